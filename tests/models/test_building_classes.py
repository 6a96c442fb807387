"""Every class that parts of pipelines have: loaded as the libraries load it, in every form that its files have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from dreamlora.errors import UserError
from dreamlora.models import building, configs
from dreamlora.models.building import Form
from dreamlora.models.fetching import Place
from tests.fuzzing import CASES, as_json, changed, fuzzed, harmless
from tests.hostile import edit_json, nothing_foreign
from tests.models import parts_of_models, real_configs

CLASSES = [*parts_of_models.ENCODERS, *parts_of_models.MODELS]
OWN_WORDS = {"_name_or_path", "architectures", "dtype", "transformers_version", "_diffusers_version", "_class_name"}
"""Of a config: where it is from, not what it says."""


def loaded(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What we load; asking nobody."""
    with nothing_foreign():
        return building.load_part(parts_of_models.part_class(name), Place(str(folder), None, None), Form(dtype))


def stock(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    option = "dtype" if name in parts_of_models.ENCODERS else "torch_dtype"
    return parts_of_models.part_class(name).from_pretrained(folder, **{option: dtype})


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Parameters, buffers of either kind, and what the classes made of the configs."""
    for mine, other in (
        (dict(ours.named_parameters(remove_duplicate=False)), dict(theirs.named_parameters(remove_duplicate=False))),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        assert mine.keys() == other.keys()
        for key, tensor in mine.items():
            assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key
    assert plain(ours.config) == plain(theirs.config)
    for name in ("_attn_implementation", "_experts_implementation"):
        assert getattr(ours.config, name, None) == getattr(theirs.config, name, None)
    assert not ours.training and not any(own.requires_grad for own in ours.parameters())


def plain(config: Any) -> Any:
    """What a config says, without where it is from."""
    content = config.to_dict() if hasattr(config, "to_dict") else dict(config)

    def own(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: own(inner) for key, inner in value.items() if key not in OWN_WORDS | {"_use_default_values"}}
        return [own(inner) for inner in value] if isinstance(value, list | tuple) else value

    return own(content)


@pytest.mark.parametrize("name", CLASSES)
def test_a_part_is_what_its_library_makes_of_it(name, tmp_path):
    whole = parts_of_models.model(name)
    whole.save_pretrained(tmp_path / "whole")
    assert_same(loaded(name, tmp_path / "whole"), stock(name, tmp_path / "whole"))
    whole.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(loaded(name, tmp_path / "shards", dtype), stock(name, tmp_path / "shards", dtype))


def test_the_statistics_of_an_autoencoder_are_loaded(tmp_path):
    """They are buffers, and what latents are scaled by."""
    made = parts_of_models.model("AutoencoderKLFlux2")
    made.save_pretrained(tmp_path)
    ours = loaded("AutoencoderKLFlux2", tmp_path)
    assert torch.equal(ours.bn.running_mean, made.bn.running_mean) and ours.bn.running_mean.any()
    assert torch.equal(ours.bn.running_var, made.bn.running_var)


def renamed(**words: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Tensors with other beginnings of their names."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {_begun(key, words): tensor for key, tensor in tensors.items()}

    return change


def _begun(key: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        old = old.replace("__", ".")
        if key.startswith(old):
            return new + key[len(old) :]
    return key


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """As the first Qwen2.5-VL were published."""
    text = config.pop("text_config")
    rotation = text.pop("rope_parameters")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rotation["mrope_section"]}
    return {**text, **config, "rope_theta": rotation["rope_theta"]}


def tied(config: Any) -> Any:
    config.tie_word_embeddings = True
    return config


LAYOUTS: dict[str, tuple[str, Callable[[], nn.Module], Any, Any]] = {
    "a language model's head is left out": (
        "Qwen3Model",
        lambda: transformers.Qwen3ForCausalLM(parts_of_models.qwen3_config()),
        None,
        None,
    ),
    "the head is tied, and not stored": (
        "Qwen3ForCausalLM",
        lambda: transformers.Qwen3ForCausalLM(tied(parts_of_models.qwen3_config())),
        None,
        None,
    ),
    "a bare model is stored, the head is tied": (
        "Qwen3ForCausalLM",
        lambda: transformers.Qwen3Model(tied(parts_of_models.qwen3_config())),
        None,
        None,
    ),
    "a whole model that sees": (
        "Qwen3VLModel",
        lambda: transformers.Qwen3VLForConditionalGeneration(parts_of_models.qwen3vl_config()),
        None,
        None,
    ),
    "Qwen2.5-VL, first names": (
        "Qwen2_5_VLForConditionalGeneration",
        lambda: transformers.Qwen2_5_VLForConditionalGeneration(parts_of_models.qwen25_config()),
        None,
        flat,
    ),
    "Qwen2.5-VL, new names": (
        "Qwen2_5_VLForConditionalGeneration",
        lambda: transformers.Qwen2_5_VLForConditionalGeneration(parts_of_models.qwen25_config()),
        renamed(model="model.language_model", visual="model.visual"),
        None,
    ),
    "Mistral, new names": (
        "Mistral3ForConditionalGeneration",
        lambda: transformers.Mistral3ForConditionalGeneration(parts_of_models.mistral_config()),
        renamed(
            language_model__model="model.language_model",
            language_model__lm_head="lm_head",
            vision_tower="model.vision_tower",
            multi_modal_projector="model.multi_modal_projector",
        ),
        None,
    ),
    "Gemma with its head": (
        "Gemma2Model",
        lambda: transformers.Gemma2ForCausalLM(parts_of_models.gemma_config()),
        None,
        None,
    ),
    "T5 with its decoder": (
        "T5EncoderModel",
        lambda: transformers.T5ForConditionalGeneration(parts_of_models.ENCODERS["T5EncoderModel"]()),
        None,
        None,
    ),
    "UMT5 with its decoder": (
        "UMT5EncoderModel",
        lambda: transformers.UMT5ForConditionalGeneration(parts_of_models.ENCODERS["UMT5EncoderModel"]()),
        None,
        None,
    ),
    "CLIP that sees as well": (
        "CLIPTextModelWithProjection",
        lambda: transformers.CLIPModel(parts_of_models.clip_config()),
        None,
        None,
    ),
}


@pytest.mark.parametrize(("name", "made", "names", "says"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_older_and_larger_files_are_read_as_the_library_reads_them(name, made, names, says, tmp_path):
    made().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if names:
        assert names(tensors).keys() != tensors.keys()
        save_file(names(tensors), file, metadata={"format": "pt"})
    if says:
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        (tmp_path / "config.json").write_text(json.dumps(says(config)), encoding="utf-8")
    assert_same(loaded(name, tmp_path), stock(name, tmp_path))


def test_a_head_that_is_missing_is_not_made_up(tmp_path):
    parts_of_models.model("Qwen3ForCausalLM").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(
        {key: own for key, own in load_file(file).items() if key != "lm_head.weight"}, file, metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match=r"the weights lack 1 tensors, lm_head\.weight first"):
        loaded("Qwen3ForCausalLM", tmp_path)


REAL = real_configs.ENCODERS


@pytest.mark.parametrize(("config_class", "says"), REAL.values(), ids=REAL.keys())
def test_configs_of_published_text_encoders_say_to_us_what_they_say_to_transformers(config_class, says, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(says), encoding="utf-8")
    owner = getattr(transformers, config_class)
    ours = configs.config_for(owner, file)
    theirs = owner.from_pretrained(tmp_path)
    assert computed(ours) == computed(theirs)
    for name in owner.sub_configs:
        assert type(getattr(ours, name)) is type(getattr(theirs, name))


def computed(config: Any) -> Any:
    """What a model's class may ask: all that the config's class knows, of it and of those inside."""
    if not isinstance(config, transformers.PretrainedConfig):
        return config
    known = type(config)().to_dict().keys() - transformers.PretrainedConfig().to_dict().keys() - OWN_WORDS
    also = {"tie_word_embeddings"} & vars(config).keys()
    return {name: computed(getattr(config, name)) for name in known | also}


@pytest.mark.parametrize("name", REAL)
def test_no_word_of_a_published_config_is_lost_unseen(name, tmp_path):
    """The angles of positions above all: with the class's own, embeddings are wrong and nothing tells."""
    config_class, says = REAL[name]
    (tmp_path / "config.json").write_text(json.dumps(says), encoding="utf-8")
    text = configs.config_for(getattr(transformers, config_class), tmp_path / "config.json").get_text_config()
    inside = says.get("text_config", says)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "head_dim"):
        assert key not in inside or getattr(text, key) == inside[key]
    if "rope_theta" in inside:
        assert text.rope_parameters["rope_theta"] == inside["rope_theta"]
        scaling = {key: value for key, value in (inside.get("rope_scaling") or {}).items() if value != "mrope"}
        assert scaling.items() <= text.rope_parameters.items()


MODELS = real_configs.MODELS


@pytest.mark.parametrize(("name", "says"), MODELS.values(), ids=MODELS.keys())
def test_configs_of_published_models_of_diffusers_are_taken_whole(name, says, tmp_path):
    content = {"_class_name": name, "_diffusers_version": "0.36.0", "_name_or_path": "a/b", **says}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    taken = configs.arguments_for(parts_of_models.part_class(name), tmp_path / "config.json")
    assert taken == {key: own for key, own in says.items() if key in taken}
    assert says.keys() - taken.keys() <= {"force_upcast"}  # no argument of the class


HIDDEN = "kernels-community/flash-attn"
HARMLESS: dict[str, dict[str, Any]] = {
    "code": {"auto_map": {"AutoModel": "x/y--evil.M"}, "architectures": ["Evil"]},
    "attention": {"attn_implementation": HIDDEN, "_attn_implementation": HIDDEN},
    "attention inside": {"_attn_implementation_internal": HIDDEN, "experts_implementation": HIDDEN},
    "other files": {"transformers_weights": "../x.safetensors", "extra_files": ["/etc/passwd"]},
    "layers": {"per_layer_config": {"0": {"hidden_size": 8}}, "fusion_config": {"a": True}},
    "methods": {"to_dict": 1, "get_text_config": 2, "attribute_map": {"a": "b"}, "sub_configs": {}},
    "ways": {"dtype": "float64", "tie_last_hidden_states": False, "return_dict": False, "output_attentions": True},
}


@pytest.mark.parametrize("says", HARMLESS.values(), ids=HARMLESS.keys())
@pytest.mark.parametrize("name", ["Qwen3VLModel", "Mistral3ForConditionalGeneration", "Qwen3ForCausalLM"])
def test_configs_inside_configs_reach_no_further(name, says, tmp_path):
    parts_of_models.model(name).save_pretrained(tmp_path)
    expected = stock(name, tmp_path)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for inner in ("text_config", "vision_config"):
        if inner in content:
            content[inner] |= says
    file.write_text(json.dumps(content | says), encoding="utf-8")
    assert_same(loaded(name, tmp_path), expected)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "quantized": ({"quantization_config": {"quant_method": "bitsandbytes"}}, {}, "its weights are quantized"),
    "quantized inside": ({}, {"quantization_config": {"quant_method": "fp8"}}, "its weights are quantized"),
    "endless layers": ({}, {"num_hidden_layers": 10**9}, "num_hidden_layers: expected a number up to 1000000"),
    "many layers": ({}, {"num_hidden_layers": 10**6}, "asks for far more than the .* numbers"),
    "many layers by name": ({}, {"num_hidden_layers": 10**5, "layer_types": None}, "asks for far more"),
    "wide": ({}, {"hidden_size": 10**6, "head_dim": 10**6}, "asks for far more|cannot load"),
    "endless angles": ({}, {"rope_parameters": {"rope_theta": 10**12}}, "rope_parameters: expected a number up to"),
    "angles by another name": ({}, {"rope_scaling": {"rope_theta": 1e30}}, "rope_scaling: expected a number up to"),
    "angles that are text": ({}, {"rope_parameters": {"rope_theta": "../a"}}, "rope_parameters: expected a number or"),
    "a list of configs": ({"text_config": [{}]}, {}, "text_config: expected a mapping"),
    "a kernel for a word": ({}, {"hidden_act": HIDDEN}, "hidden_act: expected a number or a word"),
    "deep": ({}, {"rope_parameters": {"a": {"a": {"a": {"a": 1}}}}}, "rope_parameters: expected a list"),
    "no number": ({}, {"hidden_size": "16"}, "hidden_size"),
}


@pytest.mark.parametrize(("outside", "inside", "words"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("name", ["Qwen3VLModel", "Mistral3ForConditionalGeneration"])
def test_what_a_config_inside_a_config_may_not_say_is_one_clear_error(name, outside, inside, words, tmp_path):
    parts_of_models.model(name).save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["text_config"]
    edit_json(tmp_path / "config.json", **{"text_config": text | inside} | outside)
    with pytest.raises(UserError, match=words) as error:
        loaded(name, tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


INNER = (transformers.Qwen3VLConfig, transformers.Mistral3Config, transformers.Qwen2_5_VLConfig)


@pytest.mark.parametrize("kind", ["ministral3", "llama", "evil", 5, None, ["mistral"]])
def test_a_config_inside_a_config_is_of_the_kind_that_is_known(kind, tmp_path):
    """Mistral's says itself which of all classes it is of; a like one would be computed otherwise."""
    parts_of_models.model("Mistral3ForConditionalGeneration").save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["text_config"]
    edit_json(tmp_path / "config.json", text_config=text | {"model_type": kind})
    with pytest.raises(UserError, match=r"text_config: it is of the kind .*, where 'mistral' is known"):
        loaded("Mistral3ForConditionalGeneration", tmp_path)


@fuzzed
@given(st.sampled_from(INNER), st.one_of(changed(real_configs.QWEN3_VL_4B), changed(real_configs.QWEN25_7B)))
def test_fuzz_configs_inside_configs(tmp_path_factory, config_class, content):
    file = tmp_path_factory.getbasetemp() / "inner.json"
    file.write_bytes(as_json(content))
    harmless(lambda: configs.config_for(config_class, file))


@settings(fuzzed, max_examples=max(20, CASES // 10))
@given(st.data())
def test_fuzz_a_model_of_two(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "two"
    if not folder.is_dir():
        parts_of_models.model("Qwen3VLModel").save_pretrained(folder)
    file = folder / "config.json"
    before = file.read_bytes()
    file.write_bytes(as_json(data.draw(changed(json.loads(before)))))
    try:
        place = Place(str(folder), None, None)
        harmless(lambda: building.load_part(transformers.Qwen3VLModel, place, Form(torch.float32)))
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "SanaTransformer2DModel"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_no_second_copy_is_made_in_float32(name, stored, tmp_path):
    """Of a language model of 24 billion weights it would take 96 GB."""
    parts_of_models.model(name).to(stored).save_pretrained(tmp_path)
    made: list[str] = []

    def record(module: nn.Module, key: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta and parameter.dtype == torch.float32:
            made.append(key)

    handle = register_module_parameter_registration_hook(record)
    try:
        loaded(name, tmp_path, torch.bfloat16)
    finally:
        handle.remove()
    assert not made


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_weights_of_the_right_kind_stay_where_they_are(tmp_path):
    """They are pages of the file until something writes to them: the system may drop and read them again."""
    wide = transformers.Qwen3Config(**parts_of_models.LANGUAGE | {"vocab_size": 10**6})
    transformers.Qwen3Model(wide).to(torch.bfloat16).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    before = own_memory()
    module = loaded("Qwen3Model", tmp_path, torch.bfloat16)
    assert own_memory() - before < size / 4
    assert module.embed_tokens.weight.shape == (10**6, 16)


def own_memory() -> int:
    """Bytes that are no file's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024
