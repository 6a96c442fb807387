"""What happens at which steps of a run: the callbacks, in their order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dreamlora.callbacks.best import BestCallback
from dreamlora.callbacks.checkpoint import CheckpointCallback
from dreamlora.callbacks.evaluate import EvaluateCallback
from dreamlora.callbacks.final import FinalCallback
from dreamlora.callbacks.health import HealthCallback
from dreamlora.callbacks.image_metrics import ImageMetricsCallback, Scenes
from dreamlora.callbacks.log import LogCallback
from dreamlora.callbacks.meet import MeetCallback
from dreamlora.callbacks.new_tokens import NewTokensCallback
from dreamlora.callbacks.raw import RawCallback
from dreamlora.callbacks.sample import SampleCallback
from dreamlora.data.stores import LatentStore
from dreamlora.data.transforms import Preparations
from dreamlora.eval_loss.evalset import EvalSet, build_eval_set, build_final_set
from dreamlora.evaluation.embed import Processes
from dreamlora.evaluation.embedders import Embedders, EncoderPlace
from dreamlora.interfaces import Callback
from dreamlora.metric_names import EVAL_LOSS, EVAL_LOSS_TRAIN
from dreamlora.processes import gather_lists
from dreamlora.run.context import RunContext
from dreamlora.run.encoding import encode_images
from dreamlora.run.images import RunImages
from dreamlora.sampling.grid import MAX_REFERENCES
from dreamlora.training.loop import Run

MOST_COMPARED_IMAGES = 256
"""Training images that drawn ones are compared with."""


@dataclass(frozen=True)
class Material:
    """Encoded images for the evaluation.

    Attributes:
        measured: to measure on.
        learned: images of the training, for the gap; None if it is not measured.
    """

    measured: LatentStore
    learned: LatentStore | None

    @property
    def stores(self) -> list[LatentStore]:
        """All that there are."""
        return [self.measured, *([self.learned] if self.learned else [])]


def eval_material(context: RunContext, pictures: RunImages, how: Preparations) -> Material:
    """Encode the images to measure on; and, for the gap between the two, images that are trained on."""
    options = context.config.eval
    with_gap = pictures.learned and options.eval_steps and options.final_eval_items
    measured = encode_images(context, pictures.measured, how)
    return Material(measured, encode_images(context, pictures.learned, how) if with_gap else None)


def callbacks(context: RunContext, run: Run, pictures: RunImages, material: Material) -> list[Callback]:
    """Logging first; the evaluation before all to whom it matters that a step is the last; checkpoints after all
    else of their step is on disk; and then the processes meet again.
    """
    config = context.config
    callback_list: list[Callback] = [LogCallback()]
    every = config.eval.eval_steps or config.sample.sample_steps or 0
    if run.new_tokens:
        callback_list.append(NewTokensCallback(every, config.tokens.new_tokens_end))
    if every:
        callback_list.append(HealthCallback(every))
    metric = eval_metric(pictures)
    evaluate = None
    if config.eval.eval_steps:
        items = eval_set(context, run, material.measured)
        evaluate = EvaluateCallback(items, config.eval.eval_steps, metric, config.eval.early_stopping)
        callback_list.append(evaluate)
        if run.average:
            callback_list.append(RawCallback(run.average, items, config.eval.eval_steps, metric))
    if config.sample.sample_steps:
        plan = context.sample_plan(pictures.prompts)
        callback_list.append(SampleCallback(plan, config.sample.sample_steps, pictures.train[:MAX_REFERENCES]))
    images = None
    if config.eval.eval_metrics:
        *drawing, images = _image_metrics(context, run, pictures)
        callback_list += [*drawing, images]
    if evaluate and config.eval.save_best:
        callback_list.append(BestCallback(evaluate.losses, metric, images))
    if evaluate and config.eval.final_eval_items:
        callback_list.append(_final(context, run, material))
    long = (config.eval.eval_steps, config.sample.sample_steps, config.eval.eval_metrics_steps)
    run.occasions = tuple(steps for steps in long if steps)
    saved_every = config.train.checkpointing_steps
    return [*callback_list, CheckpointCallback(saved_every), MeetCallback(saved_every)]


def eval_metric(pictures: RunImages) -> str:
    """What the evaluation loss of a run is called."""
    return EVAL_LOSS if pictures.held_out else EVAL_LOSS_TRAIN


def _image_metrics(context: RunContext, run: Run, pictures: RunImages) -> list[Any]:
    """What measures drawn images; before it, what draws them, unless the samples are measured."""
    options = context.config.eval
    every = options.eval_metrics_steps or 0
    apart = context.config.draws_for_metrics
    plan, folder = context.sample_plan(pictures.eval_prompts or pictures.prompts), run.folder.samples
    if apart:
        count = options.eval_num_images or plan.num_images_per_prompt
        plan = replace(plan, num_images_per_prompt=count, seed=options.eval_seed)
        folder = run.folder.eval_images
    scenes = Scenes(
        folder=folder,
        plan=plan,
        texts=[context.subject.scored_text(item.prompt) for item in plan.items()],
        with_subject=[context.subject.is_in(item.prompt) for item in plan.items()],
        references=pictures.held_out,
        training=pictures.train[:MOST_COMPARED_IMAGES],
    )
    accelerator = context.accelerator
    processes = Processes(accelerator.process_index, accelerator.num_processes, gather_lists, accelerator.device)
    place = EncoderPlace(accelerator.device, context.cache, context.config.model.cache_dir, processes, progress=False)
    embedders = Embedders(context.config.encoders, context.config.embedded, place)
    measuring = ImageMetricsCallback(options.eval_metrics, every, scenes, embedders, context.warn)
    return [SampleCallback(plan, every, folder=folder), measuring] if apart else [measuring]


def _final(context: RunContext, run: Run, material: Material) -> FinalCallback:
    options = context.config.eval
    items = build_final_set(
        eval_set(context, run, material.measured),
        material.measured.content_hashes,
        run.objective,
        seed=options.eval_seed,
        n_items=options.final_eval_items or 0,
    )
    return FinalCallback(items, eval_set(context, run, material.learned) if material.learned else None)


def eval_set(context: RunContext, run: Run, images: LatentStore) -> EvalSet:
    """The frozen items of these images."""
    return build_eval_set(
        torch.stack([images.latents(index, 0)[0] for index in range(len(images))]),
        [captions[0] for captions in images.captions],
        images.content_hashes,
        run.objective,
        seed=context.config.eval.eval_seed,
        model_id=context.measured_id,
    ).of_images(images.masks(), images.views())
