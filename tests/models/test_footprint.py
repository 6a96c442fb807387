"""Peaks that can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dreamlora.models.footprint import META, Footprint, Stored, bytes_of
from dreamlora.precision import quantize

BYTES = 4
"""Of a number in float32."""


def on_meta(*sides: int, **options) -> torch.Tensor:
    return torch.empty(*sides, device=META, **options)


def test_results_count_for_as_long_as_they_are_held() -> None:
    x = on_meta(1000)
    with Footprint([]) as footprint:
        y = x * 2
        del y
        y = x + 1
        z = y * y
        del y, z
    assert footprint.peak == 3 * 1000 * BYTES


def test_weights_and_views_do_not_count() -> None:
    layer = nn.Linear(100, 100, bias=False, device=META)
    x = on_meta(1, 100)
    with torch.no_grad(), Footprint([layer]) as footprint:
        layer(x).view(10, 10).T.reshape(100)
    assert footprint.peak <= (100 + 100 + 100) * BYTES


def test_what_autograd_keeps_is_held_until_the_backward_pass() -> None:
    x = on_meta(1000, requires_grad=True)
    with Footprint([]) as footprint:
        y = x
        for _ in range(10):
            y = y.sin()  # keeps its argument
        forwards = footprint.peak
        torch.autograd.backward(y.sum())
    assert forwards >= 10 * 1000 * BYTES
    assert footprint.peak <= forwards + 4 * 1000 * BYTES


def test_checkpointing_holds_less() -> None:
    def block(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = F.scaled_dot_product_attention(x.sin(), x, x)
        return x

    peaks = []
    for wrap in (lambda x: block(x), lambda x: checkpoint(block, x, use_reentrant=False)):
        x = on_meta(1, 1, 100, 8, requires_grad=True)
        with Footprint([]) as footprint:
            y = x
            for _ in range(5):
                y = wrap(y)
            torch.autograd.backward(y.sum())
        peaks.append(footprint.peak)
    assert peaks[1] < peaks[0] / 2


def test_attention_needs_no_matrix_of_all_tokens_by_all_tokens() -> None:
    before = F.scaled_dot_product_attention
    q = on_meta(1, 1, 5000, 8)
    with torch.no_grad(), Footprint([]) as footprint:
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
    assert footprint.peak < 5000 * 5000
    assert F.scaled_dot_product_attention is before


def test_masks_and_positions_keep_their_numbers() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    states = on_meta(2, 3, 8)
    with torch.no_grad(), Footprint([]):
        moved = mask.to(states.device)
        assert moved.sum(1).tolist() == [2, 1]
        assert states[moved.bool()].shape == (3, 8)
        assert (torch.arange(3, device=META)[None] < moved.sum(1, keepdim=True)).sum().item() == 3
        assert states.new_ones(2, dtype=torch.int64).sum().item() == 2
        assert (states * moved[..., None]).is_meta


def test_numbers_that_are_not_there_cannot_be_read() -> None:
    with Footprint([]), pytest.raises((RuntimeError, NotImplementedError)):
        on_meta(3).sum().item()


def test_bytes_are_those_of_the_types() -> None:
    assert bytes_of([on_meta(3, 5), on_meta(7, dtype=torch.bfloat16)]) == 4 * 15 + 2 * 7


def test_autocast_is_that_of_cuda() -> None:
    """Products in half precision, norms in float32, whatever they are given; what autograd keeps of them too."""
    originals = F.linear, F.group_norm, F.scaled_dot_product_attention
    half, full, weight = on_meta(1, 4, 8, dtype=torch.bfloat16), on_meta(1, 4, 8), on_meta(8, 8, dtype=torch.bfloat16)
    with Footprint([], torch.bfloat16):
        assert F.linear(full, weight).dtype == F.scaled_dot_product_attention(full, half, half).dtype == torch.bfloat16
        assert F.group_norm(half, 2).dtype == F.layer_norm(half, (8,)).dtype == torch.float32
        assert (half + full).dtype == torch.float32
        assert F.linear(torch.ones(2, 8), torch.ones(8, 8)).dtype == torch.float32, "it has numbers: it is no work"
    assert (F.linear, F.group_norm, F.scaled_dot_product_attention) == originals
    with Footprint([], torch.float32):
        assert F.group_norm(half, 2).dtype == torch.bfloat16, "there is no autocast to float32"


def test_norms_keep_a_copy_in_float32() -> None:
    x = on_meta(1, 4, 1000, dtype=torch.bfloat16, requires_grad=True)
    peaks = []
    for autocast in (None, torch.bfloat16):
        with Footprint([], autocast) as footprint:
            y = F.group_norm(x, 2)
        assert y.requires_grad
        peaks.append(footprint.peak)
    assert peaks[1] >= peaks[0] + 4 * 1000 * BYTES


@pytest.mark.parametrize("word", [None, "bf16", "fp8", "int8"])
def test_what_weights_take_in_a_form_is_what_they_then_take(word: str | None) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48)), nn.Linear(48, 64)).requires_grad_(False)
    stored = Stored.of(model)
    if word:
        quantize(model, word, torch.device("cpu"))
    assert stored.bytes(word) == bytes_of((*model.parameters(), *model.buffers()))
    assert stored.unpacking(word, torch.float32) == {None: 0, "fp8": 2}.get(word, 1) * 48 * 64 * BYTES
