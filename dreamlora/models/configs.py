"""What the configuration of a model's part may decide: shapes, numbers, and names of what its class is made of.

The classes' own readers also take from it which attention to fetch from the hub, which code to load, which files hold
the weights, and more with each version. So it is read here, and they are given the arguments that we know alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from dreamlora.config.model import INSTEAD_OF_QUANTIZED
from dreamlora.errors import UserError
from dreamlora.reading import Schema, UnreadableError, read_json, shortened

CONFIG_BYTES = 2**20
LARGEST_NUMBER = 10**6
"""Of whole numbers: widths, vocabularies (a quarter of it), positions."""
LONGEST_LIST = 1000
LONGEST_SCHEDULE = 100_000
"""Time steps of training; 1,000 in all known models."""
_BOUNDS = {
    "num_train_timesteps": (LONGEST_SCHEDULE, 0),
    "trained_betas": (1, LONGEST_SCHEDULE),
    "rope_theta": (10**10, 0),  # Mistral's is 10^9
}
"""Of numbers and of lists of them by their name, where they differ."""
_DEEPEST = 3
_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,64}")
"""Names of layers and activations; none of a file or repository, which have a slash."""

_SAID = 600
_ALSO = {"use_attention_mask", "tie_word_embeddings"}
"""No arguments of all classes: the first is looked up by StableDiffusionPipeline, and by us, in CLIP's; the second is
read by T5 and Qwen2.5-VL wherever it stands."""
_ROTATION = "rope_parameters"
_OLD_ROTATION = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
"""What transformers 4 wrote instead, and so do most models there are: left out, the default angles would be taken."""
_TEXT = "text_config"
_INFINITE = {"lambda_min_clipped"}
"""What diffusers writes as an infinite number, its default."""
_ANY = Schema(dict[str, Any])


def read_config(file: Path) -> dict[str, Any]:
    """All that the config of a part says.

    Raises:
        FileNotFoundError, UnreadableError: see ``reading.read_json``; or it is of a quantized model.
    """
    return _whole(file, read_json(file, _ANY, most=CONFIG_BYTES))


def _whole(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    if config.get("quantization_config") is not None:
        raise UnreadableError(file, f"its weights are quantized (quantization_config): {INSTEAD_OF_QUANTIZED}")
    return config


def arguments_for(part_class: Any, file: Path, more: Iterable[Any] = ()) -> dict[str, Any]:
    """Of the config of a model or scheduler of diffusers what its class takes, as plain values within bounds.

    Args:
        part_class: the class.
        file: the config.
        more: classes whose arguments are kept as well, for those that are made of a scheduler's config later.

    Raises:
        FileNotFoundError, UnreadableError: see ``read_config``; or a value is none that a config can hold.
    """
    taken: dict[str, inspect.Parameter] = {}
    for owner in (*more, part_class):
        taken |= _taken_by(owner)
    given = {name: value for name, value in read_config(file).items() if name in taken}
    for name in _INFINITE & given.keys():
        if given[name] is None:
            del given[name]
    for name, value in given.items():
        if not _is_such(value, taken[name]):
            raise UnreadableError(
                file, f"{name}: expected something such as {taken[name].default!r} (got {shortened(value)})"
            )
    return _plain(file, given)


def config_for(config_class: type[PretrainedConfig], file: Path) -> PretrainedConfig:
    """The config of a model of transformers, with its own arguments alone: none that all models have.

    Which attention computes is left to transformers, which takes the installed torch's.

    Raises:
        FileNotFoundError, UnreadableError: see ``arguments_for``.
    """
    given = read_config(file)
    if isinstance(given.get(config_class.base_config_key), dict):  # of a whole CLIP, whose text model alone is here
        given = given[config_class.base_config_key]
    try:
        return config_class(**_own(config_class, file, given))
    except UserError:
        raise
    except Exception as error:  # whatever the class makes of odd values
        raise UnreadableError(file, f"it describes no {config_class.__name__}: {in_one_line(error)}") from error


def _own(config_class: type[PretrainedConfig], file: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a config class and of those that it holds."""
    names = _names(config_class)
    inner = {name: _inner_class(config_class, name) for name in config_class.sub_configs}
    if _TEXT in inner and given.get(_TEXT) is None:  # the first Qwen2.5-VL have its text model's beside the others
        names |= _names(inner[_TEXT])
    own = _plain(file, {name: value for name, value in given.items() if name in names - set(inner)})
    for name, inner_class in inner.items():
        for key in (name, f"{name}_dict"):  # the second is how CLIP's first configs have it
            value = given.get(key)
            if value is not None:
                if not isinstance(value, dict):
                    raise UnreadableError(file, f"{key}: expected a mapping (got {shortened(value)})")
                _check_kind(config_class, name, inner_class, file, value)
                own[key] = _own(inner_class, file, _whole(file, value))
    return own


def _names(config_class: type[PretrainedConfig]) -> set[str]:
    own = _taken_by(config_class).keys() - _taken_by(PretrainedConfig).keys()
    return own | set(config_class.attribute_map) | _ALSO | (_OLD_ROTATION if _ROTATION in own else set())


def _inner_class(config_class: type[PretrainedConfig], name: str) -> type[PretrainedConfig]:
    """The class of a config inside; where its own text may choose one of all that there are, the usual one."""
    known: type[PretrainedConfig] = config_class.sub_configs[name]
    return type(getattr(config_class(), name)) if known is AutoConfig else known


def _check_kind(
    config_class: type[PretrainedConfig], name: str, usual: type[PretrainedConfig], file: Path, given: dict[str, Any]
) -> None:
    kind = given.get("model_type", usual.model_type)
    if config_class.sub_configs[name] is AutoConfig and kind != usual.model_type:
        raise UnreadableError(file, f"{name}: it is of the kind {shortened(kind)}, where {usual.model_type!r} is known")


def _taken_by(owner: Any) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(owner.__init__).parameters.values()
    return {
        parameter.name: parameter for parameter in parameters if parameter.kind in kinds and parameter.name != "self"
    }


def _is_such(value: Any, parameter: inspect.Parameter) -> bool:
    """Whether a value is of the kind of an argument's default, of which there may be a list."""
    default = parameter.default
    kinds = str(parameter.annotation)
    if value is None:  # also what was no finite number; SDXL has null for no
        return default is None or isinstance(default, bool) or bool(re.search("None|Optional", kinds))
    if isinstance(value, list):
        return not isinstance(default, str) or bool(re.search("tuple|list", kinds, re.IGNORECASE))
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return not isinstance(default, tuple | list)


def _plain(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        problem = problem_of(name, value)
        if problem:
            raise UnreadableError(file, f"{name}: {problem}")
    return values


def problem_of(name: str, value: Any, depth: int = 0) -> str | None:
    """What is wrong with a value of a config that may be anything of JSON, if anything is."""
    most, longest = _BOUNDS.get(name, (LARGEST_NUMBER, LONGEST_LIST))
    if isinstance(value, str) and not _WORD.fullmatch(value):
        return f"expected a number or a word (got {shortened(value)})"
    if isinstance(value, int | float) and abs(value) > most:
        return f"expected a number up to {most} (got {shortened(value)})"
    if not isinstance(value, list | dict):
        return None
    if depth == _DEEPEST or len(value) > longest:
        return f"expected a list of at most {longest} numbers (got {shortened(value)})"
    inner = [(name, own) for own in value] + (list(value.items()) if isinstance(value, dict) else [])
    return next((problem for key, own in inner if (problem := problem_of(key, own, depth + 1))), None)


def in_one_line(error: Exception) -> str:
    """What a library says of a stranger's file, which may be many lines, or a megabyte quoted."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SAID else text[: _SAID - 3] + "..."
