"""Parts that see as well as read, that are inside a processor or are not there; and what the index says besides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.families import sd
from dreamlora.interfaces import Classes, Components, ModelSource
from dreamlora.models import loading
from tests.fuzzing import as_json, changed, fuzzed, harmless
from tests.hostile import edit_json, nothing_foreign
from tests.models import parts_of_models


def source_of(folder: Path) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))


def saved(folder: Path, **parts: Any) -> Path:
    """A pipeline with these parts, each by its own class."""
    entries = {name: ["transformers", type(part).__name__] for name, part in parts.items()}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Some", **entries}), encoding="utf-8")
    return folder


def load(folder: Path, *optional: str) -> Components:
    """All parts, each of the class that the index names, if it names one."""
    source = source_of(folder)
    index = loading.read_model_index(source)
    classes: dict[str, Classes] = {
        name: (".".join(filter(None, entry or ())),)
        for name, entry in index.items()
        if name.startswith(("tokenizer", "text_encoder"))
    }
    with nothing_foreign():
        return loading.load_components(source, classes, torch.float32, optional)


SEEING = ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLModel", "Mistral3ForConditionalGeneration")


def encoder(name: str, tokens: int, **text: Any) -> Any:
    """Which knows so many tokens."""
    config = parts_of_models.ENCODERS[name]()
    for key, value in {"vocab_size": tokens, **text}.items():
        setattr(config.get_text_config(), key, value)
    return parts_of_models.part_class(name)(config)


@pytest.mark.parametrize("name", [*SEEING, "Qwen3ForCausalLM", "Qwen3Model", "Gemma2Model", "LlamaForCausalLM"])
def test_a_tokenizer_and_its_language_model_belong_together(name, tmp_path):
    tokenizer = parts_of_models.qwen_tokenizer()
    tokenizer.model_max_length = 131072  # as in Qwen3, of which the config says 40960: its positions are rotations
    room = len(tokenizer) + 100
    folder = saved(tmp_path / "a", tokenizer=tokenizer, text_encoder=encoder(name, room, max_position_embeddings=64))
    assert load(folder)["tokenizer"].model_max_length == 131072
    folder = saved(tmp_path / "b", tokenizer=tokenizer, text_encoder=encoder(name, len(tokenizer) - 1))
    words = f"the tokenizer has tokens up to {len(tokenizer) - 1}, but its text encoder knows {len(tokenizer) - 1}:"
    with pytest.raises(UserError, match=words):
        load(folder)


@pytest.mark.parametrize("name", [*SEEING, "Qwen3Model"])
def test_a_tokenizer_that_names_no_limit_has_its_language_models(name, tmp_path):
    tokenizer = parts_of_models.qwen_tokenizer()
    made = encoder(name, len(tokenizer), max_position_embeddings=64)
    folder = saved(tmp_path, tokenizer=tokenizer, text_encoder=made)
    assert load(folder)["tokenizer"].model_max_length == 64


def test_a_limit_is_not_looked_for_in_what_is_no_config(tmp_path):
    tokenizer = parts_of_models.qwen_tokenizer()
    folder = saved(tmp_path, tokenizer=tokenizer, text_encoder=encoder("Qwen3VLModel", len(tokenizer)))
    edit_json(folder / "text_encoder/config.json", text_config=5, max_position_embeddings="a")
    with pytest.raises(UserError, match="text_config: expected a mapping"):
        load(folder)


PROCESSORS = {
    "PixtralProcessor": "TokenizersBackend",
    "Qwen2VLProcessor": "Qwen2Tokenizer",
    "Qwen2_5_VLProcessor": "Qwen2Tokenizer",
    "Qwen3VLProcessor": "Qwen2Tokenizer",
}


@pytest.mark.parametrize(("processor", "inside"), PROCESSORS.items())
def test_of_a_processor_the_tokenizer_inside_is_loaded(processor, inside, tmp_path):
    """What else it has is for images, needs torchvision, and names classes of its own."""
    folder = saved(tmp_path, tokenizer=parts_of_models.qwen_tokenizer())
    edit_json(folder / "model_index.json", tokenizer=["transformers", processor])
    evil = {"processor_class": "Evil", "image_processor_type": "Evil", "auto_map": {"AutoProcessor": "evil.P"}}
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / "tokenizer" / name).write_text(json.dumps(evil), encoding="utf-8")
    (folder / "tokenizer/chat_template.jinja").write_text("{{ 1 }}", encoding="utf-8")
    edit_json(folder / "tokenizer/tokenizer_config.json", processor_class=processor)
    found = load(folder)["tokenizer"]
    assert type(found).__name__ == inside and found.chat_template is None
    text = "a <|im_start|>cat"
    assert found(text).input_ids == parts_of_models.qwen_tokenizer()(text).input_ids
    with pytest.raises(UserError, match=rf"transformers\.{processor}' is named as the class of 'tokenizer', where"):
        loading.load_components(source_of(folder), {"tokenizer": ("transformers.T5Tokenizer",)}, None)


NOTHING = [None, [None, None]]


@pytest.mark.parametrize("nothing", NOTHING, ids=str)
def test_parts_that_a_pipeline_may_lack_are_none(nothing, tmp_path):
    """As SD 3 without its T5."""
    folder = saved(tmp_path, tokenizer_3=parts_of_models.t5_tokenizer())
    edit_json(folder / "model_index.json", tokenizer_3=nothing, text_encoder_3=nothing)
    assert load(folder, "tokenizer_3", "text_encoder_3") == {"tokenizer_3": None, "text_encoder_3": None}
    with pytest.raises(UserError, match=r"the pipeline has no 'tokenizer_3' in its model_index\.json"):
        load(folder)


def test_a_tokenizer_may_be_there_without_its_encoder(tmp_path):
    folder = saved(tmp_path, tokenizer_3=parts_of_models.t5_tokenizer())
    edit_json(folder / "model_index.json", text_encoder_3=[None, None])
    found = load(folder, "tokenizer_3", "text_encoder_3")
    assert found["text_encoder_3"] is None and found["tokenizer_3"]("a").input_ids
    assert found["tokenizer_3"].model_max_length == transformers.tokenization_utils_base.VERY_LARGE_INTEGER


def test_a_part_that_the_index_names_must_be_there_though_it_could_be_left_out(tmp_path):
    folder = saved(tmp_path, text_encoder_3=parts_of_models.model("T5EncoderModel"))
    shutil.rmtree(folder / "text_encoder_3")
    with pytest.raises(UserError, match=r"incomplete: no folder 'text_encoder_3', which its model_index\.json names"):
        load(folder, "text_encoder_3")
    (folder / "text_encoder_3").mkdir()
    with pytest.raises(UserError, match=r"text_encoder_3: no config\.json|no text_encoder_3/config\.json"):
        load(folder, "text_encoder_3")


def test_a_family_takes_a_pipeline_without_its_optional_parts(sd_folder, tmp_path, monkeypatch):
    edited = json.loads((sd_folder / "model_index.json").read_text(encoding="utf-8")) | {"text_encoder": [None, None]}
    for name in ("tokenizer", "unet", "vae", "scheduler"):
        (tmp_path / name).symlink_to(sd_folder / name)
    (tmp_path / "model_index.json").write_text(json.dumps(edited), encoding="utf-8")
    with pytest.raises(UserError, match="the pipeline has no 'text_encoder'"):
        loading.family_of(source_of(tmp_path))
    monkeypatch.setattr(sd, "OPTIONAL", frozenset({"text_encoder"}))
    assert loading.family_of(source_of(tmp_path)) is sd
    parts = loading.load_components(source_of(tmp_path), sd.PARTS["text"], torch.float32, sd.OPTIONAL)
    assert parts["text_encoder"] is None


KNOWN = {
    "is_distilled": False,
    "patch_size": 2,
    "scale": 1.5,
    "text_encoder_select_layers": (2, 5),
    "sample_sigmas": None,
    "kind": "base",
}


def settings_of(folder: Path, **says: Any) -> dict[str, Any]:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Some", **says}), encoding="utf-8")
    return loading.read_settings(source_of(folder), KNOWN)


def test_settings_of_a_pipeline_are_its_own_or_the_defaults(tmp_path):
    assert settings_of(tmp_path) == {"_class_name": "Some", **KNOWN}
    says = {
        **{"is_distilled": True, "patch_size": 4, "scale": 2, "text_encoder_select_layers": [2, 5, 8]},
        **{"sample_sigmas": [1.0, 0.5], "kind": "turbo_2.1"},
    }
    found = settings_of(tmp_path, **says, evil="x" * 1000, vae=["diffusers", "AutoencoderKL"])
    assert found == {"_class_name": "Some", **says}
    for value in (None, 3, 0.5):
        assert settings_of(tmp_path, sample_sigmas=value)["sample_sigmas"] == value


ODD_SETTINGS = [
    *({"is_distilled": value} for value in (1, "true", None, [True], {})),
    *({"patch_size": value} for value in (True, 2.0, "2", None, [2], 10**7, -(10**9))),
    *({"scale": value} for value in ("1", True, None, float("nan"), float("inf"), 1e300)),
    *({"text_encoder_select_layers": value} for value in (5, [True], ["a"], [[1]], [10**9], [1] * 1001, None)),
    *({"sample_sigmas": value} for value in (True, "a", ["a"], {"a": 1}, [None], [0.1] * 1001, [[0.1]])),
    *({"kind": value} for value in (5, None, ["base"], "../../a", "x" * 65, "{{ a }}", "a\nb")),
]


@pytest.mark.parametrize("says", ODD_SETTINGS, ids=lambda says: str(says)[:60])
def test_settings_of_another_kind_are_one_clear_error(says, tmp_path):
    (name,) = says
    with pytest.raises(UserError, match=rf"model_index\.json says {name}: expected ") as error:
        settings_of(tmp_path, **says)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@fuzzed
@given(changed({"_class_name": "Some", **{name: [1, 2] if value is None else value for name, value in KNOWN.items()}}))
def test_fuzz_settings(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "settings"
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_bytes(as_json(content))
    found = harmless(lambda: loading.read_settings(source_of(folder), KNOWN))
    assert isinstance(found, UserError) or found.keys() == {"_class_name", *KNOWN}


@fuzzed
@given(st.data())
def test_fuzz_classes_of_an_index(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "classes"
    if not folder.is_dir():
        saved(folder, tokenizer=parts_of_models.qwen_tokenizer())
    content = {"_class_name": "Some", "tokenizer": ["transformers", "PixtralProcessor"]}
    (folder / "model_index.json").write_bytes(as_json(data.draw(changed(content))))
    allowed = {"tokenizer": ("transformers.PixtralProcessor",)}
    harmless(lambda: loading.load_components(source_of(folder), allowed, None, ("tokenizer",)))
