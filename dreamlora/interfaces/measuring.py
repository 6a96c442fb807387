"""What encoders and image metrics are, and what metrics are given and give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
from PIL.Image import Image

if TYPE_CHECKING:  # plug-ins import this module, and what they say of themselves is read without torch
    import torch
    from torch import Tensor

EncoderRole = Literal["clip", "dino", "features"]
"""What an encoder is for: "clip" embeds texts too, "dino" tells subjects apart, "features" are compared as a set."""

Need = Literal["prompts", "references", "training", "base"]
"""What a metric needs besides generated images: the fields of :class:`MetricInputs` with these names."""


class Encoder(Protocol):
    """Turns images, and texts if it can, into vectors.

    Attributes:
        id: model, revision or content, preprocessing and pooling; values of different ids must not be compared.
        dim: length of a vector.
    """

    id: str
    dim: int

    def images(self, images: Sequence[Image | np.ndarray]) -> Tensor:
        """Vectors ``[n, dim]`` float32 on the CPU, not normalised.

        Args:
            images: PIL images, or uint8 arrays ``[H, W, 3]``.

        Raises:
            TypeError: floats; whether they lie in [0, 1] or [0, 255] would be a guess.
        """

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Vectors ``[n, dim]`` float32 on the CPU, not normalised; prompts that are too long are cut, and warned of.

        Raises:
            UserError: the encoder knows no texts.
        """

    def to(self, device: torch.device) -> None:
        """Compute there from now on."""


@dataclass(frozen=True)
class MetricInputs:
    """Vectors that image metrics are computed from, all by one encoder, ``[n, d]`` float32 on the CPU.

    Attributes:
        generated: one row per generated image.
        groups: ``[n]`` int64, number of the prompt of every generated image.
        with_subject: ``[n]`` bool, whether the prompt of a generated image names what was learned; images of other
            prompts are not compared with references and training images. All True where nothing is known.
        prompts: ``[n, d]``, the text every generated image is scored against (without the rare token).
        references: ``[r, d]``, real images that were not trained on.
        training: ``[m, d]``, the images that were trained on.
        base: ``[n, d]``, the base model's images of the same prompts and seeds.
    """

    generated: Tensor
    groups: Tensor
    with_subject: Tensor
    prompts: Tensor | None = None
    references: Tensor | None = None
    training: Tensor | None = None
    base: Tensor | None = None


class Reading(NamedTuple):
    """What a metric says; a plain tuple, as torchmetrics takes apart what ``compute`` gives.

    Attributes:
        value: the main one; finite.
        n: generated images that went in.
        n_other: images on the other side (references, training or base images); None if there is no such side.
        parts: what else it says, by the end of the name: "p" of "img/kid" is logged as "img/kid_p".
    """

    value: float
    n: int
    n_other: int | None = None
    parts: Mapping[str, float] = {}


class ImageMetric(Protocol):
    """A metric over generated images (one module in ``metrics/``); every member is a module-level name.

    ``evaluation.metric.PluginMetric`` is the ``torchmetrics.Metric`` around it. Importing a plug-in imports no torch:
    reports and comparisons read what it says of itself.
    """

    NAME: str
    """Of its main value, such as "img/clip_t"."""
    ABOUT: str
    """What that value says, and which way is better, for the caption of its curve."""
    ENCODER: EncoderRole
    """Which encoder its vectors are from."""
    NEEDS: frozenset[Need]
    """What must be there; where it is not, the metric is left out."""
    HIGHER_IS_BETTER: bool
    SELECTS: bool
    """Whether it may have a say in which checkpoint is best, or in when to stop."""
    COMPARES_SETS: bool
    """Whether images are compared as sets: values of different numbers of images must then not be compared."""

    def compute(self, inputs: MetricInputs) -> Reading:
        """The values, of the images of all processes: a pure function.

        Raises:
            ValueError: there are too few images for it; the message says how many are needed.
        """
