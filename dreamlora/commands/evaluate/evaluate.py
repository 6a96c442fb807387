"""``dreamlora evaluate``: draw what is not there yet, measure every LoRA, write metrics.json and print the table."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm import tqdm

from dreamlora import registry
from dreamlora.cli.parse import Program, parse
from dreamlora.commands.evaluate.drawing import Sheet, draw_sheet
from dreamlora.commands.evaluate.flags import LOSS_METRIC, EvaluateConfig
from dreamlora.commands.evaluate.losses import measure_losses
from dreamlora.commands.evaluate.table import table
from dreamlora.commands.evaluate.under_test import UnderTest, applied, prepared
from dreamlora.commands.rows import Row, first_run, model_of, plan_for, prompts_of, settings_of
from dreamlora.config import EMBEDDED_MODEL, Encoders
from dreamlora.config.programs import program_of
from dreamlora.data.cache import TensorCache, cache_folder
from dreamlora.data.dataset import load_images, split_holdout
from dreamlora.data.folder import load_folder
from dreamlora.data.images import FORMATS, ImageRecord
from dreamlora.errors import UserError
from dreamlora.evaluation.embed import Processes
from dreamlora.evaluation.embedders import Embedders, EncoderPlace
from dreamlora.evaluation.measure import MeasuredImages, Measurement, load_metric, measure
from dreamlora.interfaces import ModelSource
from dreamlora.metrics import _gathered  # noqa: F401 - torchmetrics: if it is broken, that is told before images are drawn
from dreamlora.models.parts import ROLES
from dreamlora.run import provenance
from dreamlora.runfolder import RunFolder, write_atomically
from dreamlora.sampling.prompts import names_subject, scored_text, subject_of
from dreamlora.sampling.sampler import SamplePlan

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
        subject: that was learned, such as "sks dog"; None: not known.
        class_prompt: what it is one of.
        state: the processes.
        device: of pipeline and encoders.
    """

    config: EvaluateConfig
    subject: str | None
    class_prompt: str | None
    real: Real
    state: PartialState
    device: torch.device

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
            with_subject=[names_subject(prompt, self.subject) for prompt in prompts] or [True] * len(records),
            texts=[scored_text(prompt, self.subject, self.class_prompt) for prompt in prompts],
            references=self.real.references,
            training=self.real.training,
        )


def evaluate_loras(config: EvaluateConfig) -> Path:
    """Measure everything that ``config`` names; returns the file metrics.json.

    Under ``accelerate launch`` the processes share the images, to draw and to embed; all must see one disk.

    Raises:
        UserError: a LoRA, prompt file, image or model is missing or wrong, or a LoRA does not fit the model; or there
            was nothing that any metric could be had of.
    """
    # Told that it is a CPU, for otherwise accelerate takes every process that has no GPU for the only one.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
    folders = [path for path in config.lora if _holds_images(path)]
    loras = tuple(path for path in config.lora if path not in folders)
    if not loras and LOSS_METRIC in config.metrics:
        raise UserError(f"--metrics {LOSS_METRIC}: only LoRAs have a loss, and {config.lora[0]} holds images")
    run = first_run(config)
    settings = settings_of(run)
    evaluation = EvaluationContext(
        config=config,
        subject=config.subject or subject_of(settings.get("instance_prompt")),
        class_prompt=config.class_prompt or settings.get("class_prompt"),
        real=_real_images(config, run),
        state=state,
        device=state.device if state.device.type == "cuda" else torch.device("cpu"),
    )
    shown = {str(path): _shown_in(evaluation, path) for path in folders}
    facts: dict[str, Any] = {"problems": {}}
    losses: dict[str, Measurement] = {}
    if loras:
        under_test = prepared(replace(config, lora=loras), settings, evaluation.device)
        facts["base_model"] = under_test.source.model_id
        if evaluation.loss_asked:  # first, as it is quick, and what is wrong with its items should be told soon
            losses = measure_losses(under_test, run, _processes(state))
        if evaluation.image_metrics:
            drawn, of_drawing = _draw(evaluation, under_test)
            facts |= of_drawing
            shown = {**drawn, **shown}
        under_test.parts.free(*ROLES)
    embedded = bool(loras or run) and model_of(config, settings).pretrained_model_name_or_path == EMBEDDED_MODEL
    found = _measure(evaluation, shown, Embedders(_encoders(config, settings), embedded, _place(evaluation)))
    for label, measured in losses.items():
        images = found.get(label, Measurement())
        found[label] = Measurement([*measured.values, *images.values], [*measured.notes, *images.notes])
    for label, problems in facts["problems"].items():
        kinds = " or ".join(sorted(set(problems.values())))
        found[label].notes.append(f"images that came out {kinds} do not count: {', '.join(problems)}")
    file = evaluation.output / "metrics.json"
    if state.is_main_process:
        _write(file, evaluation, found, facts)
        sys.stdout.write(f"{table(found)}\n\n{file}\n")
    state.wait_for_everyone()
    if not any(row.values for row in found.values()):
        raise UserError("nothing could be measured: the notes above say what every metric lacks")
    return file


def _holds_images(path: Path) -> bool:
    if not path.is_dir() or RunFolder(path).holds_run() or any(path.glob("*.safetensors")):
        return False
    return any(file.suffix.lower() in FORMATS for file in path.iterdir())


def _real_images(config: EvaluateConfig, run: RunFolder | None) -> Real:
    """The images that the flags name; what they leave open is taken from the run, as far as it is still there."""
    training, held_out, notes = _images_of(run) if run else ([], [], [])
    if config.references:
        held_out = list(load_folder(config.references, NO_CAPTION, flag="--references").records)
    if config.training_images:
        training = list(load_folder(config.training_images, NO_CAPTION, flag="--training_images").records)
    return Real(held_out, training, () if config.references and config.training_images else tuple(notes))


def _images_of(run: RunFolder) -> tuple[list[ImageRecord], list[ImageRecord], list[str]]:
    """Training and held-out images of a run, and what is to be said of them."""
    try:
        program = program_of(yaml.safe_load(run.config_file.read_text()))
        config = parse(program, ["--config", str(run.config_file)], Program("dreamlora evaluate"))
        data = config.data
        if data.style:
            data = replace(data, train_data_dir=run.instance_images)
        elif not (data.instance_data_dir or data.train_data_dir or data.dataset_name):
            data = replace(data, instance_data_dir=run.instance_images)
        found = load_images(data, config.model.cache_dir).records
        training, held_out = map(list, split_holdout(found, data.holdout))
    except UserError as error:
        return [], [], [f"the images of the run {run.path} cannot be used: {error}"]
    return training, held_out, [] if held_out else [f"the run {run.path} held out no images to compare with"]


def _shown_in(evaluation: EvaluationContext, folder: Path) -> MeasuredImages:
    """A folder of images, with the captions beside them as their prompts, or the one prompt of ``--prompts``."""
    given = evaluation.config.prompts
    if len(given) > 1:
        raise UserError(f"--prompts: the images of {folder} can all have one prompt, or captions beside them")
    records = list(load_folder(folder, given[0] if given else NO_CAPTION, flag="--lora").records)
    prompts = [record.caption for record in records]
    return evaluation.gallery(records, [] if NO_CAPTION in prompts else prompts)


def _draw(evaluation: EvaluationContext, under_test: UnderTest) -> tuple[dict[str, MeasuredImages], dict[str, Any]]:
    """Draw what is missing of the base model and all LoRAs; their galleries by label, and facts for metrics.json."""
    config, rows, source, settings = under_test.config, under_test.rows, under_test.source, under_test.settings
    plan = plan_for(config, settings, under_test.parts.family, prompts_of(config, settings))
    sheets = [_sheet(evaluation.output, row, plan, source, under_test.dtype) for row in rows]
    broken = _draw_missing(evaluation.state, under_test, sheets)
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


def _sheet(output: Path, row: Row, plan: SamplePlan, source: ModelSource, dtype: torch.dtype) -> Sheet:
    lora = hashlib.sha256(row.lora.read_bytes()).hexdigest() if row.lora else None
    made_of = {"model": source.model_id, "lora": lora, "scale": row.scale, "dtype": str(dtype)}
    slug = re.sub(r"[^\w.]+", "-", row.label).strip("-")
    return Sheet(output / "images" / slug, plan, made_of)


def _draw_missing(state: PartialState, under_test: UnderTest, sheets: Sequence[Sheet]) -> dict[Path, str]:
    """Draw this process's share of what is missing; the images of all processes that came out wrong, with why."""
    jobs = [
        (row, sheet, missing)
        for row, sheet in zip(under_test.rows, sheets, strict=True)
        if (missing := sheet.missing(state.process_index, state.num_processes))
    ]
    wrong: list[tuple[Path, str]] = []
    if jobs:
        pipeline = under_test.parts.pipeline()
        total = sum(len(missing) for _, _, missing in jobs)
        with tqdm(total=total, desc="drawing", unit="image", disable=not state.is_main_process) as bar:
            for row, sheet, missing in jobs:
                with applied(pipeline, row):
                    problems = draw_sheet(pipeline, sheet, missing, bar.update)
                    wrong += [(sheet.file(item), problem) for item, problem in problems]
    return dict(gather_object(wrong))


def _gallery(evaluation: EvaluationContext, sheet: Sheet, base: Sheet, broken: Mapping[Path, str]) -> MeasuredImages:
    """The images of a sheet that came out right."""
    items = [item for item in sheet.plan.items() if sheet.file(item) not in broken]
    shown = evaluation.gallery([_record(sheet.file(item), item.prompt) for item in items], [i.prompt for i in items])
    files = [base.file(item) for item in items]
    if any(file in broken for file in files):
        return shown
    return replace(shown, base=[_record(file, item.prompt) for file, item in zip(files, items, strict=True)])


def _record(file: Path, caption: str) -> ImageRecord:
    return ImageRecord(file.name, caption, file.read_bytes, str(file))


def _encoders(config: EvaluateConfig, settings: Mapping[str, Any]) -> Encoders:
    """The encoders given, else those that the run was measured with."""
    weights = config.encoders.inception_weights or settings.get("inception_weights")
    return Encoders(
        clip_model=config.encoders.clip_model or settings.get("clip_model"),
        dino_model=config.encoders.dino_model or settings.get("dino_model"),
        inception_weights=Path(weights) if weights else None,
    )


def _place(evaluation: EvaluationContext) -> EncoderPlace:
    config, state = evaluation.config, evaluation.state
    return EncoderPlace(
        device=evaluation.device,
        cache=TensorCache(cache_folder(config.latents_cache_dir)),
        downloads=config.cache_dir,
        processes=_processes(state),
    )


def _processes(state: PartialState) -> Processes:
    return Processes(state.process_index, state.num_processes, gather_object, state.device)


def _measure(
    evaluation: EvaluationContext, shown: Mapping[str, MeasuredImages], embedders: Embedders
) -> dict[str, Measurement]:
    """The measurements by label."""
    evaluation.state.wait_for_everyone()
    found = {}
    for label, gallery in shown.items():
        names = evaluation.image_metrics
        found[label] = measure(names, gallery, embedders) if gallery.generated else Measurement(notes=["no images"])
        found[label].notes.extend(evaluation.real.notes)
    return found


def _write(
    file: Path, evaluation: EvaluationContext, found: Mapping[str, Measurement], facts: Mapping[str, Any]
) -> None:
    """metrics.json: every value with its encoder and its numbers of images."""
    result = {
        "v": METRICS_JSON_VERSION,
        **facts,
        "subject": evaluation.subject,
        "class_prompt": evaluation.class_prompt,
        "references": _described(evaluation.real.references),
        "training": _described(evaluation.real.training),
        "rows": [
            {"label": label.replace("\n", ", "), "values": list(map(asdict, measured.values)), "notes": measured.notes}
            for label, measured in found.items()
        ],
        "versions": provenance.versions(),
        "command": provenance.command(),
    }
    write_atomically(file, json.dumps(result, indent=1, allow_nan=False))


def _described(records: Sequence[ImageRecord]) -> dict[str, Any]:
    """How many, and a hash that tells other images."""
    contents = "".join(sorted(record.content_hash() for record in records))
    return {"n": len(records), "sha256": hashlib.sha256(contents.encode()).hexdigest()[:16]}
