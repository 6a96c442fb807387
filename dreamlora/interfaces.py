"""What the parts exchange: records, and the contracts that plug-ins fulfil."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
from PIL.Image import Image

if TYPE_CHECKING:  # plug-ins import this module, and what they say of themselves is read without torch
    from torch import Tensor, nn

Conditioning: TypeAlias = "dict[str, Tensor]"
"""What a family's denoiser is told besides the noisy latents: tensors by name, batch first.

Of a prompt, and of an image's view (``Family.describe_views``); that of one prompt or image has a leading 1. Tensors
whose length is the prompt's own are named in ``Family.LENGTH_AXES``: they are kept without padding, and a batch of them
is padded with zeros to its longest."""

Components = dict[str, Any]
"""Parts of a pipeline by diffusers' names: "unet" or "transformer", "vae", "text_encoder", "tokenizer", "scheduler".

Under "settings" there is what model_index.json says besides (``Settings``)."""

Settings: TypeAlias = Mapping[str, Any]
"""Of a pipeline: its class as "_class_name", and by the names of ``Family.SETTINGS`` what its constructor takes besides
its parts, such as "is_distilled"."""

Classes: TypeAlias = tuple[str, ...]
"""Those that a part of a pipeline can have, as "diffusers.AutoencoderKL": library and class of model_index.json."""

Role = Literal["text", "vae", "denoiser", "scheduler"]
"""A part of a pipeline that can be loaded and freed by itself: "text" is all text encoders and their tokenizers."""


@dataclass(frozen=True)
class ModelSource:
    """Where a pipeline comes from.

    Attributes:
        path: folder or hub name of a diffusers pipeline.
        model_id: how caches and reports name it; a folder's id includes what its files hold.
        revision: commit of the hub repository that every part is loaded from; None for a folder.
        vae_path: folder or hub name of an autoencoder that takes the place of the pipeline's own.
        vae_revision: commit of its repository; None for a folder.
        prediction_type: what the denoiser predicts, where that is not what its scheduler's config says.
        rescale_betas_zero_snr: whether the schedule ends in pure noise, whatever its config says.
    """

    path: str
    model_id: str
    revision: str | None = None
    variant: str | None = None
    vae_path: str | None = None
    vae_revision: str | None = None
    cache_dir: Path | None = None
    allow_pickle: bool = False
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool = False

    @property
    def predictor_id(self) -> str:
        """How losses and images name the model: with what is not as its scheduler's config says."""
        own = [self.prediction_type, "zero terminal SNR" if self.rescale_betas_zero_snr else None]
        words = " and ".join(word for word in own if word)
        return f"{self.model_id} with {words}" if words else self.model_id


class LatentSize(NamedTuple):
    """Of an autoencoder: the channels of its latents, and how many pixels of a side one of their places stands for."""

    channels: int
    pixels: int


@dataclass(frozen=True)
class View:
    """How much of an image is seen; pixels, width before height.

    Attributes:
        original: size of the image, upright.
        corner: left and top of the crop in the image after it was resized to cover the crop.
        size: of the crop, which is what is encoded.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class Latents:
    """Encoded images: the moments of the autoencoder's posterior, scaled as the denoiser wants them.

    Attributes:
        mean: ``[B, C, h, w]`` float32.
        std: ``[B, C, h, w]`` float32; zero for autoencoders without a posterior.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one process.

    Attributes:
        latents: ``[B, C, h, w]`` float32, drawn from the posterior.
        noise: ``[B, C, h, w]`` float32.
        times: ``[B]``: integer time steps (diffusion) or sigmas in (0, 1) (flow).
        conditioning: prompt embeddings, or token ids while the text encoder trains; and what belongs to the images.
        weights: ``[B]`` float32: the loss is ``sum(weights * per_sample_loss)``.
        names: file of every sample, for error messages.
        masks: ``[B, 1, h, w]`` float32 in [0, 1], how much of the loss every place has; None: the same everywhere.
    """

    latents: Tensor
    noise: Tensor
    times: Tensor
    conditioning: Conditioning
    weights: Tensor
    names: tuple[str, ...]
    masks: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports.

    Attributes:
        step: number of the step just done, from 1.
        loss: mean training loss over the step's micro-batches and processes.
        grad_norm: norm of the gradients before clipping; not finite in a step that fp16 skipped.
        learning_rate: of the first parameter group.
        seconds: wall time of the step.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float

    @property
    def skipped(self) -> bool:
        """Whether the weights stayed as they were, since the loss was scaled up too far for fp16."""
        return not math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class SampleDefaults:
    """How a family draws samples unless told otherwise."""

    num_inference_steps: int
    guidance_scale: float


class Objective(Protocol):
    """A training objective: pure functions of latents ``[B, C, h, w]``, noise (same shape) and times ``[B]``."""

    def draw_times(self, uniforms: Tensor, sides: tuple[int, int]) -> Tensor:
        """Training times from numbers ``[B, 2]`` uniform in (0, 1), for latents of these sides (h, w): the more there
        is to see, the more noise it takes to hide it.
        """

    def spread_times(self, positions: Tensor) -> Tensor:
        """Evaluation times at positions ``[n]`` in (0, 1), uniform whatever the training density."""

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The noisy latents the denoiser sees."""

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should predict."""

    def weight(self, times: Tensor) -> Tensor:
        """Loss weight ``[B]`` of every sample."""

    def errors(self, prediction: Tensor, target: Tensor, times: Tensor, masks: Tensor | None = None) -> Tensor:
        """What training makes small: the error ``[B]`` of every prediction, in float32; where there are masks
        ``[B, 1, h, w]`` in [0, 1], weighted by them.
        """


class Family(Protocol):
    """One architecture family (one module in ``families/``): how to load, encode, predict and save.

    Plug-ins are modules: every member below is a module-level name. What most families have in common is taken over
    from ``families._parts`` and its siblings by assignment.
    """

    PIPELINES: tuple[str, ...]
    """``_class_name`` values in model_index.json that this family handles."""
    PARTS: Mapping[Role, Mapping[str, Classes]]
    """Component names of every role, and the classes that each can have. A model is a stranger's: it does not decide
    which code loads it, and what it names besides is refused. Each is a class whose own ``from_pretrained`` or
    ``from_config`` makes it: a scheduler, a model or a tokenizer, no Auto class and no pipeline."""
    OPTIONAL: frozenset[str]
    """Parts that a pipeline may lack; they are None then."""
    SETTINGS: Settings
    """What the pipelines' constructors take besides parts, with their defaults; model_index.json has the values."""
    DENOISER: str
    """Component name of the denoiser: "unet" or "transformer"."""
    SIDE_MULTIPLE: int
    """Sides of images, in pixels, must be multiples of this."""
    TEXT_ENCODERS: tuple[str, ...]
    """Component names of the text encoders that can be trained; others stay frozen."""
    LORA_LAYERS: tuple[str, ...]
    """Default target modules in the denoiser."""
    TEXT_LORA_LAYERS: tuple[str, ...]
    """Target modules in the text encoders."""
    OWN_OPTIONS: tuple[str, ...]
    """Options that not all families use (``config.plausible`` says what they are for), and this one does."""
    PROMPT_LENGTH: str
    """The option of ``config.Data`` that limits this family's prompts: its value is ``tokenize``'s ``max_length``."""
    PROMPT_DEFAULT: int | None
    """Its value unless given; None: the tokenizer's own."""
    PROMPT_TOKENIZER: str
    """Component name of the tokenizer whose tokens decide how much of a prompt counts; where a pipeline lacks this
    part, it is the first tokenizer that there is."""
    LENGTH_AXES: Mapping[str, int]
    """Of each tensor of ``encode_tokens`` (and ``encode_frozen``) whose length is the prompt's own the axis, the
    batch's being 0; none where padding is a part of the model. A batch is padded with zeros: a mask of ones tells."""

    def load(self, source: ModelSource, role: Role, dtype: Any) -> Components:
        """Load one part of the pipeline on the CPU, frozen, in eval mode; "settings" come with each.

        Raises:
            UserError: the folder or hub repository is missing, incomplete or holds pickles.
        """

    def resolution(self, source: ModelSource) -> int:
        """The model's own image side in pixels."""

    def latent_size(self, source: ModelSource) -> LatentSize | None:
        """Of the latents that ``encode_images`` gives; None: not known before one is encoded."""

    def sample_defaults(self, source: ModelSource) -> SampleDefaults:
        """How samples are drawn unless told otherwise; distilled checkpoints want few steps."""

    def distilled(self, source: ModelSource) -> str | None:
        """What to train instead or besides, in words, if the checkpoint was distilled to few steps (plain training
        undoes that); None if it was not, as far as its files tell.
        """

    def prompt_limit(self, tokenizer: Any, max_length: int | None) -> int:
        """Tokens that count of a prompt, begin and end included; ``max_length`` is the value of ``PROMPT_LENGTH``.

        Raises:
            UserError: the text encoder cannot take so many.
        """

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt has, as ``prompt_limit`` counts them."""

    def tokenize(self, text: Components, prompts: Sequence[str], max_length: int | None) -> Conditioning:
        """Token ids by name, batch first."""

    def encode_frozen(self, text: Components, tokens: Conditioning) -> Conditioning:
        """The tokens with those of encoders that never train (all that ``TEXT_ENCODERS`` does not name) encoded: made
        once, while the others train.
        """

    def encode_tokens(self, text: Components, tokens: Conditioning) -> Conditioning:
        """Prompt embeddings as ``predict`` takes them; differentiable in the text encoders.

        Args:
            text: the text components; those that never train may be missing where ``tokens`` are of ``encode_frozen``.
            tokens: of ``tokenize`` or ``encode_frozen``; what else is in there is left alone.
        """

    def encode_images(self, vae: Components, pixels: Tensor) -> Latents:
        """Moments of the latents of pixels ``[B, 3, H, W]`` in [-1, 1]."""

    def describe_views(self, views: Sequence[View]) -> Conditioning:
        """What ``predict`` is told of images besides their prompts, batch first, by other names than those of
        ``encode_tokens``, "mean" and "std"; the pipeline's call says the same of the images that it draws. Empty for
        most families.
        """

    def objective(self, scheduler: Any, train: Any) -> Objective:
        """The objective the model was trained with; ``train`` is ``config.Train``."""

    def predict(
        self, denoiser: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """The denoiser's prediction ``[B, C, h, w]`` of the objective's target for noisy latents at its times."""

    def pipeline(self, components: Components) -> Any:
        """A stock diffusers pipeline around these (possibly training) modules; parts not given are None."""

    def negative_prompt(self, source: ModelSource, guidance_scale: float, given: str | None) -> str | None:
        """The text whose embeddings the pipeline's call needs as negative ones at this guidance (as the call counts
        it); None: it needs none. A family that encodes negative prompts otherwise than prompts marks the text for its
        ``tokenize``.
        """

    def call_arguments(self, conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
        """Keyword arguments that give the pipeline's ``__call__`` ready prompt embeddings instead of prompts."""

    def call_options(self, guidance_scale: float) -> dict[str, Any]:
        """Keyword arguments of the call besides prompts, seeds, steps and size: guidance by its name there, and what
        makes it draw the size that was asked for.
        """

    def save_lora(self, folder: Path, denoiser: nn.Module, text: Mapping[str, nn.Module]) -> Path:
        """Write ``pytorch_lora_weights.safetensors`` as the stock pipeline's ``load_lora_weights`` reads it."""


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


class Callback(Protocol):
    """Something that happens at times during training; ``run`` is ``training.loop.Run``."""

    def on_start(self, run: Any) -> None:
        """Before the first step (or the first after a resume)."""

    def on_step(self, run: Any, result: StepResult) -> None:
        """After every optimizer step."""

    def on_end(self, run: Any) -> None:
        """After the last step."""


__all__ = [
    "Batch",
    "Callback",
    "Classes",
    "Components",
    "Conditioning",
    "Encoder",
    "EncoderRole",
    "Family",
    "ImageMetric",
    "LatentSize",
    "Latents",
    "MetricInputs",
    "ModelSource",
    "Need",
    "Objective",
    "Reading",
    "Role",
    "SampleDefaults",
    "Settings",
    "StepResult",
    "View",
]
