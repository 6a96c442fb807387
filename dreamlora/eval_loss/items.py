"""Losses of single evaluation items over a run, and their paired differences. Needs numpy, no torch.

Two checkpoints measured on the same items have losses that go up and down together from item to item, so the
difference is known hundreds of times better than either mean; that is what decides here, never the means alone.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dreamlora.errors import UserError
from dreamlora.files import replacing
from dreamlora.metric_names import of_time_bin, relative
from dreamlora.runfolder import tell_once

_DAMAGED = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy raises for files that are not what it wrote."""
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
        if before is None or before.evalset_id != self.evalset_id:
            return False
        self.rows = {step: row for step, row in before.rows.items() if step <= until}
        return True

    @classmethod
    def load(cls, file: Path) -> ItemLosses:
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is missing, damaged or of another kind.
        """
        try:
            with np.load(file) as saved:
                rows = dict(zip(saved["steps"].tolist(), saved["items"], strict=True))
                losses = cls(str(saved["evalset_id"]), saved["image"], saved["position"], rows)
        except _DAMAGED as error:
            raise UserError(f"cannot read {file}: {error}") from error
        if not all(losses.image.shape == losses.position.shape == row.shape for row in rows.values()):
            raise UserError(f"cannot read {file}: its parts do not belong together")
        return losses

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
