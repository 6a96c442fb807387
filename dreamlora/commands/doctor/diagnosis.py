"""What a training would do, need and stumble over: every check that it makes, and none of its work."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dreamlora import registry
from dreamlora.cli.messages import PACKAGE
from dreamlora.config import RunConfig
from dreamlora.data.encode import bytes_lacking
from dreamlora.data.transforms import Preparations
from dreamlora.errors import UserError
from dreamlora.figures import gibibytes
from dreamlora.models.inventory import PartFiles, inventory, problems_of
from dreamlora.models.loading import family_of, read_model_index, resolve_source
from dreamlora.run import checks, opening, preflight, vram
from dreamlora.run.announce import outline_of
from dreamlora.run.context import RunContext
from dreamlora.run.defaults import run_folder
from dreamlora.run.encoding import latent_filling
from dreamlora.run.images import RunImages
from dreamlora.run.rehearsal import AVERAGE_BYTES, CHECKPOINT_BYTES, HOW, Rehearsal
from dreamlora.runfolder import RunFolder
from dreamlora.scratch import Scratch

NO_IMAGES = "no images given: --instance_data_dir, --train_data_dir or --dataset_name names them"
_PROMPT = "a photo of a dog on a beach in the evening sun"
"""Is encoded where no captions are given."""


@dataclass
class _Findings:
    """What is wrong, as it is found."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def one(self) -> Iterator[None]:
        """A step of the training: what it raises is noted."""
        try:
            yield
        except UserError as error:
            if str(error) not in self.errors:
                self.errors.append(str(error))

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """What the package warns of in here is noted, and not shown."""
        logger, found = logging.getLogger(PACKAGE), self.warnings

        class Noting(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if record.levelno >= logging.WARNING:
                    found.append(record.getMessage())

        handlers, propagate = logger.handlers[:], logger.propagate
        logger.handlers, logger.propagate = [Noting()], False
        try:
            yield
        finally:
            logger.handlers, logger.propagate = handlers, propagate


def diagnose(config: RunConfig, options: Any) -> dict[str, Any]:
    """All findings, as JSON can say them.

    Args:
        config: of the training, as given.
        options: of its optimizer.
    """
    findings = _Findings()
    found: dict[str, Any] = {"model": config.model.pretrained_model_name_or_path}
    with findings.hearing(), Scratch() as scratch:
        data = config.data
        has_images = bool(data.brings_images or data.style or data.subject)
        if has_images:
            with findings.one():
                preflight.check(config)
        else:
            findings.warnings.append(NO_IMAGES)
        with findings.one():
            found |= _of_model(config, findings)
        if not findings.errors:
            # images of a built-in subject are drawn into the run's folder
            folder = RunFolder(scratch) if not data.brings_images else run_folder(config)
            found |= _of_run(config, options, folder if has_images else None, findings)
    findings.warnings += _short_of_memory(found)
    return {**found, "errors": findings.errors, "warnings": findings.warnings, "would_run": not findings.errors}


def _of_model(config: RunConfig, findings: _Findings) -> dict[str, Any]:
    """Family and parts; what keeps them from being loaded is among the errors then."""
    source = resolve_source(config.model, config.train.prediction_type)
    family = family_of(source, config.model.family)
    parts = inventory(source, family)
    findings.errors += list(problems_of(parts))
    given = config.model.family
    pipeline = read_model_index(source)["_class_name"]
    single = Path(config.model.pretrained_model_name_or_path).is_file()
    how = f"the names of its tensors are those of a {pipeline}" if single else f"model_index.json names {pipeline}"
    return {
        "model_id": source.model_id,
        "family": registry.name_of(family),
        "recognised_by": f"--family {given}" if given else how,
        "distilled": family.distilled(source),
        "parts": [_of_part(part) for part in parts],
    }


def _of_part(part: PartFiles) -> dict[str, Any]:
    return {
        "name": part.name,
        "class": part.part_class.__name__,
        "role": part.role,
        "bytes": part.size,
        "parameters": part.parameters,
        "precision": part.precision,
        "here": part.here,
        "problem": part.problem,
    }


def _of_run(config: RunConfig, options: Any, folder: RunFolder | None, findings: _Findings) -> dict[str, Any]:
    """Options and images as a training has them before its model loads; memory and disk.

    Args:
        folder: of the run; None: there are no images.
    """
    found: dict[str, Any] = {}
    context = pictures = None
    with findings.one():
        context = opening.begin(config)
        if folder:
            pictures = opening.read(context, folder, options).pictures
            found["data"] = _of_images(context, pictures)
            found["steps"] = context.config.train.max_train_steps
            found["run"] = outline_of(context, folder, pictures, begun=0)
            del found["run"]["folder"]
        else:
            findings.warnings += checks.warnings(context)
    if context:
        with findings.one():
            found |= _of_rehearsal(context, pictures)
        findings.warnings = _with_details(findings.warnings, context.warnings)
    return found


def _of_images(context: RunContext, pictures: RunImages) -> dict[str, Any]:
    """What is trained on: sizes as they are and as they are trained."""
    how = _preparations(context)
    sizes = sorted((record.facts.size for record in pictures.train), key=_area)
    buckets = Counter(how[record].target(record.facts.size) for record in pictures.train)
    return {
        "images": len(pictures.train),
        "held_out": len(pictures.held_out),
        "captions": len({caption for record in pictures.train for caption in record.captions}),
        "smallest": list(sizes[0]),
        "largest": list(sizes[-1]),
        "buckets": {f"{width} x {height}": count for (width, height), count in sorted(buckets.items())},
    }


def _of_rehearsal(context: RunContext, pictures: RunImages | None) -> dict[str, Any]:
    """What gets a LoRA; memory and disk."""
    config, side = context.config, context.config.data.resolution or 0
    prompts, sizes, drawn = [_PROMPT], [(side, side)], 1
    if pictures:
        plan = context.caption_plan
        texts = {text for record in pictures.train for text in plan.texts(record.captions)}
        prompts = [*texts, *pictures.prompts, *pictures.eval_prompts]
        sizes += [_preparations(context)[record].target(record.facts.size) for record in pictures.train]
        drawn = min(config.data.sample_batch_size, len(context.sample_plan(pictures.prompts).items()))
    largest = max(sizes, key=_area)
    rehearsal = Rehearsal(context, max(prompts, key=len), largest, drawn)
    trained = rehearsal.passes.trained()
    stages = [
        {
            "stage": stage.name,
            "held": stage.held,
            "work": stage.work,
            "rough": stage.rough,
            "needed": stage.needed,
        }
        for stage in rehearsal.stages()
    ]
    return {
        "trained": [each._asdict() for each in trained],
        "memory": {"how": HOW, "device": context.accelerator.device.type, "stages": stages},
        "vram": list(vram.table(context, rehearsal)),
        "disk": _of_disk(context, pictures, rehearsal, len(set(prompts))) if pictures else {},
    }


def _of_disk(context: RunContext, pictures: RunImages, rehearsal: Rehearsal, prompts: int) -> dict[str, Any]:
    """Bytes that the cache lacks, and that checkpoints take."""
    train, each = context.config.train, rehearsal.passes.prompt_bytes
    parameters = rehearsal.passes.parameters()
    every, total = train.checkpointing_steps, train.max_train_steps or 0
    per_number = CHECKPOINT_BYTES + (AVERAGE_BYTES // 2 if context.config.optim.ema_decay else 0)
    kept = min(-(-total // every), train.checkpoints_total_limit or total) if every else 0
    return {
        "latents": bytes_lacking(pictures.train, _preparations(context), latent_filling(context)),
        "prompts": None if each is None else prompts * each,
        "cache": str(context.cache.folder),
        "cache_free": checks.free_bytes(context.cache.folder),
        "checkpoints": kept * per_number * parameters,
    }


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _preparations(context: RunContext) -> Preparations:
    data = context.config.data
    return Preparations.of(data, data.resolution or 0, context.config.train.seed)


def _with_details(heard: list[str], told: list[str]) -> list[str]:
    """Every warning once, with the details that a report has."""
    detailed = [next((text for text in told if text.startswith(short)), short) for short in heard]
    return list(dict.fromkeys(detailed))


def _short_of_memory(found: Mapping[str, Any]) -> Iterator[str]:
    stages = found.get("memory", {}).get("stages", ())
    if not torch.cuda.is_available() or not stages:
        return
    needed, stage = max((stage["needed"], stage["stage"]) for stage in stages)
    there = torch.cuda.get_device_properties(0).total_memory
    if needed > there:
        yield (
            f"{stage} takes about {gibibytes(needed)}, and the GPU has {gibibytes(there)}: "
            "--vram auto chooses what takes less, as far as that goes; a smaller --resolution or --rank does besides"
        )
