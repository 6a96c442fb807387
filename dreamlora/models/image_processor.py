"""What cuts images into the patches that a vision-language model sees, of the numbers that we know."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le, Len
from transformers import Qwen2VLImageProcessorPil
from typing_extensions import TypedDict

from dreamlora.models.fetching import Place
from dreamlora.reading import Schema, UnreadableError, read_json

CONFIG = "preprocessor_config.json"
_CONFIG_BYTES = 2**16
_Pixels = Annotated[int, Ge(1), Le(2**26)]
_Small = Annotated[int, Ge(1), Le(256)]
_Mean = Annotated[float, Ge(0), Le(1)]
_Std = Annotated[float, Gt(0), Le(1)]


class _PixelRange(TypedDict):
    shortest_edge: _Pixels
    longest_edge: _Pixels


class _Numbers(TypedDict, total=False):
    min_pixels: _Pixels | None
    max_pixels: _Pixels | None
    size: _PixelRange | None
    patch_size: _Small
    temporal_patch_size: _Small
    merge_size: _Small
    image_mean: Annotated[list[_Mean], Len(3, 3)]
    image_std: Annotated[list[_Std], Len(3, 3)]


_NUMBERS = Schema(_Numbers)


def load_image_processor(place: Place) -> Qwen2VLImageProcessorPil:
    """The image processor at a place: Qwen2-VL's, of Pillow, with the numbers that its config has.

    Raises:
        UserError: there is none, or it has others than an image processor can have.
    """
    file = place.file(CONFIG)
    try:
        numbers = _NUMBERS.check(read_json(file, Schema(dict), most=_CONFIG_BYTES))
    except ValueError as error:
        raise UnreadableError(file, str(error)) from None
    return Qwen2VLImageProcessorPil(**numbers)
