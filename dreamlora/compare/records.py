"""One run folder as the statistics need it: its curve, its final items, what it was made with. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dreamlora import tiny
from dreamlora.archives import open_tensors
from dreamlora.compare.schema import Status
from dreamlora.compare.stats import log_auc, steps_to_target
from dreamlora.errors import UserError
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.metric_names import DW_NORM, EVAL_LOSSES, STEPS_PER_SECOND, comparable, is_image_metric
from dreamlora.runfolder import RunFolder

OCTILES = 8
_MOST_NUMBERS = 2**24
"""In a factor, or in the product of one with itself."""
_MOST_PRODUCTS = 2**33
"""For the norm of a layer: a second; rank 512 of FLUX's largest takes half of that."""


@dataclass(frozen=True)
class ImageValue:
    """One value of an image metric: of ``images`` generated ones, against ``images_other`` of another side.

    ``images_id`` stands for their prompts, seeds and settings; None for runs that have not noted it.
    """

    step: int
    value: float
    encoder_id: str | None
    images_id: str | None
    images: int | None
    images_other: int | None


@dataclass(frozen=True)
class Record:
    """What one run tells.

    Attributes:
        id: how the run is named in compare.json.
        config: its config.yaml.
        method: the method's label if the comparison program made the run, else None.
        metric: which of ``EVAL_LOSSES`` it logged; empty if none.
        steps, losses: the evaluation's curve; a loss that was not finite is NaN.
        seconds: of training at each of ``steps``, without evaluations and samples.
        octiles: mean loss of the last evaluation in each eighth of the timesteps.
        tested: whether it found its learning rate by a range test.
        at_end: the larger set, with rows for the base model and the last step; None if it was not measured.
        images: image metrics by name; of a run that was resumed with other prompts or encoders, the last ones alone.
        scalars: last value of every other metric.
        damage: what could not be read, a sentence for each file.
    """

    id: str
    folder: RunFolder
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    method: str | None
    ended: Status
    message: str
    metric: str
    evalset_id: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    octiles: tuple[float, ...]
    eval_images: int
    eval_items: int
    tested: bool = False
    at_end: ItemLosses | None = None
    images: Mapping[str, Sequence[ImageValue]] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    damage: Sequence[str] = ()

    @property
    def command(self) -> str | None:
        """The command line that made it."""
        return self.summary.get("command")

    @property
    def seed(self) -> int:
        """Of the training."""
        return int(self.config.get("seed", 0))

    @property
    def lr(self) -> float:
        """Learning rate, to six digits: rates that differ by rounding are the same."""
        return float(f"{float(self.config['learning_rate']):.6g}")

    @property
    def base(self) -> float:
        """Loss of the base model; NaN for a run that ended before it was measured."""
        return self.losses[0] if self.losses else math.nan

    @property
    def final(self) -> float:
        """Loss at the end; inf if there is none, as the run diverged or failed: worse than any other."""
        return self.losses[-1] if self.sound else math.inf

    @property
    def sound(self) -> bool:
        """Whether it has a loss at its end."""
        return self.status == "finished"

    @property
    def above_base(self) -> bool:
        """Whether the training did harm: the loss at the end is above the base model's."""
        return self.sound and self.final > self.base

    @cached_property
    def status(self) -> Status:
        """How it ended. Divergence goes by value too: a last loss that is not finite."""
        return "diverged" if self.ended == "finished" and not math.isfinite(self.losses[-1]) else self.ended

    @property
    def best(self) -> float:
        """The lowest loss of the curve."""
        return min((loss for loss in self.losses if math.isfinite(loss)), default=math.nan)

    @property
    def best_step(self) -> int | None:
        """The first step with it."""
        return next((step for step, loss in zip(self.steps, self.losses, strict=True) if loss == self.best), None)

    @property
    def log_auc(self) -> float:
        """See ``stats.log_auc``; inf for a run without a loss at its end."""
        return log_auc(self.losses[1:], self.base) if self.sound else math.inf

    @property
    def seconds_per_step(self) -> float:
        """Mean over the run; NaN if no speeds were logged."""
        return self.seconds[-1] / self.steps[-1] if self.steps and self.steps[-1] and self.seconds else math.nan

    def to_target(self, target: float, along: Sequence[float]) -> float:
        """Where on ``along`` (its steps or seconds) the curve reaches ``target``; inf for a run without an end."""
        if not self.sound:
            return math.inf
        return steps_to_target(along, self.losses, target) if len(along) else math.nan

    @cached_property
    def dw_norm(self) -> float:
        """Frobenius norm of all weight changes together: as logged (lora/dw_norm), else from the saved LoRA."""
        if DW_NORM in self.scalars:
            return self.scalars[DW_NORM]
        rank = float(self.config.get("rank") or 1)
        scale = float(self.config.get("lora_alpha") or 0) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return lora_norm(self.folder.lora_file, scale) if self.folder.lora_file.exists() and scale else math.nan


def read_record(path: Path, name: str) -> Record:
    """Read a run folder.

    Args:
        path: of the run.
        name: its id in the comparison.

    Raises:
        UserError: there is no run, its config cannot be read, or it has not measured the base model.
    """
    folder = RunFolder(path)
    config = folder.config()
    if "learning_rate" not in config:
        raise UserError(f"{name}: cannot read {folder.config_file}: it names no learning_rate")
    outcome, summary = folder.outcome(), folder.summary()
    values, more = _metrics(folder)
    metric = next((candidate for candidate in EVAL_LOSSES if candidate in values), "")
    curve = values.get(metric, {})
    ended: Status = outcome.get("status") or ("finished" if summary else "unfinished")
    if ended == "finished" and 0 not in curve:
        raise UserError(
            f"{name}: no base-model evaluation (no eval/loss at step 0 in metrics.jsonl). Train again with "
            "--eval_steps above 0"
        )
    steps = tuple(sorted(curve))
    items = _items(folder)
    return Record(
        id=name,
        folder=folder,
        config=config,
        summary=summary,
        method=outcome.get("method"),
        ended=ended,
        message=str(outcome.get("message", "")),
        metric=metric,
        evalset_id=str(more.get(metric, [{}])[0].get("evalset_id", "")),
        steps=steps,
        losses=tuple(curve[step] for step in steps),
        seconds=_seconds(values.get(STEPS_PER_SECOND, {}), steps),
        octiles=items.octiles,
        eval_images=items.images,
        eval_items=items.count,
        tested=bool(folder.range_test()),
        at_end=_at_end(folder, steps),
        images={name: _image_values(rows) for name, rows in more.items() if is_image_metric(name)},
        scalars={name: points[max(points)] for name, points in values.items() if points},
        damage=tuple(folder.damage()),
    )


def data_name(config: Mapping[str, Any]) -> str:
    """What is learned, for a person: a folder's name, a data set or a built-in subject."""
    folder = config.get("instance_data_dir") or config.get("train_data_dir")
    if folder:
        return Path(folder).name
    if config.get("datasets"):
        return " + ".join(data_name(entry) for entry in config["datasets"])
    return str(config.get("dataset_name") or config.get("subject") or config.get("style") or "?")


def model_name(config: Mapping[str, Any]) -> str:
    """The base model's name, for a person."""
    name = str(config.get("pretrained_model_name_or_path", "?"))
    return tiny.MODELS[name].title if name in tiny.MODELS else name


def lora_norm(file: Path, scale: float) -> float:
    """sqrt(sum over layers of ||scale · B · A||_F^2), without forming the products; NaN if the file cannot be read.

    ||B A||_F^2 = tr((B^T B)(A A^T)): two small r x r Grams. Kernels of convolutions count as ``[r, in * k * k]``.
    """
    total = 0.0
    try:
        with open_tensors(file, "np", inside=file.parent) as opened, np.errstate(over="ignore", invalid="ignore"):
            for key in (key for key in opened.keys() if ".lora_A." in key):  # noqa: SIM118 - no iterator
                total += _squared_norm(opened, key)
    except (UserError, OSError, ValueError, TypeError, AttributeError):  # also of types that numpy has not
        return math.nan
    return abs(scale) * math.sqrt(total) if 0 < total < math.inf else math.nan


def _squared_norm(opened: Any, key: str) -> float:
    """Raises ValueError for what is no pair of factors, or larger than one can be."""
    names = (key, key.replace(".lora_A.", ".lora_B."))
    (rank, *ins), (outs, *ranks) = (opened.get_slice(name).get_shape() for name in names)
    widths = math.prod(ins) + outs
    few = rank * max(rank, widths) <= _MOST_NUMBERS and rank * rank * widths <= _MOST_PRODUCTS
    if not few or not rank or math.prod(ranks) != rank:
        raise ValueError(f"{key} is no factor of a LoRA")
    down, up = (opened.get_tensor(name).astype(np.float64) for name in names)
    a, b = down.reshape(rank, -1), up.reshape(outs, -1)
    return float(np.sum((b.T @ b) * (a @ a.T)))


def _metrics(folder: RunFolder) -> tuple[dict[str, dict[int, float]], dict[str, list[dict[str, Any]]]]:
    """Values by name and step, and whole rows of evaluations: none but those that are comparable with the last."""
    logged: dict[str, list[dict[str, Any]]] = {}
    for row in folder.metrics():
        logged.setdefault(row["name"], []).append(row)
    rows = {name: comparable(of_name) for name, of_name in logged.items()}
    values = {
        name: {row["step"]: math.nan if row["value"] is None else float(row["value"]) for row in of_name}
        for name, of_name in rows.items()
    }
    return values, {name: rows[name] for name in rows if name in EVAL_LOSSES or is_image_metric(name)}


def _seconds(speeds: Mapping[int, float], steps: Sequence[int]) -> tuple[float, ...]:
    """Seconds of training up to each of ``steps``: the sum of what every step took, whatever came between them."""
    known = [step for step in sorted(speeds) if speeds[step] > 0]
    if not known or not steps:
        return ()
    passed = np.cumsum([1 / speeds[step] for step in known])
    return tuple(float(value) for value in np.interp(steps, [0, *known], [0.0, *passed]))


def _image_values(rows: Sequence[Mapping[str, Any]]) -> list[ImageValue]:
    return [
        ImageValue(
            step=row["step"],
            value=float(row["value"]),
            encoder_id=row.get("encoder_id"),
            images_id=row.get("images_id"),
            images=row.get("n"),
            images_other=row.get("n_other"),
        )
        for row in rows
        if row["value"] is not None
    ]


def _at_end(folder: RunFolder, steps: Sequence[int]) -> ItemLosses | None:
    """The larger set, if it was measured at both ends of the run."""
    measured = ItemLosses.found(folder.final_items_file)
    return measured if measured and steps and 0 in measured and steps[-1] in measured else None


@dataclass(frozen=True)
class _Items:
    octiles: tuple[float, ...] = ()
    images: int = 0
    count: int = 0


def _items(folder: RunFolder) -> _Items:
    """The last row of eval_items.npz, by eighths of the schedule."""
    losses = ItemLosses.found(folder.eval_items_file)
    if losses is None:
        return _Items()
    last, image = losses.rows[losses.steps[-1]].astype(float), losses.image
    bins = np.minimum((losses.position * OCTILES).astype(int), OCTILES - 1)
    means = tuple(float(last[bins == k].mean()) if (bins == k).any() else math.nan for k in range(OCTILES))
    return _Items(means, len(np.unique(image)), len(last))
