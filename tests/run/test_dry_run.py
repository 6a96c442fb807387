"""``--dry_run`` by the public command: a table of every entry, no model, nothing written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dreamlora.data.folder import load_folder
from dreamlora.run.dry_run import Listed, describe
from tests.data.odd_folder import HIDDEN, make, picture
from tests.run.test_preflight import NO_TORCH, ROOT


def dry_run(folder: Path, *argv: str, **variables: str) -> str:
    """What the command prints. Anything written is an error, and so is importing torch (``datasets`` does)."""
    before = everything(folder)
    home = folder.parent / "home"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home), "PYTHONIOENCODING": "utf-8", **variables}
    program = ["-m", "dreamlora"] if "--dataset_name" in argv else ["-c", NO_TORCH]
    command = [sys.executable, *program, *argv, "--dry_run"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert everything(folder) == before and not home.exists()
    return done.stdout


def everything(folder: Path) -> dict[str, int]:
    return {path: os.lstat(path).st_mtime_ns for path in map(str, folder.rglob("*"))}


def rows(table: str) -> dict[str, tuple[str, str, str]]:
    """Entry -> use, source and text, by the columns of the head."""
    lines = table.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("  entry "))
    starts = [lines[head].index(word) for word in ("use ", "captions from", "captions, or")]
    found, last = {}, ""
    for line in lines[head + 1 : lines.index("", head)]:
        name, use, source = (line[a:b].strip() for a, b in zip([2, *starts], starts, strict=False))
        if name:
            last = name
            found[name] = (use, source, line[starts[2] :])
        else:
            found[last] = (*found[last][:2], f"{found[last][2]} {line.strip()}")
    return found


def test_every_entry_of_an_odd_folder_is_in_the_table(tmp_path: Path) -> None:
    place = tmp_path / "place"
    (place / "photos").mkdir(parents=True)
    expected = make(place / "photos")
    table = dry_run(place, "dreambooth", "--instance_data_dir", "photos")
    entries = [entry.name for entry in os.scandir(place / "photos")]
    assert len(entries) >= 60
    told = rows(table)
    for name in {*entries, "more/named.png"} - {*HIDDEN, ".git"} | {"4 hidden"}:
        use, source, text = told[name]
        assert (use, source) == expected[name][:2], name
        assert expected[name].text in text, name
    assert told.keys() == expected.keys()
    assert "2. second of two" in told["d.tif"][2]
    assert (
        "75 entries: " in table
        and "images to learn: 22, held out: 5, with several captions, of which one is drawn each time: 2" in table
    )
    assert "16 from .txt files, 6 from metadata.jsonl, 3 from .json files, 2 from .caption files" in table
    assert table.endswith("no model was loaded and nothing written\n")


def test_captioned_folder_and_repeats(tmp_path: Path) -> None:
    picture(tmp_path / "place" / "set" / "a.png")
    (tmp_path / "place" / "set" / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    flags = ("--train_data_dir", "set", "--captions_per_line", "--repeats", "7")
    table = dry_run(tmp_path / "place", "text-to-image", *flags)
    assert rows(table)["a.png"] == ("image", "a.txt", "1. one 2. two") and "repeats: 7" in table


def test_class_images_and_other_processes(tmp_path: Path) -> None:
    place = tmp_path / "place"
    picture(place / "photos" / "a.png")
    picture(place / "class" / "b.png", 2)
    flags = ("--instance_data_dir", "photos", "--with_prior_preservation", "--class_data_dir", "class")
    prompts = ("--class_prompt", "a dog", "--instance_prompt", "a sks dog")
    table = dry_run(place, "dreambooth", *flags, *prompts)
    learned, classes = table.split("class images: class")
    assert rows(learned) == {"a.png": ("image", "--instance_prompt", "a sks dog")}
    assert rows(classes) == {"b.png": ("image", "--class_prompt", "a dog")}
    assert dry_run(place, "dreambooth", *flags, *prompts, RANK="1") == ""


def test_several_data_sets(tmp_path: Path) -> None:
    """Images are held out of all sets together: a set's own line says nothing of it."""
    place = tmp_path / "place"
    for number in range(4):
        picture(place / "dogs" / f"{number}.png", number)
        picture(place / "parks" / f"{number}.png", number + 3)
    entries = "datasets: [{instance_data_dir: dogs, repeats: 3}, {instance_data_dir: parks}]"
    (place / "sets.yaml").write_text(entries, encoding="utf-8")
    table = dry_run(place, "dreambooth", "--config", "sets.yaml", "--instance_prompt", "a", "--holdout", "1")
    assert re.findall(r"^images: (.*)", table, re.MULTILINE) == ["4, repeats: 3", "4, repeats: 1"]
    held_out = re.findall(r".*held out: .*", table)
    assert held_out in (["in all, images to learn: 7, held out: 1"], ["in all, images to learn: 6, held out: 2"])
    assert "note: 1 of 7 different images is in more than one data set\n" in table


def test_built_in_subject(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    assert "drawn when the run begins" in dry_run(tmp_path / "place", "dreambooth")


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_data_set_of_rows(tmp_path: Path, streaming: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(2)], "text": ["one", "x"]}
    place = tmp_path / "place"
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(str(place / "rows"))
    table = dry_run(place, "text-to-image", "--dataset_name", "rows", *streaming, HF_HUB_OFFLINE="1")
    assert [row[:3] for row in rows(table).values()] == [("image", "column text", "one"), ("image", "column text", "x")]


def test_broken_image(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    picture(photos / "a.png")
    (photos / "b.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "dreamlora", "dreambooth", "--instance_data_dir", "photos", "--dry_run"]
    command += ["--instance_prompt", "a dog"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and re.search(r"b\.png: its content is no known image", done.stderr)
    assert {file.name for file in tmp_path.rglob("*")} == {"photos", "a.png", "b.png"}


def test_lines_are_shortened_for_a_terminal(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("word " * 100, encoding="utf-8")
    listed = Listed("photos", load_folder(tmp_path))
    assert max(map(len, describe(listed, 60))) == 60
    assert "word " * 99 in "".join(describe(listed))


def test_compare_has_none(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dreamlora", "compare", "--optimizers", "adamw", "sgd", "--dry_run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--dry_run looks at the data of one run" in done.stderr
