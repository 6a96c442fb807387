"""Grids from LoRA files, without training: (LoRA or checkpoint) x scale in rows, prompts in columns."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from dreamlora.commands.less_memory import advice
from dreamlora.commands.rows import Row, rows_of
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.commands.shown import with_shown
from dreamlora.commands.trained import DRAWN_WITH, first_run, plan_for, prompts_of
from dreamlora.commands.under_test import UnderTest, prepared
from dreamlora.files import replacing, write_atomically
from dreamlora.memory import StageMemory, shortage_told
from dreamlora.sampling.grid import GridRow, references_of, write_grid
from dreamlora.sampling.sampler import Drawn, SamplePlan, draw


def sample_loras(config: SampleConfig) -> Path:
    """Draw the grid and every image of it; returns the file of the grid.

    Everything that can be wrong with the files is found before the model loads.

    Raises:
        UserError: a LoRA, prompt file or model is missing or wrong, or a LoRA does not fit the model.
    """
    rows = rows_of(config)
    run = first_run(config)
    prompts = prompts_of(config, run)
    memory = StageMemory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    under_test = prepared(config, rows, run, memory, DRAWN_WITH)
    plan = plan_for(config, under_test.settings, under_test.sample_defaults, prompts)
    plan = with_shown(plan, config, run, edits=under_test.edits, must=under_test.must_edit)
    under_test.warn_of_cut(prompts)
    under_test.warn_of_negative(plan)
    output = config.output_dir or Path("outputs") / f"sample-{Path(config.lora[0]).resolve().stem}"
    with shortage_told(memory, functools.partial(advice, config, under_test)), memory.stage("drawing samples"):
        drawn = [record for number in range(len(rows)) for record in _draw_row(under_test, plan, number, output)]
    write_atomically(output / "samples.jsonl", "".join(json.dumps(record) + "\n" for record in drawn))
    width = len(plan.items())
    grid_rows = [
        GridRow(row.label, [_picture(record, output) for record in drawn[number * width : (number + 1) * width]])
        for number, row in enumerate(rows)
    ]
    note = f"{plan.num_inference_steps} denoising steps, guidance {plan.guidance_scale:g}, {under_test.precision}, "
    note += f"base model {under_test.source.drawer_id}"
    references = references_of(run.folder) if run else ()
    write_grid(output / "grid.png", grid_rows, _columns(plan), references, output.name, note)
    return output / "grid.png"


def _draw_row(under_test: UnderTest, plan: SamplePlan, number: int, output: Path) -> list[dict[str, Any]]:
    """Draw and write one row; its records for samples.jsonl."""
    row = under_test.rows[number]
    with under_test.drawing(row, plan, plan.prompts) as pipeline, under_test.computing():
        return [
            _write(drawn, row, plan, output / f"row_{number:02d}" / f"{drawn.item.name}.png")
            for drawn in draw(pipeline, plan, under_test.asked(plan))
        ]


def _write(drawn: Drawn, row: Row, plan: SamplePlan, file: Path) -> dict[str, Any]:
    """Write an image; its record."""
    with replacing(file) as temporary:
        drawn.image.save(temporary)
    return {
        "lora": str(row.lora) if row.lora else None,
        "lora_scale": row.scale,
        "prompt_index": drawn.item.prompt_index,
        "image_index": drawn.item.image_index,
        "prompt": drawn.item.prompt,
        "seed": drawn.item.seed,
        "file": f"{file.parent.name}/{file.name}",
        "num_inference_steps": plan.num_inference_steps,
        "guidance_scale": plan.guidance_scale,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        **({"problem": drawn.problem} if drawn.problem else {}),
    }


def _picture(record: dict[str, Any], output: Path) -> Path | str:
    return "not finite (NaN)" if record.get("problem") == "not finite" else output / record["file"]


def _columns(plan: SamplePlan) -> list[str]:
    several = plan.num_images_per_prompt > 1
    return [item.prompt + (f" · seed {item.seed}" if several else "") for item in plan.items()]
