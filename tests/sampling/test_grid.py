"""Grids of pictures whose places can be computed."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops

from dreamlora.jsonl import append_jsonl
from dreamlora.runfolder import RunFolder
from dreamlora.sampling import grid
from dreamlora.sampling.canvas import GAP, MARGIN, MISSING, font, wrap
from dreamlora.sampling.grid import CELL, GUTTER, GridRow, capped, grid_of_run, spread, write_grid, write_timelapse

RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def colours_of(picture: Image.Image, row_from_below: int, columns: int) -> list[Any]:
    """The colour near the top left corner of every cell of a row (0 is the lowest) of a grid without a note."""
    top = picture.height - MARGIN - (row_from_below + 1) * (CELL + GAP) + GAP
    return [picture.getpixel((MARGIN + GUTTER + n * (CELL + GAP) + 3, top + 3)) for n in range(columns)]


def test_dimensions_and_places(tmp_path: Path) -> None:
    rows = [GridRow("base model", [plain(RED), plain(GREEN)]), GridRow("step 1", [plain(BLUE), plain(RED)])]
    write_grid(tmp_path / "grid.png", rows, ["a", "b"])
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width == 2 * MARGIN + GUTTER + 2 * CELL + GAP
        assert colours_of(picture, 1, 2) == [RED, GREEN]
        assert colours_of(picture, 0, 2) == [BLUE, RED]
        headings = picture.height - 2 * MARGIN - 2 * (CELL + GAP) + GAP
        assert 0 < headings < 50


@pytest.mark.parametrize(
    ("size", "cell"),
    [((64, 64), (256, 256)), ((512, 512), (256, 256)), ((100, 100), (200, 200)), ((1024, 512), (256, 128))],
)
def test_cells_fit_the_images(size: tuple[int, int], cell: tuple[int, int]) -> None:
    assert grid.cell_size([[plain(RED, size)]]) == cell


def test_missing_cells_are_grey_and_shift_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    plain(RED).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    cells = [tmp_path / "gone.png", tmp_path / "broken.png", tmp_path / "cut.png", "out of memory", plain(BLUE)]
    write_grid(tmp_path / "grid.png", [GridRow("step 1", cells)], ["a", "b", "c", "d", "e", "f"])
    with Image.open(tmp_path / "grid.png") as picture:
        assert colours_of(picture, 0, 6) == [MISSING] * 4 + [BLUE, MISSING]


def test_a_grid_without_any_image(tmp_path: Path) -> None:
    write_grid(tmp_path / "grid.png", [GridRow("step 1", ["diverged"])], ["a"])
    write_grid(tmp_path / "empty.png", [], [])
    for name in ("grid.png", "empty.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()


def test_references_and_note_add_height(tmp_path: Path) -> None:
    plain(GREEN, (300, 200)).save(tmp_path / "photo.png")
    rows = [GridRow("base model", [plain(RED)])]
    write_grid(tmp_path / "without.png", rows, ["a"])
    write_grid(tmp_path / "with.png", rows, ["a"], [tmp_path / "photo.png", tmp_path / "gone.jpg"], "title", "note")
    with Image.open(tmp_path / "without.png") as without, Image.open(tmp_path / "with.png") as with_all:
        assert with_all.width == without.width
        assert with_all.height > without.height + 160
        pixels = np.asarray(with_all.convert("RGB")).astype(int)
        assert ((abs(pixels[..., 1] - 128) < 4) & (pixels[..., 0] < 4)).sum() > 20_000


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "grid.png"
    write_grid(file, [GridRow("old", [plain(RED)])], ["a"])
    old = file.read_bytes()

    def half(self: Image.Image, target: Path, *args: Any, **kwargs: Any) -> None:
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    for write in (write_grid, write_timelapse):
        with pytest.raises(KeyboardInterrupt):
            write(file, [GridRow("new", [plain(BLUE)])], ["a"])
    assert file.read_bytes() == old
    assert [found.name for found in tmp_path.iterdir()] == ["grid.png"]


def test_the_same_grid_twice_is_the_same_file(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        write_grid(tmp_path / name, [GridRow("step 1", [plain(RED)])], ["a long prompt " * 20], title="t", note="n")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_timelapse_has_a_frame_per_row(tmp_path: Path) -> None:
    rows = [GridRow(f"step {step}", [plain((step * 20, 0, 0)), plain(BLUE)]) for step in range(5)]
    assert write_timelapse(tmp_path / "timelapse.webp", rows, ["a", "b"])
    with Image.open(tmp_path / "timelapse.webp") as film:
        assert film.n_frames == 5
        frames = []
        for number in range(5):
            film.seek(number)
            frames.append(film.convert("RGB"))
    assert all(ImageChops.difference(a, b).getbbox() for a, b in itertools.pairwise(frames))


def test_timelapse_without_webp_support(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid.features, "check", lambda name: False)
    assert not write_timelapse(tmp_path / "timelapse.webp", [GridRow("a", [plain(RED)])], ["a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 12, 40, 1000])
@pytest.mark.parametrize("limit", [1, 2, 3, 8])
def test_spread(count: int, limit: int) -> None:
    chosen = spread(count, limit)
    assert len(chosen) == min(count, limit)
    assert chosen == sorted(set(chosen))
    assert chosen[-1] == count - 1
    if limit > 1:
        assert chosen[0] == 0


def test_spread_widens() -> None:
    chosen = spread(1001, 8)
    gaps = [after - before for before, after in itertools.pairwise(chosen)]
    assert gaps == sorted(gaps)


def test_capped_says_what_is_left_out() -> None:
    rows = [GridRow(str(number), []) for number in range(20)]
    kept, columns, note = capped(rows, [str(number) for number in range(25)])
    assert (len(kept), len(columns)) == (8, 8)
    assert "8 of 20 rows" in note and "8 of 25 columns" in note
    assert capped(rows[:3], ["a"]) == (rows[:3], ["a"], "")


def test_wrap() -> None:
    face = font(18)
    lines = wrap("a photo of sks dog with an" + "x" * 60 + " end", face, 120, 10)
    assert all(face.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == ("a photo of sks dog with an" + "x" * 60 + " end").replace(" ", "")
    short = wrap("word " * 50, face, 120, 3)
    assert len(short) == 3
    assert short[-1].endswith("…") and face.getlength(short[-1]) <= 120
    assert wrap("", face, 120, 3) == [""]


def rows_of_run(folder: RunFolder, steps: Sequence[int], prompts: int) -> None:
    rows = []
    for step in steps:
        folder.sample_dir(step).mkdir(parents=True)
        for prompt in range(prompts):
            file = folder.sample_dir(step) / f"p{prompt:02d}_s{42 + prompt}.png"
            plain((0, min(step, 255), prompt * 80)).save(file)
            row = {"step": step, "prompt_index": prompt, "image_index": 0, "prompt": f"prompt {prompt}"}
            more = {"seed": 42 + prompt, "file": f"{file.parent.name}/{file.name}", "scheduler": "DDIMScheduler"}
            rows.append({**row, **more, "num_inference_steps": 2, "guidance_scale": 1.0})
    folder.samples_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_grid_of_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not grid_of_run(folder)
    rows_of_run(folder, [0, 100, 200], 3)
    with folder.samples_file.open("a") as file:
        file.write('{"step": 300, "prompt_ind')  # killed in the middle of a line
    assert grid_of_run(folder)
    with Image.open(folder.grid_file) as picture:
        assert picture.width == 2 * MARGIN + GUTTER + 3 * (CELL + GAP) - GAP
        assert 3 * CELL < picture.height < 4 * CELL
    with Image.open(folder.timelapse_file) as film:
        assert film.n_frames == 3


def recorded(folder: RunFolder, step: int, colours: dict[str, Any], **more: Any) -> None:
    """Rows and pictures of one step: plain ones, by prompt."""
    folder.sample_dir(step).mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (prompt, colour) in enumerate(colours.items()):
        file = folder.sample_dir(step) / f"{prompt}-{more}.png"
        plain(colour).save(file)
        row = {"step": step, "prompt_index": number, "image_index": 0, "prompt": prompt, "seed": 42, **more}
        rows.append({**row, "file": f"{file.parent.name}/{file.name}"})
    append_jsonl(folder.samples_file, rows)


def shown(folder: RunFolder, rows: int, columns: int) -> list[list[Any]]:
    """The colours of the cells, from the top row down; the note is cut off."""
    with Image.open(folder.grid_file) as picture:
        note = picture.height - rows * (CELL + GAP)
        cut = next(y for y in range(note) if _cells_end(picture, picture.height - MARGIN - y))
        whole = picture.crop((0, 0, picture.width, picture.height - cut))
        return [colours_of(whole, rows - 1 - row, columns) for row in range(rows)]


def _cells_end(picture: Image.Image, y: int) -> bool:
    return picture.getpixel((MARGIN + GUTTER + 3, y - 1)) in (RED, GREEN, BLUE, MISSING)


def test_columns_go_by_prompt_not_by_number(tmp_path: Path) -> None:
    """Resumed after step 1 with other prompts: "b" was number 1 and is number 0 now."""
    folder = RunFolder(tmp_path / "run")
    for step in (0, 1):
        recorded(folder, step, {"a": RED, "b": GREEN})
    for step in (0, 2):
        recorded(folder, step, {"b": GREEN, "c": BLUE})
    grid_of_run(folder)
    assert shown(folder, 3, 3) == [[GREEN, BLUE, RED], [GREEN, MISSING, RED], [GREEN, BLUE, MISSING]]


@pytest.mark.parametrize(
    "other", [{"seed": 7}, {"guidance_scale": 2.0}, {"num_inference_steps": 9}, {"negative_prompt": "blurry"}]
)
def test_other_seeds_and_settings_have_columns_of_their_own(tmp_path: Path, other: dict[str, Any]) -> None:
    folder, how = RunFolder(tmp_path / "run"), {"guidance_scale": 3.0, "num_inference_steps": 4}
    recorded(folder, 0, {"a": RED}, **how)
    recorded(folder, 1, {"a": BLUE}, **{**how, **other})
    grid_of_run(folder)
    assert shown(folder, 2, 2) == [[MISSING, RED], [BLUE, MISSING]]


def test_the_newest_columns_are_kept_and_steps_without_any_of_them_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    recorded(folder, 1, {f"old {n}": RED for n in range(3)})
    recorded(folder, 2, {f"new {n}": BLUE for n in range(8)})
    grid_of_run(folder)
    assert shown(folder, 1, 8) == [[BLUE] * 8]


def test_grid_of_a_long_run_is_capped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    rows_of_run(folder, range(0, 900, 100), 9)
    grid_of_run(folder)
    with Image.open(folder.grid_file) as picture:
        assert picture.width == 2 * MARGIN + GUTTER + 8 * (CELL + GAP) - GAP
        assert 8 * CELL < picture.height < 9 * CELL


def test_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, dreamlora.sampling.grid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pictures_of_strangers_are_grey_cells(tmp_path: Path) -> None:
    """Links out of the run, pipes, and files for other programs; before, the grid showed the first, and waited."""
    folder = RunFolder(tmp_path / "run")
    recorded(folder, 1, {"link": RED, "pipe": RED, "eps": RED, "path": RED, "whole": BLUE})
    link, pipe, eps = (next(folder.sample_dir(1).glob(f"{name}-*")) for name in ("link", "pipe", "eps"))
    plain(GREEN).save(tmp_path / "private.png")
    link.unlink()
    link.symlink_to(tmp_path / "private.png")
    pipe.unlink()
    os.mkfifo(pipe)
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n{} loop\n")
    rows = [json.loads(line) for line in folder.samples_file.read_text(encoding="utf-8").splitlines()]
    rows[3]["file"] = "../../private.png"
    folder.samples_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder.reference_dir.mkdir()
    (folder.reference_dir / "00.png").symlink_to(tmp_path / "private.png")
    grid_of_run(folder)
    assert shown(folder, 1, 4) == [[MISSING, MISSING, MISSING, BLUE]], "a row with such a file is left out"
    assert grid.references_of(folder) == []
