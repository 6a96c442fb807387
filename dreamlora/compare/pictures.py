"""Pictures of runs that lie elsewhere are copied into the comparison's folder: a report shows nothing from outside it.

So compare.json names no file that it does not bring along, and the folder can be moved or given away whole.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from dreamlora.compare.schema import COMPARE_FILE, Cell, Comparison
from dreamlora.files import remove, replacing
from dreamlora.reading import UnreadableError, read_bytes, tell_once
from dreamlora.sampling.grid import MAX_COLUMNS, shown_steps
from dreamlora.sampling.recorded import Motif, motif_of, motifs_of
from dreamlora.schemas import lies_below

COPIES = "sample_images"
"""Folder of the copies."""
PICTURE_BYTES = 2**26


def with_own_pictures(comparison: Comparison, folder: Path) -> Comparison:
    """The comparison, with copies in ``folder`` of the pictures that lie elsewhere.

    Those that a report has no room to show are not copied, and no longer named.

    Raises:
        WriteError: a copy cannot be written.
    """
    if (folder / COMPARE_FILE).exists():  # else a folder of that name is not an earlier comparison's
        remove(folder / COPIES)
    drawn = [method["samples"] for method in comparison["methods"] if method["samples"]]
    cells = [cell for samples in drawn for cell in samples["cells"]]
    shown = set(shown_steps(cell["step"] for cell in cells)), set(motifs_of(cells)[:MAX_COLUMNS])
    for number, samples in enumerate(drawn):
        place = folder / COPIES / f"{number:02d}"
        samples["cells"] = [_cell(cell, folder / samples["run"], place, shown) for cell in samples["cells"]]
        references = [_own(file, folder / samples["run"], place / "references") for file in samples["references"]]
        samples["references"] = [file for file in references if file]
    return comparison


def _cell(cell: Cell, run: Path, place: Path, shown: tuple[Set[int], Set[Motif]]) -> Cell:
    file = cell["file"]
    if not file or lies_below(file):
        return cell
    steps, motifs = shown
    seen = cell["step"] in steps and motif_of(cell) in motifs
    return {**cell, "file": _own(file, run, place / f"step_{cell['step']:06d}") if seen else None}


def _own(file: str, run: Path, place: Path) -> str | None:
    """A picture's name below the folder; None if it cannot be read, or is none of the run's own."""
    if lies_below(file):
        return file
    try:
        content = read_bytes(place.parents[2] / file, PICTURE_BYTES, inside=run)
    except (UnreadableError, FileNotFoundError) as error:
        tell_once(f"{error}: it is left out")
        return None
    copy = place / Path(file).name
    with replacing(copy) as temporary:
        temporary.write_bytes(content)
    return copy.relative_to(place.parents[2]).as_posix()
