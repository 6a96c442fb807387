"""Grids from LoRA files, without training: (LoRA or checkpoint) x scale in rows, prompts in columns."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dreamlora.config import EMBEDDED_MODEL, Model, Sample
from dreamlora.errors import UserError
from dreamlora.families._loading import family_of, resolve_source
from dreamlora.interfaces import Family
from dreamlora.lora.files import apply_lora, read_lora, same_lora
from dreamlora.runfolder import RunFolder, replacing, write_atomically
from dreamlora.sample_command import SampleConfig
from dreamlora.sampling.grid import GridRow, references_of, write_grid
from dreamlora.sampling.prompts import fill_subject, read_prompts, sample_prompts, subject_of
from dreamlora.sampling.sampler import SamplePlan, draw, plan_of
from dreamlora.stages import DTYPES, Parts


@dataclass(frozen=True)
class Row:
    """One row to draw: a LoRA at a scale; the base model if ``lora`` is None."""

    label: str
    lora: Path | None = None
    scale: float = 0.0


def sample_loras(config: SampleConfig) -> Path:
    """Draw the grid and every image of it; returns the file of the grid.

    Everything that can be wrong with the files is found before the model loads.

    Raises:
        UserError: a LoRA, prompt file or model is missing or wrong, or a LoRA does not fit the model.
    """
    rows = rows_of(config)
    run = first_run(config)
    settings = settings_of(run)
    prompts = prompts_of(config, settings)
    model = model_of(config, settings)
    source = resolve_source(model)
    family = family_of(source, model.family)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = Parts(family, source, device, dtype_on(config, device)).pipeline()
    plan = plan_for(config, settings, family, prompts)
    output = config.output_dir or Path("outputs") / f"sample-{Path(config.lora[0]).resolve().stem}"
    drawn = [record for number, row in enumerate(rows) for record in _draw_row(pipeline, plan, row, number, output)]
    write_atomically(output / "samples.jsonl", "".join(json.dumps(record) + "\n" for record in drawn))
    width = len(plan.items())
    grid_rows = [
        GridRow(row.label, [_picture(record, output) for record in drawn[number * width : (number + 1) * width]])
        for number, row in enumerate(rows)
    ]
    note = f"{plan.num_inference_steps} denoising steps, guidance {plan.guidance_scale:g}, base model {source.model_id}"
    write_grid(output / "grid.png", grid_rows, _columns(plan), references_of(run) if run else (), output.name, note)
    return output / "grid.png"


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


def _draw_row(pipeline: Any, plan: SamplePlan, row: Row, number: int, output: Path) -> list[dict[str, Any]]:
    """Draw and write one row; its records for samples.jsonl. The pipeline is left without LoRA."""
    if row.lora:
        apply_lora(pipeline, row.lora, row.scale)
    records = []
    try:
        for drawn in draw(pipeline, plan):
            file = output / f"row_{number:02d}" / f"{drawn.item.name}.png"
            with replacing(file) as temporary:
                drawn.image.save(temporary)
            records.append(
                {
                    "lora": str(row.lora) if row.lora else None,
                    "lora_scale": row.scale,
                    "prompt_index": drawn.item.prompt_index,
                    "image_index": drawn.item.image_index,
                    "prompt": drawn.item.prompt,
                    "seed": drawn.item.seed,
                    "file": file.relative_to(output).as_posix(),
                    "num_inference_steps": plan.num_inference_steps,
                    "guidance_scale": plan.guidance_scale,
                    "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                    **({"problem": drawn.problem} if drawn.problem else {}),
                }
            )
    finally:
        if row.lora:
            pipeline.unload_lora_weights()
    return records


def _picture(record: dict[str, Any], output: Path) -> Path | str:
    return "not finite (NaN)" if record.get("problem") == "not finite" else output / record["file"]


def _columns(plan: SamplePlan) -> list[str]:
    several = plan.num_images_per_prompt > 1
    return [item.prompt + (f" · seed {item.seed}" if several else "") for item in plan.items()]


def first_run(config: SampleConfig) -> RunFolder | None:
    """The first ``--lora`` that is, or lies in, a run folder."""
    for path in config.lora:
        for folder in (path, *path.resolve().parents[:3]):
            if RunFolder(folder).holds_run():
                return RunFolder(folder)
    return None


def settings_of(run: RunFolder | None) -> dict[str, Any]:
    """The options that the run was trained with, by flag."""
    if run is None:
        return {}
    loaded = yaml.safe_load(run.config_file.read_text())
    return loaded if isinstance(loaded, dict) else {}


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
    subject = config.subject or subject_of(settings.get("instance_prompt"))
    if config.prompts:
        return tuple(fill_subject(prompt, subject, "--prompts") for prompt in config.prompts)
    if config.sample_prompts:
        return read_prompts(config.sample_prompts, subject)
    file = settings.get("sample_prompts")
    trained = Sample(
        sample_prompts=Path(file) if file and Path(file).exists() else None,
        validation_prompt=settings.get("validation_prompt"),
    )
    if not (trained.sample_prompts or trained.validation_prompt or settings.get("instance_prompt")):
        raise UserError('which prompts? Give --prompts "a photo of sks dog" ..., or --sample_prompts FILE')
    return sample_prompts(trained, settings.get("instance_prompt"), settings.get("class_prompt"))


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
