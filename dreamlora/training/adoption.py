"""What a run takes over that goes on from a checkpoint of another run: what that one measured and drew, and no more.

The other run may be a stranger's, prepared to have files of this machine copied into a run that is then published. So
only regular files inside its folder are taken, and only those that the run itself has recorded: files with names of
their own, and pictures that are byte for byte what their rows say.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from dreamlora.errors import UserError, WriteError
from dreamlora.files import make_folder, replacing, write_atomically
from dreamlora.jsonl import lines_of
from dreamlora.lora.embeddings import files_beside
from dreamlora.reading import is_regular, lies_inside, opened
from dreamlora.runfolder import LORA_FILE, TRAINABLES_FILE, RunFolder
from dreamlora.sampling.grid import MAX_REFERENCES
from dreamlora.sampling.recorded import recorded_picture, rows_with_places

MOST_BYTES = 2**36
"""Of all that is taken over."""

logger = logging.getLogger(__name__)


def adopt(folder: RunFolder, other: RunFolder) -> None:
    """Take over what another run measured and drew.

    Raises:
        UserError: that is more than a run can have, or than there is room for.
        WriteError: the system refused.
    """
    files = [file for file in _single_files(other) if is_regular(file, other.path)]
    places = [(other.samples, folder.samples), (other.eval_images, folder.eval_images)]
    rows_file = other.samples_file.name
    for place in (*(theirs for theirs, _ in places), other.candidates, other.reference_dir):
        if not lies_inside(place, other.path):
            logger.warning("%s is not taken over: a link leads out of that run's folder", place)
    rows = {theirs: rows_with_places(theirs / rows_file, other.path) for theirs, _ in places}
    pictures = {place / row["file"] for place, rows_here in rows.items() for row in rows_here}
    _check_room(folder, other, sum(_size(file, other) for file in (*files, *pictures)))
    for file in files:
        copy(file, folder.path / file.relative_to(other.path), other.path)
    missing = 0
    for theirs, ours in places:
        kept = []
        for row in rows[theirs]:
            content = recorded_picture(theirs, row, other.path)
            if content is None:
                missing += 1
                continue
            with replacing(ours / row["file"]) as temporary:
                temporary.write_bytes(content)
            kept.append(row)
        if kept:
            write_atomically(ours / rows_file, lines_of(kept))
    if missing:
        logger.warning(
            "%d pictures of %s are not taken over: they are missing, or not what that run has drawn",
            missing,
            other.path,
        )


def copy(file: Path, target: Path, inside: Path) -> None:
    """Copy a regular file; no link leads out of the folder ``inside``.

    Raises:
        FileNotFoundError, UnreadableError: see ``reading.opened``.
        WriteError: the system refused to write.
    """
    with opened(file, inside) as source, replacing(target) as temporary, temporary.open("wb") as copied:
        shutil.copyfileobj(source, copied, 2**20)


def _single_files(other: RunFolder) -> Iterator[Path]:
    """Those that a run names itself."""
    yield from (
        other.range_test_file,
        other.metrics_file,
        other.eval_items_file,
        other.raw_items_file,
        other.final_items_file,
    )
    yield from (other.reference_dir / f"{number:02d}.png" for number in range(MAX_REFERENCES))
    for step in other.candidate_steps():
        place = other.candidate_dir(step)
        yield from (place / LORA_FILE, place / TRAINABLES_FILE, *files_beside(place / LORA_FILE))


def _size(file: Path, run: RunFolder) -> int:
    return file.stat().st_size if is_regular(file, run.path) else 0


def _check_room(folder: RunFolder, other: RunFolder, size: int) -> None:
    if size > MOST_BYTES:
        raise UserError(
            f"--resume_from_checkpoint: what {other.path} has measured and drawn are {size / 2**30:.0f} GiB, more "
            f"than the {MOST_BYTES / 2**30:.0f} GiB that are taken over. Copy the checkpoint out of there to go on "
            "without it"
        )
    make_folder(folder.path)
    free = shutil.disk_usage(folder.path).free
    if size > free:
        raise WriteError(
            f"cannot write {folder.path}: {size / 2**30:.1f} GiB of {other.path} are to be taken over, and "
            f"{free / 2**30:.1f} GiB are free. Free some space there, or choose another folder"
        )
