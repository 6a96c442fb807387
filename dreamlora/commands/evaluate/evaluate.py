"""``dreamlora evaluate``: draw the missing images, measure every LoRA, write metrics.json and print the table."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from dreamlora import registry, tiny
from dreamlora.cache_folder import cache_folder
from dreamlora.cli.saved import saved_group
from dreamlora.commands.evaluate.drawing import Sheet, draw_missing
from dreamlora.commands.evaluate.flags import LOSS_METRIC, EvaluateConfig
from dreamlora.commands.evaluate.losses import measure_losses
from dreamlora.commands.evaluate.table import table
from dreamlora.commands.less_memory import advice
from dreamlora.commands.outside import way_in
from dreamlora.commands.rows import Row, rows_of
from dreamlora.commands.shown import with_shown
from dreamlora.commands.trained import (
    DRAWN_WITH,
    MEASURED_WITH,
    TrainedRun,
    first_run,
    model_of,
    plan_for,
    prompts_of,
)
from dreamlora.commands.under_test import UnderTest, prepared
from dreamlora.config import OWN_IMAGES, Data, Encoders, instance_prompt_of
from dreamlora.data.cache import TensorCache
from dreamlora.data.dataset import examine, split_holdout
from dreamlora.data.folder import load_folder
from dreamlora.data.images import ImageRecord, holds_images
from dreamlora.data.sets import load_sets
from dreamlora.errors import UserError
from dreamlora.escapes import one_line
from dreamlora.evaluation.embed import Processes
from dreamlora.evaluation.embedders import Embedders, EncoderPlace
from dreamlora.evaluation.measure import MeasuredImages, Measurement, load_metric, measure
from dreamlora.files import write_atomically
from dreamlora.memory import StageMemory, shortage_told
from dreamlora.metrics import _gathered  # noqa: F401 - torchmetrics: if it is broken, that is told before images are drawn
from dreamlora.models.parts import ROLES
from dreamlora.models.tf32 import set_tf32
from dreamlora.processes import gather_lists, main_first, wait_for_everyone
from dreamlora.reading import lies_inside
from dreamlora.run import provenance
from dreamlora.run.launch import processes
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.prompts import Subject
from dreamlora.sampling.sampler import SamplePlan

logger = logging.getLogger(__name__)

METRICS_JSON_VERSION = 1
NO_CAPTION = "(no caption)"


@dataclass(frozen=True)
class Real:
    """Real images.

    Attributes:
        references: not trained on.
        training: trained on.
        notes: what is missing, and why.
    """

    references: Sequence[ImageRecord]
    training: Sequence[ImageRecord]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationContext:
    """What all rows share.

    Attributes:
        subject: that was learned.
        state: the processes.
        memory: that the stages take, on the device of pipeline and encoders.
    """

    config: EvaluateConfig
    subject: Subject
    real: Real
    state: PartialState
    memory: StageMemory

    @property
    def loss_asked(self) -> bool:
        """Whether the evaluation loss is to be measured."""
        return not self.config.metrics or LOSS_METRIC in self.config.metrics

    @property
    def image_metrics(self) -> list[str]:
        """What is to be measured of images: what was asked for, else all that may have a say in a choice."""
        if self.config.metrics:
            return [name for name in self.config.metrics if name != LOSS_METRIC]
        return [name for name in registry.names("metrics") if load_metric(name).SELECTS]

    @property
    def output(self) -> Path:
        """The folder that everything goes to."""
        name = Path(self.config.lora[0]).resolve().stem
        return self.config.output_dir or Path("outputs") / f"evaluate-{name}"

    def gallery(self, records: Sequence[ImageRecord], prompts: Sequence[str]) -> MeasuredImages:
        """Images with their prompts, or with none."""
        number = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        return MeasuredImages(
            generated=records,
            groups=[number[prompt] for prompt in prompts] or [0] * len(records),
            with_subject=[self.subject.is_in(prompt) for prompt in prompts] or [True] * len(records),
            texts=[self.subject.scored_text(prompt) for prompt in prompts],
            references=self.real.references,
            training=self.real.training,
        )


def evaluate_loras(config: EvaluateConfig) -> Path:
    """Measure everything that ``config`` names; returns the file metrics.json.

    Under ``accelerate launch`` the processes share the images, to draw and to embed; all must see one disk.

    Raises:
        UserError: a LoRA, prompt file, image or model is missing or wrong, or a LoRA does not fit the model; there was
            nothing that any metric could be had of; or accelerate was set to what the processes cannot do.
    """
    state = processes()
    folders = [path for path in config.lora if _holds_images(path)]
    loras = tuple(path for path in config.lora if path not in folders)
    if not loras and LOSS_METRIC in config.metrics:
        raise UserError(f"--metrics {LOSS_METRIC}: only LoRAs have a loss, and {config.lora[0]} holds images")
    run = first_run(config)
    settings = run.options if run else {}
    set_tf32(bool(settings.get("allow_tf32")))
    evaluation = EvaluationContext(
        config=config,
        subject=Subject.of(
            instance_prompt_of(settings), config.class_prompt or settings.get("class_prompt"), name=config.subject
        ),
        real=_real_images(config, run),
        state=state,
        memory=StageMemory(state.device if state.device.type == "cuda" else torch.device("cpu")),
    )
    under_test = _under_test(evaluation, loras, run) if loras else None
    with shortage_told(evaluation.memory, functools.partial(advice, config, under_test)):
        return _evaluated(evaluation, under_test, folders, run)


def _evaluated(
    evaluation: EvaluationContext, under_test: UnderTest | None, folders: Sequence[Path], run: TrainedRun | None
) -> Path:
    """What is known by now, measured; returns the file."""
    config, state, memory = evaluation.config, evaluation.state, evaluation.memory
    galleries = {str(path): _folder_gallery(evaluation, path) for path in folders}
    facts: dict[str, Any] = {"problems": {}}
    losses: dict[str, Measurement] = {}
    of_runs: dict[str, list[str]] = {}
    if under_test:
        of_runs = under_test.notes
        facts |= {"base_model": under_test.source.drawer_id, "precision": under_test.precision}
        if evaluation.loss_asked:  # first, as it is quick, and what is wrong with its items should be told soon
            with memory.stage("evaluation loss"):
                losses = measure_losses(config, under_test, run.folder if run else None, _processes(state))
        if evaluation.image_metrics:
            with memory.stage("drawing samples"):
                drawn, of_drawing = _draw(evaluation, under_test, run)
            facts |= of_drawing
            galleries = {**drawn, **galleries}
        under_test.parts.free(*ROLES)
    embedded = bool(under_test or run) and model_of(config, run).pretrained_model_name_or_path in tiny.MODELS
    with memory.stage("image metrics"):
        measurements = _measure(evaluation, galleries, Embedders(_encoders(config, run), embedded, _place(evaluation)))
    for label, measured in losses.items():
        images = measurements.get(label, Measurement())
        measurements[label] = Measurement([*measured.values, *images.values], [*measured.notes, *images.notes])
    for label, notes in of_runs.items():
        measurements[label].notes.extend(notes)
    for label, problems in facts["problems"].items():
        kinds = " or ".join(sorted(set(problems.values())))
        measurements[label].notes.append(f"images that came out {kinds} do not count: {', '.join(problems)}")
    facts["references"] = _described(evaluation.real.references, _processes(state))
    facts["training"] = _described(evaluation.real.training, _processes(state))
    file = evaluation.output / "metrics.json"
    if state.is_main_process:
        _write(file, evaluation, measurements, facts)
        sys.stdout.write(f"{table(measurements)}\n\n{one_line(str(file))}\n")
    wait_for_everyone()
    if not any(row.values for row in measurements.values()):
        raise UserError("nothing could be measured: the notes above say what every metric lacks")
    return file


def _under_test(evaluation: EvaluationContext, loras: tuple[Path, ...], run: TrainedRun | None) -> UnderTest:
    """The base model with these LoRAs; rows with equal labels get the path of their LoRA."""
    rows = rows_of(replace(evaluation.config, lora=loras))
    labels = [row.label for row in rows]
    rows = [replace(row, label=f"{row.label}\n{row.lora}") if labels.count(row.label) > 1 else row for row in rows]
    options = (DRAWN_WITH if evaluation.image_metrics else ()) + (MEASURED_WITH if evaluation.loss_asked else ())
    return prepared(evaluation.config, rows, run, evaluation.memory, options)


def _holds_images(path: Path) -> bool:
    if not path.is_dir() or RunFolder(path).holds_run() or any(path.glob("*.safetensors")):
        return False
    return holds_images(path, "--lora")


def _real_images(config: EvaluateConfig, run: TrainedRun | None) -> Real:
    """The images that the flags name; what they leave open is taken from the run, as far as it is still there."""
    asked = run if run and not (config.references and config.training_images) else None
    training, held_out, notes = _images_of(asked) if asked else ([], [], [])
    if config.references:
        held_out = _images_in(config.references, "--references", config)
    if config.training_images:
        training = _images_in(config.training_images, "--training_images", config)
    return Real(held_out, training, tuple(notes))


def _images_in(folder: Path, flag: str, config: EvaluateConfig, prompt: str = NO_CAPTION) -> list[ImageRecord]:
    """The images of a folder, decoded once: a broken one must not show only after images are drawn."""
    records = load_folder(folder, prompt, flag=flag, strict=False).records
    with main_first():
        examine(records, cache_folder(config.latents_cache_dir), progress=PartialState().is_main_process)
    return list(records)


def _images_of(run: TrainedRun) -> tuple[list[ImageRecord], list[ImageRecord], list[str]]:
    """Training and held-out images of a run, and what is to be said of them."""
    path, own = run.folder.path, run.folder.instance_images
    named = next((name for name in OWN_IMAGES if name in run.outside), None)
    if named:
        value = "its data sets" if named == "datasets" else f"--{named} {run.outside[named]}"
        way = way_in(named, value, "--training_images and --references")
        return [], [], [f"the images of the run {path} ({value}) lie outside its folder and are not opened: {way}"]
    try:
        data: Data = saved_group(run.options, Data)
        if data.style:
            data = replace(data, train_data_dir=own)
        elif not data.brings_images:
            data = replace(data, instance_data_dir=own)
        if own in (data.train_data_dir, data.instance_data_dir) and not lies_inside(own, path):
            raise UserError(f"{own} is a link that leads out of the run's folder")
        with main_first():
            records = load_sets(data, Path(cache) if (cache := run.options.get("cache_dir")) else None).records
        training, held_out = map(list, split_holdout(records, data.holdout))
    except UserError as error:
        return [], [], [f"the images of the run {path} cannot be used: {error}"]
    return training, held_out, [] if held_out else [f"the run {path} held out no images to compare with"]


def _folder_gallery(evaluation: EvaluationContext, folder: Path) -> MeasuredImages:
    """A folder of images, with the captions beside them as their prompts, or the one prompt of ``--prompts``."""
    given = evaluation.config.prompts
    if len(given) > 1:
        raise UserError(f"--prompts: the images of {folder} can all have one prompt, or captions beside them")
    records = _images_in(folder, "--lora", evaluation.config, given[0] if given else NO_CAPTION)
    prompts = [record.caption for record in records]
    return evaluation.gallery(records, [] if NO_CAPTION in prompts else prompts)


def _draw(
    evaluation: EvaluationContext, under_test: UnderTest, run: TrainedRun | None
) -> tuple[dict[str, MeasuredImages], dict[str, Any]]:
    """Draw what is missing of the base model and all LoRAs; their galleries by label, and facts for metrics.json."""
    config, rows, settings = evaluation.config, under_test.rows, under_test.settings
    plan = plan_for(config, settings, under_test.sample_defaults, prompts_of(config, run))
    plan = with_shown(plan, config, run, edits=under_test.edits, must=under_test.must_edit)
    under_test.warn_of_cut(plan.prompts)
    sheets = [
        _sheet(evaluation.output, row, plan, under_test.made_of | under_test.tokens[row.label].made_of) for row in rows
    ]
    broken = draw_missing(evaluation.state, under_test, sheets)
    galleries = {
        row.label: _gallery(evaluation, sheet, sheets[0], broken) for row, sheet in zip(rows, sheets, strict=True)
    }
    facts = {
        "num_inference_steps": plan.num_inference_steps,
        "guidance_scale": plan.guidance_scale,
        "negative_prompt": plan.negative_prompt,
        "images": str(evaluation.output / "images"),
        "problems": {
            row.label: problems
            for row, sheet in zip(rows, sheets, strict=True)
            if (problems := {i.name: broken[sheet.file(i)] for i in plan.items() if sheet.file(i) in broken})
        },
    }
    return galleries, facts


def _sheet(output: Path, row: Row, plan: SamplePlan, base: Mapping[str, Any]) -> Sheet:
    lora = hashlib.sha256(row.lora.read_bytes()).hexdigest() if row.lora else None
    made_of = {**base, "lora": lora, "scale": row.scale}
    slug = re.sub(r"[^\w.]+", "-", row.label).strip("-")
    return Sheet(output / "images" / slug, plan, made_of)


def _gallery(evaluation: EvaluationContext, sheet: Sheet, base: Sheet, broken: Mapping[Path, str]) -> MeasuredImages:
    """The images of a sheet that came out right."""
    items = [item for item in sheet.plan.items() if sheet.file(item) not in broken]
    gallery = evaluation.gallery([_record(sheet.file(item), item.prompt) for item in items], [i.prompt for i in items])
    files = [base.file(item) for item in items]
    if any(file in broken for file in files):
        return gallery
    return replace(gallery, base=[_record(file, item.prompt) for file, item in zip(files, items, strict=True)])


def _record(file: Path, caption: str) -> ImageRecord:
    return ImageRecord(file.name, caption, file.read_bytes, str(file))


def _encoders(config: EvaluateConfig, run: TrainedRun | None) -> Encoders:
    """The encoders given, else those that the run was measured with, as far as these may be opened."""
    options = run.options if run else {}
    for name in ("clip_model", "dino_model", "inception_weights"):
        if run and name in run.outside and getattr(config.encoders, name) is None:
            logger.warning("%s of %s is not opened: %s", name, run.name, way_in(name, run.outside[name]))
    weights = config.encoders.inception_weights or options.get("inception_weights")
    return Encoders(
        clip_model=config.encoders.clip_model or options.get("clip_model"),
        dino_model=config.encoders.dino_model or options.get("dino_model"),
        inception_weights=Path(weights) if weights else None,
    )


def _place(evaluation: EvaluationContext) -> EncoderPlace:
    config, state = evaluation.config, evaluation.state
    return EncoderPlace(
        device=evaluation.memory.device,
        cache=TensorCache(cache_folder(config.latents_cache_dir)),
        downloads=config.cache_dir,
        processes=_processes(state),
    )


def _processes(state: PartialState) -> Processes:
    return Processes(state.process_index, state.num_processes, gather_lists, state.device)


def _measure(
    evaluation: EvaluationContext, galleries: Mapping[str, MeasuredImages], embedders: Embedders
) -> dict[str, Measurement]:
    """The measurements by label."""
    wait_for_everyone()
    measurements = {}
    for label, gallery in galleries.items():
        names = evaluation.image_metrics
        measured = measure(names, gallery, embedders) if gallery.generated else Measurement(notes=["no images"])
        measured.notes.extend(evaluation.real.notes)
        measurements[label] = measured
    return measurements


def _write(
    file: Path, evaluation: EvaluationContext, measurements: Mapping[str, Measurement], facts: Mapping[str, Any]
) -> None:
    """metrics.json: every value with its encoder and its numbers of images."""
    result = {
        "v": METRICS_JSON_VERSION,
        **facts,
        "subject": evaluation.subject.name,
        "class_prompt": evaluation.subject.class_prompt,
        "rows": [
            {"label": label.replace("\n", ", "), "values": list(map(asdict, measured.values)), "notes": measured.notes}
            for label, measured in measurements.items()
        ],
        "versions": provenance.versions(),
        "command": provenance.command(),
    }
    write_atomically(file, json.dumps(result, indent=1, allow_nan=False))


def _described(records: Sequence[ImageRecord], processes: Processes) -> dict[str, Any]:
    """How many, and a hash that tells other images; the processes share the reading."""
    mine = [record.content_hash() for record in records[processes.rank :: processes.world]]
    contents = "".join(sorted(processes.gather(mine)))
    return {"n": len(records), "sha256": hashlib.sha256(contents.encode()).hexdigest()[:16]}
