"""What LoRAs were trained with, as far as their runs tell: whatever is not asked for otherwise is done as there."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dreamlora.cli import presets
from dreamlora.commands.outside import outside, way_in
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.config import EMBEDDED_MODEL, Model, RunConfig, Sample, instance_prompt_of
from dreamlora.errors import UserError
from dreamlora.interfaces import ModelSource, SampleDefaults
from dreamlora.models.loading import SCHEDULER, read_config, resolve_source
from dreamlora.models.parts import DTYPES
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.prompts import Subject, read_prompts, sample_prompts, with_subject
from dreamlora.sampling.sampler import SamplePlan, plan_of

COMPUTED_WITH = ("mixed_precision", "allow_tf32", "base_precision", "text_encoder_precision", "text_encoder_device")
"""Options of a run that decide what its model computes; the family's PROMPT_LENGTH is another."""
DRAWN_WITH = ("resolution", "num_inference_steps", "sample_guidance_scale", "negative_prompt")
"""Those that decide an image besides."""
MEASURED_WITH = ("guidance_scale",)
"""Those that decide the loss besides."""
_BASE, _VAE = "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"
_TAKEN_OVER = (
    *(_BASE, _VAE, "family", "revision", "variant", "offload_blocks"),
    *(*COMPUTED_WITH, *DRAWN_WITH, *MEASURED_WITH),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedRun:
    """A run that a LoRA is from.

    Attributes:
        folder: of the run.
        options: that it was trained with, by flag; those that are not to be opened are None.
        base: what exactly was trained (base_model.json); empty for runs that have not noted it.
        outside: options that name places outside the run's folder, which nobody has said may be opened.
    """

    folder: RunFolder
    options: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    outside: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.path.resolve().name

    @property
    def model(self) -> str | None:
        """The base model that its config.yaml names, whether it may be opened or not."""
        return self.outside.get(_BASE) or self.options.get(_BASE)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Those that it drew last, in their order; empty if it drew nothing."""
        rows = self.folder.sample_rows()
        last = max((row["step"] for row in rows), default=0)
        rows = sorted((row for row in rows if row["step"] == last), key=lambda row: row["prompt_index"])
        return tuple(dict.fromkeys(row["prompt"] for row in rows))


def run_of(path: Path, trusted: bool = False) -> TrainedRun | None:
    """The run whose folder this is, or lies around it.

    Args:
        trusted: whether what its config.yaml names outside its folder may be opened.
    """
    for folder in (path, *path.resolve().parents[:3]):
        run = RunFolder(folder)
        if run.holds_run():
            options = run.config()
            withheld = {} if trusted else outside(options, run.path)
            return TrainedRun(run, options | dict.fromkeys(withheld), run.base_model(), withheld)
    return None


def first_run(config: SampleConfig) -> TrainedRun | None:
    """That of the first ``--lora`` that has one; says what is taken over from it."""
    run = next((run for path in config.lora if (run := run_of(path, config.trust_runs))), None)
    if run:
        taken = {name: run.options.get(name) for name in _TAKEN_OVER if getattr(config, name, None) is None}
        words = ", ".join(f"{name} {value}" for name, value in taken.items() if value is not None)
        logger.info("taken over from %s: %s", run.folder.config_file, words or "nothing")
    return run


def source_of(config: SampleConfig, run: TrainedRun | None) -> ModelSource:
    """The base model, as the run had it: from the same commit, and with the same prediction type and schedule.

    Raises:
        UserError: there is no such model.
    """
    base = run.base if run and _takes_over(config, run) else {}
    options = run.options if run else {}
    return resolve_source(
        model_of(config, run),
        options.get("prediction_type"),
        base.get("vae_revision"),
        bool(options.get("rescale_betas_zero_snr")),
    )


def _takes_over(config: SampleConfig, run: TrainedRun) -> bool:
    """Whether the base model is that of the run."""
    return config.pretrained_model_name_or_path in (None, run.model)


def model_of(config: SampleConfig, run: TrainedRun | None) -> Model:
    """The base model: the one given, else the run's, else the embedded one.

    Raises:
        UserError: the run's lies outside its folder, and nobody has said that it may be opened.
    """
    settings = run.options if run else {}
    inherited = settings if run and _takes_over(config, run) else {}
    commit = run.base.get("revision") if run and inherited else None
    blocks = inherited.get("offload_blocks") if config.offload_blocks is None else config.offload_blocks
    for name in (_BASE, _VAE):
        if run and inherited and name in run.outside and getattr(config, name) is None:
            raise UserError(
                f"{run.name} was trained with --{name} {run.outside[name]}. No folder is opened because a run's "
                f"config.yaml names it: {way_in(name, run.outside[name])}"
            )
    return Model(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path or inherited.get(_BASE) or EMBEDDED_MODEL,
        family=config.family or inherited.get("family"),
        revision=config.revision or commit or inherited.get("revision"),
        variant=config.variant or inherited.get("variant"),
        pretrained_vae_model_name_or_path=config.pretrained_vae_model_name_or_path or inherited.get(_VAE),
        text_encoder_out_layers=tuple(inherited.get("text_encoder_out_layers") or ()),
        cache_dir=config.cache_dir,
        allow_pickle=config.allow_pickle,
        base_precision=config.base_precision or settings.get("base_precision"),
        text_encoder_precision=config.text_encoder_precision or settings.get("text_encoder_precision"),
        offload_blocks=blocks or 0,
        text_encoder_device=config.text_encoder_device or settings.get("text_encoder_device"),
    )


def settings_of(config: SampleConfig, run: TrainedRun | None) -> dict[str, Any]:
    """The run's options, by flag; without a run those that an embedded model draws and is measured with by itself."""
    if run:
        return run.options
    preset = presets.embedded({_BASE: config.pretrained_model_name_or_path}, RunConfig.PRESET)
    return {name: preset[name] for name in (*DRAWN_WITH, *MEASURED_WITH, "max_sequence_length") if name in preset}


def prompts_of(config: SampleConfig, run: TrainedRun | None) -> tuple[str, ...]:
    """The prompts given, else those that the run drew, else those that it would have drawn; with the subject in them.

    Raises:
        UserError: there are none, or no subject for a placeholder.
    """
    settings = run.options if run else {}
    subject = _subject(config, settings)
    if config.prompts:
        return tuple(subject.put_into(prompt, "--prompts") for prompt in config.prompts)
    if config.sample_prompts:
        return read_prompts(config.sample_prompts, subject)
    drawn = run.prompts if run and config.subject is None else ()
    if drawn:
        return drawn
    file = settings.get("sample_prompts")
    trained = Sample(
        sample_prompts=Path(file) if file and Path(file).exists() else None,
        validation_prompt=settings.get("validation_prompt"),
    )
    if not (trained.sample_prompts or trained.validation_prompt or subject.instance_prompt):
        raise UserError('which prompts? Give --prompts "a photo of sks dog" ..., or --sample_prompts FILE')
    return sample_prompts(trained, subject)


def _subject(config: SampleConfig, settings: dict[str, Any]) -> Subject:
    return Subject.of(instance_prompt_of(settings), settings.get("class_prompt"), name=config.subject)


def plan_for(
    config: SampleConfig, settings: dict[str, Any], defaults: SampleDefaults, prompts: tuple[str, ...]
) -> SamplePlan:
    """What was not given is as the run drew it, so that the images can be compared with the run's own.

    Raises:
        UserError: the negative prompt has a ``{}`` and there is no subject.
    """

    def given(name: str, otherwise: Any = None) -> Any:
        value = getattr(config, name)
        return settings.get(name, otherwise) if value is None else value

    sample = Sample(
        num_images_per_prompt=given("num_images_per_prompt", Sample.num_images_per_prompt),
        num_inference_steps=given("num_inference_steps"),
        sample_guidance_scale=given("sample_guidance_scale"),
        sample_seed=given("sample_seed", Sample.sample_seed),
        negative_prompt=given("negative_prompt"),
    )
    sample = with_subject(sample, _subject(config, settings))
    return plan_of(sample, defaults, prompts, given("resolution"), config.sample_batch_size)


def dtype_of(config: SampleConfig, settings: dict[str, Any], device: torch.device) -> torch.dtype:
    """Of denoiser and text encoders: what is given, else the run's, else what suits the device."""
    precision = config.mixed_precision or settings.get("mixed_precision")
    if precision in DTYPES:
        return DTYPES[precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def refuse_other_predictions(runs: Iterable[TrainedRun], source: ModelSource) -> None:
    """Nothing, if all runs were trained to predict the same.

    Raises:
        UserError: they were not: drawn or measured as the other, a LoRA gives nonsense.
    """
    asked = {run.name: tuple(map(run.options.get, _PREDICTED_WITH)) for run in runs}
    if len(set(asked.values())) < 2:
        return
    own = read_config(source, SCHEDULER)
    predictions = {name: _prediction(own, *options) for name, options in asked.items()}
    if len(set(predictions.values())) > 1:
        several = ", ".join(f"{name} to predict {prediction}" for name, prediction in predictions.items())
        raise UserError(
            f"--lora: these were trained for different things, {several}. No model draws both: "
            "give those that predict the same, and the others in a command of their own"
        )


_PREDICTED_WITH = ("prediction_type", "rescale_betas_zero_snr")


def _prediction(own: dict[str, Any], prediction_type: str | None, zero_snr: bool | None) -> str:
    """What is predicted, in words, where a run has said this and the scheduler's config its own."""
    words = str(prediction_type or own.get("prediction_type", "epsilon"))
    return f"{words} with zero terminal SNR" if zero_snr or own.get("rescale_betas_zero_snr") else words


def differences(
    run: TrainedRun, first: TrainedRun, config: SampleConfig, source: ModelSource, options: Sequence[str]
) -> list[str]:
    """What of a run is not as it is done here, in words: LoRAs are drawn and measured alike, as the first run was.

    Args:
        run: that a LoRA is from.
        first: whose options hold.
        config: whose flags win; what they say is no difference, as it was asked for.
        source: the base model.
        options: names of those that matter.
    """
    notes = []
    trained_on = run.base.get("id", source.model_id)
    if trained_on != source.model_id:
        notes.append(f"{run.name} was trained on {trained_on}, and is put into {source.model_id}")
    for name in options:
        theirs, used = run.options.get(name), first.options.get(name)
        if theirs != used and getattr(config, name, None) is None:
            notes.append(
                f"{run.name} was trained {_with(name, theirs)}, and is treated here as {first.name} was, "
                f"{_with(name, used)}"
            )
    return notes


def _with(name: str, value: Any) -> str:
    return f"without --{name}" if value is None else f"with --{name} {value}"
