"""From images and metric names to values, each with its encoder and its number of images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from dreamlora import registry
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError
from dreamlora.evaluation.embed import Embedder
from dreamlora.interfaces import EncoderRole, ImageMetric, Need, Reading
from dreamlora.metric_names import of_metric


@dataclass(frozen=True)
class MeasuredImages:
    """The images that metrics are about.

    Attributes:
        generated: what is measured.
        groups: number of the prompt of every generated image.
        with_subject: whether that prompt names what was learned.
        texts: what every generated image is scored against; empty if there are no prompts.
        references: real images that were not trained on.
        training: the images that were trained on.
        base: the base model's image for every generated one; empty if there are none.
    """

    generated: Sequence[ImageRecord]
    groups: Sequence[int]
    with_subject: Sequence[bool]
    texts: Sequence[str] = ()
    references: Sequence[ImageRecord] = ()
    training: Sequence[ImageRecord] = ()
    base: Sequence[ImageRecord] = ()

    def lacks(self, needed: Iterable[Need]) -> list[Need]:
        """Those of ``needed`` that the gallery does not have."""
        inputs = {"prompts": self.texts, "references": self.references, "training": self.training, "base": self.base}
        return [need for need in sorted(needed) if not inputs[need]]


@dataclass(frozen=True)
class Value:
    """One number, with all that is needed to read it.

    Attributes:
        name: such as "img/clip_t".
        value: finite.
        encoder_id: values by different encoders must not be compared.
        n: generated images that went in.
        n_other: images on the other side, if there is one.
    """

    name: str
    value: float
    encoder_id: str
    n: int
    n_other: int | None


@dataclass(frozen=True)
class Measurement:
    """Values of a set of images, and notes on them.

    Attributes:
        values: by the order of the metrics asked for.
        notes: what the reader should know: warnings, and metrics left out with the reason.
    """

    values: list[Value] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Known = dict[tuple[str, str], Tensor]
"""Vectors of this process's share, by encoder and side of the gallery."""

_REMEDIES: dict[Need, str] = {
    "prompts": "the images' prompts are not known (captions beside them, or --prompts)",
    "references": "there are no reference images (--references, or a run with held-out images)",
    "training": "the training images are not known (--training_images)",
    "base": "there are no images of the base model to compare with",
}


def load_metric(name: str) -> ImageMetric:
    """The plug-in called ``name``.

    Raises:
        UserError: there is none.
    """
    return cast(ImageMetric, registry.load("metrics", name))


def measure(
    names: Sequence[str], gallery: MeasuredImages, embedder_of: Callable[[EncoderRole], Embedder]
) -> Measurement:
    """Compute metrics; one that cannot be computed is left out with a note.

    Every process must call this with the same arguments, and gets the same values.

    Args:
        names: of plug-ins in ``metrics/``.
        gallery: the images.
        embedder_of: the embedder for what a metric's encoder is for; asked once per role, and only if needed.

    Raises:
        UserError: an image cannot be read.
    """
    measurement = Measurement()
    embedders: dict[EncoderRole, Embedder | UserError] = {}
    known: Known = {}
    for name in names:
        metric = load_metric(name)
        missing = gallery.lacks(metric.NEEDS)
        if missing:
            measurement.notes.append(f"{name} is left out: {'; '.join(_REMEDIES[need] for need in missing)}")
            continue
        embedder = _embedder(metric.ENCODER, embedder_of, embedders)
        if isinstance(embedder, UserError):
            measurement.notes.append(f"{name} is left out: {embedder}")
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                reading = read(metric, gallery, embedder, known)
            except ValueError as error:
                measurement.notes.append(f"{name} is left out: {error}")
                continue
        measurement.notes.extend(f"{name}: {warning.message}" for warning in caught if warning.category is UserWarning)
        values = {metric.NAME: reading.value}
        values |= {of_metric(metric.NAME, part): value for part, value in reading.parts.items()}
        for value_name, value in values.items():
            measurement.values.append(Value(value_name, value, embedder.encoder.id, reading.n, reading.n_other))
    return measurement


def read(metric: ImageMetric, gallery: MeasuredImages, embedder: Embedder, known: Known | None = None) -> Reading:
    """One metric of images that have all it needs, the same in every process; each must call it, and embeds its share.

    Args:
        metric: what is measured.
        gallery: the images.
        embedder: with the metric's encoder.
        known: vectors that other metrics had; those of this one are added.

    Raises:
        UserError: an image cannot be read.
        ValueError: there are too few images, or one has no direction for the encoder.
    """
    from dreamlora.evaluation.metric import PluginMetric

    known = {} if known is None else known

    def vectors(side: str) -> Tensor:
        key = (embedder.encoder.id, side)
        if key not in known:
            known[key] = embedder.texts(gallery.texts) if side == "prompts" else embedder.images(getattr(gallery, side))
        return known[key]

    def places(count: int) -> Tensor:
        return torch.tensor(embedder.processes.share(count), dtype=torch.int64)

    gathered = PluginMetric(metric, embedder.encoder.dim).to(embedder.processes.device)
    mine = places(len(gallery.generated))
    groups, with_subject = torch.tensor(gallery.groups), torch.tensor(gallery.with_subject)
    gathered.update(mine, groups=groups[mine], with_subject=with_subject[mine])
    for side in (*sorted(metric.NEEDS), "generated"):  # sorted: all processes must embed in the same order
        count = len(gallery.texts if side == "prompts" else getattr(gallery, side))
        gathered.update(places(count), **{side: vectors(side)})
    return gathered.compute()


def _embedder(
    role: EncoderRole,
    embedder_of: Callable[[EncoderRole], Embedder],
    known: dict[EncoderRole, Embedder | UserError],
) -> Embedder | UserError:
    if role not in known:
        try:
            known[role] = embedder_of(role)
        except UserError as error:  # an encoder that cannot be loaded must not end a training run
            known[role] = error
    return known[role]
