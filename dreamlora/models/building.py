"""Parts of a model from its files: each of a class that we name, of files that were looked through before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dreamlora.errors import UserError
from dreamlora.models.configs import arguments_for, config_for, in_one_line
from dreamlora.models.fetching import Place
from dreamlora.models.tokenizer import load_tokenizer
from dreamlora.models.weights import DIFFUSERS, TRANSFORMERS, Weights, find_weights
from dreamlora.reading import UnreadableError

CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"
_ADAPTER = "adapter_config.json"
_without_weights: ContextVar[Mapping[Place, Weights] | None] = ContextVar("without_weights", default=None)


@dataclass(frozen=True)
class Form:
    """What a module is loaded as.

    Attributes:
        dtype: of its weights.
        variant: the word in the names of its files, such as fp16.
        allow_pickle: whether weights may be read from .bin files where there are no others.
        options: for its class.
    """

    dtype: torch.dtype | None
    variant: str | None = None
    allow_pickle: bool = False
    options: Mapping[str, Any] | None = None


def load_part(part_class: Any, place: Place, form: Form) -> Any:
    """A part of a model; modules are frozen and in eval mode.

    Raises:
        UserError: a file is missing or holds something else.
    """
    if issubclass(part_class, SchedulerMixin):
        return load_scheduler(part_class, place)
    if issubclass(part_class, PreTrainedTokenizerBase):
        with building(part_class, place):
            return load_tokenizer(part_class, place)
    return load_module(part_class, place, form)


def check_config(part_class: Any, place: Place) -> None:
    """Nothing, if the config of a part is one that ``load_part`` takes; no weights are fetched for that.

    Raises:
        UserError: it is missing, or says what it may not.
    """
    if issubclass(part_class, SchedulerMixin):
        load_scheduler(part_class, place)
    elif issubclass(part_class, PreTrainedModel):
        config_for(part_class.config_class, place.file(CONFIG))
    elif not issubclass(part_class, PreTrainedTokenizerBase):
        arguments_for(part_class, place.file(CONFIG))


def load_scheduler(part_class: Any, place: Place) -> Any:
    """A scheduler of diffusers, which also keeps what the others take that can be made of its config.

    Raises:
        UserError: its config is missing, or describes no noise schedule.
    """
    file = place.file(SCHEDULER_CONFIG)
    arguments = arguments_for(part_class, file, part_class._get_compatibles() if part_class.has_compatibles else ())
    with building(part_class, place):
        scheduler = part_class.from_config(arguments)
    name = "alphas_cumprod" if hasattr(scheduler, "alphas_cumprod") else "sigmas"
    schedule = torch.as_tensor(getattr(scheduler, name))
    if schedule.ndim != 1 or not len(schedule) or not ((schedule >= 0) & (schedule <= 1)).all():
        raise UnreadableError(file, f"it gives no noise schedule: its {name} are none, or not all in [0, 1]")
    return scheduler


def load_module(part_class: Any, place: Place, form: Form) -> nn.Module:
    """A model of diffusers or transformers, frozen and in eval mode.

    Raises:
        UserError: its config or weights are missing, do not belong together, or are none that it can be made of.
    """
    sizes = _without_weights.get()
    if sizes is not None:
        return empty_module(part_class, place, sizes[place], form.dtype or torch.float32)
    file = place.file(CONFIG)
    build = _of_transformers if issubclass(part_class, PreTrainedModel) else _of_diffusers
    module, missing = build(part_class, place, form, file)
    if missing:
        # both libraries go on with random numbers there
        raise UserError(
            f"{place}: the weights lack {len(missing)} tensors, {min(missing)} first; "
            f"they do not belong to its {CONFIG}: download or export the model again"
        )
    odd = next((name for name, own in module.named_parameters() if not own.is_floating_point()), None)
    if odd:
        raise UserError(f"{place}: the weights of {odd} are whole numbers: download or export the model again")
    return module.requires_grad_(False).eval()


def _of_transformers(part_class: Any, place: Place, form: Form, file: Path) -> tuple[nn.Module, set[str]]:
    if place.optional(_ADAPTER):
        raise UserError(
            f"{place} has an adapter beside the model ({_ADAPTER}): merge it into the weights, or take it away"
        )
    config = config_for(part_class.config_class, file)
    weights = find_weights(place, TRANSFORMERS, form.variant, form.allow_pickle)
    with building(part_class, place), weights.bounding(file):
        # without a path there is nothing that transformers could look up beside the weights
        module, info = part_class.from_pretrained(
            None,
            config=config,
            state_dict=weights.read(),
            dtype=form.dtype,
            trust_remote_code=False,
            output_loading_info=True,
            **(form.options or {}),
        )
    return module, info["missing_keys"]


def _of_diffusers(part_class: Any, place: Place, form: Form, file: Path) -> tuple[nn.Module, set[str]]:
    arguments = arguments_for(part_class, file)
    weights: Weights = find_weights(place, DIFFUSERS, form.variant, form.allow_pickle)
    if not form.allow_pickle:
        arguments["use_safetensors"] = True
    with building(part_class, place), weights.bounding(file):
        module, info = part_class.from_pretrained(
            file.parent, torch_dtype=form.dtype, variant=form.variant, output_loading_info=True, **arguments
        )
    return module, set(info["missing_keys"])


@contextmanager
def without_weights(sizes: Mapping[Place, Weights]) -> Iterator[None]:
    """Modules that are loaded in here have no numbers: they are on torch's meta device.

    Args:
        sizes: of their weights, as bounds.
    """
    token = _without_weights.set(sizes)
    try:
        yield
    finally:
        _without_weights.reset(token)


def is_module(part_class: Any) -> bool:
    """Whether a part has weights."""
    return issubclass(part_class, nn.Module)


def empty_module(part_class: Any, place: Place, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """A model of diffusers or transformers on torch's meta device: all its layers, and no numbers.

    Args:
        weights: that it is to have, as a bound.
        dtype: of its weights.

    Raises:
        UserError: its config describes no such model, or a far larger one.
    """
    file = place.file(CONFIG)
    with building(part_class, place), weights.bounding(file), torch.device("meta"):
        if issubclass(part_class, PreTrainedModel):
            module: nn.Module = part_class(config_for(part_class.config_class, file))
        else:
            module = part_class.from_config(arguments_for(part_class, file))
    return nn.Module.to(module, dtype).requires_grad_(False).eval()  # diffusers' own warns


@contextmanager
def building(part_class: Any, place: Place) -> Iterator[None]:
    """What a library raises while it makes a part of a stranger's files, of whatever kind, as one clear error."""
    dtype = torch.get_default_dtype()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot load {place}: expected a {part_class.__name__} as save_pretrained writes it. Copy or download it "
            f"again, or load and save it with save_pretrained. The reason given: {in_one_line(error)}"
        ) from error
    finally:
        torch.set_default_dtype(dtype)  # diffusers leaves another one behind when it fails
