"""diffusers' files."""

from __future__ import annotations

import json

import torch
from peft.utils.other import get_pattern_key

from dreamlora.lora.formats import diffusers
from dreamlora.lora.settings import METADATA_KEY
from dreamlora.lora.weights import lora_weights


def test_a_layer_whose_name_others_end_with_has_its_own_rank_and_alpha():
    """PEFT, and so diffusers, takes a pattern for the end of names."""
    ranks = {"proj_out": 4, "blocks.0.proj_out": 2, "blocks.1.proj_out": 2, "blocks.1.norm": 3}
    weights = {
        "transformer": {name: lora_weights(torch.ones(r, 2), torch.ones(2, r), 2.0 * r) for name, r in ranks.items()}
    }
    content = diffusers.write(weights)
    settings = json.loads(content.metadata[METADATA_KEY])
    for kind, default, expected in (("rank", "r", 1), ("alpha", "lora_alpha", 2)):
        patterns = settings[f"transformer.{kind}_pattern"]
        found = {
            name: patterns.get(get_pattern_key(patterns, name), settings[f"transformer.{default}"]) for name in ranks
        }
        assert found == {name: expected * rank for name, rank in ranks.items()}
    assert diffusers.read(content)["transformer"]["blocks.0.proj_out"].alpha == 4
