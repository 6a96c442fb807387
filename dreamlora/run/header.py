"""What a run's LoRA files say of themselves: ModelSpec, kohya's keys, and our own (``lora.metadata``).

Nothing private: no paths, no user's or machine's name, no times but the date of the file, no captions but how often
their parts were seen, and these only if wanted.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dreamlora.config.rates import in_start_units
from dreamlora.credentials import masked_options
from dreamlora.data.images import ImageRecord
from dreamlora.lora.metadata import DATE, IMPLEMENTATION, SPEC, SPEC_VERSION, hashes_of, now
from dreamlora.lora.names import ModelNames, names_of
from dreamlora.models.local import is_single_file
from dreamlora.run import provenance
from dreamlora.run.context import RunContext
from dreamlora.training.loop import Run

MOST_TAGS = 1000
"""Of a data set: a thousand tags take some 20 KB, of captions that are sentences each is one."""
_LONGEST_TAG = 200
_LYCORIS = {"dora": {"algo": "lora", "dora_wd": "True"}, "loha": {"algo": "loha"}, "lokr": {"algo": "lokr"}}
"""Arguments of LyCORIS' ``lycoris.kohya`` for adapters that kohya's own module does not have."""
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def of_run(context: RunContext, run: Run, records: Sequence[ImageRecord]) -> Callable[[int], dict[str, str]]:
    """What the file of a step says; nothing where that is not wanted.

    Args:
        context: of the run.
        run: whose model is there.
        records: images that it trains on.
    """
    wanted = context.config.about
    if not wanted.metadata:
        return lambda step: {}
    names = names_of(context.family, dict(run.components[context.family.DENOISER].config))
    spec = _spec(context, names, getattr(run.objective, "prediction_type", ""))
    known = {**_kohya(context, names, records), **_own(context)}
    fixed = {f"modelspec.{key}": value for key, value in spec.items() if value}
    fixed |= {key: _text(value) for key, value in known.items()}
    return functools.partial(_at, fixed, run)


def _at(fixed: dict[str, str], run: Run, step: int) -> dict[str, str]:
    average = {"dreamlora.ema_decay": str(run.config.optim.ema_decay)} if run.average and run.average.shown else {}
    return {**fixed, **average, DATE: now(), "ss_steps": str(step), "dreamlora.step": str(step)}


def _spec(context: RunContext, names: ModelNames, prediction: str) -> dict[str, str]:
    config, wanted = context.config, context.config.about
    side = config.data.resolution
    return {
        SPEC.removeprefix("modelspec."): SPEC_VERSION,
        "architecture": f"{names.architecture}/lora",
        IMPLEMENTATION.removeprefix("modelspec."): "diffusers",
        "title": wanted.metadata_title or _name(context),
        "author": wanted.metadata_author or "",
        "description": wanted.metadata_description or "",
        "license": wanted.metadata_license or "",
        "tags": wanted.metadata_tags or "",
        "resolution": f"{side}x{side}",
        "prediction_type": _PREDICTIONS.get(prediction, ""),
        "trigger_phrase": _trigger(context) if wanted.metadata_captions else "",
    }


def _trigger(context: RunContext) -> str:
    """What is learned, as prompts name it, and new tokens."""
    subject = context.subject.name or ""
    new = [each.token for each in context.config.tokens.tokens if each.token not in subject.lower()]
    return ", ".join([subject, *new] if subject else new)


def _kohya(context: RunContext, names: ModelNames, pictures: Sequence[ImageRecord]) -> dict[str, Any]:
    """Those of kohya's keys that Civitai, Forge and lora managers show, or that mean here what they mean there."""
    config = context.config
    lora, optim, train, data = config.lora, config.optim, config.train, config.data
    processes, base = context.accelerator.num_processes, config.model.pretrained_model_name_or_path
    batch = train.train_batch_size or 1
    return {
        "ss_output_name": _name(context),
        "ss_base_model_version": names.base_version,
        "ss_sd_model_name": context.source.model_id,
        **(hashes_of(Path(base)) if is_single_file(base) else {}),
        "ss_network_module": "lycoris.kohya" if lora.adapter in _LYCORIS else "networks.lora",
        "ss_network_args": _LYCORIS.get(lora.adapter),
        "ss_network_dim": lora.rank,
        "ss_network_alpha": lora.rank * lora.scale(lora.rank, lora.lora_alpha or lora.rank),
        "ss_network_dropout": lora.lora_dropout,
        "ss_resolution": f"({data.resolution}, {data.resolution})",
        "ss_num_train_images": len(pictures),
        "ss_batch_size_per_device": batch,
        "ss_total_batch_size": batch * processes * train.gradient_accumulation_steps,
        "ss_gradient_accumulation_steps": train.gradient_accumulation_steps,
        "ss_gradient_checkpointing": config.model.gradient_checkpointing,
        "ss_max_train_steps": train.max_train_steps,
        "ss_learning_rate": optim.learning_rate,
        "ss_unet_lr": optim.learning_rate,
        "ss_text_encoder_lr": optim.text_encoder_lr if lora.train_text_encoder else None,
        "ss_optimizer": " ".join((optim.optimizer, *optim.optimizer_args)),
        "ss_lr_scheduler": optim.lr_scheduler,
        "ss_lr_warmup_steps": optim.lr_warmup_steps,
        "ss_max_grad_norm": optim.max_grad_norm,
        "ss_mixed_precision": context.accelerator.mixed_precision,
        "ss_seed": train.seed,
        "ss_noise_offset": train.noise_offset or None,
        "ss_min_snr_gamma": train.snr_gamma,
        "ss_prior_loss_weight": data.prior_loss_weight if data.with_prior_preservation else None,
        "ss_loss_type": train.loss_type,
        "ss_tag_frequency": _tag_frequency(pictures) if config.about.metadata_captions else None,
    }


def _own(context: RunContext) -> dict[str, Any]:
    lora, optim = context.config.lora, context.config.optim
    return masked_options(
        {
            "dreamlora.version": provenance.versions().get("dreamlora", ""),
            "dreamlora.base_model": context.source.model_id,
            "dreamlora.base_precision": context.source.base_precision,
            "dreamlora.text_encoder_precision": context.source.text_encoder_precision,
            "dreamlora.optimizer": optim.optimizer,
            "dreamlora.optimizer_args": list(optim.optimizer_args),
            "dreamlora.lora_units": "start" if in_start_units(optim) else None,
            "dreamlora.adapter": lora.adapter,
            "dreamlora.adapter_args": list(lora.adapter_args),
            "dreamlora.rank_pattern": list(lora.rank_pattern),
            "dreamlora.alpha_pattern": list(lora.alpha_pattern),
            "dreamlora.text_encoder_rank": lora.of_text_encoder.rank if lora.train_text_encoder else None,
            "dreamlora.init": lora.init,
        }
    )


def _tag_frequency(pictures: Iterable[ImageRecord]) -> dict[str, dict[str, int]]:
    """By data set how often each tag was seen, as kohya counts them: parts of captions between commas."""
    counts: dict[int, Counter[str]] = {}
    for record in pictures:
        for caption in record.captions:
            tags = (tag.strip() for tag in caption.split(","))
            counts.setdefault(record.dataset, Counter()).update(tag[:_LONGEST_TAG] for tag in tags if tag)
    return {f"dataset_{number}": dict(tags.most_common(MOST_TAGS)) for number, tags in sorted(counts.items())}


def _name(context: RunContext) -> str:
    """Of the run's folder."""
    place = context.config.train.output_dir
    return place.resolve().name if place else ""


def _text(value: Any) -> str:
    """As kohya writes values: Python's words, and JSON for what has parts."""
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
