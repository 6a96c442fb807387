"""What the metadata of a LoRA file says of the LoRA: its alphas. Nothing else in there decides anything.

diffusers hands PEFT whatever stands there: regular expressions, ranks, the names of other methods and of base models.
Here ranks and layers are those of the tensors, and patterns are ends of names of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le, MaxLen
from typing_extensions import TypedDict

from dreamlora.lora.names import CLIP_MODEL
from dreamlora.reading import Schema, json_of, shortened

HIGHEST_ALPHA = 1e9
"""Above it a product of factors of ordinary size is no number any more."""
METADATA_KEY = "lora_adapter_metadata"
"""Under which diffusers writes the settings, as JSON, each name with its component before it."""
_SETTINGS_BYTES = 2**20

_Rank = Annotated[int, Ge(1), Le(2**20)]
_Alpha = Annotated[float, Ge(-HIGHEST_ALPHA), Le(HIGHEST_ALPHA)]
_Name = Annotated[str, MaxLen(2**9)]


class _Known(TypedDict, total=False):
    """PEFT's settings that say what the factors are multiplied by."""

    r: _Rank
    lora_alpha: _Alpha
    use_rslora: bool
    use_dora: bool
    rank_pattern: Annotated[dict[_Name, _Rank], MaxLen(2**14)] | None
    alpha_pattern: Annotated[dict[_Name, _Alpha], MaxLen(2**14)] | None


_KNOWN = Schema(_Known)
_DEFAULT_RANK = _DEFAULT_ALPHA = 8
"""PEFT's."""
_NO_MATTER = {
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out"),
    *("base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping"),
    *("peft_version", "runtime_config", "eva_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
"""Settings that say where the LoRA is, which the tensors tell; how it was made; or how it is to train. Not read."""
_NEUTRAL = {"init_lora_weights": (True, "gaussian", "eva", "orthogonal"), "bias": ("none",), "peft_type": ("LORA",)}
"""Values of others that leave the LoRA a plain one; other inits have changed the base model's weights."""


@dataclass(frozen=True)
class Settings:
    """Of the LoRA of one component.

    Attributes:
        rank, alpha: of layers that no pattern names.
        root: whether the scale is ``alpha / sqrt(rank)`` (rsLoRA), and not ``alpha / rank``.
        dora: whether it is a DoRA, which has magnitudes too.
        ranks, alphas: of layers by the ends of their names, or whole ones after "^"; the first that fits counts.
    """

    rank: int
    alpha: float
    root: bool = False
    dora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    def alpha_of(self, layer: str, rank: int) -> float:
        """The alpha that scales a layer by ``alpha / rank``.

        Args:
            layer: its name in the component.
            rank: of its factors.

        Raises:
            ValueError: the settings mean another rank.
        """
        meant = _value_of(self.ranks, layer, self.rank)
        if meant != rank:
            raise ValueError(f"its metadata says that {layer} has rank {meant}, and its tensors are of rank {rank}")
        alpha = _value_of(self.alphas, layer, self.alpha)
        return alpha * math.sqrt(rank) if self.root else alpha

    def scale_of(self, layer: str) -> float:
        """What a layer is scaled by whose tensors tell no rank."""
        rank = _value_of(self.ranks, layer, self.rank)
        return self.alpha_of(layer, rank) / rank


def settings_of(metadata: Mapping[str, str]) -> dict[str, Settings]:
    """Settings by component; none for a file that has none, whose alphas are its ranks or tensors of their own.

    Args:
        metadata: of the file.

    Raises:
        ValueError: it is not what diffusers writes, or out of bounds, or asks for more than a LoRA or DoRA.
    """
    text = metadata.get(METADATA_KEY, "")
    try:
        if len(text) > _SETTINGS_BYTES:
            raise ValueError(f"has more than {_SETTINGS_BYTES} bytes")
        content = json_of(text or "{}")
        if not isinstance(content, dict):
            raise ValueError(f"is a {type(content).__name__}, and no object")
        by_component: dict[str, dict[str, Any]] = {}
        for key, value in content.items():
            component, _, name = key.partition(".")
            by_component.setdefault(component, {})[name] = value
        return {component: settings(component, given) for component, given in by_component.items()}
    except ValueError as error:
        raise ValueError(f"its metadata ({METADATA_KEY}) is not usable: {error}") from None


def settings(component: str, given: Mapping[str, Any]) -> Settings:
    """What PEFT's settings of a component say.

    Args:
        component: its name, for messages.
        given: as PEFT writes them.

    Raises:
        ValueError: they are out of bounds, or ask for more than a LoRA or DoRA.
    """
    for name, value in given.items():
        if name in _Known.__annotations__ or name in _NO_MATTER or not value or value in _NEUTRAL.get(name, ()):
            continue
        raise ValueError(
            f"it asks for {shortened(f'{component}.{name}')} = {shortened(value)}, and only LoRAs and DoRAs are "
            "applied: factors with their ranks and alphas, and magnitudes"
        )
    try:
        known = _KNOWN.check(given)
    except ValueError as error:
        raise ValueError(f"{component}.{error}") from None
    ranks, alphas = (known.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    return Settings(
        known.get("r", _DEFAULT_RANK),
        known.get("lora_alpha", _DEFAULT_ALPHA),
        known.get("use_rslora", False),
        known.get("use_dora", False),
        {_plain_name(name): rank for name, rank in ranks.items()},
        {_plain_name(name): alpha for name, alpha in alphas.items()},
    )


def whole(number: float) -> float | int:
    """The same, without a point if it is whole: as PEFT writes alphas."""
    return int(number) if number == int(number) else number


def _plain_name(pattern: str) -> str:
    """A pattern that is the end of a name; PEFT takes any regular expression, which may never come to an end."""
    name = pattern.replace("\\.", ".").removesuffix("$")
    if not all(part.replace("_", "a").replace("-", "a").isalnum() for part in name.removeprefix("^").split(".")):
        raise ValueError(f"{shortened(pattern)} is a regular expression, and only names of layers are read")
    return name


def _value_of(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Of the first of the patterns that fits a layer."""
    fits = patterns.keys() & set(_ends(layer.removeprefix(CLIP_MODEL)))
    return next((patterns[name] for name in patterns if name in fits), default) if fits else default


def _ends(layer: str) -> Iterator[str]:
    """What may stand for a layer; transformers 5 dropped CLIP's inner "text_model", which files still have."""
    parts = ["text_model", *layer.split(".")]
    for first in range(len(parts)):
        yield ".".join(parts[first:])
    yield f"^{layer}"
    yield f"^text_model.{layer}"
