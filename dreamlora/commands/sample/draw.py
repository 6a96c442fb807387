"""Grids from LoRA files, without training: (LoRA or checkpoint) x scale in rows, prompts in columns."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from dreamlora.commands.rows import Row, dtype_on, first_run, model_of, plan_for, prompts_of, rows_of, settings_of
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.lora.files import apply_lora
from dreamlora.models.loading import family_of, resolve_source
from dreamlora.models.parts import Parts
from dreamlora.models.tf32 import set_tf32
from dreamlora.runfolder import replacing, write_atomically
from dreamlora.sampling.grid import GridRow, references_of, write_grid
from dreamlora.sampling.sampler import SamplePlan, draw


def sample_loras(config: SampleConfig) -> Path:
    """Draw the grid and every image of it; returns the file of the grid.

    Everything that can be wrong with the files is found before the model loads.

    Raises:
        UserError: a LoRA, prompt file or model is missing or wrong, or a LoRA does not fit the model.
    """
    rows = rows_of(config)
    run = first_run(config)
    settings = settings_of(run)
    set_tf32(bool(settings.get("allow_tf32")))
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
