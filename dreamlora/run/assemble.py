"""Composition root: from a configuration to a finished run. The only file that knows everyone.

At no time are more models in memory than the stage needs: text encoder, then autoencoder, then denoiser.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dreamlora.cli.parse import method_options
from dreamlora.config import RunConfig
from dreamlora.data.captions import CaptionPlan
from dreamlora.data.sets import loss_shares, places
from dreamlora.data.shown_prompts import Prompt
from dreamlora.data.stores import LatentStore
from dreamlora.data.transforms import Preparations, bucket_numbers
from dreamlora.interfaces import Components
from dreamlora.interrupts import Interrupted
from dreamlora.lora.inject import trainable_parameters
from dreamlora.lora.pairs import layers_below_rank
from dreamlora.memory import shortage_told
from dreamlora.models.compiling import compile_blocks
from dreamlora.processes import wait_for_everyone
from dreamlora.run import (
    defaults,
    ending,
    formats,
    header,
    image_list,
    new_tokens,
    provenance,
    range_test,
    remedies,
    resume,
    schedule,
    trackers,
)
from dreamlora.run.announce import announce, write_outline
from dreamlora.run.context import RunContext
from dreamlora.run.encoding import (
    Encode,
    encode_frozen,
    encode_images,
    encode_texts,
    in_tiles_if_need_be,
    pipeline_inputs,
)
from dreamlora.run.images import RunImages, for_classes, with_class_images
from dreamlora.run.opening import Prelude, begin, decided, read
from dreamlora.run.prompts import all_prompts, all_shown_prompts
from dreamlora.run.trainable import measure_start, optimizer_of, training_tensors, with_lora
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop, parity, start, state
from dreamlora.training.ema import MovingAverage
from dreamlora.training.loop import Run
from dreamlora.training.stream import Layout, Source, Stream


def train(config: RunConfig, options: Any) -> RunFolder:
    """Train a LoRA as ``config`` says; everything of the run lies in the returned folder.

    Args:
        config: all options.
        options: of the optimizer, an instance of its plug-in's ``Options``.

    Raises:
        UserError: something that was given cannot be used; said before any long work where it can be known by then.
    """
    context = begin(config)
    folder = _claim_folder(context)
    try:
        with shortage_told(context.memory, functools.partial(remedies.of_run, context)):
            _train_in(context, folder, options)
    except Interrupted:
        context.tell(resume.way_on(folder, provenance.command()))
        raise
    finally:
        trackers.finish(context)
        folder.release()
        gc.collect()  # the model has gone now, whatever pointed at it in a ring
    return folder


def prepare(config: RunConfig, options: Any) -> Run:
    """A run that is ready for ``loop.train``, for those who want no more than the loop: its folder stays locked.

    Raises:
        UserError: as ``train``.
    """
    context = begin(config)
    folder = _claim_folder(context)
    return _prepare(context, folder, options, read(context, folder, options))[0]


def _train_in(context: RunContext, folder: RunFolder, options: Any) -> None:
    """All stages of a run, in order; of one that is complete only what came after its summary."""
    prelude = read(context, folder, options)
    if prelude.complete:
        context.tell(prelude.complete)
        if context.accelerator.is_main_process:
            ending.publish(context, folder)
        return
    ended = _trained(context, folder, options, prelude)
    # The run has gone with the function that held it. Nothing else may hold what its model had beside the base.
    context.accelerator.free_memory()
    ending.release(context, ended)
    wait_for_everyone()  # for the last time: what is left to do takes long and is the main process's alone
    context.accelerator.trackers = []  # they stay open for the report
    context.accelerator.end_training()
    if context.accelerator.is_main_process:
        ending.finish(context, folder, ended)


def _trained(context: RunContext, folder: RunFolder, options: Any, prelude: Prelude) -> ending.Conclusion:
    """The stages that need the model; it is held in here and by what accelerate keeps, nowhere else."""
    run, pictures = _prepare(context, folder, options, prelude)
    wait_for_everyone()
    if context.accelerator.is_main_process:
        trackers.start(context, folder, run.step)
        folder.forget_after(run.step)
        provenance.write_config(context.config, folder, context.accelerator.device)
        provenance.write_base_model(
            context.source, folder, context.predecessor.content if context.predecessor else None
        )
        image_list.write(folder.images_file, pictures)
    with context.timed("training"):
        loop.train(run)
    return ending.conclude(context, run, pictures)


def _prepare(context: RunContext, folder: RunFolder, options: Any, prelude: Prelude) -> tuple[Run, RunImages]:
    """All before the first step; a resumed run is where its checkpoint left it."""
    checkpoint = state.open_checkpoint(prelude.checkpoint) if prelude.checkpoint else None
    if checkpoint:
        resume.take_over_latents(context, checkpoint)
    announce(context, folder, prelude.pictures, begun=checkpoint.state["step"] if checkpoint else 0)
    pictures = with_class_images(context, folder, prelude.pictures)
    settings = resume.settings(context, pictures, options)
    if checkpoint:
        resume.require_same(checkpoint, settings, pictures)
    run, material = _build(context, folder, pictures, options)
    if checkpoint:
        if context.predecessor:
            run.begun_with = {name: parameter.detach().clone() for name, parameter in run.trainables.items()}
        state.restore(run, checkpoint.state)
    else:
        lora = context.config.lora
        with context.timed("starting the LoRA"):
            start.initialise(run, method_options("inits", lora.init, lora.init_args, {}))
            measure_start(run)
    formats.require_held(context, run)
    if context.config.model.compile:
        compile_blocks(run.components[context.family.DENOISER], _shapes(run))
    if context.open_rates and not checkpoint:
        items = schedule.eval_set(context, run, material.measured)
        range_test.settle(context, run, items, schedule.eval_metric(pictures), options)
        if context.accelerator.is_main_process:
            write_outline(context, folder, prelude.pictures, begun=0)
        settings = resume.settings(context, pictures, options)
    run.settings = settings | resume.latents(context)
    run.header = header.of_run(context, run, pictures.train)
    run.callbacks = schedule.callbacks(context, run, pictures, material)
    return run, pictures


def _shapes(run: Run) -> int:
    """Of batches, at most: sizes of images, each in batches of every size if there are several, and of prompts."""
    sources = run.stream.sources
    sizes = sum(len(set(source.buckets or (0,))) for source in sources)
    batches = 1 if sizes == 1 else len(sources) * run.stream.layout.batch_size
    own_lengths = sources if run.family.LENGTH_AXES else ()
    prompts = {caption for source in own_lengths for captions in source.store.captions for caption in captions}
    return sizes * batches * max(1, len(prompts))


def _claim_folder(context: RunContext) -> RunFolder:
    """The run folder, chosen and locked by the main process; an earlier run there is removed if that was asked for."""
    claimed: list[RunFolder] = []

    def claim() -> Path:
        folder = defaults.run_folder(context.config)
        folder.lock()
        claimed.append(folder)
        which = context.config.train.resume_from_checkpoint
        if which == "latest" and not folder.checkpoint_steps() and not folder.holds_result():
            context.tell(f"there is no checkpoint in {folder.path} to go on from yet: the training begins")
            folder.clear()
        elif folder.holds_remains() or (folder.holds_run() and not which):
            folder.clear()  # of a run, defaults.run_folder has made sure that this was asked for
        return folder.path

    path = decided(context, claim)
    folder = claimed[0] if claimed else RunFolder(path)
    context.config = replace(context.config, train=replace(context.config.train, output_dir=folder.path))
    return folder


def _build(context: RunContext, folder: RunFolder, pictures: RunImages, options: Any) -> tuple[Run, schedule.Material]:
    """Encode everything once, then load the denoiser, inject the LoRA and put the run together; what its evaluation
    measures on comes with it.
    """
    config, accelerator = context.config, context.accelerator
    side = config.data.resolution or 0
    how = Preparations.of(config.data, side, config.train.seed)

    def encoded() -> tuple[LatentStore, LatentStore | None, schedule.Material]:
        store = encode_images(context, pictures.train, how)
        class_store = encode_images(context, pictures.classes, for_classes(context)) if pictures.classes else None
        return store, class_store, schedule.eval_material(context, pictures, how.fixed(side))

    with context.timed("encoding images"):
        store, class_store, material = in_tiles_if_need_be(context, encoded)
    config = context.config  # which says by now whether that was in tiles
    context.parts.free("vae")
    encode, text = _conditioning(context, pictures, store, material)  # some are of prompts and images
    with context.timed("loading the model"):
        components: Components = {**context.parts.get("denoiser"), **context.parts.get("scheduler"), **(text or {})}
        if ending.checks_in_base(context):
            context.base_bits = parity.bits_of(components[context.family.DENOISER])
        model = with_lora(context, components, text)
    few, layers = layers_below_rank(model)
    if "rank" in config.given and layers and 2 * few >= layers:
        context.warn(f"--rank {config.lora.rank} is more than {few} of the {layers} layers have inputs or outputs")
    trainables = trainable_parameters(model)
    model = accelerator.prepare_model(model, evaluation_mode=True)  # no DDP: see training.gradients
    optimizer, lr_scheduler = optimizer_of(context, accelerator.unwrap_model(model), options)
    objective = context.family.objective(components["scheduler"], config.train)
    caption = context.caption_plan.draw
    learned, data = pictures.train, config.data
    sources = [
        Source(
            *("instance", store, 1.0, caption),
            buckets=bucket_numbers(learned, how),
            places=places(learned, data),
            shares=loss_shares(learned, data),
        )
    ]
    if class_store:
        sources.append(
            Source("class", class_store, config.data.prior_loss_weight, CaptionPlan(seed=config.train.seed).draw)
        )
    run = Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        family=context.family,
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
            _layout(context),
            seed=config.train.seed,
            noise_offset=config.train.noise_offset,
        ),
        conditioning=encode,
        call_arguments=pipeline_inputs(context, encode, text),
        vae=lambda: context.parts.get("vae"),
        put_away=lambda: context.parts.rest("vae"),
        memory=context.memory,
        total_steps=config.train.max_train_steps or 0,
        settle=new_tokens.settler(context),
        average=MovingAverage(trainables, config.optim.ema_decay) if config.optim.ema_decay else None,
    )
    context.memory.holds("LoRA, gradients and optimizer", run, training_tensors)
    return run, material


def _conditioning(
    context: RunContext, pictures: RunImages, store: LatentStore, material: schedule.Material
) -> tuple[Encode, Components | None]:
    """Captions to embeddings (the text encoder is gone then); or to token ids, with the text encoder to train."""
    if context.family.text_pictures(context.source) is None:
        prompts: Iterable[Prompt] = all_prompts(context, pictures)
    else:
        prompts = all_shown_prompts(context, pictures, store, material.stores)
    with context.timed("encoding prompts"):
        if context.config.encodes_in_training:
            text = context.parts.get("text")
            new_tokens.put_in(context, text)
            encode = encode_frozen(context, prompts, text)
            new_tokens.warn_of_pooling(context, text, encode)
            return encode, text
        return encode_texts(context, prompts), None


def _layout(context: RunContext) -> Layout:
    train_options = context.config.train
    return Layout(
        batch_size=train_options.train_batch_size or 1,
        accumulation=train_options.gradient_accumulation_steps,
        rank=context.accelerator.process_index,
        world=context.accelerator.num_processes,
    )
