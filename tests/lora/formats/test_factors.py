"""Adapters out of tensors' names, against dense matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamlora.lora.formats._factors import by_layer, named, weights_of
from dreamlora.lora.weights import LayerWeights, lora_weights

_DRAW = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_DRAW)


SPELLINGS = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "PEFT": ("lora_A.weight", "lora_B.weight"),
    "PEFT with an adapter's name": ("lora_A.default.weight", "lora_B.default.weight"),
    "old diffusers": ("lora.down.weight", "lora.up.weight"),
    "PEFT's parameters": ("lora_A", "lora_B"),
}


@pytest.mark.parametrize("ends", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_a_pair(ends):
    down, up = random(2, 5), random(3, 2)
    tensors = {f"blocks.0.attn.{end}": tensor for end, tensor in zip(ends, (down, up), strict=True)}
    tensors["blocks.0.attn.alpha"] = torch.tensor(3.0)
    (layer, factors), *rest = by_layer(tensors).items()
    assert layer == "blocks.0.attn"
    assert not rest
    adapter = weights_of(layer, factors)
    assert adapter.kind == "lora"
    torch.testing.assert_close(adapter.delta(), up @ down * 1.5)


def test_without_an_alpha_the_scale_is_1():
    down, up = random(2, 5), random(3, 2)
    adapter = weights_of("layer", {"lora_A": down, "lora_B": up})
    assert adapter.alpha == 2
    torch.testing.assert_close(adapter.delta(), up @ down)


@pytest.mark.parametrize("side", [1, 3])
def test_a_tucker_core_goes_into_a(side):
    """LoCon's three convolutions one after another are one."""
    down, core, up = random(2, 5, 1, 1), random(2, 2, side, side), random(3, 2, 1, 1)
    tensors = {"conv.lora_down.weight": down, "conv.lora_mid.weight": core, "conv.lora_up.weight": up}
    tensors["conv.alpha"] = torch.tensor(1.0)
    adapter = weights_of("conv", by_layer(tensors)["conv"])
    image = random(1, 5, 8, 8)
    expected = F.conv2d(F.conv2d(F.conv2d(image, down), core, padding=side // 2), up) * 0.5
    torch.testing.assert_close(F.conv2d(image, adapter.delta(), padding=side // 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("core", "down"), [((2, 3, 3, 3), (2, 5, 1, 1)), ((2, 2), (2, 5, 1, 1)), ((2, 2, 3, 3), (2, 5, 3, 3))]
)
def test_a_core_that_does_not_fit_is_refused(core, down):
    with pytest.raises(ValueError, match="conv: a core of"):
        weights_of("conv", {"lora_A": random(*down), "lora_B": random(3, 2, 1, 1), "lora_mid": random(*core)})


@pytest.mark.parametrize("spatial", ["A", "B"])
def test_a_convolution(spatial):
    """As LoCon has it, and as some old files have it the other way round."""
    sides = {"A": ((3, 3), (1, 1)), "B": ((1, 1), (3, 3))}[spatial]
    down, up = random(2, 5, *sides[0]), random(4, 2, *sides[1])
    adapter = weights_of("conv", {"lora_A": down, "lora_B": up, "alpha": torch.tensor(1.0)})
    image = random(1, 5, 8, 8)
    paddings = [side[0] // 2 for side in sides]
    expected = F.conv2d(F.conv2d(image, down, padding=paddings[0]), up, padding=paddings[1]) * 0.5
    found = F.conv2d(image, adapter.delta(), padding=1)
    # at the border the two differ, where zeros around the picture are zeros around what the first one makes of it
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)


def test_a_loha_is_a_product_of_its_elements():
    factors = {
        "hada_w1_a": random(3, 2),
        "hada_w1_b": random(2, 5),
        "hada_w2_a": random(3, 2),
        "hada_w2_b": random(2, 5),
    }
    adapter = weights_of("layer", by_layer({f"layer.{name}": tensor for name, tensor in factors.items()})["layer"])
    w1a, w1b, w2a, w2b = factors.values()
    assert (adapter.kind, adapter.rank, adapter.rows) == ("loha", 2, 3)
    torch.testing.assert_close(adapter.delta(), (w1a @ w1b) * (w2a @ w2b))
    scaled = weights_of("layer", {**factors, "alpha": torch.tensor(1.0)})
    torch.testing.assert_close(scaled.delta(), (w1a @ w1b) * (w2a @ w2b) / 2)


def test_a_loha_with_cores():
    """W[p, r, k, l] is the sum over i and j of T[i, j, k, l] B[j, r] A[i, p]."""
    factors = {f"hada_{name}": random(2, 3) for name in ("w1_a", "w2_a")}
    factors |= {f"hada_{name}": random(2, 5) for name in ("w1_b", "w2_b")}
    factors |= {f"hada_{name}": random(2, 2, 3, 3) for name in ("t1", "t2")}
    adapter = weights_of("conv", factors)
    halves = []
    for number in (1, 2):
        a, b, core = (factors[f"hada_{name}"] for name in (f"w{number}_a", f"w{number}_b", f"t{number}"))
        halves.append(
            sum(core[i, j] * a[i][:, None, None, None] * b[j][None, :, None, None] for i in range(2) for j in range(2))
        )
    assert adapter.rows == 3
    torch.testing.assert_close(adapter.delta(), halves[0] * halves[1])


W1 = {"whole": {"lokr_w1": (2, 3)}, "product": {"lokr_w1_a": (2, 1), "lokr_w1_b": (1, 3)}}
W2 = {
    "whole": {"lokr_w2": (4, 5)},
    "product": {"lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)},
    "core": {"lokr_w2_a": (2, 4), "lokr_w2_b": (2, 5), "lokr_t2": (2, 2, 3, 3)},
    "convolution": {"lokr_w2": (4, 5, 3, 3)},
}


@pytest.mark.parametrize("second", W2)
@pytest.mark.parametrize("first", W1)
def test_a_lokr_is_a_kronecker_product(first, second):
    """Of its element (a, b) and the other's (c, d) at row 4 a + c, column 5 b + d; scaled where one is a product."""
    factors = {name: random(*shape) for name, shape in {**W1[first], **W2[second]}.items()}
    adapter = weights_of("layer", {**factors, "alpha": torch.tensor(3.0)})
    w1 = factors["lokr_w1"] if first == "whole" else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    if second == "core":
        w2 = torch.zeros(4, 5, 3, 3)
        for i in range(2):
            for j in range(2):
                outer = factors["lokr_w2_a"][i][:, None] * factors["lokr_w2_b"][j][None, :]
                w2 += factors["lokr_t2"][i, j] * outer[..., None, None]
    else:
        w2 = factors["lokr_w2"] if "lokr_w2" in factors else factors["lokr_w2_a"] @ factors["lokr_w2_b"]
    rank = 2 if "lokr_w2_b" in factors else 1 if "lokr_w1_b" in factors else None
    scale = 3.0 / rank if rank else 1.0
    assert adapter.rank == rank
    assert adapter.rows == 8
    delta = adapter.delta()
    assert delta.shape == (8, 15, *w2.shape[2:])
    for a in range(2):
        for b in range(3):
            torch.testing.assert_close(delta[4 * a : 4 * a + 4, 5 * b : 5 * b + 5], scale * w1[a, b] * w2)


MAGNITUDES = {
    "LyCORIS": ("dora_scale", (3, 1)),
    "of a convolution": ("dora_scale", (3, 1, 1, 1)),
    "PEFT": ("lora_magnitude_vector", (3,)),
    "PEFT, old": ("lora_magnitude_vector.weight", (3,)),
    "PEFT with an adapter's name": ("lora_magnitude_vector.default.weight", (3,)),
    "PEFT of a convolution": ("lora_magnitude_vector", (1, 3, 1, 1)),
}


@pytest.mark.parametrize(("end", "shape"), MAGNITUDES.values(), ids=MAGNITUDES)
def test_magnitudes_of_every_shape(end, shape):
    tensors = {"layer.lora_A.weight": random(2, 5), "layer.lora_B.weight": random(3, 2)}
    tensors[f"layer.{end}"] = torch.arange(1.0, 4.0).reshape(shape)
    adapter = weights_of("layer", by_layer(tensors)["layer"])
    assert adapter.magnitude.tolist() == [1, 2, 3]


@pytest.mark.parametrize("shape", [(1, 5), (5,), (1, 3)])
def test_magnitudes_of_columns_are_refused(shape):
    """Old LyCORIS' files; a square layer's shape alone would not tell."""
    factors = {"lora_A": random(2, 5), "lora_B": random(3, 2), "magnitude": random(*shape)}
    with pytest.raises(ValueError, match=r"layer has magnitudes of \("):
        weights_of("layer", factors)


BROKEN = {
    "B": {"lora_B": (3, 2)},
    "A": {"lora_A": (2, 5), "alpha": ()},
    "an alpha alone": {"alpha": ()},
    "two kinds": {"lora_A": (2, 5), "lora_B": (3, 2), "lokr_w1": (2, 2)},
    "half a LoHa": {"hada_w1_a": (3, 2), "hada_w1_b": (2, 5)},
    "a LoHa with one core": {
        **dict.fromkeys(("hada_w1_a", "hada_w2_a"), (2, 3)),
        **dict.fromkeys(("hada_w1_b", "hada_w2_b"), (2, 5)),
        "hada_t1": (2, 2, 3, 3),
    },
    "half a LoKr": {"lokr_w2_a": (2, 1), "lokr_w1": (1, 1)},
}


@pytest.mark.parametrize("shapes", BROKEN.values(), ids=BROKEN)
def test_what_is_no_whole_adapter_is_refused_by_name(shapes):
    with pytest.raises(ValueError, match=r"^blocks_0_attn has .*, which is no whole adapter$"):
        weights_of("blocks_0_attn", {name: random(*shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(("down", "up"), [((2, 5), (3, 4)), ((5,), (3, 5)), ((2, 5), (2,))])
def test_factors_that_are_no_pair_are_refused(down, up):
    with pytest.raises(ValueError, match=r"^layer: "):
        weights_of("layer", {"lora_A": random(*down), "lora_B": random(*up)})


UNFIT = {
    "two ranks of a LoHa": {"hada_w1_a": (3, 2), "hada_w1_b": (1, 5), "hada_w2_a": (3, 2), "hada_w2_b": (2, 5)},
    "two heights of a LoHa": {"hada_w1_a": (3, 2), "hada_w1_b": (2, 5), "hada_w2_a": (4, 2), "hada_w2_b": (2, 5)},
    "two ranks of a LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (4, 3)},
    "a core of another rank": {"lokr_w1": (2, 2), "lokr_w2_a": (2, 3), "lokr_w2_b": (2, 3), "lokr_t2": (3, 2, 3, 3)},
}


@pytest.mark.parametrize("shapes", UNFIT.values(), ids=UNFIT)
def test_factors_that_do_not_go_together_are_refused(shapes):
    with pytest.raises(ValueError, match=r"^layer: "):
        weights_of("layer", {name: random(*shape) for name, shape in shapes.items()})


def test_names_that_are_no_adapters_are_refused():
    with pytest.raises(ValueError, match=r"^lora_unet_x\.diff_b is no part of"):
        by_layer({"lora_unet_x.diff_b": random(3)})
    with pytest.raises(ValueError, match="x has two of lora_A"):
        by_layer({"x.lora_A.weight": random(2, 3), "x.lora_down.weight": random(2, 3)})


def test_a_layer_may_be_called_like_a_factor():
    """The end of a name is the longest that fits."""
    factors = by_layer({"x.lora_A.lora_A.weight": random(2, 3), "x.lora_A.alpha": torch.tensor(1.0)})
    assert factors.keys() == {"x.lora_A"}


def test_what_is_named_is_read_again():
    cases = [
        lora_weights(random(2, 5), random(3, 2), 3.0, random(3)),
        lora_weights(random(2, 5, 3, 3), random(3, 2, 1, 1), 3.0, random(3)),
        LayerWeights("lokr", {"lokr_w1": random(1, 1), "lokr_w2": random(3, 5)}, 1.0, random(3)),
    ]
    for adapter in cases:
        ends = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
        tensors = {f"x.{end}": tensor for end, tensor in named(adapter, ends)}
        assert tensors["x.dora_scale"].shape == (3, *([1] * (adapter.delta().ndim - 1)))
        again = weights_of("x", {**by_layer(tensors)["x"], "alpha": torch.tensor(adapter.alpha)})
        assert torch.equal(again.magnitude, adapter.magnitude)
        assert torch.equal(again.delta(), adapter.delta())
