"""Small files by other programs' conventions: each does what its numbers say, or is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.lora.applying import apply_lora
from dreamlora.lora.files import read_lora, read_weights
from dreamlora.lora.merging import fits
from dreamlora.lora.names import flat, names_of
from tests import tinymodels

Tensors = dict[str, Tensor]
Made = tuple[Tensors, Tensor]
"""The tensors of a layer by the ends of their names, and the weight that the layer has with them."""
R = 2


def rand(*shape: int, scale: float = 0.5) -> Tensor:
    return torch.randn(shape) * scale


def lora(W: Tensor, alpha: float | None = 3.0) -> Made:
    """kohya's: of a convolution LoCon's."""
    down, up = rand(R, *W.shape[1:]), rand(W.shape[0], R, *(1 for _ in W.shape[2:]))
    more = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    tensors = {"lora_down.weight": down, "lora_up.weight": up, **more}
    return tensors, W + lora_change(tensors, W)


def lora_change(tensors: Tensors, W: Tensor) -> Tensor:
    down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
    scale = float(tensors.get("alpha", R)) / R
    if "lora_mid.weight" in tensors:
        return torch.einsum("or,rshw,si->oihw", up[:, :, 0, 0], tensors["lora_mid.weight"], down[:, :, 0, 0]) * scale
    return (up.flatten(1) @ down.flatten(1)).reshape(W.shape) * scale


def locon_with_core(W: Tensor) -> Made:
    down, up, mid = rand(R, W.shape[1], 1, 1), rand(W.shape[0], R, 1, 1), rand(R, R, *W.shape[2:])
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid, "alpha": torch.tensor(1.0)}
    return tensors, W + lora_change(tensors, W)


def dylora(W: Tensor) -> Made:
    """LyCORIS' DyLoRA, whose B has no kernel."""
    tensors, changed = lora(W)
    return {**tensors, "lora_up.weight": tensors["lora_up.weight"].flatten(1)}, changed


def dora(W: Tensor) -> Made:
    """LyCORIS' with magnitudes of outputs (wd_on_output)."""
    return _directed(*lora(W))


def dora_with_core(W: Tensor) -> Made:
    return _directed(*locon_with_core(W))


def _directed(tensors: Tensors, changed: Tensor) -> Made:
    lengths = changed.flatten(1).norm(dim=1).reshape(-1, *(1 for _ in changed.shape[1:]))
    magnitudes = lengths * (0.5 + torch.rand(lengths.shape))
    return {**tensors, "dora_scale": magnitudes}, magnitudes * changed / lengths


def loha(W: Tensor) -> Made:
    factors = {f"hada_w{n}_{x}": rand(*shape) for n in (1, 2) for x, shape in flat_shapes(W).items()}
    change = (factors["hada_w1_a"] @ factors["hada_w1_b"]) * (factors["hada_w2_a"] @ factors["hada_w2_b"])
    return {**factors, "alpha": torch.tensor(1.0)}, W + change.reshape(W.shape) / R


def flat_shapes(W: Tensor) -> dict[str, tuple[int, int]]:
    return {"a": (W.shape[0], R), "b": (R, W[0].numel())}


def loha_with_cores(W: Tensor) -> Made:
    factors: Tensors = {}
    change = torch.ones(W.shape)
    for n in (1, 2):
        core, a, b = rand(R, R, *W.shape[2:]), rand(R, W.shape[0]), rand(R, W.shape[1])
        factors |= {f"hada_t{n}": core, f"hada_w{n}_a": a, f"hada_w{n}_b": b}
        change = change * torch.einsum("pqhw,po,qi->oihw", core, a, b)
    return {**factors, "alpha": torch.tensor(4.0)}, W + change * 4 / R


def lokr_of_whole_matrices(W: Tensor) -> Made:
    """No factor has a rank: LyCORIS takes its alpha for that, and does not scale."""
    w1, w2 = rand(2, 4), rand(W.shape[0] // 2, W.shape[1] // 4, *W.shape[2:])
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(16.0)}, W + kron(w1, w2)


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    blocks = [torch.cat([value * w2 for value in row], dim=1) for row in w1]
    return torch.cat(blocks)


def lokr(W: Tensor) -> Made:
    """Factor 4, and the large matrix of a rank."""
    w1, a, b = rand(4, 4), rand(W.shape[0] // 4, R), rand(R, W[0].numel() // 4)
    change = kron(w1, (a @ b).reshape(W.shape[0] // 4, W.shape[1] // 4, *W.shape[2:])) * 3 / R
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}, W + change


def lokr_decomposed_both(W: Tensor) -> Made:
    tensors, changed = lokr(W)
    a, b = rand(4, R), rand(R, 4)
    w2 = (tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]).reshape(W.shape[0] // 4, W.shape[1] // 4, *W.shape[2:])
    del tensors["lokr_w1"], changed
    return {**tensors, "lokr_w1_a": a, "lokr_w1_b": b}, W + kron(a @ b, w2) * 3 / R


def lokr_with_core(W: Tensor) -> Made:
    w1, core = rand(4, 4), rand(R, R, *W.shape[2:])
    a, b = rand(R, W.shape[0] // 4), rand(R, W.shape[1] // 4)
    change = kron(w1, torch.einsum("pqhw,po,qi->oihw", core, a, b)) * 3 / R
    return {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}, W + change


LINEAR = [lora, dora, loha, lokr, lokr_of_whole_matrices, lokr_decomposed_both]
CONVOLUTION = [*LINEAR, dylora, locon_with_core, dora_with_core, loha_with_cores, lokr_with_core]


class Model:
    """A small pipeline, and what other programs call its layers."""

    def __init__(self, family: str, folder: Path) -> None:
        self.pipeline: Any = tinymodels.of(family).stock(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.denoiser: str = registry.load("families", family).DENOISER
        self.names: Any = names_of(registry.load("families", family), getattr(self.pipeline, self.denoiser).config)
        self.before = self.drawn()

    def drawn(self, pipeline: Any = None) -> Tensor:
        pipeline = pipeline or self.pipeline
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "generator": generator, "output_type": "latent", "height": 32, "width": 32}
        return pipeline("a cat", **options).images

    def with_weights(self, changed: Mapping[tuple[str, str], Tensor]) -> Tensor:
        """What is drawn with other weights of some layers."""
        pipeline = copy.deepcopy(self.pipeline)
        for (component, layer), weight in changed.items():
            submodule(getattr(pipeline, component), layer).weight.data = weight
        return self.drawn(pipeline)

    def with_file(self, file: Path, scale: float = 1.0) -> Tensor:
        apply_lora(self.pipeline, file, scale, self.names)
        try:
            return self.drawn()
        finally:
            self.pipeline.unload_lora_weights()
            assert torch.equal(self.drawn(), self.before), "something was left behind"
            assert not any(map(self.is_marked, (getattr(self.pipeline, self.denoiser), self.pipeline.text_encoder)))

    @staticmethod
    def is_marked(module: Any) -> bool:
        left = any(part in name for name, _ in module.named_parameters() for part in ("lora_", "hada_", "lokr_"))
        return left or hasattr(module, "peft_config")


@pytest.fixture(scope="module")
def sd(sd_folder: Path) -> Model:
    return Model("sd", sd_folder)


@pytest.fixture(scope="module")
def sdxl(tiny_folder: Callable[[str], Path]) -> Model:
    return Model("sdxl", tiny_folder("sdxl"))


@pytest.fixture(scope="module")
def flux(flux_folder: Path) -> Model:
    return Model("flux", flux_folder)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def weight(model: Model, component: str, layer: str) -> Tensor:
    return submodule(getattr(model.pipeline, component), layer).weight.detach()


def submodule(module: Any, layer: str) -> Any:
    """Of a text encoder with a projection the rest lies deeper."""
    inner = hasattr(module, "text_model") and layer != "text_projection"
    return module.get_submodule(f"text_model.{layer}" if inner else layer)


def written(folder: Path, layers: Mapping[str, Tensors]) -> Path:
    tensors = {f"{name}.{end}": tensor.contiguous() for name, each in layers.items() for end, tensor in each.items()}
    save_file(tensors, folder / "foreign.safetensors")
    return folder / "foreign.safetensors"


ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
RESNET = "down_blocks.0.resnets.0.conv1"
PROJECTION = "encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("scale", [1.0, 0.4, -0.5])
@pytest.mark.parametrize(
    ("component", "layer", "kind"),
    [
        *(("unet", ATTENTION, kind) for kind in LINEAR),
        *(("unet", RESNET, kind) for kind in CONVOLUTION),
        *(("text_encoder", PROJECTION, kind) for kind in LINEAR),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_kind_is_what_its_numbers_say(sd, component, layer, kind, scale, tmp_path):
    """At a scale, a DoRA keeps its magnitudes, as in diffusers."""
    W = weight(sd, component, layer)
    tensors, changed = kind(W)
    prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    file = written(tmp_path, {prefix + flat(layer): tensors})
    if kind in (dora, dora_with_core):
        directions = W + scale * (lora_change(tensors, W))
        lengths = directions.flatten(1).norm(dim=1).reshape(tensors["dora_scale"].shape)
        expected = sd.with_weights({(component, layer): tensors["dora_scale"] * directions / lengths})
    else:
        expected = sd.with_weights({(component, layer): W + scale * (changed - W)})
    torch.testing.assert_close(sd.with_file(file, scale), expected, rtol=1e-3, atol=1e-4)
    assert (expected - sd.before).abs().max() > 3e-3
    read = read_weights(file, sd.names)[component][layer]
    if read.magnitude is None:
        torch.testing.assert_close(read.delta().reshape(W.shape), changed - W, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [lora, dora], ids=lambda kind: kind.__name__)
def test_a_linear_layer_that_is_a_convolution_elsewhere(sd, sdxl, kind, tmp_path):
    """Stable Diffusion's proj_in is a 1 x 1 convolution, or linear: a file may have the one for the other."""
    layer = "mid_block.attentions.0.proj_in"
    for model in (sd, sdxl):
        W = weight(model, "unet", layer)
        tensors, changed = kind(W.flatten(1))
        if W.ndim == 2:
            tensors = {end: each[..., None, None] if "lora" in end else each for end, each in tensors.items()}
        expected = model.with_weights({("unet", layer): changed.reshape(W.shape)})
        file = written(tmp_path, {"lora_unet_" + flat(layer): tensors})
        torch.testing.assert_close(model.with_file(file), expected, rtol=1e-3, atol=1e-4)
        (read,) = read_weights(file, model.names)["unet"].values()
        assert fits(read, tuple(W.shape)) and not fits(read, (W.shape[0], W.shape[1], 3, 3))


def test_several_kinds_in_one_file(sd, tmp_path):
    places = {
        ATTENTION: lora,
        RESNET: locon_with_core,
        ATTENTION.replace("to_q", "to_k"): dora,
        ATTENTION.replace("to_q", "to_v"): loha,
        ATTENTION.replace("attn1", "attn2"): lokr,
        RESNET.replace("conv1", "conv2"): lokr_of_whole_matrices,
    }
    made = {layer: kind(weight(sd, "unet", layer)) for layer, kind in places.items()}
    file = written(tmp_path, {"lora_unet_" + flat(layer): tensors for layer, (tensors, _) in made.items()})
    expected = sd.with_weights({("unet", layer): changed for layer, (_, changed) in made.items()})
    torch.testing.assert_close(sd.with_file(file), expected, rtol=1e-3, atol=1e-4)


SGM = {
    "input_blocks_3_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "output_blocks_0_1_transformer_blocks_0_ff_net_2": "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_0": "add_embedding.linear_1",
}
"""kohya's names of layers of the small SDXL, which are Stability's, and diffusers'."""


def names_of_sdxl(program: str) -> dict[str, tuple[str, str]]:
    """Component and layer by the name that a program gives them."""
    layers = {name: layer for name, layer in SGM.items()}
    text = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    if program == "kohya":
        unet = {f"lora_unet_{name}": ("unet", layer) for name, layer in layers.items()}
    elif program == "comfyui":
        dotted = {flat(place): place for place in SGM_WITH_POINTS}
        return {f"diffusion_model.{dotted[name]}": ("unet", layer) for name, layer in layers.items()}
    else:
        before = {"diffusers' names": "lora_unet_", "LyCORIS": "lycoris_"}[program]
        unet = {before + flat(layer): ("unet", layer) for layer in layers.values()}
    if program == "LyCORIS":
        return unet
    encoders = {f"{flag}_text_model_{flat(PROJECTION)}": (component, PROJECTION) for component, flag in text.items()}
    return {**unet, **encoders, "lora_te2_text_projection": ("text_encoder_2", "text_projection")}


SGM_WITH_POINTS = (
    *("input_blocks.3.1.transformer_blocks.0.attn1.to_q", "input_blocks.1.0.in_layers.2", "middle_block.1.proj_in"),
    *("output_blocks.0.1.transformer_blocks.0.ff.net.2", "time_embed.0", "label_emb.0.0"),
)


@pytest.mark.parametrize("kind", [lora, dora, loha], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("program", ["kohya", "comfyui", "diffusers' names", "LyCORIS"])
def test_names_of_stable_diffusion_xl(sdxl, program, kind, tmp_path):
    places = names_of_sdxl(program)
    made = {name: kind(weight(sdxl, *place)) for name, place in places.items()}
    file = written(tmp_path, {name: tensors for name, (tensors, _) in made.items()})
    expected = sdxl.with_weights({places[name]: changed for name, (_, changed) in made.items()})
    torch.testing.assert_close(sdxl.with_file(file), expected, rtol=1e-3, atol=1e-4)
    assert (expected - sdxl.before).abs().max() > 3e-3


def without_alpha(W: Tensor) -> Made:
    return lora(W, alpha=None)


def peft(W: Tensor) -> Made:
    tensors, changed = lora(W, alpha=None)
    return {
        "lora_A.default.weight": tensors["lora_down.weight"],
        "lora_B.default.weight": tensors["lora_up.weight"],
    }, changed


def old_diffusers(W: Tensor) -> Made:
    tensors, changed = lora(W, alpha=None)
    return {"lora.down.weight": tensors["lora_down.weight"], "lora.up.weight": tensors["lora_up.weight"]}, changed


def processor(W: Tensor) -> Made:
    """Of the time when attention had processors: the layer's name is a part of the factor's."""
    tensors, changed = lora(W, alpha=None)
    return {
        "to_q_lora.down.weight": tensors["lora_down.weight"],
        "to_q_lora.up.weight": tensors["lora_up.weight"],
    }, changed


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"unet.{ATTENTION.removesuffix('.to_q')}.processor", processor),
        (f"lora_unet_{flat(ATTENTION)}", without_alpha),
        (f"unet.{ATTENTION}", peft),
        (f"unet.{ATTENTION}", old_diffusers),
        (f"diffusion_model.{ATTENTION}", peft),
        (f"diffusion_model.{ATTENTION}", lora),
        (f"base_model.model.{ATTENTION}", peft),
    ],
)
def test_other_names(sd, name, kind, tmp_path):
    tensors, changed = kind(weight(sd, "unet", ATTENTION))
    drawn = sd.with_file(written(tmp_path, {name: tensors}))
    torch.testing.assert_close(drawn, sd.with_weights({("unet", ATTENTION): changed}), rtol=1e-3, atol=1e-4)


BLOCK, SINGLE = "transformer_blocks.0.", "single_transformer_blocks.0."
PARTS = {
    "double_blocks.0.img_attn.qkv": [BLOCK + f"attn.to_{part}" for part in "qkv"],
    "double_blocks.0.txt_attn.qkv": [BLOCK + f"attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.0.img_mlp.0": [BLOCK + "ff.net.0.proj"],
    "single_blocks.0.linear1": [*(SINGLE + f"attn.to_{part}" for part in "qkv"), SINGLE + "proj_mlp"],
    "single_blocks.0.linear2": [SINGLE + "proj_out"],
}
"""Layers of BFL's FLUX.1, and diffusers' that they are made of."""


def without_points(names: Mapping[str, Tensors], before: str) -> dict[str, Tensors]:
    return {before + flat(name): tensors for name, tensors in names.items()}


def with_points(names: Mapping[str, Tensors], before: str) -> dict[str, Tensors]:
    return {before + name: tensors for name, tensors in names.items()}


@pytest.mark.parametrize("kind", [lora, loha, dora, lokr], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("naming", "before"),
    [(without_points, "lora_unet_"), (with_points, "diffusion_model."), (with_points, "base_model.model.")],
)
def test_names_of_flux(flux, naming, before, kind, tmp_path):
    """q, k and v are one layer there."""
    made, changed = {}, {}
    for name, layers in PARTS.items():
        Ws = [weight(flux, "transformer", layer) for layer in layers]
        made[name], whole = kind(torch.cat(Ws))
        parts = whole.split([len(W) for W in Ws])
        changed |= {("transformer", layer): part for layer, part in zip(layers, parts, strict=True)}
    drawn = flux.with_file(written(tmp_path, naming(made, before)))
    torch.testing.assert_close(drawn, flux.with_weights(changed), rtol=1e-3, atol=2e-4)
    assert (drawn - flux.before).abs().max() > 3e-3


@pytest.mark.parametrize("kind", [lora, loha, dora, lokr], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("before", ["lora_transformer_", "lycoris_"])
def test_diffusers_names_of_flux_without_points(flux, before, kind, tmp_path):
    """OneTrainer's and SimpleTuner's."""
    layers = [BLOCK + "attn.to_q", BLOCK + "attn.to_out.0", SINGLE + "proj_mlp"]
    made = {layer: kind(weight(flux, "transformer", layer)) for layer in layers}
    file = written(tmp_path, without_points({layer: tensors for layer, (tensors, _) in made.items()}, before))
    expected = flux.with_weights({("transformer", layer): changed for layer, (_, changed) in made.items()})
    torch.testing.assert_close(flux.with_file(file), expected, rtol=1e-3, atol=2e-4)


def test_a_file_that_diffusers_alone_knows(flux, tmp_path):
    """xlabs': of FLUX.1, from the time before there were conventions."""
    layers = [BLOCK + f"attn.to_{part}" for part in "qkv"]
    Ws = [weight(flux, "transformer", layer) for layer in layers]
    tensors, whole = lora(torch.cat(Ws), alpha=None)
    ends = {f"{way}.weight": tensors[f"lora_{way}.weight"] for way in ("down", "up")}
    file = written(tmp_path, {"double_blocks.0.processor.qkv_lora1": ends})
    parts = whole.split([len(W) for W in Ws])
    expected = flux.with_weights({("transformer", layer): part for layer, part in zip(layers, parts, strict=True)})
    assert read_lora(file).format == ""
    torch.testing.assert_close(flux.with_file(file), expected, rtol=1e-3, atol=2e-4)


def test_text_encoders_of_flux_that_cannot_have_one(flux, tmp_path):
    """kohya calls T5 te3, OneTrainer te2."""
    for name in (
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    ):
        with pytest.raises(UserError, match=name):
            flux.with_file(written(tmp_path, {name: CLIP_PAIR}))


def one(name: str, *ends: str) -> dict[str, Tensors]:
    return {name: {end: rand(2, 2) for end in ends}}


LAYER = f"lora_unet_{flat(ATTENTION)}"
PAIR: dict[str, Tensors] = {LAYER: {"lora_down.weight": rand(2, 16), "lora_up.weight": rand(16, 2)}}
CLIP_PAIR = {"lora_down.weight": rand(2, 16), "lora_up.weight": rand(16, 2)}
REFUSED: dict[str, tuple[dict[str, Tensors], str]] = {
    "GLoRA": (one(LAYER, "a1.weight", "a2.weight", "b1.weight", "b2.weight"), "a GLoRA"),
    "(IA)³": ({LAYER: {"weight": rand(16), "on_input": torch.tensor(False)}}, r"an \(IA\)³"),
    "T-LoRA": (one(LAYER, "q_layer.weight", "p_layer.weight", "lambda_layer"), "a T-LoRA"),
    "GLoRA of a model of diffusers": (one("lycoris_transformer", "a1.weight", "a2.weight"), "a GLoRA"),
    "OFT": ({LAYER: {"oft_blocks": rand(4, 4, 4), "alpha": torch.tensor(1.0)}}, "an OFT"),
    "BOFT": ({LAYER: {"oft_blocks": rand(2, 4, 4, 4), "rescale": rand(16, 1)}}, "an OFT"),
    "whole weights": (one(LAYER, "diff", "diff_b"), "whole weights"),
    "norm layers": ({**PAIR, "lora_unet_conv_norm_out": {"w_norm": rand(8), "b_norm": rand(8)}}, "norm layers"),
    "embeddings": ({**PAIR, "bundle_emb.sks": {"string_to_param.*": rand(2, 16)}}, "embeddings of new words"),
    "SDXL's second text encoder": ({f"lora_te2_text_model_{flat(PROJECTION)}": CLIP_PAIR}, "lora_te2_"),
    "T5": ({**PAIR, "lora_te3_encoder_block_0_layer_0_SelfAttention_q": CLIP_PAIR}, "lora_te3_encoder"),
    "magnitudes of inputs": ({LAYER: {**PAIR[LAYER], "dora_scale": rand(1, 16)}}, "one for every output"),
    "magnitudes of a LoHa": ({LAYER: {**loha(rand(16, 16))[0], "dora_scale": rand(16, 1)}}, "magnitudes"),
    "a layer that is none": ({**PAIR, "lora_unet_down_blocks_9_conv": CLIP_PAIR}, "lora_unet_down_blocks_9_conv is no"),
    "another layer's size": ({LAYER: loha(rand(8, 8))[0]}, r"for a weight of \(8, 8\), but the layer's is \(16, 16\)"),
    "factors of different sizes": (
        {LAYER: {**loha(rand(16, 16))[0], "hada_w2_b": rand(2, 8)}},
        "do not go together",
    ),
    "half of a LoHa": (one(LAYER, "hada_w1_a", "hada_w1_b"), "no whole adapter"),
    "another adapter's name": (
        {LAYER: {"lora_A.mine.weight": rand(2, 16), "lora_B.mine.weight": rand(16, 2)}},
        "names of their own",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_applied_is_named(sd, what, tmp_path):
    layers, words = REFUSED[what]
    with pytest.raises(UserError, match=words) as refusal:
        sd.with_file(written(tmp_path, layers))
    assert len(str(refusal.value)) < 700 and torch.equal(sd.drawn(), sd.before)


def test_a_lora_of_another_model_says_of_which(sd, tmp_path):
    tensors, _ = lora(rand(16, 16))
    file = written(tmp_path, {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": tensors})
    with pytest.raises(UserError, match=r"is no layer of the unet \(by its layers it is for sdxl\)"):
        sd.with_file(file)
    named = {f"{LAYER.replace('to_q', 'to_x')}.{end}": tensor for end, tensor in tensors.items()}
    save_file(named, file, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    with pytest.raises(UserError, match=r"its header says 'sdxl_base_v1-0'"):
        sd.with_file(file)


def test_a_model_is_no_lora(tmp_path):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    with pytest.raises(UserError, match=f"is not a LoRA: .*it has {name}"):
        read_lora(written(tmp_path, {name.removesuffix(".weight"): {"weight": rand(4, 4)}}))


@pytest.mark.parametrize("kind", ["oft_blocks", "a1.weight", "diff"])
def test_what_is_no_lora_at_all_is_named_without_a_model(kind, tmp_path):
    with pytest.raises(UserError, match=r"an OFT|a GLoRA|whole weights"):
        read_lora(written(tmp_path, one(LAYER, kind)))
