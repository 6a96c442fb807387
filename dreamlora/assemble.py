"""Composition root: from a configuration to a finished run. The only file that knows everyone.

At no time are more models in memory than the stage needs: text encoder, then autoencoder, then denoiser.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list
from diffusers.optimization import get_scheduler

from dreamlora import finish, registry, settle
from dreamlora.callbacks.checkpoint import CheckpointCallback
from dreamlora.callbacks.evaluate import EvaluateCallback
from dreamlora.callbacks.log import LogCallback
from dreamlora.callbacks.sample import SampleCallback
from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.data.cache import LatentStore
from dreamlora.data.dataset import load_images, split_holdout
from dreamlora.data.folder import load_folder
from dreamlora.data.images import ImageRecord
from dreamlora.data.transforms import Preparation
from dreamlora.errors import UserError
from dreamlora.families._loading import family_of, resolve_source
from dreamlora.interfaces import Callback, Components
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.metrics.eval_loss import build_eval_set
from dreamlora.optimizers import lora_param_groups
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.prompts import sample_prompts
from dreamlora.sampling.sampler import SamplePlan, plan_of
from dreamlora.stages import (
    DTYPES,
    ROLES,
    Encode,
    Parts,
    Stage,
    encode_images,
    encode_texts,
    pipeline_inputs,
    tokenized,
)
from dreamlora.training import loop, prior, state
from dreamlora.training.loop import Predictor, Run
from dreamlora.training.stream import Layout, Source, Stream

SUBJECT_IMAGES = 40
"""Images drawn of a built-in subject; a fifth of them is held out."""
CLASS_SEED = 0
"""Of the first class image; not the run's seed, so that runs with other seeds share the class images."""
MOST_EVAL_IMAGES = 16
"""Training images measured on where none is held out; more would cost time in every measurement."""


@dataclass(frozen=True)
class Pictures:
    """The images and prompts of a run.

    Attributes:
        train: to learn.
        held_out: to measure on; empty if there are too few images.
        classes: for prior preservation.
        prompts: of the samples; empty if none are drawn.
    """

    train: list[ImageRecord]
    held_out: list[ImageRecord]
    classes: list[ImageRecord]
    prompts: tuple[str, ...]


def train(config: RunConfig, options: Any) -> RunFolder:
    """Train a LoRA as ``config`` says; everything of the run lies in the returned folder.

    Args:
        config: all options.
        options: of the optimizer, an instance of its plug-in's ``Options``.

    Raises:
        UserError: something that was given cannot be used; said before any long work where it can be known by then.
    """
    stage = _start(config)
    folder = _claim_folder(stage)
    try:
        _train_in(stage, folder, options)
    finally:
        folder.release()
    return folder


def _train_in(stage: Stage, folder: RunFolder, options: Any) -> None:
    """All stages of a run, in order."""
    pictures = _read_pictures(stage, folder)
    stage.config = settle.by_length(stage.config, len(pictures.train), stage.accelerator.num_processes)
    images = [f"{record.content_hash()} {record.caption}" for record in pictures.train]
    settings = finish.settings(stage, images, options)
    which = stage.config.train.resume_from_checkpoint
    checkpoint = state.open_checkpoint(folder, which, settings) if which else None
    pictures = _with_class_images(stage, folder, pictures)
    run = _build(stage, folder, pictures, options)
    run.settings = settings
    if checkpoint:
        state.restore(run, checkpoint)
    stage.accelerator.wait_for_everyone()
    if stage.accelerator.is_main_process:
        folder.forget_after(run.step)
        finish.write_config(stage.config, folder, stage.accelerator.device)
    _start_trackers(stage, folder)
    with stage.timed("training"):
        loop.train(run)
    finish.finish(stage, run)


def _start(config: RunConfig) -> Stage:
    """Accelerator, model source and family; the options that depend on them."""
    accelerator = _accelerator(config)
    if config.train.push_to_hub:
        finish.check_hub(config)
    torch.backends.cuda.matmul.allow_tf32 = config.model.allow_tf32
    source = resolve_source(config.model)
    family = family_of(source, config.model.family)
    config = settle.by_model(config, family.resolution(source), family.SAMPLE_DEFAULTS, accelerator.num_processes)
    config = replace(config, model=replace(config.model, mixed_precision=accelerator.mixed_precision))
    if (config.data.resolution or 0) % family.SIDE_MULTIPLE:
        raise UserError(f"--resolution must be a multiple of {family.SIDE_MULTIPLE} (got {config.data.resolution})")
    parts = Parts(family, source, accelerator.device, DTYPES[accelerator.mixed_precision])
    return Stage(config, accelerator, family, source, parts)


def _accelerator(config: RunConfig) -> Accelerator:
    """Processes, device, precision and trackers; the trackers' folder is set once the run folder is known."""
    tracker = config.train.report_to
    known = [str(kind) for kind in get_available_trackers()]
    if tracker not in (None, "all", *known):
        raise UserError(f"--report_to {tracker}: no tracker that is installed. Installed: {', '.join(known) or 'none'}")
    try:
        return Accelerator(
            mixed_precision=config.model.mixed_precision,
            # The loop weighs its micro-batches itself; a number from accelerate's own settings would divide twice.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=tracker,
            project_config=ProjectConfiguration(logging_dir=str(config.train.logging_dir)),
        )
    except ValueError as error:
        raise UserError(f"--mixed_precision {config.model.mixed_precision}: {error}") from error


def _claim_folder(stage: Stage) -> RunFolder:
    """The run folder, chosen and locked by the main process; an earlier run there is removed if that was asked for."""
    told: list[Any] = [None]
    folder = None
    if stage.accelerator.is_main_process:
        try:
            folder = settle.run_folder(stage.config)
            folder.lock()
            if folder.holds_run() and not stage.config.train.resume_from_checkpoint:
                folder.clear()  # settle.run_folder has made sure that this was asked for
            told = [folder.path]
        except UserError as error:
            told = [error]
    broadcast_object_list(told)
    if isinstance(told[0], UserError):
        raise told[0]
    folder = folder or RunFolder(told[0])
    stage.config = replace(stage.config, train=replace(stage.config.train, output_dir=folder.path))
    return folder


def _read_pictures(stage: Stage, folder: RunFolder) -> Pictures:
    """Images to learn and to measure on, and the prompts to draw; a file that is no image stops the run here."""
    data, main = stage.config.data, stage.accelerator.is_main_process
    if not data.instance_data_dir and not data.dataset_name:
        images_dir = _draw_subject(stage, folder)
        data = replace(data, instance_data_dir=images_dir)
    found = load_images(data, stage.config.model.cache_dir, progress=main)
    if found.skipped:
        names = ", ".join(found.skipped[:3]) + (", ..." if len(found.skipped) > 3 else "")
        stage.warn(f"{len(found.skipped)} files in {data.instance_data_dir} are no images and were skipped: {names}")
    training, held_out = split_holdout(found.records, data.holdout)
    if not held_out and stage.config.eval.eval_steps != 0:
        stage.warn(
            "no image could be held out: the evaluation loss is that of training images and cannot see overfitting"
        )
    sample = stage.config.sample
    prompts = sample_prompts(sample, data.instance_prompt, data.class_prompt) if sample.sample_steps != 0 else ()
    return Pictures(training, held_out, [], prompts)


def _draw_subject(stage: Stage, folder: RunFolder) -> Path:
    """Images of a built-in subject of the embedded model, as files, so that they go the way of a person's photos."""
    subject = stage.config.data.subject
    if subject is None:
        raise UserError("nothing to train on: give --instance_data_dir, or --dataset_name, or --subject")
    images = folder.instance_images
    if stage.accelerator.is_main_process:
        from dreamlora.tiny.subjects import write_instance_images

        write_instance_images(images, subject, SUBJECT_IMAGES)
    stage.accelerator.wait_for_everyone()
    return images


def _with_class_images(stage: Stage, folder: RunFolder, pictures: Pictures) -> Pictures:
    """Class images for prior preservation, made by the base model where they are missing."""
    data = stage.config.data
    if not data.with_prior_preservation or data.class_prompt is None:
        return pictures
    images = data.class_data_dir or _class_folder(stage, folder.path.parent)
    precision = data.prior_generation_precision or stage.accelerator.mixed_precision
    plan = _plan(stage, (data.class_prompt,))
    plan = replace(plan, num_images_per_prompt=data.num_class_images, seed=CLASS_SEED, negative_prompt=None)
    base = Parts(stage.family, stage.source, stage.accelerator.device, DTYPES[precision])
    rank, world = stage.accelerator.process_index, stage.accelerator.num_processes
    with stage.timed("class images"):
        prior.ensure_class_images(images, plan, base.pipeline, stage.source.model_id, rank, world)
        base.free(*ROLES)
        stage.accelerator.wait_for_everyone()
    records = load_folder(images, data.class_prompt, flag="--class_data_dir").records
    return replace(pictures, classes=records[: data.num_class_images])


def _plan(stage: Stage, prompts: tuple[str, ...]) -> SamplePlan:
    data = stage.config.data
    return plan_of(stage.config.sample, stage.family.SAMPLE_DEFAULTS, prompts, data.resolution, data.sample_batch_size)


def _class_folder(stage: Stage, outputs: Path) -> Path:
    """``outputs/class_images/<prompt>-<hash>``: other prompts, models and sizes have folders of their own."""
    prompt = stage.config.data.class_prompt or ""
    kind = f"{prompt}/{stage.source.model_id}/{stage.config.data.resolution}"
    slug = "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:40]
    return outputs / "class_images" / f"{slug}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"


def _build(stage: Stage, folder: RunFolder, pictures: Pictures, options: Any) -> Run:
    """Encode everything once, then load the denoiser, inject the LoRA and put the run together."""
    config, accelerator = stage.config, stage.accelerator
    encode, text = _conditioning(stage, pictures)
    how = Preparation.of(config.data, config.data.resolution or 0, config.train.seed)
    with stage.timed("encoding images"):
        store = encode_images(stage, pictures.train, how)
        class_store = encode_images(stage, pictures.classes, how) if pictures.classes else None
        measured = pictures.held_out or pictures.train[:MOST_EVAL_IMAGES]
        eval_store = encode_images(stage, measured, how.fixed())
    stage.parts.free("vae")
    components: Components = {**stage.parts.get("denoiser"), **stage.parts.get("scheduler"), **(text or {})}
    if config.train.prediction_type:  # samples must be drawn as the model is trained
        components["scheduler"].register_to_config(prediction_type=config.train.prediction_type)
    model = _with_lora(stage, components, text)
    trainables = trainable_parameters(model)
    model = accelerator.prepare(model)
    optimizer, lr_scheduler = _optimizer(stage, accelerator.unwrap_model(model), options)
    objective = stage.family.objective(components["scheduler"], config.train)
    sources = [Source("instance", store, 1.0)]
    if class_store:
        sources.append(Source("class", class_store, config.data.prior_loss_weight))
    run = Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        family=stage.family,
        objective=objective,
        components=components,
        model=model,
        trainables=trainables,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        stream=Stream(
            sources,
            objective,
            encode,
            _layout(stage),
            seed=config.train.seed,
            noise_offset=config.train.noise_offset,
        ),
        conditioning=encode,
        call_arguments=pipeline_inputs(stage, encode, text),
        vae=lambda: stage.parts.get("vae"),
        total_steps=config.train.max_train_steps or 0,
    )
    run.callbacks = _callbacks(stage, run, pictures, eval_store)
    return run


def _conditioning(stage: Stage, pictures: Pictures) -> tuple[Encode, Components | None]:
    """Captions to embeddings (the text encoder is gone then); or to token ids, with the text encoder to train."""
    if stage.config.lora.train_text_encoder:
        text = stage.parts.get("text")
        return tokenized(stage, text), text
    captions = [record.caption for record in (*pictures.train, *pictures.held_out, *pictures.classes)]
    prompts = dict.fromkeys([*captions, *pictures.prompts, stage.config.sample.negative_prompt or ""])
    with stage.timed("encoding prompts"):
        return encode_texts(stage, prompts), None


def _with_lora(stage: Stage, components: Components, text: Components | None) -> Predictor:
    """The denoiser (and the text encoders that train) with fresh adapters, as one module."""
    config, family = stage.config, stage.family
    denoiser = components[family.DENOISER]
    layers = config.lora.lora_layers or family.LORA_LAYERS
    add_lora(denoiser, config.lora, layers, seed=config.train.seed)
    encoders = [text[name] for name in family.TEXT_ENCODERS] if text else []
    for number, encoder in enumerate(encoders):
        add_lora(encoder, config.lora, family.TEXT_LORA_LAYERS, seed=config.train.seed + number + 1)
    if config.model.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
        for encoder in encoders:
            encoder.gradient_checkpointing_enable()
    if config.model.enable_xformers_memory_efficient_attention:
        try:
            denoiser.enable_xformers_memory_efficient_attention()
        except (ModuleNotFoundError, ValueError) as error:
            raise UserError(f"--enable_xformers_memory_efficient_attention: {error}") from error
    return Predictor(family, denoiser, text, config.train.guidance_scale)


def _optimizer(stage: Stage, model: Predictor, options: Any) -> tuple[Any, Any]:
    """The optimizer and its schedule. The schedule counts optimizer steps, whatever the processes and micro-batches."""
    optim = stage.config.optim
    groups = lora_param_groups(model.denoiser, lr=optim.learning_rate, weight_decay=optim.adam_weight_decay)
    if len(model.encoders):
        groups += lora_param_groups(
            list(model.encoders.values()), lr=optim.text_encoder_lr, weight_decay=optim.adam_weight_decay_text_encoder
        )
    optimizer = registry.load("optimizers", optim.optimizer).build(groups, options)
    lr_scheduler = get_scheduler(
        optim.lr_scheduler,
        optimizer,
        num_warmup_steps=optim.lr_warmup_steps,
        num_training_steps=stage.config.train.max_train_steps,
        num_cycles=optim.lr_num_cycles,
        power=optim.lr_power,
    )
    return stage.accelerator.prepare(optimizer), lr_scheduler


def _start_trackers(stage: Stage, folder: RunFolder) -> None:
    if stage.config.train.report_to:
        stage.accelerator.project_configuration.logging_dir = str(folder.path / stage.config.train.logging_dir)
        simple = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in as_flat_dict(stage.config).items()
            if name != "hub_token"
        }
        stage.accelerator.init_trackers("dreamlora", config=simple)


def _layout(stage: Stage) -> Layout:
    train_options = stage.config.train
    return Layout(
        batch_size=train_options.train_batch_size or 1,
        accumulation=train_options.gradient_accumulation_steps,
        rank=stage.accelerator.process_index,
        world=stage.accelerator.num_processes,
    )


def _callbacks(stage: Stage, run: Run, pictures: Pictures, eval_store: LatentStore) -> list[Callback]:
    """Logging first, checkpoints last: a checkpoint promises that all else of its step is on disk."""
    config = stage.config
    callbacks: list[Callback] = [LogCallback()]
    if config.eval.eval_steps:
        name = "eval/loss" if pictures.held_out else "eval/loss_train"
        latents = torch.stack([eval_store.latents(index, 0)[0] for index in range(len(eval_store))])
        items = build_eval_set(
            latents,
            eval_store.captions,
            eval_store.content_hashes,
            run.objective,
            seed=config.eval.eval_seed,
            model_id=stage.source.model_id,
        )
        callbacks.append(EvaluateCallback(items, config.eval.eval_steps, name))
    if config.sample.sample_steps:
        plan = _plan(stage, pictures.prompts)
        references = [Path(record.where) for record in pictures.train]
        callbacks.append(SampleCallback(plan, config.sample.sample_steps, references))
    if config.train.checkpointing_steps:
        callbacks.append(CheckpointCallback())
    return callbacks
