"""What ``sample`` and ``evaluate`` share: which LoRAs are put into which model, and how it draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.config import EMBEDDED_MODEL, Model, Sample
from dreamlora.errors import UserError
from dreamlora.interfaces import Family
from dreamlora.lora.files import read_lora, same_lora
from dreamlora.models.parts import DTYPES
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.prompts import Subject, read_prompts, sample_prompts
from dreamlora.sampling.sampler import SamplePlan, plan_of


@dataclass(frozen=True)
class Row:
    """One row to draw: a LoRA at a scale; the base model if ``lora`` is None."""

    label: str
    lora: Path | None = None
    scale: float = 0.0


def rows_of(config: SampleConfig) -> list[Row]:
    """The base model, then every LoRA at every scale; run folders give their checkpoints if that is asked for.

    Raises:
        UserError: a LoRA is missing or damaged.
    """
    rows = [Row("base model")]
    for path in config.lora:
        for label, file in _files_of(path, config):
            for scale in config.lora_scales:
                rows.append(Row(label if scale == 1 else f"{label}\nscale {scale:g}", file, scale))
    return rows


def _files_of(path: Path, config: SampleConfig) -> list[tuple[str, Path]]:
    """LoRA files of one ``--lora`` with their labels; a final LoRA that equals the last checkpoint is left out."""
    run = RunFolder(path)
    steps = run.checkpoint_steps() if config.checkpoints else []
    name = path.resolve().stem if path.is_file() else path.resolve().name
    found = [(f"{name}\nstep {step:,}", read_lora(run.checkpoint_dir(step)).path) for step in steps]
    if config.best and run.holds_run():
        found.append(_best_of(run, name))
    elif run.path.name == "best" and (parent := RunFolder(path.resolve().parent)).selection():
        return [_best_of(parent, parent.path.name)]
    if steps and not run.lora_file.exists():  # a run that is not finished
        return found
    final = read_lora(path).path
    if not steps or not same_lora(final, found[len(steps) - 1][1]):
        found.append((f"{name}\nfinal" if found else name, final))
    return found


def _best_of(run: RunFolder, name: str) -> tuple[str, Path]:
    step = run.selection().get("step")
    if step is None:
        raise UserError(f"--best: no checkpoint was selected in {run.path} (there is no {run.selection_file})")
    return f"{name}\nbest: step {step:,}", read_lora(run.best).path


def first_run(config: SampleConfig) -> RunFolder | None:
    """The first ``--lora`` that is, or lies in, a run folder."""
    for path in config.lora:
        for folder in (path, *path.resolve().parents[:3]):
            if RunFolder(folder).holds_run():
                return RunFolder(folder)
    return None


def settings_of(run: RunFolder | None) -> dict[str, Any]:
    """The options that the run was trained with, by flag."""
    return {} if run is None else run.config()


def model_of(config: SampleConfig, settings: dict[str, Any]) -> Model:
    """The base model: the one given, else the run's, else the embedded one."""
    given = config.pretrained_model_name_or_path
    trained = given is None and settings.get("pretrained_model_name_or_path")
    inherited = settings if trained else {}
    return Model(
        pretrained_model_name_or_path=given or trained or EMBEDDED_MODEL,
        family=config.family or inherited.get("family"),
        revision=config.revision or inherited.get("revision"),
        variant=config.variant or inherited.get("variant"),
        pretrained_vae_model_name_or_path=config.pretrained_vae_model_name_or_path
        or inherited.get("pretrained_vae_model_name_or_path"),
        cache_dir=config.cache_dir,
        allow_pickle=config.allow_pickle,
    )


def prompts_of(config: SampleConfig, settings: dict[str, Any]) -> tuple[str, ...]:
    """The prompts given, else the run's, with the subject in its place.

    Raises:
        UserError: there are none, or no subject for a placeholder.
    """
    subject = Subject.of(settings.get("instance_prompt"), settings.get("class_prompt"), name=config.subject)
    if config.prompts:
        return tuple(subject.put_into(prompt, "--prompts") for prompt in config.prompts)
    if config.sample_prompts:
        return read_prompts(config.sample_prompts, subject)
    file = settings.get("sample_prompts")
    trained = Sample(
        sample_prompts=Path(file) if file and Path(file).exists() else None,
        validation_prompt=settings.get("validation_prompt"),
    )
    if not (trained.sample_prompts or trained.validation_prompt or subject.instance_prompt):
        raise UserError('which prompts? Give --prompts "a photo of sks dog" ..., or --sample_prompts FILE')
    return sample_prompts(trained, subject)


def plan_for(config: SampleConfig, settings: dict[str, Any], family: Family, prompts: tuple[str, ...]) -> SamplePlan:
    """What was not given is as the run drew it, so that the images can be compared with the run's own."""

    def given(name: str) -> Any:
        value = getattr(config, name)
        return settings.get(name) if value is None else value

    sample = Sample(
        num_images_per_prompt=config.num_images_per_prompt,
        num_inference_steps=given("num_inference_steps"),
        sample_guidance_scale=given("sample_guidance_scale"),
        sample_seed=config.sample_seed,
        negative_prompt=given("negative_prompt"),
    )
    return plan_of(sample, family.SAMPLE_DEFAULTS, prompts, given("resolution"), config.sample_batch_size)


def dtype_on(config: SampleConfig, device: torch.device) -> torch.dtype:
    """Of denoiser and text encoders: what is given, else what suits the device."""
    if config.mixed_precision:
        return DTYPES[config.mixed_precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
