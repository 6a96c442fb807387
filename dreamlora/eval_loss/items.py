"""Losses of single evaluation items over a run, and their paired differences. Needs numpy, no torch.

Two checkpoints measured on the same items have losses that go up and down together from item to item, so the
difference is known hundreds of times better than either mean; that is what decides here, never the means alone.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dreamlora.archives import check_archive, read_entry
from dreamlora.errors import UserError
from dreamlora.files import replacing
from dreamlora.metric_names import of_time_bin, relative
from dreamlora.reading import LARGEST, UnreadableError, read_bytes
from dreamlora.runfolder import tell_once

_MOST_BYTES = 2**27
"""Of a file: 300,000 measurements of 64 items."""
_MOST = 2**20
"""Of steps, and of images."""
_LONGEST_ID = 100
_DAMAGED = (ValueError, TypeError, IndexError, RuntimeError, OverflowError, EOFError)
"""What numpy raises for arrays that it has not written."""
TIME_BINS = 8
"""Parts of the schedule whose mean losses are logged by themselves."""


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences of two sets of values, and its standard error.

    Attributes:
        mean: of ``values - reference``.
        se: standard deviation of the differences (n - 1) over the root of n; 0 for a single pair.
        n: number of pairs.
    """

    mean: float
    se: float
    n: int

    @property
    def standard_errors(self) -> float:
        """The mean in units of its standard error; 0 for no difference, infinite for one without any spread."""
        if self.mean == 0:
            return 0.0
        return self.mean / self.se if self.se else math.copysign(math.inf, self.mean)


def paired_difference(values: np.ndarray, reference: np.ndarray) -> Difference:
    """How ``values`` differ from ``reference``, item by item.

    Args:
        values: ``[items]``.
        reference: ``[items]``, of the same items in the same order.
    """
    with np.errstate(invalid="ignore"):  # a diverged model has infinite losses
        apart = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
        count = len(apart)
        se = float(apart.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return Difference(float(apart.mean()), se, count)


@dataclass
class ItemLosses:
    """Every item's loss at every measured step: what eval_items.npz holds.

    Attributes:
        evalset_id: of the frozen items; values of other sets must not be compared with these.
        image: ``[items]``: which image an item is about.
        position: ``[items]`` in (0, 1): how far along the schedule it lies.
        rows: losses ``[items]`` by step.
    """

    evalset_id: str
    image: np.ndarray
    position: np.ndarray
    rows: dict[int, np.ndarray] = field(default_factory=dict)

    def __contains__(self, step: int) -> bool:
        return step in self.rows

    @property
    def steps(self) -> list[int]:
        """The measured steps, ascending."""
        return sorted(self.rows)

    def put(self, step: int, losses: list[float]) -> None:
        """Add the measurement of one step."""
        self.rows[step] = np.array(losses, dtype=np.float32)

    def mean(self, step: int) -> float:
        """The evaluation loss of a step: the mean over the items."""
        return float(self.rows[step].astype(np.float64).mean())

    def difference(self, step: int, reference: int) -> Difference:
        """How a step's losses differ from those of another step."""
        return paired_difference(self.rows[step], self.rows[reference])

    def take_up(self, file: Path, until: int) -> bool:
        """Read the measurements of an interrupted run, up to and including a step; False if they are of other items."""
        before = ItemLosses.found(file)
        if before is None or before.evalset_id != self.evalset_id or len(before.image) != len(self.image):
            return False
        self.rows = {step: row for step, row in before.rows.items() if step <= until}
        return True

    @classmethod
    def load(cls, file: Path) -> ItemLosses:
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            UnreadableError: it is damaged, of another kind, or holds what no measurement gives.
        """
        try:
            content = io.BytesIO(read_bytes(file, _MOST_BYTES, inside=file.parent))
            archive = check_archive(content)
            parts = {name: _array(read_entry(archive, f"{name}.npy")) for name in _PARTS}
            return _losses(**parts)
        except UserError:
            raise
        except _DAMAGED as error:
            raise UnreadableError(file, str(error) or type(error).__name__) from error

    @classmethod
    def found(cls, file: Path) -> ItemLosses | None:
        """The same; None if there is no such file, or none with a row that can be read, which is told once."""
        if not file.exists():
            return None
        try:
            losses = cls.load(file)
        except UserError as error:
            tell_once(f"{error}. What it held is left out")
            return None
        return losses if losses.rows else None

    def save(self, file: Path) -> None:
        """Write everything; a reader sees the old file or the new one."""
        content = io.BytesIO()  # on a full disk numpy's zip file would complain once more while it is destroyed
        np.savez(
            content,
            steps=np.array(self.steps),
            items=np.array([self.rows[step] for step in self.steps], dtype=np.float32),
            position=self.position,
            image=self.image,
            evalset_id=np.array(self.evalset_id),
        )
        with replacing(file) as temporary:
            temporary.write_bytes(content.getvalue())


_PARTS = ("steps", "items", "position", "image", "evalset_id")


def _array(content: bytes) -> np.ndarray:
    """The array of a .npy file, if its header promises no more than there is.

    Raises:
        ValueError: it does, or the content is none; objects are none, as they are pickled.
    """
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"an array is of version {version}, which numpy takes for odd types alone")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise ValueError("an array is not as large as it says, or holds objects")
    stream.seek(0)
    array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _losses(
    steps: np.ndarray, items: np.ndarray, position: np.ndarray, image: np.ndarray, evalset_id: np.ndarray
) -> ItemLosses:
    """The table of these parts; losses that are not finite are those of a diverged model. Raises ValueError."""
    count = len(image) if image.ndim == 1 else 0
    if steps.ndim != 1 or steps.dtype.kind not in "iu" or len(steps) > _MOST or not _ascending(steps):
        raise ValueError("its steps are no ascending whole numbers from 0 on")
    if not count or image.dtype.kind not in "iu" or not 0 <= image.min() <= image.max() < _MOST:
        raise ValueError("its images are no numbers of images")
    if position.shape != (count,) or position.dtype.kind != "f" or not ((position >= 0) & (position <= 1)).all():
        raise ValueError("its positions are not one from 0 to 1 for each item")
    if items.shape != (len(steps), count) and (len(steps) or items.size):
        raise ValueError("its parts do not belong together")
    if items.dtype.kind != "f" or (items < 0).any():
        raise ValueError("its losses are no numbers from 0 on")
    if evalset_id.shape != () or evalset_id.dtype.kind != "U" or len(str(evalset_id)) > _LONGEST_ID:
        raise ValueError("its id is no short text")
    rows = dict(zip(steps.tolist(), items.astype(np.float32, copy=False), strict=True))
    return ItemLosses(str(evalset_id), image, position, rows)


def _ascending(steps: np.ndarray) -> bool:
    numbers = np.minimum(steps, LARGEST + 1).astype(np.int64)
    return bool((numbers >= 0).all() and (numbers <= LARGEST).all() and (np.diff(numbers) > 0).all())


def values_of(losses: ItemLosses, step: int, name: str) -> dict[str, float]:
    """What is logged of a measurement: the mean, the mean against the base model's, and the mean by time."""
    row = losses.rows[step].astype(np.float64)
    values = {name: float(row.mean())}
    if 0 in losses:
        values[relative(name)] = float((row / losses.rows[0]).mean())
    bins = np.minimum((losses.position * TIME_BINS).astype(int), TIME_BINS - 1)
    for number in np.unique(bins):
        values[of_time_bin(name, number)] = float(row[bins == number].mean())
    return values
