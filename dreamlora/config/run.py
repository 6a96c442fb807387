"""What can be set: every option once, with its default, its help text and its range.

The docstring under a field *is* the text of ``--help``. Names and meanings are those of diffusers' training scripts
wherever those have the option. ``None`` means "decided later": from the model, an embedded model's preset or the
length of the run, as the text says. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from dreamlora import tiny
from dreamlora.config.data import Data, DataSet
from dreamlora.config.lora import Lora
from dreamlora.config.measuring import IMAGES_FOR_METRICS, Encoders, Eval, Sample
from dreamlora.config.model import Model
from dreamlora.config.new_tokens import NewTokens
from dreamlora.config.publishing import Label
from dreamlora.config.ranges import above as _above
from dreamlora.config.ranges import at_least as _at_least
from dreamlora.config.ranges import finite as _finite
from dreamlora.config.ranges import folder_names as _folder_names
from dreamlora.config.ranges import pairs as _pairs
from dreamlora.config.ranges import respell as _respell
from dreamlora.config.ranges import respell_all as _respell_all
from dreamlora.config.ranges import steps_or_share as _steps_or_share
from dreamlora.config.ranges import within as _within
from dreamlora.config.times import check_times
from dreamlora.errors import UserError

Scheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
AUTO: Final = "auto"
"""A learning rate that a test before the first step decides."""
Tracker = Literal[
    "all", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # fmt: skip
"""Those that accelerate knows."""


@dataclass(frozen=True)
class Optim:
    """The optimizer and its learning rate."""

    optimizer: str = "adamw"
    """Optimizer: {optimizers}."""
    optimizer_args: tuple[str, ...] = ()
    """Settings of the optimizer itself as name value pairs, e.g. damping 0.03. A wrong name lists the right ones."""
    learning_rate: float | Literal["auto"] | None = None
    """Learning rate; auto: the one that a range test finds before the first step, by the evaluation loss. Default: the
    optimizer's own."""
    text_encoder_lr: float | None = None
    """Learning rate of the text encoder's LoRA. Default: --learning_rate."""
    lora_units: Literal["plain", "start"] = "plain"
    """Units of the LoRA's learning rates: plain, each entry of A and B as it is; or start, in which a rate depends
    neither on --lora_alpha nor on how A starts, and hardly on --rank. The optimizers' own rates differ between them."""
    scale_lr: bool = False
    """Multiply the learning rate by processes x accumulation x batch size."""
    lr_scheduler: Scheduler = "constant"
    """Course of the learning rate over the run."""
    lr_warmup_steps: float = 500
    """Optimizer steps of warm-up, for the schedules that have one; below 1 a share of the run, such as 0.1."""
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
    ema_decay: float = 0.0
    """Decay, such as 0.999, of a moving average of the LoRA, which is then what is measured, drawn and saved; 0: none.
    The first steps count less of it: (1 + n) / (10 + n), n steps before."""

    def __post_init__(self) -> None:
        _respell(self, "optimizer", "optimizers")
        _at_least(self, 0, "learning_rate", "text_encoder_lr", "lr_warmup_steps", "max_grad_norm")
        _at_least(self, 0, "adam_weight_decay", "adam_weight_decay_text_encoder", "adam_epsilon")
        _steps_or_share(self, "lr_warmup_steps")
        _at_least(self, 1, "lr_num_cycles")
        _finite(self, "lr_power")
        _within(self, 0, 1, "adam_beta1", "adam_beta2", "ema_decay")
        _pairs(self, "optimizer_args")
        if self.scale_lr and self.learning_rate == AUTO:
            raise UserError(
                "--scale_lr multiplies a learning rate that is given, and --learning_rate auto finds one: leave it out"
            )


@dataclass(frozen=True)
class Train:
    """Length of the run, its loss, its folder and its checkpoints."""

    dry_run: bool = False
    """Check all flags and data, print what becomes of every file of the data, and end: no model, nothing written."""
    output_dir: Path | None = None
    """The run's folder. Default: outputs/<subject or data folder>-<optimizer>."""
    overwrite_output_dir: bool = False
    """Begin anew in a folder that holds a run; the old run is removed."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint: a folder, or "latest" of --output_dir, which begins the run where there is none yet."""
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
    save_format: tuple[str, ...] = ()
    """Formats to write the result and the best checkpoint in, beside diffusers' own: {lora.formats}."""
    checkpointing_steps: int = 500
    """A checkpoint every N steps, and at the end; 0 for none. A run that is stopped writes one, too."""
    checkpoints_total_limit: int | None = None
    """Checkpoints kept; the oldest goes first."""
    snr_gamma: float | None = None
    """Min-SNR weighting of the loss (arXiv 2303.09556); 5.0 is the paper's value."""
    debiased_estimation_loss: bool = False
    """Weigh the loss by debiased estimation (arXiv 2310.08442) instead."""
    noise_offset: float = 0.0
    """Adds an offset per image and channel to the noise, for darker darks and brighter brights."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the denoiser predicts. Default: what the model's scheduler says."""
    rescale_betas_zero_snr: bool = False
    """Zero terminal SNR (arXiv 2305.08891), in training and samples. Always so where the model's scheduler says it."""
    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """How an error is counted in training; the evaluation loss stays the mean square."""
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    """How the threshold of huber and smooth_l1 depends on the noise: least where it is most, or constant."""
    huber_c: float = 0.1
    """That threshold, for pure noise."""
    huber_scale: float = 1.0
    """Factor of the threshold; not with snr."""
    unmasked_weight: float = 0.0
    """How much of the loss the places keep that a mask leaves out, from 0 to 1."""
    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    """How rectified-flow models draw (logit_normal, mode) or weight (sigma_sqrt, cosmap) their times."""
    timestep_sampling: Literal["uniform", "logit_normal", "mode", "sigmoid", "beta", "table"] | None = None
    """How rectified-flow models draw their times. Default: as --weighting_scheme says, else the family's own way."""
    timestep_shift: str | None = None
    """Move these times towards noise: none, scheduler (as in samples) or a factor. Default: the family's own."""
    logit_mean: float = 0.0
    """Mean of logit_normal; above 0 prefers clear images."""
    logit_std: float = 1.0
    """Standard deviation of logit_normal."""
    mode_scale: float = 1.29
    """Scale of mode."""
    sigmoid_scale: float = 1.0
    """Scale of sigmoid, which is logit_normal with mean 0 and this standard deviation."""
    timestep_beta: tuple[float, float] = (2.0, 2.0)
    """Both parameters of beta, the distribution of sigma (1 is noise): its mean is a / (a + b)."""
    timestep_table: tuple[str, ...] = ()
    """Shares of the times in equal parts of sigma from image to noise, for table: numbers, or a text file of them."""
    precondition_outputs: int = 0
    """1 weights the loss of rectified flows by sigma squared, as diffusers' SD3 script does by default."""
    guidance_scale: float = 3.5
    """Guidance embedding that guidance-distilled models (FLUX.1-dev) are trained with."""
    parity_check: bool = True
    """At the end, compare what the saved LoRA does in a stock pipeline with training."""
    parity: Literal["lean", "full"] = "lean"
    """How: lean loads the LoRA's file into the base model that is in memory; full loads a fresh pipeline, all of it at
    once, which may need more memory than training."""
    report_to: Tracker | None = None
    """Tracker besides the run's own metrics.jsonl; all: every one that is installed."""
    logging_dir: Path = Path("logs")
    """Folder of the trackers, inside the run's folder."""
    tracker_project_name: str | None = None
    """Project that the tracker puts the run into. Default: dreamlora."""
    tracker_run_name: str | None = None
    """What the tracker calls the run. Default: the run folder's name."""
    push_to_hub: bool = False
    """Upload the result to the hub."""
    hub_token: str | None = None
    """Token for that; by default the one stored by `hf auth login`."""
    hub_model_id: str | None = None
    """Repository for that. Default: the run folder's name."""
    local_rank: int = -1
    """Accepted and unused: accelerate sets it."""

    def __post_init__(self) -> None:
        _respell_all(self, "save_format", "lora.formats")
        _at_least(self, 1, "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps")
        _at_least(self, 0, "seed", "checkpointing_steps", "noise_offset")
        _within(self, 0, 2**63, "seed")
        _within(self, 1, 10**9 + 1, "max_train_steps")
        _at_least(self, 1, "checkpoints_total_limit")
        _above(self, 0, "snr_gamma", "logit_std", "sigmoid_scale", "huber_c", "huber_scale")
        _finite(self, "logit_mean", "mode_scale", "guidance_scale")
        _within(self, 0, 2, "precondition_outputs")
        _folder_names(self, "tracker_project_name", "tracker_run_name")
        check_times(self)


@dataclass(frozen=True)
class RunConfig:
    """Train a LoRA on images of one subject (DreamBooth).

    These are all options of one training run; ``programs`` has other programs. The first paragraph is in ``--help``.

    Attributes:
        COMMAND: the program's name.
        PRESET: file in ``tiny/`` with what is set for the embedded models.
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
    tokens: NewTokens = field(default_factory=NewTokens)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    sample: Sample = field(default_factory=Sample)
    eval: Eval = field(default_factory=Eval)
    encoders: Encoders = field(default_factory=Encoders)
    about: Label = field(default_factory=Label)
    given: frozenset[str] = field(default=frozenset(), compare=False, metadata={"option": False})
    """Options that have their value from a person's flag or file, not from a preset or a default."""
    sources: tuple[Mapping[str, Any], ...] = field(default=(), compare=False, repr=False, metadata={"option": False})
    """What the flags, the files and the preset say, by option; of an option the first that says it counts."""

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
        if self.lora.text_encoder_rank is not None and not self.lora.train_text_encoder:
            raise UserError("--text_encoder_rank is only used together with --train_text_encoder")
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
    def encodes_in_training(self) -> bool:
        """Whether text encoders are a part of every step: a LoRA in them trains, or embeddings of new tokens do."""
        return self.lora.train_text_encoder or bool(self.tokens.new_tokens)

    @property
    def embedded(self) -> bool:
        """Whether an embedded model is trained."""
        return self.model.pretrained_model_name_or_path in tiny.MODELS


def as_flat_dict(config: RunConfig) -> dict[str, Any]:
    """Every option that its program offers, by flag, in the order of ``--help``; paths as text (for YAML)."""
    flat: dict[str, Any] = {}
    for part in (getattr(config, group.name) for group in fields(config) if group.metadata.get("option", True)):
        for option in (option for option in fields(part) if option.name not in config.NOT_OFFERED):
            value = getattr(part, option.name)
            flat[option.name] = as_yaml(value)
    return flat


def as_yaml(value: Any) -> Any:
    """An option's value in the types of YAML: lists for tuples, text for paths, mappings for entries."""
    if isinstance(value, tuple):
        return [as_yaml(part) for part in value]
    if isinstance(value, DataSet):
        return {name: as_yaml(part) for name, part in value.given().items()}
    return str(value) if isinstance(value, Path) else value
