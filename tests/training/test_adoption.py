"""A run that goes on from a stranger's takes over what that one has recorded, and no file of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamlora.errors import UserError
from dreamlora.runfolder import LORA_FILE, TRAINABLES_FILE, RunFolder
from dreamlora.training import adoption
from dreamlora.training.adoption import adopt
from tests.fuzzing import changed, damaged, fuzzed, harmless, odd_values

pytestmark = pytest.mark.usefixtures("no_report")

SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"
PICTURE = b"\x89PNG a picture"
NAME = "step_000100/p00_s42-1a2b3c4d5e6f.png"


def row(file: str = NAME, content: bytes = PICTURE, **more: Any) -> dict[str, Any]:
    fields = {"step": 100, "prompt_index": 0, "image_index": 0, "prompt": "a dog", "seed": 42}
    return {**fields, "file": file, "sha256": hashlib.sha256(content).hexdigest(), **more}


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def rows(file: Path, *given: dict[str, Any]) -> None:
    write(file, "".join(json.dumps(one) + "\n" for one in given).encode())


@pytest.fixture
def theirs(tmp_path: Path) -> RunFolder:
    """All that a run records, and much that it does not."""
    run = RunFolder(tmp_path / "theirs")
    for place in (run.samples, run.eval_images):
        rows(place / "samples.jsonl", row())
        write(place / NAME, PICTURE)
    for file in (run.metrics_file, run.eval_items_file, run.final_items_file, run.reference_dir / "00.png"):
        write(file, b"content")
    for name in (LORA_FILE, TRAINABLES_FILE):
        write(run.candidate_dir(100) / name, b"weights")
    for stray in ("samples/notes.txt", "samples/step_000100/stray.png", "eval_images/a", "references/x.png"):
        write(run.path / stray, SECRET)
    write(run.candidate_dir(100) / "more.bin", SECRET)
    write(run.candidates / "key", SECRET)
    return run


@pytest.fixture
def ours(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "ours")


def files(run: RunFolder) -> dict[str, bytes]:
    return {file.relative_to(run.path).as_posix(): file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


RECORDED = {
    *("metrics.jsonl", "eval_items.npz", "eval_final_items.npz", "references/00.png"),
    *(f"checkpoints/candidates/step-000100/{name}" for name in (LORA_FILE, TRAINABLES_FILE)),
    *(f"{place}/{name}" for place in ("samples", "eval_images") for name in ("samples.jsonl", NAME)),
}


def test_what_the_run_recorded_is_taken_over_and_nothing_else(theirs: RunFolder, ours: RunFolder) -> None:
    adopt(ours, theirs)
    assert set(files(ours)) == RECORDED
    assert [file for file, content in files(ours).items() if content != files(theirs)[file]] == []


@pytest.mark.parametrize("recorded", sorted(RECORDED))
@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "absent"])
def test_nothing_is_taken_from_behind_a_link(
    kind: str, recorded: str, theirs: RunFolder, ours: RunFolder, tmp_path: Path
) -> None:
    write(tmp_path / "home" / "id_rsa", SECRET)
    place = theirs.path / recorded
    place.unlink()
    if kind == "link":
        place.symlink_to(tmp_path / "home" / "id_rsa")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    adopt(ours, theirs)
    assert recorded not in files(ours) and SECRET not in files(ours).values()


@pytest.mark.parametrize("place", ["samples", "eval_images", "references", "checkpoints", "checkpoints/candidates"])
def test_nor_from_a_folder_behind_one_and_that_is_told(
    place: str, theirs: RunFolder, ours: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.move(theirs.path / place, tmp_path / "elsewhere")
    (theirs.path / place).symlink_to(tmp_path / "elsewhere")
    adopt(ours, theirs)
    assert not (ours.path / place).exists() and "a link leads out of that run's folder" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *("../../home/id_rsa", "/etc/passwd", "step_000100/../../../home/id_rsa", "step_000100/a/b.png", "x.png", ""),
        *("step_1/a.png", "step_000100/a.txt", "step_000100/.png", "step_000100/a\0.png", "step_000100\\a.png"),
        *("samples.jsonl", "step_٠٠٠١٠٠/a.png", "step_000100/" + "a" * 300 + ".png"),
    ],
)
def test_only_names_that_a_run_gives_its_pictures_count(
    name: str, theirs: RunFolder, ours: RunFolder, tmp_path: Path
) -> None:
    write(tmp_path / "home" / "id_rsa", SECRET)
    rows(theirs.samples_file, row(name, SECRET), row())
    adopt(ours, theirs)
    assert set(files(ours)) == RECORDED
    assert [json.loads(line)["file"] for line in ours.samples_file.read_text("utf-8").splitlines()] == [NAME]


def test_a_picture_that_is_not_the_recorded_one_is_left_out(
    theirs: RunFolder, ours: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as a private one under a second name: a hard link is no link that could be told from a file."""
    write(tmp_path / "private.png", b"\x89PNG private")
    (theirs.samples / NAME).unlink()
    (theirs.samples / NAME).hardlink_to(tmp_path / "private.png")
    adopt(ours, theirs)
    assert f"samples/{NAME}" not in files(ours)
    assert f"1 pictures of {theirs.path} are not taken over" in caplog.text


def test_more_than_a_run_can_have_is_refused_before_anything_is_copied(
    theirs: RunFolder, ours: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (theirs.candidate_dir(100) / LORA_FILE).open("wb") as sparse:
        sparse.truncate(2**37)
    with pytest.raises(UserError, match="128 GiB, more than the 64 GiB that are taken over"):
        adopt(ours, theirs)
    with (theirs.candidate_dir(100) / LORA_FILE).open("wb") as sparse:
        sparse.truncate(2**35)
    monkeypatch.setattr(adoption.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 2**30))
    with pytest.raises(UserError, match=r"32\.0 GiB of .* are to be taken over, and 1\.0 GiB are free"):
        adopt(ours, theirs)
    assert not files(ours)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


NAMES = st.one_of(st.sampled_from([NAME, "../../secret", "/etc/passwd", "step_000100/b.png"]), st.text(max_size=30))
LINES = st.lists(
    st.one_of(
        st.builds(lambda file, odd: json.dumps({**row(), "file": file, "extra": odd}).encode(), NAMES, odd_values),
        changed(row()).map(lambda odd: json.dumps(odd).encode()),
        damaged(json.dumps(row()).encode()),
        st.builds(lambda odd: json.dumps({**row(), "sha256": odd}).encode(), odd_values),
    ),
    max_size=4,
)
KINDS = st.fixed_dictionaries(
    {name: st.sampled_from(["kept", "link", "pipe", "folder", "gone"]) for name in sorted(RECORDED)}
)
TOP = st.sampled_from([None, "samples", "eval_images", "checkpoints", "references"])


@fuzzed
@given(lines=LINES, kinds=KINDS, top=TOP)
def test_fuzz_adopt(lines: list[bytes], kinds: dict[str, str], top: str | None, place: Path) -> None:
    shutil.rmtree(place)
    write(place / "secret", SECRET)
    run, ours = RunFolder(place / "theirs"), RunFolder(place / "ours")
    for name in RECORDED:
        write(run.path / name, PICTURE)
    write(run.samples_file, b"\n".join(lines))
    for name, kind in kinds.items():
        if kind != "kept":
            (run.path / name).unlink()
        if kind == "link":
            (run.path / name).symlink_to(place / "secret")
        elif kind == "pipe":
            os.mkfifo(run.path / name)
        elif kind == "folder":
            (run.path / name).mkdir()
    if top:
        shutil.move(run.path / top, place / "elsewhere")
        (run.path / top).symlink_to(place / "elsewhere")
    harmless(lambda: adopt(ours, run))
    made = files(ours) if ours.path.exists() else {}
    assert set(made) <= RECORDED and SECRET not in made.values()
