"""The text that ``dreamlora merge`` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dreamlora.commands.kept_layers import table_of
from dreamlora.commands.lora_files import megabytes
from dreamlora.escapes import one_line

_WORTH_TELLING, _MUCH = 1e-3, 0.1
_KINDS = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines, from ``merge.merge``."""
    if "base" not in found:
        yield from map(one_line, table_of(found))
        yield one_line(f"{found['output']}: {_sum(found)}, {megabytes(found['bytes'])}, format {found['format']}")
        return
    for lora in found["loras"]:
        kinds = " and ".join(_KINDS[kind] for kind in lora["kinds"])
        layers = ", ".join(f"{count} layers of the {part}" for part, count in lora["layers"].items())
        yield one_line(f"{lora['name']} x {lora['strength']:g} ({kinds}): {layers}")
    if found["rounding_error"] > _WORTH_TELLING:
        advice = ": --dtype fp32 keeps it all" if found["rounding_error"] > _MUCH else ""
        yield (
            f"rounded to the model's precision: an error of {found['rounding_error']:.1%} of what the LoRAs change"
            f"{advice}"
        )
    precisions = ", ".join(f"{part} {kind}" for part, kind in found["precision"].items())
    yield one_line(f"{found['output']}: {found['base']} with {_sum(found)} ({precisions})")


def _sum(found: Mapping[str, Any]) -> str:
    return " + ".join(f"{lora['name']} x {lora['strength']:g}" for lora in found["loras"])
