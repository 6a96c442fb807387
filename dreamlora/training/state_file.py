"""training_state.pt, read as data: torch's file format with nothing in it but tensors, numbers and words.

``weights_only`` runs no code. Still a few bytes can name tuples of tuples that take for ever to hash, a tensor of 10⁹
numbers that are all the same one, or an archive that unpacks to more than there is memory.
"""

from __future__ import annotations

import math
import pickletools
import re
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from annotated_types import Ge, Gt, Le, Lt, MaxLen
from pydantic import AfterValidator
from torch import Tensor
from typing_extensions import TypedDict

from dreamlora.archives import check_archive, read_entry
from dreamlora.reading import LARGEST, Schema, opened, shortened

_PICKLE_BYTES = 2**23
"""Of the part that names the tensors: 10,000 parameters with two moments each take 4 MB."""
_HEAVIEST = 10_000
"""Objects in a tuple, those in its tuples included."""
_NAMES = re.compile(
    r"collections OrderedDict|torch (?:BFloat16|Bool|Byte|Char|Double|Float|Half|Int|Long|Short)Storage"
    r"|torch (?:Size|device|bool|u?int\d+|b?float\d+)|torch\._utils (?:_rebuild_tensor_v2|_rebuild_wrapper_subclass)"
    r"|torch\._tensor _rebuild_from_type_v2|torch\.serialization _get_layout|torchao\.[\w.]+ \w+"
)
"""What a state may ask for by name: tensors, and torchao's classes of moments in 8 bits."""
_DEEPEST = 6
_MOST = 2**19
"""Of all objects; 10,000 parameters have a tenth of that."""
_LONGEST_WORD = 1000


def read_state(file: Path, inside: Path) -> dict[str, Any]:
    """What ``state.save`` has written.

    Raises:
        OSError: there is no such file, or it cannot be read.
        UnreadableError: it is no regular file, or a link leads out of the folder.
        ValueError: it is damaged, or holds what no state has.
    """
    with opened(file, inside) as stream:
        archive = check_archive(stream)
        names = [entry for entry in archive.infolist() if entry.filename.casefold().endswith("data.pkl")]
        if len(names) != 1 or names[0].file_size > _PICKLE_BYTES:
            raise ValueError("it is no file of tensors, or names more of them than a state has")
        _check_pickle(read_entry(archive, names[0]))
        stream.seek(0)
        try:
            content = torch.load(stream, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # its unpickler says all kinds of things of what no pickler writes
            raise ValueError(str(error) or type(error).__name__) from error
    _refuse_odd_objects(content)
    state: dict[str, Any] = _STATE.check(content)
    if state.get("skipped_steps", 0) > state["step"]:
        raise ValueError("it has skipped more steps than it has made")
    return state


def _check_pickle(pickled: bytes) -> None:
    """Raises ValueError for names of other things than tensors, and for tuples that are cheap to write alone."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    try:
        argument: Any
        for opcode, argument, _ in pickletools.genops(pickled):
            name = opcode.name
            if name == "GLOBAL" and not _NAMES.fullmatch(argument):
                raise ValueError(f"it asks for {shortened(argument)}")
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(len(stack))
            else:
                weight = 1 + sum(_taken(opcode, stack, marks))
                if weight > _HEAVIEST and name.startswith("TUPLE"):
                    raise ValueError(f"it holds a tuple of over {_HEAVIEST} objects")
                stack += [weight if name.startswith("TUPLE") or name == "REDUCE" else 1] * len(opcode.stack_after)
    except (LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__})") from error


def _taken(opcode: Any, stack: list[int], marks: list[int]) -> list[int]:
    """What an operation takes from the stack."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        first = marks.pop() - before.index(pickletools.markobject)
    else:
        first = len(stack) - len(before)
    if first < 0:
        raise IndexError
    taken = stack[first:]
    del stack[first:]
    return taken


def _refuse_odd_objects(content: Any) -> None:
    """Raises ValueError for more than tensors whose numbers are all there, numbers and words in lists and mappings."""
    left = [(content, 0)]
    count = 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST:
            raise ValueError("it holds more than a state does")
        if isinstance(value, dict):
            if not all((isinstance(key, str) and len(key) <= _LONGEST_WORD) or type(key) is int for key in value):
                raise ValueError("it has keys that are neither words nor numbers")
            left += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list | tuple):
            left += [(each, depth + 1) for each in value]
        elif problem := _problem_of(value):
            raise ValueError(problem)


def _problem_of(value: Any) -> str | None:
    if isinstance(value, Tensor):
        if type(value) is not Tensor:  # torchao's
            return None
        whole = value.layout == torch.strided and value.device.type == "cpu"
        missing = not whole or value.numel() * value.element_size() > value.untyped_storage().nbytes()
        return f"it holds a tensor of {tuple(value.shape)} whose numbers are not all there" if missing else None
    if isinstance(value, bool | None):
        return None
    if isinstance(value, int | float):
        return None if abs(value) <= LARGEST or value == math.inf else f"it holds the number {shortened(value)}"
    if isinstance(value, str):
        return "it holds a long text" if len(value) > _LONGEST_WORD else None
    return f"it holds a {type(value).__name__}"


def _finite(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not bool(value.isfinite().all()):
        raise ValueError("no tensor of finite numbers")
    return value


def _group(value: dict[str, Any]) -> dict[str, Any]:
    params = value.get("params")
    if not isinstance(params, list) or not all(type(number) is int for number in params):
        raise ValueError("no group of parameters")
    for name in ("names", "pair_names"):
        words = value.get(name)
        if not isinstance(words, list | tuple | None) or not all(isinstance(word, str) for word in words or ()):
            raise ValueError(f"{name} that are no words")
    return value


_Finite = Annotated[Any, AfterValidator(_finite)]
_Count = Annotated[int, Ge(0), Le(LARGEST)]
_Rate = Annotated[float, Ge(0), Le(1e9)]


class _Factors(TypedDict):
    A: _Finite
    B: _Finite


_WrittenBy = TypedDict("_WrittenBy", {"class": str, "entries": _Count})


class _Optimizer(TypedDict):
    state: dict[int, dict[str, Any]]
    param_groups: list[Annotated[dict[str, Any], AfterValidator(_group)]]
    written_by: NotRequired[_WrittenBy]


class _Schedule(TypedDict):
    last_epoch: _Count
    base_lrs: list[_Rate]


class _Scaler(TypedDict):
    scale: Annotated[float, Gt(0), Le(2.0**127)]
    growth_factor: Annotated[float, Gt(1), Le(1e6)]
    backoff_factor: Annotated[float, Gt(0), Lt(1)]
    growth_interval: Annotated[int, Ge(1), Le(LARGEST)]
    _growth_tracker: _Count


class _TrainingState(TypedDict):
    step: _Count
    skipped_steps: NotRequired[_Count]
    trainables: dict[str, _Finite]
    averaged: NotRequired[dict[str, _Finite]]
    starts: dict[str, _Factors]
    optimizer: _Optimizer
    lr_scheduler: _Schedule
    scaler: _Scaler | Annotated[dict[str, Any], MaxLen(0)] | None
    uncounted: NotRequired[dict[str, Annotated[int, Ge(-LARGEST), Le(LARGEST)]]]


_STATE = Schema(_TrainingState)
