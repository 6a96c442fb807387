"""What can be set: every option once, with its default, its help text and its range.

The docstring under a field *is* the text of ``--help``. Names and meanings are those of diffusers' training scripts
wherever those have the option. ``None`` means "decided later": from the model, the embedded model's preset or the
length of the run, as the text says. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from dreamlora.config.measuring import IMAGES_FOR_METRICS, Encoders, Eval, Sample
from dreamlora.config.ranges import above as _above
from dreamlora.config.ranges import at_least as _at_least
from dreamlora.config.ranges import finite as _finite
from dreamlora.config.ranges import pairs as _pairs
from dreamlora.config.ranges import respell as _respell
from dreamlora.config.ranges import within as _within
from dreamlora.errors import UserError

EMBEDDED_MODEL = "tiny"

Scheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Tracker = Literal[
    "all", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # fmt: skip
"""Those that accelerate knows."""


@dataclass(frozen=True)
class Model:
    """Which model is trained, and how it is held in memory."""

    pretrained_model_name_or_path: str = EMBEDDED_MODEL
    """A diffusers pipeline: a folder, a hub name, or "tiny" for the embedded model."""
    family: str | None = None
    """Model family; by default read from the pipeline's model_index.json."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    variant: str | None = None
    """Weight variant of the hub repository, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = None
    """An autoencoder to use instead of the pipeline's own."""
    cache_dir: Path | None = None
    """Where downloads from the hub are kept."""
    allow_pickle: bool = False
    """Accept .bin/.ckpt weights. They can run any code while they load: only for files you trust."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute activations in the backward pass."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use xformers' attention instead of torch's own."""
    allow_tf32: bool = False
    """Let Ampere and newer GPUs round fp32 matrix products and convolutions to TF32."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the frozen weights and the forward pass; LoRA weights stay fp32. Default: accelerate's setting."""

    def __post_init__(self) -> None:
        if self.family is not None:
            _respell(self, "family", "families")


@dataclass(frozen=True)
class Data:
    """Which images and captions are trained on, and how they are prepared."""

    train_data_dir: Path | None = None
    """Folder with captioned images: captions lie beside them as name.txt, or in metadata.jsonl or metadata.csv."""
    style: str | None = None
    """A built-in style of the embedded model, drawn with captions on demand; used when no images are given."""
    instance_data_dir: Path | None = None
    """Folder with the images to learn. Captions may lie beside them: name.txt, metadata.jsonl or metadata.csv."""
    subject: str | None = None
    """A built-in subject of the embedded model, drawn on demand; used when no images are given."""
    instance_prompt: str | None = None
    """Caption of every image that has none of its own, such as "a photo of sks dog"."""
    dataset_name: str | None = None
    """A Hugging Face datasets name to train on instead of a folder."""
    dataset_config_name: str | None = None
    """Configuration of that data set."""
    streaming: bool = False
    """Fetch only the rows of --dataset_name that are used (see --max_train_samples), not the whole data set."""
    image_column: str = "image"
    """Its column with the images."""
    caption_column: str | None = None
    """Its column with the captions; by default text or caption."""
    caption_dropout: float = 0.0
    """Probability that an image is seen without its caption, which keeps classifier-free guidance working."""
    shuffle_tags: bool = False
    """Put the tags of a caption, which commas separate, into another order each time its image is seen."""
    keep_tags: int = 0
    """The first N tags stay where they are."""
    caption_variants: int = 4
    """Random orders of the tags kept in the cache for each caption; each time an image is seen, one is drawn."""
    class_data_dir: Path | None = None
    """Folder with images of the class; missing ones are made by the base model. Default: outputs/class_images/..."""
    class_prompt: str | None = None
    """Prompt of the class images, such as "a photo of a dog"."""
    with_prior_preservation: bool = False
    """Train on class images too, so that the class keeps its look."""
    prior_loss_weight: float = 1.0
    """Weight of the class images' loss."""
    num_class_images: int = 100
    """How many class images there should be."""
    sample_batch_size: int = 4
    """Images made at a time, class images and samples alike."""
    prior_generation_precision: Literal["no", "fp32", "fp16", "bf16"] | None = None
    """Precision for making class images. Default: --mixed_precision."""
    repeats: int = 1
    """How often each image is seen in an epoch."""
    max_train_samples: int | None = None
    """Use only the first N images."""
    resolution: int | None = None
    """Side of the square training images in pixels. Default: the model's own."""
    center_crop: bool = False
    """Crop the middle instead of a random place."""
    random_flip: bool = False
    """Mirror images half of the time."""
    image_interpolation_mode: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "lanczos"
    """Filter for resizing."""
    buckets: bool = False
    """Train images at the size with the nearest aspect ratio and the area of the square, instead of squares."""
    bucket_step: int | None = None
    """Sides of these sizes are multiples of it. Default: 64, or an eighth of --resolution if that is less."""
    crop_variants: int = 4
    """Random crops kept in the cache for an image that must be cropped; each time it is seen, one is drawn."""
    holdout: int | None = None
    """Images kept out of training for the evaluation. Default: 20 % of them (at most 16), 1 or 2 of 6 to 11, else 0."""
    latents_cache_dir: Path | None = None
    """Where encoded images and prompts are kept. Default: .cache/dreamlora in the home folder."""
    tokenizer_max_length: int | None = None
    """Tokens kept of a prompt. Default: the tokenizer's."""
    max_sequence_length: int = 512
    """Tokens kept of a prompt for T5 encoders."""
    dataloader_num_workers: int = 0
    """Processes that read and crop images while the cache is filled."""
    pre_compute_text_embeddings: bool = True
    """Always so here, unless the text encoder is trained; kept so that diffusers' command lines work."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "prior_loss_weight", "holdout", "dataloader_num_workers", "keep_tags")
        _at_least(self, 1, "num_class_images", "sample_batch_size", "repeats", "max_train_samples", "crop_variants")
        _at_least(self, 1, "caption_variants", "bucket_step")
        _within(self, 0, 1, "caption_dropout")
        _at_least(self, 8, "resolution", "max_sequence_length")
        _within(self, 8, 2**14 + 1, "resolution")  # one such image takes 3 GB
        _at_least(self, 3, "tokenizer_max_length")
        if self.train_data_dir and self.dataset_name:
            raise UserError("give either --train_data_dir or --dataset_name, not both")
        if self.streaming and not self.dataset_name:
            raise UserError("--streaming is only used together with --dataset_name")
        if self.keep_tags and not self.shuffle_tags:
            raise UserError("--keep_tags is only used together with --shuffle_tags")
        if self.bucket_step and not self.buckets:
            raise UserError("--bucket_step is only used together with --buckets")


@dataclass(frozen=True)
class Lora:
    """The adapter."""

    rank: int = 4
    """Rank r of the update B·A."""
    lora_alpha: float | None = None
    """The update is scaled by alpha / rank. Default: alpha = rank, so a scale of 1."""
    lora_dropout: float = 0.0
    """Probability that an input of lora_A is dropped."""
    lora_layers: tuple[str, ...] = ()
    """Layers of the denoiser to adapt, by the ends of their names (commas work too). Default: the family's."""
    train_text_encoder: bool = False
    """Adapt the text encoder too."""
    init: str = "gaussian"
    """Start of the adapter, which never changes what the model does at first: {inits}."""
    init_args: tuple[str, ...] = ()
    """Settings of the start itself as name value pairs, e.g. gamma 64. A wrong name lists the right ones."""

    def __post_init__(self) -> None:
        # diffusers' scripts take one text with commas
        layers = tuple(name.strip() for part in self.lora_layers for name in part.split(",") if name.strip())
        object.__setattr__(self, "lora_layers", layers)
        _respell(self, "init", "inits")
        _pairs(self, "init_args")
        _at_least(self, 1, "rank")
        _within(self, 1, 2**14 + 1, "rank")  # more than any layer has
        _above(self, 0, "lora_alpha")
        _within(self, 0, 1, "lora_dropout")


@dataclass(frozen=True)
class Optim:
    """The optimizer and its learning rate."""

    optimizer: str = "adamw"
    """Optimizer: {optimizers}."""
    optimizer_args: tuple[str, ...] = ()
    """Settings of the optimizer itself as name value pairs, e.g. damping 0.03. A wrong name lists the right ones."""
    learning_rate: float | None = None
    """Learning rate. Default: the optimizer's own."""
    text_encoder_lr: float | None = None
    """Learning rate of the text encoder's LoRA. Default: --learning_rate."""
    scale_lr: bool = False
    """Multiply the learning rate by processes x accumulation x batch size."""
    lr_scheduler: Scheduler = "constant"
    """Course of the learning rate over the run."""
    lr_warmup_steps: int = 500
    """Optimizer steps of warm-up, for the schedules that have one."""
    lr_num_cycles: int = 1
    """Hard resets of cosine_with_restarts."""
    lr_power: float = 1.0
    """Exponent of polynomial."""
    adam_beta1: float | None = None
    """Decay of the first moment. Default: the optimizer's own, mostly 0.9."""
    adam_beta2: float | None = None
    """Decay of the second moment. Default: the optimizer's own, mostly 0.999."""
    adam_weight_decay: float | None = None
    """Weight decay, of whatever optimizer. Default: the optimizer's own, 0.01 for Adam-like ones and else 0."""
    adam_weight_decay_text_encoder: float | None = None
    """Weight decay of the text encoder's LoRA. Default: --adam_weight_decay."""
    adam_epsilon: float | None = None
    """Added to the root of the second moment. Default: the optimizer's own, mostly 1e-8."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it; 0 switches clipping off."""

    def __post_init__(self) -> None:
        _respell(self, "optimizer", "optimizers")
        _at_least(self, 0, "learning_rate", "text_encoder_lr", "lr_warmup_steps", "max_grad_norm")
        _at_least(self, 0, "adam_weight_decay", "adam_weight_decay_text_encoder", "adam_epsilon")
        _at_least(self, 1, "lr_num_cycles")
        _finite(self, "lr_power")
        _within(self, 0, 1, "adam_beta1", "adam_beta2")
        _pairs(self, "optimizer_args")


@dataclass(frozen=True)
class Train:
    """Length of the run, its loss, its folder and its checkpoints."""

    output_dir: Path | None = None
    """The run's folder. Default: outputs/<subject or data folder>-<optimizer>."""
    overwrite_output_dir: bool = False
    """Begin anew in a folder that holds a run; the old run is removed."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint: a folder, or "latest" of --output_dir."""
    seed: int = 0
    """Decides everything random; the same seed gives the same run."""
    train_batch_size: int | None = None
    """Images per process and forward pass. Default: 4 in all, shared by the processes."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    num_train_epochs: int = 1
    """Passes over the images, if --max_train_steps is not given."""
    max_train_steps: int | None = None
    """Optimizer steps of the run."""
    checkpointing_steps: int = 500
    """A checkpoint every N steps, and at the end; 0 for none."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept; the oldest goes first."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the loss (arXiv 2303.09556); 5.0 is the paper's value."""
    noise_offset: float = 0.0
    """Adds an offset per image and channel to the noise, for darker darks and brighter brights."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the denoiser predicts. Default: what the model's scheduler says."""
    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    """How rectified-flow models draw and weight their times."""
    logit_mean: float = 0.0
    """Mean of logit_normal."""
    logit_std: float = 1.0
    """Standard deviation of logit_normal."""
    mode_scale: float = 1.29
    """Scale of mode."""
    guidance_scale: float = 3.5
    """Guidance embedding that guidance-distilled models (FLUX.1-dev) are trained with."""
    parity_check: bool = True
    """At the end, compare what the saved LoRA does in a freshly loaded pipeline (all of it in memory) with training."""
    report_to: Tracker | None = None
    """Tracker besides the run's own metrics.jsonl; all: every one that is installed."""
    logging_dir: Path = Path("logs")
    """Folder of the trackers, inside the run's folder."""
    push_to_hub: bool = False
    """Upload the result to the hub."""
    hub_token: str | None = None
    """Token for that; by default the one stored by `hf auth login`."""
    hub_model_id: str | None = None
    """Repository for that. Default: the run folder's name."""
    local_rank: int = -1
    """Accepted and unused: accelerate sets it."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps")
        _at_least(self, 0, "seed", "checkpointing_steps", "noise_offset")
        _at_least(self, 1, "checkpoints_total_limit")
        _above(self, 0, "snr_gamma", "logit_std")
        _finite(self, "logit_mean", "mode_scale", "guidance_scale")


@dataclass(frozen=True)
class RunConfig:
    """Train a LoRA on images of one subject (DreamBooth).

    These are all options of one training run; ``programs`` has other programs. The first paragraph is in ``--help``.

    Attributes:
        COMMAND: the program's name.
        PRESET: file in ``tiny/`` with what is set for the embedded model.
        NOT_OFFERED: options that belong to another program, with what to do here instead.
    """

    COMMAND: ClassVar[str] = "dreambooth"
    PRESET: ClassVar[str] = "preset.yaml"
    NOT_OFFERED: ClassVar[dict[str, str]] = {
        "train_data_dir": "use --instance_data_dir, or train on captions with dreamlora text-to-image "
        "(in a comparison: --program text-to-image)",
        "style": "dreamlora text-to-image (in a comparison: --program text-to-image) has built-in styles; here there "
        "is --subject",
    }

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    lora: Lora = field(default_factory=Lora)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)
    eval: Eval = field(default_factory=Eval)
    encoders: Encoders = field(default_factory=Encoders)

    def __post_init__(self) -> None:
        data = self.data
        if data.instance_data_dir and data.dataset_name:
            raise UserError("give either --instance_data_dir or --dataset_name, not both")
        if data.with_prior_preservation and not data.class_prompt:
            raise UserError('--with_prior_preservation needs --class_prompt, such as "a photo of a dog"')
        if data.class_data_dir and not data.with_prior_preservation:
            raise UserError("--class_data_dir is only used together with --with_prior_preservation")
        if self.optim.text_encoder_lr is not None and not self.lora.train_text_encoder:
            raise UserError("--text_encoder_lr is only used together with --train_text_encoder")
        own = [flag for flag in IMAGES_FOR_METRICS if getattr(self.eval, flag) is not None]
        if own and not self.eval.eval_metrics:
            raise UserError(f"--{own[0]} is only used together with --eval_metrics")
        if self.eval.eval_metrics and self.sample.sample_steps == 0 and not own:
            raise UserError(
                "--eval_metrics: with --sample_steps 0 there are no images to measure: give --eval_metrics_steps too"
            )

    @property
    def draws_for_metrics(self) -> bool:
        """Whether the metrics have images of their own, which are drawn besides the samples."""
        own = self.eval
        if own.eval_prompts is not None or own.eval_num_images is not None:
            return True
        return own.eval_metrics_steps not in (None, self.sample.sample_steps)

    @property
    def embedded(self) -> bool:
        """Whether the embedded model is trained."""
        return self.model.pretrained_model_name_or_path == EMBEDDED_MODEL


def as_flat_dict(config: RunConfig) -> dict[str, Any]:
    """Every option that its program offers, by flag, in the order of ``--help``; paths as text (for YAML)."""
    flat: dict[str, Any] = {}
    for group in fields(config):
        part = getattr(config, group.name)
        for option in (option for option in fields(part) if option.name not in config.NOT_OFFERED):
            value = getattr(part, option.name)
            flat[option.name] = (
                list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            )
    return flat
