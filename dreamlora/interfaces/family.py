"""What a family of models is, and what it is asked for and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

from dreamlora.interfaces.training import Conditioning, Objective

if TYPE_CHECKING:  # plug-ins import this module, and what they say of themselves is read without torch
    from PIL.Image import Image
    from torch import Tensor, nn

PICTURE = "shown_picture"
"""Name of what ``Family.text_pictures`` makes, among what belongs to images: ``[B, 3, h, w]``."""

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
        text_layers: of the text encoder, whose states are a prompt's embedding; empty: the family's own.
        rescale_betas_zero_snr: whether the schedule ends in pure noise, whatever its config says.
        base_precision: of the frozen denoiser, where that is not what it computes in (``precision``).
        text_encoder_precision: of the text encoders, likewise.
        offload_blocks: of the denoiser, that wait in host memory (``models.offload``).
        attention_backend: of the denoiser, where it is not torch's own choice (``kernels``).
        channels_last: whether the denoiser keeps the channels of images innermost.
        text_encoder_device: where text encoders that do not train compute; None: where the rest does.
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
    text_layers: tuple[int, ...] = ()
    rescale_betas_zero_snr: bool = False
    base_precision: str | None = None
    text_encoder_precision: str | None = None
    offload_blocks: int = 0
    attention_backend: str | None = None
    channels_last: bool = False
    text_encoder_device: str | None = None

    @property
    def predictor_id(self) -> str:
        """How losses and images name the model: with what is not as its scheduler's config says."""
        own = [self.prediction_type, "zero terminal SNR" if self.rescale_betas_zero_snr else None]
        words = " and ".join(word for word in own if word)
        return f"{self.model_id} with {words}" if words else self.model_id

    @property
    def drawer_id(self) -> str:
        """How images name the model that drew them: with the precision of its weights too."""
        own = {"weights": self.base_precision, "text encoders": self.text_encoder_precision}
        words = " and ".join(f"{what} in {word}" for what, word in own.items() if word)
        return f"{self.predictor_id}, {words}" if words else self.predictor_id


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
class SampleDefaults:
    """How a family draws samples unless told otherwise.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: as the pipeline's call counts it.
        negative_prompt: for pipelines that do not guide without one; None: the pipeline's own.
    """

    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None = None


class Family(Protocol):
    """One architecture family (one module in ``families/``): how to load, encode, predict and save.

    Plug-ins are modules: every member below is a module-level name. What most families have in common is taken over
    from ``families._parts`` and its siblings by assignment.
    """

    PIPELINES: tuple[str, ...]
    """``_class_name`` values in model_index.json that this family handles."""
    REFUSED: Mapping[str, str]
    """Pipelines that look like this family's and cannot be trained as such: by ``_class_name`` what they are, and what
    to give instead."""
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
    EMBEDDING_KEYS: Mapping[str, str]
    """Of each text encoder that can be given new tokens how files of embeddings name its vectors; empty: the stock
    pipeline loads none."""
    LORA_LAYERS: tuple[str, ...]
    """Default target modules in the denoiser: ends of their names, in which ``*`` stands for any part."""
    LORA_PRESETS: Mapping[str, tuple[str, ...]]
    """Others by the names that ``--lora_layers`` takes: "attn" are the projections of attention, "attn-mlp" the layers
    between them too."""
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

    def shows_images(self, source: ModelSource) -> bool:
        """Whether the pipeline edits: its call takes an image, and ``predict`` what ``encode_conditioning`` gives."""

    def encode_conditioning(self, vae: Components, pixels: Tensor) -> Conditioning:
        """What ``predict`` is told of the images before an edit, ``[B, 3, H, W]`` in [-1, 1]: batch first, float32."""

    def text_pictures(self, source: ModelSource) -> Callable[[Image], Tensor] | None:
        """What makes of an RGB image before an edit the picture ``[3, h, w]`` (uint8) that the text encoder sees with
        the prompt; None: it sees none. ``encode_tokens`` finds pictures among its tokens as ``PICTURE``.
        """

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
