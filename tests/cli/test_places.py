"""Folders that must be apart: photos, class images, and the run's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dreamlora.cli.parse import parse_run
from dreamlora.cli.places import check_folders, lies_in
from dreamlora.config.programs import TextToImageConfig
from dreamlora.errors import UserError

PRIOR = ["--with_prior_preservation", "--class_prompt", "a dog"]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``photos``, with ``deeper`` in it, ``classes`` and a link to the photos; the working folder is beside them."""
    (tmp_path / "photos" / "deeper").mkdir(parents=True)
    (tmp_path / "classes").mkdir()
    (tmp_path / "file.png").write_bytes(b"")
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "classes", ["photos", "photos/", "./classes/../photos", "link", "photos/deeper", "photos/new", "."]
)
def test_class_images_among_the_photos(places: Path, classes: str) -> None:
    with pytest.raises(UserError, match=r"--instance_data_dir photos and --class_data_dir .* folders apart"):
        parse_run(["--instance_data_dir", "photos", "--output_dir", "run", *PRIOR, "--class_data_dir", classes])


@pytest.mark.parametrize("output", ["photos", "link", "photos/run", "link/a/b"])
def test_the_run_among_the_photos(places: Path, output: str) -> None:
    with pytest.raises(UserError, match=rf"--output_dir {output} lies in --instance_data_dir photos"):
        parse_run(["--instance_data_dir", "photos", "--output_dir", output])
    with pytest.raises(UserError, match="lies in --train_data_dir photos"):
        parse_run(["--train_data_dir", "photos", "--output_dir", output], TextToImageConfig)
    with pytest.raises(UserError, match="lies in --dataset_name photos"):
        parse_run(["--dataset_name", "photos", "--output_dir", output])


def test_the_run_among_the_class_images(places: Path) -> None:
    argv = ["--instance_data_dir", "photos", *PRIOR, "--class_data_dir", "classes", "--output_dir", "classes/run"]
    with pytest.raises(UserError, match="--output_dir classes/run lies in --class_data_dir classes"):
        parse_run(argv)


@pytest.mark.parametrize(("there", "photos"), [("photos", "."), ("photos/deeper", ".."), (".", ".")])
def test_the_default_folder_of_a_run_that_is_started_among_the_photos(
    places: Path, monkeypatch: pytest.MonkeyPatch, there: str, photos: str
) -> None:
    monkeypatch.chdir(places / there)
    with pytest.raises(UserError, match=r"would be written to outputs lies in --instance_data_dir"):
        parse_run(["--instance_data_dir", photos])
    parse_run(["--instance_data_dir", photos, "--output_dir", "/somewhere/else"])


@pytest.mark.parametrize("flag", ["--instance_data_dir", "--class_data_dir", "--dataset_name"])
def test_files_for_folders(places: Path, flag: str) -> None:
    prior = PRIOR if flag == "--class_data_dir" else []
    with pytest.raises(UserError, match=rf"{flag} file\.png is a file"):
        parse_run([flag, "file.png", *prior])


def test_folders_apart(places: Path) -> None:
    argv = ["--instance_data_dir", "photos", *PRIOR, "--class_data_dir"]
    for classes, output in (("classes", "run"), ("photos-of-dogs", "photos-run"), ("run/classes", "run"), ("new", ".")):
        parse_run([*argv, classes, "--output_dir", output])
    parse_run(["--dataset_name", "someone/photos", "--output_dir", "someone"])


def test_a_folder_that_is_not_there_yet_by_a_link_to_where_it_will_be(places: Path) -> None:
    assert lies_in(Path("photos/new/run"), Path("link/new")) and not lies_in(Path("photos/newer"), Path("link/new"))


def test_one_folder_by_two_spellings(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where case does not count: here the file system is told to say so."""
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "samefile", lambda path, other: str(path).lower() == str(other).lower())
    assert lies_in(Path("PHOTOS/run"), Path("photos")) and not lies_in(Path("photos-2"), Path("photos"))


def test_a_config_that_names_nothing() -> None:
    check_folders(parse_run([])[0])
