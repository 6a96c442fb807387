"""From images and metric names to values, each with its encoder and its number of images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from dreamlora import registry
from dreamlora.data.images import ImageRecord
from dreamlora.errors import UserError
from dreamlora.evaluation.embed import Embedder
from dreamlora.interfaces import EncoderRole, ImageMetric, MetricInputs, Need


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
        """Those of ``needed`` that are not there."""
        there = {"prompts": self.texts, "references": self.references, "training": self.training, "base": self.base}
        return [need for need in sorted(needed) if not there[need]]


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
    """What was found.

    Attributes:
        values: by the order of the metrics asked for.
        notes: what the reader should know: warnings, and metrics left out with the reason.
    """

    values: list[Value] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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
    found = Measurement()
    embedders: dict[EncoderRole, Embedder | UserError] = {}
    known: dict[tuple[str, str], torch.Tensor] = {}
    for name in names:
        metric = load_metric(name)
        missing = gallery.lacks(metric.NEEDS)
        if missing:
            found.notes.append(f"{name} is left out: {'; '.join(_REMEDIES[need] for need in missing)}")
            continue
        embedder = _embedder(metric.ENCODER, embedder_of, embedders)
        if isinstance(embedder, UserError):
            found.notes.append(f"{name} is left out: {embedder}")
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                reading = metric.compute(_inputs(gallery, metric.NEEDS, embedder, known))
            except ValueError as error:
                found.notes.append(f"{name} is left out: {error}")
                continue
        found.notes.extend(f"{name}: {warning.message}" for warning in caught if warning.category is UserWarning)
        for value_name, value in reading.values.items():
            found.values.append(Value(value_name, value, embedder.encoder.id, reading.n, reading.n_other))
    return found


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


def _inputs(
    gallery: MeasuredImages, needed: Iterable[Need], embedder: Embedder, known: dict[tuple[str, str], torch.Tensor]
) -> MetricInputs:
    """The vectors that a metric needs; those that another metric had are taken from ``known``."""

    def vectors(side: str) -> torch.Tensor:
        key = (embedder.encoder.id, side)
        if key not in known:
            known[key] = embedder.texts(gallery.texts) if side == "texts" else embedder.images(getattr(gallery, side))
        return known[key]

    # Sorted: all processes must embed, and gather, in the same order.
    sides: dict[str, Any] = {need: vectors("texts" if need == "prompts" else need) for need in sorted(needed)}
    return MetricInputs(
        generated=vectors("generated"),
        groups=torch.tensor(gallery.groups, dtype=torch.int64),
        with_subject=torch.tensor(gallery.with_subject, dtype=torch.bool),
        **sides,
    )
