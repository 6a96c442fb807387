"""Encoders against their models called by hand."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Model,
    SiglipModel,
    ViTModel,
)

from dreamlora import tiny
from dreamlora.errors import UserError
from dreamlora.evaluation import encoders
from dreamlora.evaluation.encoders import TransformersEncoder, load_encoder
from dreamlora.evaluation.preprocessing import DINO
from tests.hostile import edit_json, nothing_foreign
from tests.hubcache import FakeHub
from tests.tinymodels import CLIP_LENGTH

CPU = torch.device("cpu")


def load(folder: Path) -> TransformersEncoder:
    return load_encoder(str(folder), CPU)


@pytest.mark.parametrize(("name", "model_class"), [("clip", CLIPModel), ("siglip", SiglipModel)])
@torch.no_grad()
def test_text_models_give_the_projected_vectors(
    name: str, model_class: type, encoder_folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    folder = encoder_folders[name]
    encoder, model = load(folder), model_class.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(pictures, return_tensors="pt").pixel_values
    expected = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(encoder.images(pictures), expected, atol=1e-5, rtol=1e-5)
    tokens = AutoTokenizer.from_pretrained(folder)(["a dog", "cat"], padding="max_length", return_tensors="pt")
    expected = model.get_text_features(input_ids=tokens.input_ids).pooler_output
    torch.testing.assert_close(encoder.texts(["a dog", "cat"]), expected, atol=1e-5, rtol=1e-5)
    assert encoder.dim == expected.shape[1]


@torch.no_grad()
def test_dino_gives_the_class_token_and_never_a_random_pooler(
    encoder_folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    encoder = load(encoder_folders["dino"])
    model = ViTModel.from_pretrained(encoder_folders["dino"], add_pooling_layer=False).eval()
    expected = model(pixel_values=DINO(pictures)).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.images(pictures), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(load(encoder_folders["dino"]).images(pictures), encoder.images(pictures))
    assert encoder.id.endswith("/pil-bicubic256-crop224/cls") and encoder.dim == 16
    with pytest.raises(UserError, match=r"knows no texts.*--clip_model"):
        encoder.texts(["a dog"])


@torch.no_grad()
def test_dinov2_gives_the_class_token(encoder_folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    folder = encoder_folders["dinov2"]
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(pictures, return_tensors="pt").pixel_values
    expected = Dinov2Model.from_pretrained(folder).eval()(pixel_values=pixels).pooler_output
    torch.testing.assert_close(load(folder).images(pictures), expected, atol=1e-5, rtol=1e-5)


def test_long_prompts_keep_their_beginning_and_their_end_token(
    encoder_folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load(encoder_folders["clip"])
    fits = "".join(chr(ord("a") + i) for i in range(CLIP_LENGTH - 2))
    with caplog.at_level(logging.WARNING):
        whole, cut, other = encoder.texts([fits, fits + "xyz", "q" + fits + "xyz"])
    assert caplog.messages == [f"2 of 3 prompts have more than {CLIP_LENGTH} tokens: their ends do not count"]
    encoder.texts([fits + "xyz"])
    assert len(caplog.messages) == 1, "said once"
    assert not torch.allclose(cut, other), "without the end token, CLIP would read the same start token in both"
    tokenizer = AutoTokenizer.from_pretrained(encoder_folders["clip"])
    by_hand = [*tokenizer(fits + "xyz", verbose=False).input_ids[: CLIP_LENGTH - 1], tokenizer.eos_token_id]
    model = CLIPModel.from_pretrained(encoder_folders["clip"]).eval()
    with torch.no_grad():
        expected = model.get_text_features(input_ids=torch.tensor([by_hand])).pooler_output[0]
    torch.testing.assert_close(cut, expected, atol=1e-5, rtol=1e-5)
    assert whole.shape == cut.shape


def test_the_batch_does_not_matter(encoder_folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    encoder = load(encoder_folders["clip"])
    many = encoder.images(pictures * 4)
    alone = torch.cat([encoder.images([picture]) for picture in pictures])
    torch.testing.assert_close(many, alone.repeat(4, 1), atol=1e-5, rtol=1e-5)
    assert encoder.images([]).shape == (0, 12) and encoder.texts([]).shape == (0, 12)


def test_loading_leaves_the_random_state(encoder_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def drawing(*arguments: Any) -> torch.nn.Module:
        torch.rand(1)  # as versions of transformers do that fill weights with random numbers before they read them
        return original(*arguments)

    original = encoders._model
    monkeypatch.setattr(encoders, "_model", drawing)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load(encoder_folders["dino"])
    assert torch.equal(before, torch.get_rng_state())


def test_the_id_tells_other_weights(encoder_folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(encoder_folders["clip"], tmp_path / "clip")
    assert load(tmp_path / "clip").id == load(encoder_folders["clip"]).id
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "clip")
    assert load(tmp_path / "clip").id != load(encoder_folders["clip"]).id


def test_the_embedded_clip_knows_a_red_circle_from_a_blue_square() -> None:
    encoder = load_encoder("tiny", CPU)
    assert load_encoder("tiny-flow", CPU).id == encoder.id, "there is one CLIP for all embedded models"
    assert encoder.id.startswith("tiny@") and str(tiny.clip_path()) not in encoder.id
    from dreamlora.tiny import world

    assert encoder.images([Image.new("RGB", (world.SIZE, world.SIZE), "red")]).shape == (1, encoder.dim)
    a, b = torch.nn.functional.normalize(encoder.texts(["a red circle", "a blue square on grass"]))
    assert float(a @ b) < 0.9


def test_pickles_are_refused(encoder_folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(encoder_folders["clip"], tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").rename(tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(UserError, match="only pickled weights"):
        load(tmp_path / "clip")


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nothing")
    with pytest.raises(UserError, match="no_such/encoder"):
        load_encoder("no_such/encoder", CPU)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"is of type 'bert'.*choose a clip, siglip, vit, dinov2"):
        load(tmp_path)


@torch.no_grad()
def test_all_of_an_encoder_is_of_the_commit_that_its_id_names(
    encoder_folders: dict[str, Path], pictures: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors are kept by this id. The branch of the hub moves between the weights and what comes after them."""
    first, second = "1" * 40, "2" * 40
    hub = FakeHub(tmp_path)
    other = Path(shutil.copytree(encoder_folders["clip"], tmp_path / "other"))
    sizes = {"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 24}}
    CLIPImageProcessor(**sizes).save_pretrained(other)
    hub.commit("owner/clip", second, other)
    hub.commit("owner/clip", first, encoder_folders["clip"])
    original = encoders._model

    def load_slowly(*arguments: Any) -> Any:
        model = original(*arguments)
        hub.move("owner/clip", second)
        return model

    monkeypatch.setattr(encoders, "_model", load_slowly)
    encoder = load_encoder("owner/clip", CPU, hub.cache)
    assert encoder.id.startswith(f"owner/clip@{first}/")
    assert torch.equal(encoder.images(pictures), load(encoder_folders["clip"]).images(pictures))


@pytest.mark.parametrize(
    "reach",
    [
        {"attn_implementation": "kernels-community/flash-attn", "auto_map": {"AutoModel": "x/y--evil.M"}},
        {"_attn_implementation_internal": "kernels-community/flash-attn", "transformers_weights": "../a.safetensors"},
        {"_name_or_path": "x/y", "base_model": "x/y", "return_dict": False, "torch_dtype": "float64"},
    ],
    ids=["code", "files", "names"],
)
def test_an_encoder_is_made_of_its_numbers_alone(
    encoder_folders: dict[str, Path], pictures: list[Image.Image], tmp_path: Path, reach: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(encoder_folders["clip"], tmp_path / "clip"))
    edit_json(folder / "config.json", **reach)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x/y--evil.T", None]}, init_inputs=[1])
    edit_json(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "x/y--evil.P"})
    expected = load(encoder_folders["clip"])
    with nothing_foreign():
        encoder = load(folder)
    assert torch.equal(encoder.images(pictures), expected.images(pictures))
    assert torch.equal(encoder.texts(["a dog"]), expected.texts(["a dog"]))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("config.json", {"model_type": ["clip"]}, "is of type a list of 1, which is no supported encoder"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "weights are quantized"),
        ("config.json", {"text_config": 5}, r"config\.json: text_config: expected a mapping"),
        ("config.json", {"vision_config": {"num_hidden_layers": 10**6}}, "far more than"),
        ("tokenizer_config.json", {"tokenizer_class": "EvilTokenizer"}, "where CLIPTokenizer or CLIPTokenizerFast is"),
        ("tokenizer_config.json", {"tokenizer_class": "AutoTokenizer"}, "where CLIPTokenizer or CLIPTokenizerFast is"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, r"tokenizer_config\.json: tokenizer_class"),
        ("tokenizer_config.json", {"model_max_length": 10**6}, "prompts of 1000000 tokens"),
    ],
)
def test_what_an_encoder_may_not_say(
    encoder_folders: dict[str, Path], tmp_path: Path, file: str, values: dict[str, Any], words: str
) -> None:
    folder = Path(shutil.copytree(encoder_folders["clip"], tmp_path / "clip"))
    edit_json(folder / file, **values)
    with nothing_foreign(), pytest.raises(UserError, match=words):
        load(folder)


@pytest.mark.parametrize("limit", [int(1e30), None])
def test_the_tokenizer_of_an_encoder_need_not_name_a_limit(
    encoder_folders: dict[str, Path], tmp_path: Path, limit: int | None
) -> None:
    """SigLIP 2's does not."""
    folder = Path(shutil.copytree(encoder_folders["clip"], tmp_path / "clip"))
    edit_json(folder / "tokenizer_config.json", model_max_length=limit)
    assert torch.equal(load(folder).texts(["a dog"]), load(encoder_folders["clip"]).texts(["a dog"]))


def test_an_encoders_index_names_safetensors_alone(encoder_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder_folders["dino"], tmp_path / "dino"))
    torch.save({"a": torch.zeros(1)}, folder / "evil.bin")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "evil.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"it names 'evil\.bin', where only files <name>\.safetensors"):
        load(folder)
