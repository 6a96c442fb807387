"""Labelled picture grids and time lapses. Pillow alone: reports draw them on machines without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, features

from dreamlora.files import replacing
from dreamlora.metric_names import name_of_step_0
from dreamlora.pictures import BrokenImage, own_picture
from dreamlora.reading import lies_inside
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.canvas import GAP, INK, LABEL, MARGIN, SMALL, TITLE, Canvas, Cell, font, wrap
from dreamlora.sampling.recorded import Motif, common_settings, motif_of, motifs_of, titles

MAX_ROWS = 8
MAX_COLUMNS = 8
MAX_FRAMES = 60
MAX_REFERENCES = 16
CELL = 256
"""Longest side of a cell in pixels; smaller pictures are enlarged by a whole factor as long as they fit."""
GUTTER = 128
LABEL_LINES = 4
FRAME_MS = 500
LAST_FRAME_MS = 2500

Picture = Path | Image.Image | str
"""A file, an image, or the reason why there is none."""


@dataclass(frozen=True)
class GridRow:
    """One row.

    Attributes:
        label: such as "step 100"; lines may be broken with a newline.
        images: one per column; missing ones at the end are drawn as empty cells.
    """

    label: str
    images: Sequence[Picture]


def shown_steps(steps: Iterable[int]) -> list[int]:
    """Those of the steps that are shown where there is room for ``MAX_ROWS``, ascending."""
    known = sorted(set(steps))
    return [known[index] for index in spread(len(known), MAX_ROWS)]


def spread(count: int, limit: int) -> list[int]:
    """At most ``limit`` of ``range(count)``: the first, the last, and between them ever wider steps."""
    if count <= limit:
        return list(range(count))
    if limit == 1:
        return [count - 1]
    ratio = (count - 1) ** (1 / (limit - 2)) if limit > 2 else 1.0
    chosen = [0]
    for place in range(1, limit):
        wanted = round(ratio ** (place - 1)) if limit > 2 else count - 1
        # Strictly ascending, and enough room for those that still come.
        chosen.append(min(max(wanted, chosen[-1] + 1), count - limit + place))
    return chosen


def capped(
    rows: Sequence[GridRow], columns: Sequence[str], most: tuple[int, int] = (MAX_ROWS, MAX_COLUMNS)
) -> tuple[list[GridRow], list[str], str]:
    """At most so many rows (``spread``) and columns, and a note on what is left out ("" if nothing)."""
    kept_rows = [rows[index] for index in spread(len(rows), most[0])]
    kept_columns = list(columns[: most[1]])
    if len(kept_rows) == len(rows) and len(kept_columns) == len(columns):
        return kept_rows, kept_columns, ""
    note = f"Shown: {len(kept_rows)} of {len(rows)} rows, {len(kept_columns)} of {len(columns)} columns."
    return kept_rows, kept_columns, note


def write_grid(
    file: Path,
    rows: Sequence[GridRow],
    columns: Sequence[str],
    references: Sequence[Path] = (),
    title: str = "",
    note: str = "",
) -> None:
    """Write a labelled grid as PNG; the file is replaced at once, so a reader never sees half a picture.

    Args:
        rows: all are drawn; see ``capped``.
        columns: labels, one per column.
        references: pictures for the strip above the grid, as many as there is room for.
        title: heading.
        note: small print below.
    """
    picture = render(rows, columns, references, Look(title, note))
    with replacing(Path(file)) as temporary:
        picture.save(temporary)


def write_timelapse(
    file: Path, rows: Sequence[GridRow], columns: Sequence[str], title: str = "", note: str = ""
) -> bool:
    """Write an animated WebP, one frame per row; replaced at once like the grid.

    Args:
        rows: at most 60 become frames.

    Returns:
        False if this Pillow cannot write WebP: nothing is written then.
    """
    if not features.check("webp"):
        return False
    columns = columns[:MAX_COLUMNS]
    cell = cell_size([row.images[: len(columns)] for row in rows])
    frames = []
    for index in spread(len(rows), MAX_FRAMES):
        done = index / max(len(rows) - 1, 1)
        frames.append(render([rows[index]], columns, (), Look(title, note, cell, progress=done)))
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    with replacing(Path(file)) as temporary:
        frames[0].save(
            temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=85, method=4
        )
    return True


def cell_size(images: Sequence[Sequence[Picture]]) -> tuple[int, int]:
    """Width and height of the cells in pixels, from the largest among the first whole pictures of the rows."""
    firsts = [next(filter(None, map(_size, row)), None) for row in images]
    sizes = [size for size in firsts if size]
    if not sizes:
        return CELL * 3 // 4, CELL * 3 // 4
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    longest = max(width, height)
    scale = CELL / longest if longest > CELL else CELL // longest
    return max(round(width * scale), 48), max(round(height * scale), 48)


@dataclass(frozen=True)
class Look:
    """What a picture has besides its cells.

    Attributes:
        title: heading.
        note: small print below.
        cell: width and height of a cell in pixels; None: from the pictures.
        progress: length of a bar below the rows, in [0, 1].
    """

    title: str = ""
    note: str = ""
    cell: tuple[int, int] | None = None
    progress: float | None = None


def render(rows: Sequence[GridRow], columns: Sequence[str], references: Sequence[Path], look: Look) -> Image.Image:
    """The grid as a picture."""
    size = look.cell or cell_size([row.images for row in rows])
    width = 2 * MARGIN + GUTTER + len(columns) * (size[0] + GAP) - GAP
    canvas = Canvas(width)
    if look.title:
        canvas.text(MARGIN, wrap(look.title, font(TITLE), width - 2 * MARGIN, 2), TITLE, INK)
        canvas.skip(12)
    _strip(canvas, references, size)
    canvas.headings(MARGIN + GUTTER, size[0], [wrap(label, font(LABEL), size[0], LABEL_LINES) for label in columns])
    for row in rows:
        label = [line for part in row.label.split("\n") for line in wrap(part, font(LABEL), GUTTER - 12, 4)]
        images = [*row.images, *[""] * (len(columns) - len(row.images))][: len(columns)]
        canvas.row(label, GUTTER, size, [_cell(picture, size) for picture in images])
    if look.progress is not None:
        canvas.progress(MARGIN + GUTTER, width - MARGIN, look.progress)
    if look.note:
        canvas.note(wrap(look.note, font(SMALL), width - 2 * MARGIN, 3))
    return canvas.finish()


def grid_of_run(folder: RunFolder) -> bool:
    """Rebuild grid.png and timelapse.webp from samples.jsonl; False if nothing was drawn yet.

    Rows are steps. A column is a prompt with its seed and settings, those that were drawn last first: what a step has
    not drawn of them, or a file that is missing or broken, is a grey cell, and steps without any have no row.
    """
    drawn = folder.sample_rows()
    base = name_of_step_0(folder.config().get("init_lora") if folder.holds_run() else None)
    if not drawn:
        return False
    motifs = motifs_of(drawn)
    by_step: dict[int, dict[Motif, dict]] = {}
    for row in drawn:
        by_step.setdefault(row["step"], {})[motif_of(row)] = row
    columns = titles(motifs)
    rows = [
        GridRow(f"step {step:,}" if step else base, [_picture(folder, by_step[step].get(motif)) for motif in motifs])
        for step in sorted(by_step)
        if not by_step[step].keys().isdisjoint(motifs[:MAX_COLUMNS])
    ]
    kept_rows, kept_columns, left_out = capped(rows, columns)
    how = ", ".join(common_settings(motifs))
    note = " ".join(filter(None, [f"{how};" if how else "", "a column has the same seed in every row.", left_out]))
    write_grid(folder.grid_file, kept_rows, kept_columns, references_of(folder), folder.path.name, note)
    write_timelapse(folder.timelapse_file, rows, columns, folder.path.name)
    return True


def _picture(folder: RunFolder, row: dict | None) -> Picture:
    if row is None:
        return "not drawn at this step"
    if row.get("problem") == "not finite":
        return "not finite (NaN)"
    file = folder.samples / row["file"]
    return file if lies_inside(file, folder.path) else "file is not in the run's folder"


def references_of(folder: RunFolder) -> list[Path]:
    """The training images that a run keeps for the strip above its grid."""
    return [file for file in sorted(folder.reference_dir.glob("*.png")) if lies_inside(file, folder.path)]


def _size(picture: Picture) -> tuple[int, int] | None:
    opened = _open(picture)
    return None if isinstance(opened, str) else opened.size


def _open(picture: Picture) -> Image.Image | str:
    """The picture in RGB, or the reason why it cannot be shown."""
    if isinstance(picture, str):
        return picture or "no image"
    try:
        return own_picture(picture) if isinstance(picture, Path) else picture.convert("RGB")
    except FileNotFoundError:
        return "file is missing"
    except BrokenImage:
        return "file is damaged"


def _cell(picture: Picture, size: tuple[int, int]) -> Cell:
    opened = _open(picture)
    return opened if isinstance(opened, str) else fit(opened, size)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image as large as ``size`` allows, its shape kept."""
    scale = min(size[0] / image.width, size[1] / image.height)
    width, height = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    if (width, height) == image.size:
        return image
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _strip(canvas: Canvas, references: Sequence[Path], size: tuple[int, int]) -> None:
    height = min(max(size[1] * 5 // 8, 96), 160)
    room = canvas.width - 2 * MARGIN - GUTTER
    thumbnails: list[Image.Image] = []
    for file in references[:MAX_REFERENCES]:
        opened = _open(file)
        if isinstance(opened, str):
            continue
        thumbnail = fit(opened, (height * 2, height))
        if thumbnail.width > room:
            break
        thumbnails.append(thumbnail)
        room -= thumbnail.width + GAP
    if thumbnails:
        label = wrap("training images", font(LABEL), GUTTER - 12, 3)
        canvas.strip(label, GUTTER, height, thumbnails)
