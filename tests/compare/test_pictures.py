"""A comparison brings the pictures along that it shows, and takes none away that are not its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dreamlora import compare
from dreamlora.compare.pictures import COPIES
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.grid import MAX_COLUMNS
from tests.compare.synthetic import make_run


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    return [make_run(tmp_path / "elsewhere", method, 2e-3, 0, pictures=True) for method in ("adamw", "sgd")]


def written(runs: list[RunFolder], root: Path) -> list[dict[str, Any]]:
    """The samples of every method in compare.json."""
    comparison = compare.compare_runs([run.path for run in runs], root)
    content = json.loads(compare.write_comparison(comparison, root).read_text(encoding="utf-8"))
    return [method["samples"] for method in content["methods"]]


def files_of(samples: list[dict[str, Any]]) -> set[str]:
    return {cell["file"] for one in samples for cell in one["cells"] if cell["file"]}


def test_a_second_comparison_takes_the_place_of_the_first(runs: list[RunFolder], tmp_path: Path) -> None:
    root = tmp_path / "comparison"
    first = files_of(written(runs, root))
    assert first and all((root / file).is_file() for file in first)
    second = files_of(written(runs[:1], root))
    copies = {file.relative_to(root).as_posix() for file in (root / COPIES).rglob("p*.png")}
    assert second == copies < first


def test_a_folder_of_the_same_name_that_no_comparison_made_stays(runs: list[RunFolder], tmp_path: Path) -> None:
    photo = tmp_path / COPIES / "photo.png"
    photo.parent.mkdir()
    photo.write_bytes(b"a photo")
    written(runs, tmp_path)
    assert photo.read_bytes() == b"a photo"


@pytest.mark.parametrize("name", [".hidden", "back\\slash", "odd\u202e"])
def test_pictures_of_runs_in_folders_with_odd_names_are_copied_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names are relative to the comparison's folder, wherever the program runs."""
    monkeypatch.chdir(tmp_path.parent)
    folders = [make_run(tmp_path / name, method, 2e-3, 0, pictures=True) for method in ("adamw", "sgd")]
    files = files_of(written(folders, tmp_path))
    assert files and all(file.startswith(COPIES) and (tmp_path / file).is_file() for file in files)


def test_only_what_a_page_can_show_is_copied(runs: list[RunFolder], tmp_path: Path) -> None:
    rows = runs[0].sample_rows()
    more = [{**rows[0], "prompt": f"prompt {number}", "prompt_index": number} for number in range(100)]
    runs[0].samples_file.write_text("".join(json.dumps(row) + "\n" for row in more), encoding="utf-8")
    samples, _ = written(runs, tmp_path / "comparison")
    assert len(samples["cells"]) == 100
    assert 0 < sum(cell["file"] is not None for cell in samples["cells"]) <= MAX_COLUMNS


def test_a_name_that_no_disk_can_have_is_a_missing_picture(runs: list[RunFolder], tmp_path: Path) -> None:
    rows = [{**row, "file": "a" * 600} for row in runs[0].sample_rows()]
    runs[0].samples_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    samples, _ = written(runs, tmp_path / "comparison")
    assert {cell["file"] for cell in samples["cells"]} == {None}
