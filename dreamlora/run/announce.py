"""What a run takes and does, told before its first step and kept for its report: the same words in both places."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from dreamlora import registry
from dreamlora.compare.records import model_name
from dreamlora.config import Data, as_flat_dict
from dreamlora.config.new_tokens import NewToken
from dreamlora.config.rates import in_start_units, told_rate
from dreamlora.data.caption_text import tidy
from dreamlora.data.images import ImageRecord
from dreamlora.data.sets import epoch_length
from dreamlora.files import write_atomically
from dreamlora.models.loading import read_model_index
from dreamlora.run.context import RunContext
from dreamlora.run.images import RunImages, class_folder
from dreamlora.runfolder import RunFolder

_LONGEST = 70
"""Letters of a caption that are shown."""


def announce(context: RunContext, folder: RunFolder, pictures: RunImages, begun: int) -> None:
    """Tell the person what is about to be trained, on what, and how, before any long work; the main process alone.

    Args:
        context: with every option decided.
        folder: of the run.
        pictures: that it learns and measures on; class images may still be missing.
        begun: steps that a resumed run has made.
    """
    if not context.accelerator.is_main_process:
        return
    outline = write_outline(context, folder, pictures, begun)
    width = max(map(len, outline))
    for name, text in outline.items():
        context.tell(f"{name:<{width}}  {text}")


def write_outline(context: RunContext, folder: RunFolder, pictures: RunImages, begun: int) -> dict[str, str]:
    """Put the same into the run's folder, for the report."""
    outline = outline_of(context, folder, pictures, begun)
    write_atomically(folder.outline_file, json.dumps(outline, indent=1, ensure_ascii=False))
    return outline


def outline_of(context: RunContext, folder: RunFolder, pictures: RunImages, begun: int) -> dict[str, str]:
    """Every line by its name, in the order in which they are told."""
    lines = {
        "model": _model(context),
        "images": _images(context, pictures),
        "captions": _captions(context, pictures.train),
        "class images": _class_images(context, folder),
        "size": _size(context),
        "LoRA": _lora(context),
        "optimizer": _optimizer(context),
        "steps": _steps(context, pictures, begun),
        "evaluation": _evaluation(context, pictures),
        "samples": _samples(context, pictures),
        "checkpoints": _checkpoints(context),
        "seed": str(context.config.train.seed),
        "folder": str(folder.path),
    }
    return {name: text for name, text in lines.items() if text}


def _model(context: RunContext) -> str:
    precision, source = context.accelerator.mixed_precision, context.source
    kind = read_model_index(source)["_class_name"]
    words = [f"in {'fp32' if precision == 'no' else precision}"]
    words += [f"weights in {source.base_precision}"] if source.base_precision else []
    words += [f"text encoders in {source.text_encoder_precision}"] if source.text_encoder_precision else []
    text = f"{model_name(as_flat_dict(context.config))} ({', '.join([kind, *words])})"
    if count := context.config.model.offload_blocks:
        text += f"; the weights of {count} blocks wait in host memory, with gradient checkpointing"
    return text


def _lora(context: RunContext) -> str:
    lora, family = context.config.lora, context.family
    adapter = registry.load("adapters", lora.adapter)
    kind = "" if lora.adapter == "lora" else f"{adapter.NAME}, "
    kind += "rsLoRA, " if lora.use_rslora else ""
    ranks = "".join(f", {place} {rank}" for place, rank in lora.ranks.items())
    alpha = "each layer's rank" if lora.lora_alpha is None else f"{lora.lora_alpha:g}"
    alphas = "".join(f", {place} {value:g}" for place, value in lora.alphas.items())
    start = f", init {lora.init}" if adapter.PAIRS else ""
    layers = " ".join(lora.lora_layers or family.LORA_LAYERS)
    where = f"layers of the {family.DENOISER}: {layers}"
    where += f" in the blocks {' '.join(lora.lora_blocks)}" if lora.lora_blocks else ""
    if lora.train_text_encoder:
        where += "; and the text encoder" + (f" (rank {lora.text_encoder_rank})" if lora.text_encoder_rank else "")
    there = context.predecessor.embeddings if context.predecessor else ()
    where += "".join(f"; the new token {_token(new, new.token in there)}" for new in context.config.tokens.tokens)
    if context.predecessor:
        start = f", goes on from {lora.init_lora}: with its layers, ranks and alphas where no others are given"
    assisted = f"; with the frozen {lora.training_adapter} while training" if lora.training_adapter else ""
    return f"{kind}rank {lora.rank}{ranks}, alpha {alpha}{alphas}{start}; {where}" + assisted


def _token(new: NewToken, goes_on: bool) -> str:
    """Such as "sks (2 vectors, from dog)"."""
    count = f"{new.vectors} vectors" if new.vectors > 1 else "a vector"
    start = "goes on from that LoRA's" if goes_on else f"from {' '.join(new.words) or 'a random start'}"
    return f"{new.token} ({count}, {start})"


def _images(context: RunContext, pictures: RunImages) -> str:
    data = context.config.data
    held_out = f"; {len(pictures.held_out)} held out to measure on" if pictures.held_out else "; none held out"
    if not data.brings_images:
        return f"{len(pictures.train)} to learn, drawn for {data.style or data.subject}{held_out}"
    counts = Counter(record.dataset for record in pictures.train)
    sets = zip(data.each(), data.loss_weights, strict=True)
    parts = [f"{counts[number]} from {_source(one, weight)}" for number, (one, weight) in enumerate(sets)]
    if len(parts) == 1:
        return f"{len(pictures.train)} to learn, {parts[0].partition(' ')[2]}{held_out}"
    return f"{len(pictures.train)} to learn: {'; '.join(parts)}{held_out}"


def _source(data: Data, weight: float) -> str:
    """A data set, and what of it is not as usual."""
    unusual = [f"{data.repeats} times in an epoch"] if data.repeats > 1 else []
    unusual += [f"where {data.mask_data_dir} is white"] if data.mask_data_dir else []
    unusual += ["where it is opaque"] if data.alpha_mask else []
    unusual += [f"weight of the loss {weight:g}"] if weight != 1 else []
    source = str(data.instance_data_dir or data.train_data_dir or data.dataset_name)
    return f"{source} ({', '.join(unusual)})" if unusual else source


def _captions(context: RunContext, records: Sequence[ImageRecord]) -> str:
    data = context.config.data
    prompts = [tidy(one.instance_prompt) for one in data.each()]
    own = [record.caption for record in records if record.caption != prompts[record.dataset]]
    common = " or ".join(f'"{prompt}"' for prompt in dict.fromkeys(prompts) if prompt)
    if own:
        text = f"{len(own)} of {len(records)} images have their own, such as {_quoted(own[0])}"
        text += "" if len(own) == len(records) else f"; the others are learned as {common}"
    else:
        text = f"none of their own: every image is learned as {common}"
    several = sum(len(record.captions) > 1 for record in records)
    text += f"; {several} have several, of which one is drawn each time" if several else ""
    if data.shuffle_tags:
        text += f"; tags shuffled but for the first {data.keep_tags}" if data.keep_tags else "; tags shuffled"
    return f"{text}; left out {100 * data.caption_dropout:.3g} % of the time" if data.caption_dropout else text


def _class_images(context: RunContext, folder: RunFolder) -> str:
    data = context.config.data
    if not data.with_prior_preservation:
        return ""
    own = ", or more if more are your own" if data.class_data_dir else ""
    where = f'{data.num_class_images} of "{data.class_prompt}" in {class_folder(context, folder)}{own}'
    return f"{where}; the base model makes what is missing; weight {data.prior_loss_weight:g}"


def _size(context: RunContext) -> str:
    data = context.config.data
    sides = dict.fromkeys(one.resolution or data.resolution for one in data.each())
    squares = " or ".join(f"{side} × {side}" for side in sides) + " pixels"
    if data.buckets:
        return f"the nearest of the shapes with the area of {squares}, sides in steps of {data.bucket_step}"
    return squares


def _optimizer(context: RunContext) -> str:
    optim = context.config.optim
    open_rates = context.open_rates
    rate = "auto" if open_rates else told_rate(optim.optimizer, f"{optim.learning_rate:g}")
    text = f"{optim.optimizer}, learning rate {rate}"
    text += " in units of the start" if in_start_units(optim) else ""
    if context.config.lora.train_text_encoder and "text_encoder_lr" not in open_rates:
        text += f" (text encoder {optim.text_encoder_lr:g})"
    tokens = context.config.tokens
    text += "" if tokens.new_tokens_lr is None else f" (embeddings {tokens.new_tokens_lr:g})"
    text += "" if tokens.new_tokens_end is None else f" (embeddings up to step {tokens.new_tokens_end:g})"
    text += f", {optim.lr_scheduler}"
    if optim.lr_scheduler != "constant" and optim.lr_warmup_steps:
        text += f" after {optim.lr_warmup_steps:g} steps of warm-up"
    text += f", weight decay {optim.adam_weight_decay:g}"
    return f"{text}; moving average with decay {optim.ema_decay:g}" if optim.ema_decay else text


def _steps(context: RunContext, pictures: RunImages, begun: int) -> str:
    data, train, world = context.config.data, context.config.train, context.accelerator.num_processes
    images = (train.train_batch_size or 1) * train.gradient_accumulation_steps * world
    total = train.max_train_steps or 0
    text = f"{total}, each of {images} images (batch {train.train_batch_size} × {train.gradient_accumulation_steps} "
    text += f"accumulated × {world} process{'es' if world > 1 else ''})"
    text += " and as many class images" if data.with_prior_preservation else ""
    if data.datasets:
        epoch = epoch_length(pictures.train, data)
        text += f": {total * images / epoch:.3g} epochs of {epoch} samples"
    else:
        text += f": every image is seen {total * images / len(pictures.train):.3g} times"
    return f"{text}; {begun} are done" if begun else text


def _evaluation(context: RunContext, pictures: RunImages) -> str:
    options = context.config.eval
    parts = []
    if options.eval_steps:
        kind = "held-out" if pictures.held_out else "training"
        parts.append(f"loss on {len(pictures.measured)} {kind} images every {options.eval_steps} steps")
    if options.eval_metrics:
        parts.append(f"{' '.join(options.eval_metrics)} of drawn images every {options.eval_metrics_steps} steps")
    return "; ".join(parts) or "none"


def _samples(context: RunContext, pictures: RunImages) -> str:
    sample = context.config.sample
    if not sample.sample_steps:
        return "none"
    plan = context.sample_plan(pictures.prompts)
    return (
        f"{len(plan.items())} images of {len(pictures.prompts)} prompts every {sample.sample_steps} steps, seeds from "
        f"{plan.seed}, {plan.num_inference_steps} denoising steps, guidance {plan.guidance_scale:g}"
    )


def _checkpoints(context: RunContext) -> str:
    every = context.config.train.checkpointing_steps
    return f"every {every} steps and at the end" if every else "none"


def _quoted(caption: str) -> str:
    return f'"{caption}"' if len(caption) <= _LONGEST else f'"{caption[: _LONGEST - 1].rstrip()}…"'
