"""Formats of LoRA files, one file each: how tensors and their names become ``AdapterWeights``, and back.

The names in them are a family's (``families.layers``), given as ``names.ModelNames``. Nothing here opens a file.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from dreamlora.lora.names import ModelNames
from dreamlora.lora.weights import AdapterWeights


class FileContent(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: by name.
        metadata: of its header.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class Format(Protocol):
    """A module of this package."""

    def read(self, content: FileContent, model: ModelNames) -> AdapterWeights:
        """All that a file holds, in the precision that it has there.

        Raises:
            ValueError: a name is no layer's of the model, or what belongs to a layer is not an adapter.
        """

    def write(self, weights: AdapterWeights, model: ModelNames) -> FileContent:
        """The file of these weights, which has no other metadata than the format needs.

        Raises:
            ValueError: the format cannot hold them, or has no names for this model.
        """
