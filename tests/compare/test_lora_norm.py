"""The norm of a LoRA that others made: a number, or NaN; never long, never large."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from dreamlora.compare.records import lora_norm
from tests.fuzzing import damaged, fuzzed, harmless

ODD = {
    "no B": {"a.lora_A.weight": torch.ones(2, 4)},
    "a B of another rank": {"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(4, 3)},
    "rank 0": {"a.lora_A.weight": torch.ones(0, 4), "a.lora_B.weight": torch.ones(4, 0)},
    "no dimensions": {"a.lora_A.weight": torch.ones(()), "a.lora_B.weight": torch.ones(())},
    "one dimension": {"a.lora_A.weight": torch.ones(4), "a.lora_B.weight": torch.ones(4)},
    "a Gram of 8 TB": {"a.lora_A.weight": torch.ones(10**6, 1), "a.lora_B.weight": torch.ones(1, 10**6)},
    "minutes of products": {"a.lora_A.weight": torch.ones(4000, 4100), "a.lora_B.weight": torch.ones(90, 4000)},
    "a type that numpy has not": {name: torch.ones(2, 2).bfloat16() for name in ("a.lora_A.weight", "a.lora_B.weight")},
    "values that are not finite": {
        name: torch.ones(2, 2) * torch.inf for name in ("a.lora_A.weight", "a.lora_B.weight")
    },
    "no factors": {"a": torch.ones(2)},
}


@pytest.mark.parametrize("tensors", ODD.values(), ids=ODD)
def test_what_has_no_norm_is_nan(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "lora.safetensors")
    assert math.isnan(harmless(lambda: lora_norm(tmp_path / "lora.safetensors", 1.0)))


def test_a_link_out_of_the_run_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_file({"a.lora_A.weight": torch.ones(2, 2), "a.lora_B.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    (tmp_path / "run" / "lora.safetensors").symlink_to(tmp_path / "a.safetensors")
    assert math.isnan(lora_norm(tmp_path / "run" / "lora.safetensors", 1.0))
    assert lora_norm(tmp_path / "a.safetensors", 0.5) == 2.0


SOUND = save({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)})


@fuzzed
@given(st.one_of(damaged(SOUND), st.just(SOUND)))
def test_fuzz_lora_norm(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.write_bytes(content)
    assert isinstance(harmless(lambda: lora_norm(file, 1.0)), float | np.floating)
