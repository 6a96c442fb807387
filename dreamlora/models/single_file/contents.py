"""What a .safetensors file says that it holds: names, shapes and types of its tensors. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dreamlora.archives import open_tensors
from dreamlora.config.model import INSTEAD_OF_QUANTIZED
from dreamlora.errors import UserError
from dreamlora.reading import UnreadableError, opened, shortened

Shapes = Mapping[str, tuple[int, ...]]

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PICKLED = (b"\x80", b"PK\x03\x04")
"""How pickles begin, and torch's archives of them."""
_NUMBERS = {"F64", "F32", "F16", "BF16"}
_COUNTERS = {"I64", "I32", "I16", "BOOL"}
"""Positions, and marks such as ``global_step``."""
_QUANTIZED = ("scaled_fp8", ".scale_weight", ".weight_scale", ".quant_state.", ".absmax", ".qweight", ".comfy_quant")


@dataclass(frozen=True)
class Contents:
    """The header of a .safetensors file.

    Attributes:
        file: that was read.
        shapes: of its tensors, by name.
        metadata: what else it says, as text.
    """

    file: Path
    shapes: Shapes
    metadata: Mapping[str, str]

    def below(self, *prefixes: str) -> dict[str, tuple[int, ...]]:
        """The shapes of those tensors whose names begin with one of these, without it."""
        return {
            name.removeprefix(prefix): shape
            for prefix in prefixes
            for name, shape in self.shapes.items()
            if name.startswith(prefix)
        }

    def has(self, *prefixes: str) -> bool:
        """Whether the name of a tensor begins with one of these."""
        return any(name.startswith(prefixes) for name in self.shapes)

    def outline(self) -> str:
        """What the names of most tensors begin with, for a message."""
        groups = Counter(name.split(".")[0] for name in self.shapes)
        named = ", ".join(f"{shortened(group)[1:-1]} ({count})" for group, count in groups.most_common(3))
        return f"{len(self.shapes)} tensors: {named}{', ...' if len(groups) > 3 else ''}"


def read_contents(file: Path) -> Contents:
    """The header of a file that may be a stranger's.

    Raises:
        UserError: it is a pickle or quantized, is no whole safetensors file, or see ``archives.open_tensors``.
    """
    _refuse_other_kinds(file)
    with open_tensors(file, "np") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no iterator
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
        types = {name: tensor.get_dtype() for name, tensor in slices.items()}
        metadata = dict(tensors.metadata() or {})
    odd = next((name for name, kind in types.items() if kind not in _NUMBERS | _COUNTERS), None)
    odd = odd or next((name for name in shapes if any(mark in f".{name}" for mark in _QUANTIZED)), None)
    if odd is not None:
        raise UserError(f"{file} is quantized ({shortened(odd)[1:-1]} is of type {types[odd]}): {INSTEAD_OF_QUANTIZED}")
    if not shapes:
        raise UnreadableError(file, "it holds no tensors")
    return Contents(file, shapes, metadata)


def _refuse_other_kinds(file: Path) -> None:
    with opened(file) as stream:
        beginning = stream.read(9)
    if beginning.startswith(b"GGUF") or file.suffix.lower() == ".gguf":
        raise UserError(f"{file} is quantized (GGUF): {INSTEAD_OF_QUANTIZED}")
    pickled = beginning.startswith(_PICKLED) and beginning[8:] != b"{"  # which is where safetensors' header begins
    if pickled or file.suffix.lower() in PICKLES:
        raise UserError(
            f"{file} is a pickle, which can run any code while it loads, and is never opened: get the same model as "
            "a .safetensors file, or as a folder in diffusers' format"
        )
