"""What the ends of the names of tensors say: which part of an adapter each is. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable

LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
ENDS = {
    **dict.fromkeys(
        ("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight", "lora_A"), "lora_A"
    ),
    **dict.fromkeys(("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight", "lora_B"), "lora_B"),
    "lora_mid.weight": "lora_mid",
    "alpha": "alpha",
    **dict.fromkeys(
        ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"),
        "magnitude",
    ),
    **{name: name for name in (*LOHA, *LOKR)},
}
"""Parts, by PEFT's and LyCORIS' names, by the ends that programs give them."""
END = re.compile(r"(?P<layer>.+?)\.(?P<end>" + "|".join(map(re.escape, ENDS)) + ")")
_OLD = re.compile(r"(?P<layer>.+?)(?:\.lora_linear_layer|(?<=_lora)|(?<=_lora[12]))\.(?P<end>down|up)\.weight")
"""Of diffusers before PEFT, and of xlabs, whose layers are called "..._lora1": diffusers' converters read them."""
_OLD_ENDS = {"down": "lora_A", "up": "lora_B"}


def by_layer(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Names of tensors by layer and part, and those that are no part of an adapter.

    Args:
        names: of all tensors of a file.
    """
    layers: dict[str, dict[str, str]] = {}
    others = []
    for name in names:
        found, ends = END.fullmatch(name), ENDS
        if found is None:
            found, ends = _OLD.fullmatch(name), _OLD_ENDS
        part = ends[found["end"]] if found else ""
        if found is None or part in layers.setdefault(found["layer"], {}):
            others.append(name)
        else:
            layers[found["layer"]][part] = name
    return layers, others
