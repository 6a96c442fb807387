"""Embedded pictures are small, and unreadable ones are left out."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

from PIL import Image

from dreamlora.report import pictures


def opened(picture: pictures.Picture) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(picture.data.partition(",")[2])))


def test_large_pictures_are_shrunk_and_keep_their_shape(tmp_path: Path) -> None:
    Image.new("RGB", (3200, 800), "red").save(tmp_path / "a.png")
    picture = pictures.embedded(tmp_path / "a.png")
    assert picture is not None and (picture.width, picture.height) == (1600, 400)
    assert opened(picture).size == (1600, 400)


def test_missing_and_broken_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "name.txt").write_text("caption", encoding="utf-8")
    assert pictures.embedded(tmp_path / "missing.png") is None
    assert pictures.references(tmp_path) == []
    assert pictures.timelapse(tmp_path / "broken.png") is None


def test_the_timelapse_keeps_its_frames_and_ends_in_its_last(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    found = pictures.timelapse(tmp_path / "a.webp")
    assert found is not None
    assert getattr(opened(found[0]), "n_frames", 1) == 2
    assert opened(found[1]).convert("RGB").getpixel((4, 4)) == (255, 255, 255)


def test_only_a_webp_is_embedded_as_one(tmp_path: Path) -> None:
    """Any bytes were, as they are."""
    Image.new("RGB", (8, 8)).save(tmp_path / "png.webp", "PNG")
    (tmp_path / "page.webp").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    for file in tmp_path.iterdir():
        assert pictures.timelapse(file) is None


def test_pictures_that_do_not_lie_in_the_run_are_left_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "references").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "private.webp")
    for name in ("grid.png", "references/00.png"):
        (run / name).symlink_to(tmp_path / "private.png")
    (run / "timelapse.webp").symlink_to(tmp_path / "private.webp")
    os.mkfifo(run / "references" / "01.png")
    assert pictures.embedded(run / "grid.png", inside=run) is None
    assert pictures.references(run / "references", run) == []
    assert pictures.timelapse(run / "timelapse.webp", run) is None
