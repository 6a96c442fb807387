"""Values that a person can hardly mean, and flags that do nothing in a run: told once, at its start. No torch here.

Only what was given is doubted: defaults, and what a preset sets, are as they should be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from dreamlora import registry
from dreamlora.config.rates import in_start_units, own_rate
from dreamlora.config.run import RunConfig, as_flat_dict
from dreamlora.config.times import sampling_of

RATE_FACTOR = 100
"""So many times larger or smaller than an optimizer's own, a rate is doubted, but for plug-ins with a ``USUAL_LR``."""


@dataclass(frozen=True)
class Facts:
    """What a run knows besides its options.

    Attributes:
        resolution: the model's own, in pixels.
        epoch: samples in one passage through the images.
        batch: samples of an optimizer step.
        family_options: of those that not all families use, the ones that count for this model.
        prediction_type: what the model's scheduler says of it, if it says that.
        zero_snr: whether it says that the schedule ends in pure noise.
    """

    resolution: int
    epoch: int
    batch: int
    family_options: Collection[str]
    prediction_type: str | None = None
    zero_snr: bool = False


class _Idle(NamedTuple):
    """Flags that do nothing unless something else is so."""

    flags: tuple[str, ...]
    counts: Callable[[RunConfig], Any]
    otherwise: str


def _draws(c: RunConfig) -> bool:
    return bool(c.sample.sample_steps or (c.draws_for_metrics and not c.eval.eval_prompts))


def _draws_times_by(density: str) -> Callable[[RunConfig], bool]:
    return lambda c: sampling_of(c.train) == density


def _has_threshold(c: RunConfig) -> bool:
    return c.train.loss_type in ("huber", "smooth_l1")


def _draws_built_in(c: RunConfig) -> bool:
    return not c.data.brings_images


def _epochs_count(c: RunConfig) -> bool:
    """Whether anything goes by the length of an epoch: the embedded models' presets have a number of steps."""
    by_steps = "max_train_steps" in c.given or (c.embedded and "num_train_epochs" not in c.given)
    return not by_steps or c.sample.validation_epochs is not None


_IDLE = (
    _Idle(
        ("lr_num_cycles",),
        lambda c: c.optim.lr_scheduler == "cosine_with_restarts",
        "only --lr_scheduler cosine_with_restarts has restarts",
    ),
    _Idle(
        ("lr_power",), lambda c: c.optim.lr_scheduler == "polynomial", "only --lr_scheduler polynomial has an exponent"
    ),
    _Idle(
        ("lr_warmup_steps",),
        lambda c: c.optim.lr_scheduler != "constant" or not c.optim.lr_warmup_steps,
        "--lr_scheduler constant has no warm-up; constant_with_warmup has one",
    ),
    _Idle(
        ("lora_units",),
        lambda c: in_start_units(c.optim),
        "steps of --optimizer lora_rite, lora_muon and lora_tsd depend neither on alpha nor on the scale of the start",
    ),
    _Idle(
        ("logit_mean", "logit_std"),
        _draws_times_by("logit_normal"),
        "they belong to --timestep_sampling (or --weighting_scheme) logit_normal",
    ),
    _Idle(("mode_scale",), _draws_times_by("mode"), "it belongs to --timestep_sampling (or --weighting_scheme) mode"),
    _Idle(("sigmoid_scale",), _draws_times_by("sigmoid"), "it belongs to --timestep_sampling sigmoid"),
    _Idle(("timestep_beta",), _draws_times_by("beta"), "it belongs to --timestep_sampling beta"),
    _Idle(("timestep_table",), _draws_times_by("table"), "it belongs to --timestep_sampling table"),
    _Idle(
        ("huber_schedule", "huber_c", "huber_scale"), _has_threshold, "they belong to --loss_type huber and smooth_l1"
    ),
    _Idle(
        ("huber_scale",),
        lambda c: not _has_threshold(c) or c.train.huber_schedule != "snr",
        "--huber_schedule snr has no scale",
    ),
    _Idle(
        ("unmasked_weight",),
        lambda c: any(one.mask_data_dir or one.alpha_mask for one in c.data.each()),
        "there are masks only with --mask_data_dir or --alpha_mask",
    ),
    _Idle(("alpha_mask",), lambda c: c.data.brings_images, "the built-in images are not transparent"),
    _Idle(
        ("image_column", "dataset_config_name"),
        lambda c: any(one.dataset_name for one in c.data.each()),
        "they are for --dataset_name",
    ),
    _Idle(("subject", "style"), _draws_built_in, "images were given"),
    _Idle(
        ("num_class_images", "prior_loss_weight", "prior_generation_precision"),
        lambda c: c.data.with_prior_preservation,
        "there are class images only with --with_prior_preservation",
    ),
    _Idle(
        ("adam_weight_decay_text_encoder",),
        lambda c: c.lora.train_text_encoder,
        "the text encoder trains only with --train_text_encoder",
    ),
    _Idle(("num_train_epochs",), lambda c: "max_train_steps" not in c.given, "--max_train_steps decides"),
    _Idle(("validation_epochs",), lambda c: "sample_steps" not in c.given, "--sample_steps decides"),
    _Idle(
        ("num_images_per_prompt",), lambda c: "num_validation_images" not in c.given, "--num_validation_images decides"
    ),
    _Idle(
        ("sample_prompts", "validation_prompt", "num_images_per_prompt"),
        _draws,
        "with --sample_steps 0 no samples are drawn",
    ),
    _Idle(
        ("eval_batch_size", "final_eval_items"), lambda c: c.eval.eval_steps, "with --eval_steps 0 nothing is measured"
    ),
    _Idle(
        ("clip_model", "dino_model", "inception_weights"),
        lambda c: c.eval.eval_metrics,
        "only --eval_metrics needs such a model",
    ),
    _Idle(("init_lora_weight_name",), lambda c: c.lora.init_lora, "it belongs to --init_lora"),
    _Idle(("training_adapter_weight_name",), lambda c: c.lora.training_adapter, "it belongs to --training_adapter"),
    _Idle(("caption_variants",), lambda c: c.data.shuffle_tags, "it belongs to --shuffle_tags"),
    _Idle(("crop_variants",), lambda c: not c.data.center_crop, "with --center_crop an image has one crop"),
    _Idle(("repeats",), lambda c: c.data.datasets or _epochs_count(c), "the number of steps decides, not the epochs"),
    _Idle(
        ("checkpoints_total_limit",),
        lambda c: c.train.checkpointing_steps,
        "with --checkpointing_steps 0 there are no checkpoints",
    ),
    _Idle(("hub_token", "hub_model_id"), lambda c: c.train.push_to_hub, "nothing is uploaded without --push_to_hub"),
    _Idle(
        ("logging_dir", "tracker_project_name", "tracker_run_name"),
        lambda c: c.train.report_to,
        "there is a tracker only with --report_to",
    ),
)

_OF_FAMILIES = {
    **dict.fromkeys(
        ("snr_gamma", "debiased_estimation_loss", "prediction_type", "rescale_betas_zero_snr"),
        "diffusion models, and this is a rectified flow",
    ),
    **dict.fromkeys(
        (
            *("weighting_scheme", "logit_mean", "logit_std", "mode_scale", "precondition_outputs"),
            *("timestep_sampling", "timestep_shift", "sigmoid_scale", "timestep_beta", "timestep_table"),
        ),
        "rectified flows, and this is a diffusion model",
    ),
    "guidance_scale": "models with a guidance embedding (for samples: --sample_guidance_scale)",
    "negative_prompt": "samples with classifier-free guidance (see --sample_guidance_scale)",
    "tokenizer_max_length": "models whose prompts CLIP alone reads",
    "max_sequence_length": "models whose prompts T5 or a language model reads",
    "text_encoder_out_layers": "models whose prompts are some layers' states of a language model",
}
"""What options are for that not all families use."""

_OF_OPTIMIZERS = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}
"""Settings of optimizers that have flags of their own."""


class _Usual(NamedTuple):
    """From where to where a value is common; beyond, it is doubted."""

    low: float
    high: float
    usual: str


_USUAL = {
    "adam_beta1": _Usual(0.1, 0.99, "0.9"),
    "adam_beta2": _Usual(0.5, 0.99999, "0.99 to 0.999"),
    "adam_epsilon": _Usual(0, 1e-3, "1e-8"),
    "adam_weight_decay": _Usual(0, 0.5, "0 to 0.1"),
    "adam_weight_decay_text_encoder": _Usual(0, 0.5, "0 to 0.1"),
    "caption_dropout": _Usual(0, 0.5, "0.05 to 0.2"),
    "caption_variants": _Usual(1, 64, "4"),
    "crop_variants": _Usual(1, 64, "4"),
    "dataloader_num_workers": _Usual(0, 64, "0 to 8"),
    "eval_batch_size": _Usual(1, 256, "8"),
    "eval_num_images": _Usual(1, 64, "1 to 4"),
    "gradient_accumulation_steps": _Usual(1, 256, "1 to 16"),
    "guidance_scale": _Usual(0, 30, "1 to 4"),
    "huber_c": _Usual(1e-3, 1, "0.1"),
    "huber_scale": _Usual(0.01, 100, "1"),
    "logit_mean": _Usual(-5, 5, "0"),
    "logit_std": _Usual(0.05, 5, "1"),
    "lora_dropout": _Usual(0, 0.5, "0 to 0.1"),
    "loss_weight": _Usual(0.01, 10, "1"),
    "lr_power": _Usual(0.1, 10, "1 or 2"),
    "max_grad_norm": _Usual(0, 100, "1"),
    "max_train_steps": _Usual(1, 1e6, "some hundreds to some thousands"),
    "mode_scale": _Usual(-1, 2, "1.29"),
    "noise_offset": _Usual(0, 0.5, "0.05 to 0.1"),
    "num_class_images": _Usual(4, 5000, "100 to 300"),
    "num_images_per_prompt": _Usual(1, 64, "1 to 4"),
    "num_inference_steps": _Usual(2, 250, "20 to 50"),
    "num_train_epochs": _Usual(1, 1e5, "some dozens to some hundreds"),
    "num_validation_images": _Usual(1, 64, "1 to 4"),
    "prior_loss_weight": _Usual(0.01, 10, "1"),
    "repeats": _Usual(1, 1000, "1 to 20"),
    "sample_batch_size": _Usual(1, 256, "4"),
    "sample_guidance_scale": _Usual(0, 30, "3 to 9"),
    "sigmoid_scale": _Usual(0.05, 5, "1"),
    "snr_gamma": _Usual(0.5, 20, "5"),
}
"""Numbers of which any value is allowed, but some can hardly be meant; by flag, or key of an entry of ``datasets``."""
_ANY = _Usual(float("-inf"), float("inf"), "any")


def doubts(config: RunConfig, facts: Facts) -> list[str]:
    """What to tell about a run, one sentence each.

    Args:
        config: with all options decided.
        facts: what decides besides.
    """
    return [
        *_without_effect(config, facts),
        *_unusual(config),
        *_rates(config),
        *_relations(config, facts),
        *_predictions(config, facts),
    ]


def _without_effect(config: RunConfig, facts: Facts) -> Iterator[str]:
    idle = {flag: why for flags, counts, why in _IDLE if not counts(config) for flag in flags}
    for flag, audience in _OF_FAMILIES.items():
        if flag not in facts.family_options:
            idle[flag] = f"it is for {audience}"
    given = _differing(config)
    settings = {setting.name for setting in fields(_optimizer(config).Options)}
    for flag, setting in _OF_OPTIMIZERS.items():
        if setting not in settings:
            idle[flag] = f"--optimizer {config.optim.optimizer} has no {setting}"
    yield from (f"--{flag} has no effect: {why}" for flag, why in idle.items() if flag in given)


def _unusual(config: RunConfig) -> Iterator[str]:
    values = as_flat_dict(config)
    given = [(f"--{flag}", flag, values.get(flag)) for flag in _USUAL if flag in config.given]
    given += [
        (f"{flag} of {entry.name}", flag, value)
        for entry in config.data.datasets
        for flag, value in entry.given().items()
    ]
    for name, flag, value in given:
        low, high, usual = _USUAL.get(flag, _ANY)
        if isinstance(value, int | float) and not low <= value <= high:
            yield f"{name} {_as_typed(value)} is far from what is usual ({usual})"


def _rates(config: RunConfig) -> Iterator[str]:
    method, optim = _optimizer(config), config.optim
    own, units = own_rate(optim), " in units of the start" if in_start_units(optim) else ""
    for flag in ("learning_rate", "text_encoder_lr"):
        rate = getattr(optim, flag)
        if flag not in config.given or rate is None or own is None:
            continue
        low, high = getattr(method, "USUAL_LR", (own / RATE_FACTOR, own * RATE_FACTOR))
        if not rate:
            yield f"--{flag} 0: what it belongs to learns nothing"
        elif not low < rate < high:
            yield (
                f"--{flag} {_as_typed(rate)} is far from what --optimizer {optim.optimizer} needs: its own default is "
                f"{_as_typed(own)}{units}, and rates of different optimizers are in different units"
            )
    if getattr(method, "OWN_SCHEDULE", False) and "lr_scheduler" in config.given and optim.lr_scheduler != "constant":
        yield f"--lr_scheduler {optim.lr_scheduler}: {optim.optimizer} averages in place of a schedule: leave it out"


def _relations(config: RunConfig, facts: Facts) -> Iterator[str]:
    """Values that do not go with others, or with the model and the images."""
    given, lora, steps = config.given, config.lora, config.train.max_train_steps or 0
    alpha = lora.lora_alpha
    scale = 1.0 if alpha is None else lora.scale(lora.rank, alpha)
    if alpha is not None and scale != 1 and ("lora_alpha" in given or lora.init_lora is None):
        root = " and --use_rslora" if lora.use_rslora else ""
        told = f"--lora_alpha {_as_typed(alpha)} with --rank {lora.rank}{root} scales the LoRA by {_as_typed(scale)}"
        remedy = f"Give --lora_alpha {_as_typed(lora.rank**0.5)}" if lora.use_rslora else "Leave --lora_alpha out"
        yield (
            f"{told}: diffusers reads that from the file, programs that look for alphas among its tensors (ComfyUI and "
            f"others) apply it at a scale of 1. {remedy} if the LoRA is for those"
        )
        if not 0.05 <= scale <= 8:
            yield f"{told}, which is far from what is usual (0.5 to 2)"
    sides = [("--resolution", config.data.resolution)] if "resolution" in given else []
    sides += [(f"resolution of {entry.name}", entry.resolution) for entry in config.data.datasets]
    for name, side in sides:
        if side and not facts.resolution / 2 <= side <= facts.resolution * 2:
            yield f"{name} {side} is far from the {facts.resolution} pixels that this model was trained with"
    if {"train_batch_size", "gradient_accumulation_steps"} & given and facts.batch > facts.epoch:
        yield (
            f"a step of {facts.batch} samples is more than the {facts.epoch} of an epoch, and sees images twice: "
            "--train_batch_size, --gradient_accumulation_steps and the processes multiply"
        )
    warmup = config.optim.lr_warmup_steps
    if {"lr_warmup_steps", "lr_scheduler"} & given and config.optim.lr_scheduler != "constant" and warmup >= steps:
        yield f"--lr_warmup_steps {warmup} covers all {steps} steps: the learning rate will not reach its value"
    for flag in ("checkpointing_steps", "sample_steps", "eval_steps", "eval_metrics_steps"):
        every = as_flat_dict(config)[flag]
        if flag in given and (every or 0) > steps:
            yield f"--{flag} {every} is more than the {steps} steps of the run: nothing happens before its end"
    if "lr_num_cycles" in given and config.optim.lr_num_cycles > steps:
        yield f"--lr_num_cycles {config.optim.lr_num_cycles} is more than the {steps} steps of the run"


_NAMES_V = re.compile(r"(?<![a-z])v[-_ ]?(pred|param)")
_NAMES_EPSILON = re.compile(r"(?<![a-z])eps(ilon)?(?![a-z])|(?<![a-z])eps(ilon)?[-_ ]?pred")


def _predictions(config: RunConfig, facts: Facts) -> Iterator[str]:
    """What a model is named after and what its scheduler says: of converted folders the second is often wrong."""
    if "prediction_type" not in facts.family_options:
        return
    model, train = config.model.pretrained_model_name_or_path, config.train
    predicted = train.prediction_type or facts.prediction_type or "epsilon"
    zero_snr = train.rescale_betas_zero_snr or facts.zero_snr
    by = "--prediction_type" if train.prediction_type else "its scheduler_config.json"
    name = model.lower()
    if predicted == "epsilon" and _NAMES_V.search(name):
        more = "" if zero_snr else ", most of them with --rescale_betas_zero_snr (NoobAI's are so)"
        yield (
            f"{model} is named like a model that predicts v, and {by} says epsilon: trained as the wrong one, a LoRA "
            f"is of no use. Models that predict v need --prediction_type v_prediction{more}"
        )
    elif predicted == "v_prediction" and _NAMES_EPSILON.search(name) and not _NAMES_V.search(name):
        yield (
            f"{model} is named like a model that predicts epsilon, and {by} says v_prediction: trained as the wrong "
            "one, a LoRA is of no use. Models that predict noise need --prediction_type epsilon"
        )
    elif predicted == "epsilon" and facts.zero_snr:
        yield (
            "the model's scheduler_config.json says rescale_betas_zero_snr, which goes with models that predict v, and "
            f"{by} says epsilon: is it one of these (--prediction_type v_prediction)?"
        )


def _differing(config: RunConfig) -> set[str]:
    """Options that were given and have another value than by default, which a saved config names too."""
    usual, values = as_flat_dict(type(config)()), as_flat_dict(config)
    return {flag for flag in config.given if values.get(flag) != usual.get(flag)}


def _optimizer(config: RunConfig) -> Any:
    return registry.load("optimizers", config.optim.optimizer)


def _as_typed(number: float) -> str:
    return f"{number:g}"
