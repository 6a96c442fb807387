"""A data set of Hugging Face ``datasets`` reads its own files alone, whatever its card, its state and its rows name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreamlora.config import Data
from dreamlora.data import hub_source
from dreamlora.data.dataset import load_images
from dreamlora.data.hub import _Rows
from dreamlora.data.hub_source import Origin
from dreamlora.errors import UserError
from tests.data.odd_folder import picture
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where data sets lie, beside somebody's private files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "private" / "p.png", 1)
    (tmp_path / "private" / "p.txt").write_text("private", encoding="utf-8")
    return tmp_path


def load(folder: Path, streaming: bool = False, **options: Any) -> list[Image.Image]:
    home = folder.parent
    data = Data(
        dataset_name=str(folder),
        streaming=streaming,
        **{"instance_prompt": "prompt", "latents_cache_dir": home / "cache", **options},
    )
    return [record.open() for record in load_images(data, cache_dir=home / "hub").records]


def cached(home: Path) -> list[Path]:
    """Files that a stream has left in the cache."""
    return [file for file in (home / "cache" / "streamed").rglob("*") if file.is_file()]


def table(file: Path, images: list[Any], **columns: list[Any]) -> Path:
    """Rows of images as a parquet file that says so."""
    features = datasets.Features({"image": datasets.Image(), **{name: datasets.Value("string") for name in columns}})
    rows = datasets.Dataset.from_dict({"image": images, **columns}, features=features)
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(rows.data.table, file)
    return file.parent


both = pytest.mark.parametrize("streaming", [False, True])


# Rows


@both
@pytest.mark.parametrize(
    "path",
    [
        "{private}/p.png",
        "../private/p.png",
        "sub/../../private/p.png",
        "/etc/passwd",
        "/dev/zero",
        "link/p.png",
        "file://{private}/p.png",
        "file:///{private}/p.png",
        "local://{private}/p.png",
        "zip://p.png::{private}/p.zip",
        "zip://p.png::zip://q.zip::{set}/own.zip",
        "tar://p.png::{set}/own.zip",
        "simplecache::file://{private}/p.png",
        "filecache::{set}/own.zip",
        "hf://datasets/someone/set/p.png",
        "https://example.com/p.png",
        "s3://bucket/p.png",
        "memory://p.png",
        "~/p.png",
        "p.png\0",
    ],
)
def test_paths_in_rows_lead_to_the_data_sets_own_files(place: Path, path: str, streaming: bool) -> None:
    private = place / "private"
    shutil.make_archive(str(private / "p"), "zip", private)
    own = place / "set"
    own.mkdir()
    (own / "link").symlink_to(private)
    shutil.copy(private / "p.zip", own / "own.zip.bin")
    table(own / "train.parquet", [{"bytes": None, "path": path.format(private=private, set=own)}])
    with pytest.raises(
        UserError, match=r"cannot read the image in row 0 of .*(data set's own files|No such file|null byte)"
    ):
        load(own, streaming)
    assert cached(place) == []


@both
def test_a_column_of_paths_is_below_the_folder(place: Path, streaming: bool) -> None:
    picture(place / "set" / "images" / "a.png", 2)
    for path, sound in (("images/a.png", True), ("../private/p.png", False), (str(place / "private/p.png"), False)):
        (place / "set" / "data.jsonl").write_text(json.dumps({"image": path, "text": "x"}), encoding="utf-8")
        if sound:
            assert [image.getpixel((0, 0)) for image in load(place / "set", streaming, image_column="image")]
        else:
            with pytest.raises(UserError, match="leads to none of the data set's own files"):
                load(place / "set", streaming, image_column="image")


@both
def test_rows_without_an_image_and_lists_of_images(place: Path, streaming: bool) -> None:
    own = table(place / "set" / "train.parquet", [None])
    with pytest.raises(UserError, match=r"row 0 .*: the row has no image"):
        load(own, streaming)
    features = datasets.Features({"image": datasets.List(datasets.Image())})
    rows = [[{"bytes": None, "path": str(place / "private" / "p.png")}] * 2]
    several = datasets.Dataset.from_dict({"image": rows}, features=features)
    parquet.write_table(several.data.table, own / "train.parquet")
    with pytest.raises(UserError, match=r"holds no images|row 0"):
        load(own, streaming)
    assert cached(place) == []


@both
def test_captions_are_not_opened_as_files(place: Path, streaming: bool) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Image())})
    content = (place / "private" / "p.png").read_bytes()
    rows = {"image": [content], "text": [[{"bytes": None, "path": str(place / "private" / "p.png")}]]}
    (place / "set").mkdir()
    parquet.write_table(datasets.Dataset.from_dict(rows, features=features).data.table, place / "set" / "a.parquet")
    with pytest.raises(UserError, match=r"the column 'text' of .* holds files, no captions"):
        load(place / "set", streaming, caption_column="text")


@both
def test_what_is_no_image_is_not_kept(place: Path, streaming: bool) -> None:
    own = table(place / "set" / "train.parquet", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"], text=["x"])
    with pytest.raises(UserError, match=r"row 0 of .*: its content is no known image format"):
        load(own, streaming)
    assert cached(place) == []


def test_a_file_of_the_cache_that_was_replaced_is_written_anew(place: Path) -> None:
    content = (place / "private" / "p.png").read_bytes()
    own = table(place / "set" / "train.parquet", [content])
    load(own, streaming=True)
    [file] = cached(place)
    for odd in (b"other", content + b"more"):
        file.write_bytes(odd)
        load(own, streaming=True)
        assert file.read_bytes() == content


@both
def test_captions_of_rows_have_bounds(place: Path, streaming: bool) -> None:
    content = (place / "private" / "p.png").read_bytes()
    own = table(place / "set" / "train.parquet", [content], text=["x" * 10_001])
    with pytest.raises(UserError, match=r"row 0 of .*, column text: a text of 10,001 characters is too long"):
        load(own, streaming, caption_column="text")


# Folders that datasets reads itself


@both
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["../private/p.png", "{private}/p.png", "link/p.png", "file://{private}/p.png"])
def test_metadata_of_an_image_folder(place: Path, kind: str, name: str, streaming: bool) -> None:
    """datasets itself refuses some of these, from a version on."""
    own, private = place / "set", place / "private"
    picture(own / "sub" / "a.png", 3)
    (own / "sub" / "link").symlink_to(private)
    row = {"file_name": name.replace("..", "../..").format(private=private), "text": "x"}
    file = own / "sub" / f"metadata.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list([row]).to_parquet(str(file))
    else:
        text = json.dumps(row) if kind == "jsonl" else f"file_name,text\n{row['file_name']},x\n"
        file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"own files|Invalid metadata file_name"):
        load(own, streaming)
    assert cached(place) == []


@both
def test_several_names_in_a_row(place: Path, streaming: bool) -> None:
    picture(place / "set" / "a.png", 3)
    row = {"file_names": ["a.png", "../private/p.png"], "text": "x"}
    (place / "set" / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match=r"Invalid metadata file_name|holds no images|own files"):
        load(place / "set", streaming, image_column="images")
    assert cached(place) == []


@both
def test_archives_of_the_folder_are_read(place: Path, streaming: bool) -> None:
    picture(place / "set" / "a.png", 3)
    shutil.make_archive(str(place / "a"), "zip", place / "set")
    shutil.move(place / "a.zip", place / "set" / "a.zip")
    (place / "set" / "a.png").unlink()
    assert len(load(place / "set", streaming)) == 1


@both
@pytest.mark.parametrize(
    "configs",
    [
        {"data_files": "../private/*"},
        {"data_files": "sub/../../private/*.png"},
        {"data_files": "{private}/*.png"},
        {"data_files": "/**"},
        {"data_files": ["*.png", {"split": "train", "path": "/**"}]},
        {"data_files": [{"split": "train", "path": ["*.png", "../private/p.png"]}]},
        {"data_files": {"train": "../private/*"}},
        {"data_files": "link/*.png"},
        {"data_files": "link/**"},
        {"data_files": "file://{private}/p.png"},
        {"data_files": "https://example.com/a.png"},
        {"data_files": "hf://datasets/someone/private/a.png"},
        {"data_files": "zip://p.png::{private}/p.zip"},
        {"data_files": "~/*.png"},
        {"data_dir": "../private"},
        {"data_dir": "{private}"},
        {"data_dir": "link"},
    ],
)
@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_cards_name_files_of_the_folder(place: Path, configs: Any, card: str, streaming: bool) -> None:
    own = place / "set"
    picture(own / "a.png", 3)
    (own / "link").symlink_to(place / "private")
    text = json.dumps({"configs": [{"config_name": "default", **configs}]}).replace("{private}", str(place / "private"))
    write_card(own, card, text.replace("configs", "\\u0063onfigs"))  # the same to YAML
    with pytest.raises(UserError, match=r"cannot read .*: it names .*, which is no place inside of the data set"):
        load(own, streaming)


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("configs: &a [{config_name: x, data_files: *a}]", "refers to another place"),
        ("a: &a [1]\nb: {<<: [*a, *a]}", "refers to another place"),
        ("configs: [{config_name: x, data_files: '*.png', decode_num_threads: 1000000}]", "sets 'decode_num_threads'"),
        ("configs: [{config_name: x, data_files: '*.csv', sep: '(a+)+b'}]", "sets 'sep' of the reader"),
        ("configs: [3]", "a configuration is a mapping"),
        ("a: " + "[" * 10_000, "nested deeper"),
        ("a: !!python/object/apply:os.system [id]", "has a tag"),
    ],
)
def test_cards_are_data(place: Path, card: str, text: str, words: str) -> None:
    picture(place / "set" / "a.png", 3)
    write_card(place / "set", card, text)
    with pytest.raises(UserError, match=words):
        load(place / "set")


def test_a_card_that_is_a_pipe_is_not_waited_for(place: Path) -> None:
    picture(place / "set" / "a.png", 3)
    os.mkfifo(place / "set" / ".huggingface.yaml")
    with pytest.raises(UserError, match=r"huggingface\.yaml: it is a pipe"):
        load(place / "set")


@both
def test_sound_cards_are_followed(place: Path, streaming: bool) -> None:
    for number, name in enumerate(("a.png", "data/b.png", "data/more/c.png")):
        picture(place / "set" / name, number)
    for configs, count in (
        ({"data_files": "data/**"}, 2),
        ({"data_dir": "data"}, 2),
        ({"data_files": [{"split": "train", "path": ["a.png", "data/b.png"]}], "drop_labels": True}, 2),
    ):
        write_card(place / "set", "README.md", json.dumps({"configs": [{"config_name": "default", **configs}]}))
        assert len(load(place / "set", streaming)) == count


def write_card(folder: Path, card: str, text: str) -> None:
    text = f"---\n{text}\n---\nAbout it.\n" if card == "README.md" else text
    (folder / card).write_text(text, encoding="utf-8")


def test_no_code_of_a_data_set_runs(place: Path) -> None:
    ran = place / "ran"
    picture(place / "set" / "a.png", 3)
    (place / "set" / "set.py").write_text(f"open({str(ran)!r}, 'w')", encoding="utf-8")
    with pytest.raises(UserError, match=r"scripts are no longer supported"):
        load(place / "set")
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["a.md", "task.toml", "a.h5", "a.xml", "a.fasta", "a.pdf", "a.pkl", "a.lance", "a.txt"]
)
def test_other_readers_are_not_used(place: Path, name: str) -> None:
    (place / "set").mkdir()
    (place / "set" / name).write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot load --dataset_name"):
        load(place / "set")


def test_a_folder_is_not_taken_for_a_reader_of_its_name(place: Path) -> None:
    picture(place / "csv" / "a.png", 3)
    (place / "other.csv").write_text("image\nx\n", encoding="utf-8")
    data = Data(dataset_name="csv", instance_prompt="p", latents_cache_dir=place / "cache")
    assert len(load_images(data, cache_dir=place / "hub").records) == 1


def test_archives_for_webdataset_hold_data_alone(place: Path) -> None:
    """Members named with .. stay members, links and pickles are refused or passed over."""
    content = (place / "private" / "p.png").read_bytes()
    (place / "set").mkdir()
    with tarfile.open(place / "set" / "a.tar", "w") as tar:
        for name in ("../../x.png", "/tmp/y.png"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("z.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(place / "private" / "p.png")
        tar.addfile(link)
    before = {path for path in place.rglob("*") if "hub" not in path.parts and "cache" not in path.parts}
    with contextlib.suppress(UserError):
        assert len(load(place / "set", image_column="png")) <= 2
    after = {path for path in place.rglob("*") if "hub" not in path.parts and "cache" not in path.parts}
    assert before == after


def test_huge_row_groups_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = table(place / "set" / "train.parquet", [(place / "private" / "p.png").read_bytes()] * 4)
    monkeypatch.setattr(hub_source, "ROWS_AT_ONCE", 3)
    with pytest.raises(UserError, match=r"row group 0 has 4 rows"):
        load(own)


# What save_to_disk wrote


@pytest.fixture
def saved(place: Path) -> Path:
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "text": ["x"]})
    rows = rows.cast_column("image", datasets.Image())
    rows.save_to_disk(str(place / "other"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(place / "set"))
    return place / "set"


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@both
def test_a_saved_state_names_files_of_its_folder(saved: Path, streaming: bool) -> None:
    assert len(load(saved, streaming)) == 1
    arrow = next((saved.parent / "other").glob("*.arrow"))
    for name in (f"../../other/{arrow.name}", str(arrow), "..", "", "gone.arrow", "a\\b", "file:///x", "x\0", "pipe"):
        if name == "pipe":
            os.mkfifo(saved / "train" / name)
        edit(saved / "train" / "state.json", _data_files=[{"filename": name}])
        with pytest.raises(UserError, match=r"state\.json: (it names|there is no file)"):
            load(saved, streaming)
    for odd in ("x", [3], None, [{"filename": 3}]):
        edit(saved / "train" / "state.json", _data_files=odd)
        with pytest.raises(UserError, match=r"state\.json: _data_files"):
            load(saved, streaming)


def test_splits_are_folders_of_their_folder(saved: Path) -> None:
    (saved / "link").symlink_to(saved.parent / "other")
    for name in ("../other", str(saved.parent / "other"), ".", "link", "file:///x"):
        edit(saved / "dataset_dict.json", splits=[name])
        with pytest.raises(UserError, match=r"dataset_dict\.json: (it names|the split link leads out)"):
            load(saved)
    edit(saved / "dataset_dict.json", splits={"a": 1})
    with pytest.raises(UserError, match=r"dataset_dict\.json: splits"):
        load(saved)


@both
def test_rows_of_a_saved_set_hold_their_images(place: Path, streaming: bool) -> None:
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": "/etc/passwd"}]}, features=features)
    rows.save_to_disk(str(place / "set"))
    [file] = (place / "set").glob("*.arrow")
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, rows.data.table.schema) as writer:
        writer.write_table(rows.data.table.combine_chunks())
    with pytest.raises(UserError, match="leads to none of the data set's own files"):
        load(place / "set", streaming)


def test_a_made_up_fingerprint_does_not_stand_for_the_files(saved: Path) -> None:
    """Else the rows of one data set would be taken for those of another, which were looked at before."""

    def stamp(folder: Path) -> Any:
        rows = datasets.load_from_disk(str(folder))
        return _Rows(rows, "image", "name", Origin((folder,))).stamp(0, "")

    for file in saved.parent.rglob("*.arrow"):
        os.utime(file, (1, 1))
    first = json.loads((saved.parent / "other" / "state.json").read_text(encoding="utf-8"))["_fingerprint"]
    edit(saved / "train" / "state.json", _fingerprint=first)
    stamps = [stamp(saved.parent / "other"), stamp(saved / "train")]
    assert stamps[0] is None or stamps[0] != stamps[1]  # None: written a moment ago


# Anything


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved data set, and a folder with a parquet file."""
    home = tmp_path_factory.mktemp("shelf")
    picture(home / "p.png", 1)
    content = (home / "p.png").read_bytes()
    datasets.Dataset.from_dict({"image": [content], "text": ["x"]}).save_to_disk(str(home / "saved"))
    table(home / "set" / "train.parquet", [content, {"bytes": None, "path": "a.png"}], text=["x", "y"])
    picture(home / "set" / "a.png", 2)
    return home


STATE = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": None}
CARD = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "*.parquet"}]}], "a": {"b": 1}}


@fuzzed
@given(content=st.one_of(damaged(as_json(STATE)), changed(STATE).map(as_json)))
def test_fuzz_state(shelf: Path, content: bytes) -> None:
    (shelf / "saved" / "state.json").write_bytes(content)
    harmless(lambda: load(shelf / "saved", caption_column="text"))


@fuzzed
@given(content=st.one_of(damaged(as_json(CARD)), changed(CARD).map(as_json)))
def test_fuzz_card(shelf: Path, content: bytes) -> None:
    file = shelf / "set" / "README.md"
    file.write_bytes(b"---\n" + content + b"\n---\n")
    harmless(lambda: hub_source.check_cards(file, None, shelf / "set"))


# A repository of the hub


@pytest.mark.parametrize(
    ("path", "own"),
    [
        ("hf://datasets/someone/set@abc/data/a.png", True),
        ("hf://datasets/someone/set/data/a.png", True),
        ("hf://datasets/someone/set@abc/../private/a.png", False),
        ("hf://datasets/someone/setter/a.png", False),
        ("hf://datasets/someone/private@abc/a.png", False),
        ("hf://someone/set/a.png", False),
        ("https://huggingface.co/datasets/someone/set/a.png", False),
        ("{cache}/snapshots/abc/a.png", True),
        ("{cache}/../datasets--someone--private/snapshots/abc/a.png", False),
        ("/etc/passwd", False),
    ],
)
def test_a_repository_has_its_address_and_its_downloads(tmp_path: Path, path: str, own: bool) -> None:
    cache = tmp_path / "datasets--someone--set"
    origin = Origin((cache,), "hf://datasets/someone/set")
    assert origin.holds(path.format(cache=cache)) is own


def test_files_of_a_repository_are_links_to_its_blobs(tmp_path: Path) -> None:
    cache = tmp_path / "datasets--someone--set"
    picture(cache / "blobs" / "1.png", 1)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    file = cache / "snapshots" / "abc" / "a.png"
    file.symlink_to("../../blobs/1.png")
    assert Origin((cache,)).image({"bytes": None, "path": str(file)}) == (cache / "blobs" / "1.png").read_bytes()


def test_cards_of_a_repository_are_looked_at_before_files_are_searched(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_card(place, "README.md", "configs: [{config_name: x, data_files: '/**'}]")
    monkeypatch.setattr(hub_source, "_downloaded", lambda name, file: place / file if file == "README.md" else None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: pytest.fail("searched"))
    with pytest.raises(UserError, match=r"it names '/\*\*'"):
        load_images(Data(dataset_name="someone/set", instance_prompt="p"))
