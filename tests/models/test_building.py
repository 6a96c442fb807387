"""Parts of strangers' models: what their files may decide, and what not."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dreamlora.config import Model, Train
from dreamlora.errors import UserError
from dreamlora.families import flux, sd
from dreamlora.interfaces import Components, Role
from dreamlora.models import building, loading
from dreamlora.models.fetching import Place
from dreamlora.models.prompts import cut_prompts
from tests import tinymodels
from tests.fuzzing import CASES, as_json, changed, fuzzed, harmless
from tests.hostile import edit_json, nothing_foreign
from tests.hubcache import FakeHub

TEXT = "text_encoder/config.json"
TOKENIZER = "tokenizer/tokenizer_config.json"
UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
KERNEL = "kernels-community/flash-attn"


@pytest.fixture
def folder(sd_folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


def load(folder: Path | str, role: Role, **options: Any) -> Components:
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(folder), **options))
    return sd.load(source, role, torch.float32)


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / file, **values)


def write(file: str, content: object) -> Callable[[Path], None]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / file).parent.mkdir(exist_ok=True) or (folder / file).write_text(text, "utf-8")


REACHING = {
    "attention": edit(TEXT, attn_implementation=KERNEL, _attn_implementation=KERNEL),
    "attention inside": edit(TEXT, _attn_implementation_internal=KERNEL, _experts_implementation=KERNEL),
    "experts": edit(TEXT, experts_implementation=KERNEL, use_kernels=True, kernel_config={"a": KERNEL}),
    "code": edit(TEXT, auto_map={"AutoConfig": "evil.C", "AutoModel": "x/y--evil.M"}, architectures=["Evil"]),
    "other files": edit(TEXT, transformers_weights="../unet/x.safetensors", configuration_files=["config.4.0.json"]),
    "patches": edit(TEXT, fusion_config={"patch_embeddings": True}, per_layer_config={"0": {"hidden_size": 4}}),
    "names": edit(TEXT, _name_or_path="x/y", name_or_path="x/y", base_model="x/y", _commit_hash="a" * 40),
    "methods": edit(TEXT, to_dict=1, __class__=2, attribute_map={"a": "b"}, base_model_tp_plan={}, return_dict=False),
    "types": edit(TEXT, torch_dtype="float16", dtype="float64", output_hidden_states=True, problem_type="regression"),
    "generation": write("text_encoder/generation_config.json", {"custom_generate": "x/y"}),
    "modeling code": write("text_encoder/modeling_clip.py", "raise SystemExit"),
    "tokenizer's code": edit(TOKENIZER, auto_map={"AutoTokenizer": ["x/y--evil.T", None]}),
    "tokenizer's class": edit(TOKENIZER, tokenizer_class="EvilTokenizer", processor_class="EvilProcessor"),
    "tokenizer's files": edit(TOKENIZER, vocab_file="/etc/passwd", tokenizer_file="/etc/passwd", gguf_file="a"),
    "tokenizer's versions": edit(TOKENIZER, fast_tokenizer_files=["tokenizer.0.1.json", "tokenizer.json"]),
    "tokenizer's arguments": edit(TOKENIZER, init_inputs=[{"a": 1}], name_or_path="x/y", special_tokens_map_file="/x"),
    "tokenizer's templates": write("tokenizer/chat_template.jinja", "{{ lipsum.__globals__ }}"),
    "more templates": write("tokenizer/additional_chat_templates/a.jinja", "{% for i in range(10**9) %}{% endfor %}"),
    "other tokenizers": write("tokenizer/tekken.json", "{}"),
    "unet's code": edit(UNET, auto_map={"AutoModel": "evil.M"}, _class_name="Evil", _name_or_path="x/y"),
    "unet's defaults": edit(UNET, _use_default_values=["sample_size", "in_channels"], evil="x"),
    "pipeline": edit("model_index.json", custom_pipeline="x/y", auto_map={"a": "b"}, safety_checker=["evil", "M"]),
    "pipeline's code": write("pipeline.py", "raise SystemExit"),
}


@pytest.mark.parametrize("reach", REACHING.values(), ids=REACHING.keys())
def test_a_model_is_made_of_its_numbers_alone(folder, sd_folder, reach, monkeypatch):
    """It is loaded as it would be without what else it says; nothing is fetched, asked or imported for it."""
    monkeypatch.chdir(folder)
    expected = {name: part for role in ("text", "denoiser") for name, part in load(sd_folder, role).items()}
    reach(folder)
    with nothing_foreign():
        found = {name: part for role in ("text", "denoiser") for name, part in load(folder, role).items()}
    tokens = [sd.tokenize(text, ["a cat"], None) for text in (found, expected)]
    assert torch.equal(tokens[0]["input_ids"], tokens[1]["input_ids"])
    embeddings = [sd.encode_tokens(text, tokens[0])["prompt_embeds"] for text in (found, expected)]
    assert torch.equal(*embeddings)
    assert found["text_encoder"].config._attn_implementation == expected["text_encoder"].config._attn_implementation
    arguments = (torch.ones(1, 4, 8, 8), torch.tensor([5]), {"prompt_embeds": embeddings[0]}, 1.0)
    with torch.no_grad():
        assert torch.equal(*(sd.predict(parts["unet"], *arguments) for parts in (found, expected)))


REFUSED = {
    "quantized text encoder": (edit(TEXT, quantization_config={"quant_method": "gptq"}), "text", "are quantized"),
    "quantized unet": (edit(UNET, quantization_config={"quant_method": "x"}), "denoiser", "unet.config.*are quantized"),
    "adapter": (
        write("text_encoder/adapter_config.json", {"base_model_name_or_path": "x/y", "peft_type": "LORA"}),
        "text",
        "has an adapter beside the model",
    ),
    "endless layers": (edit(TEXT, num_hidden_layers=10**7), "text", r"config\.json: num_hidden_layers: expected a num"),
    "many layers": (edit(TEXT, num_hidden_layers=10**6), "text", "asks for far more than the .* numbers"),
    "many blocks": (edit(UNET, layers_per_block=10**6), "denoiser", "asks for far more than the .* numbers"),
    "many lists": (edit(UNET, layers_per_block=[1000, 1000]), "denoiser", "asks for far more than|cannot load"),
    "wide": (edit(TEXT, hidden_size=10**6, intermediate_size=10**6), "text", "asks for far more|cannot load"),
    "wide unet": (edit(UNET, block_out_channels=[10**5, 10**6]), "denoiser", "asks for far more|cannot load"),
    "long list": (edit(UNET, down_block_types=["DownBlock2D"] * 2000), "denoiser", "down_block_types: expected a list"),
    "text for a number": (edit(TEXT, hidden_size="a"), "text", r"text_encoder/config\.json: .*hidden_size"),
    "a path for a word": (edit(TEXT, hidden_act="../../a"), "text", "hidden_act: expected a number or a word"),
    "no activation": (edit(TEXT, hidden_act="evil"), "text", "cannot load .*text_encoder"),
    "no number": (edit(UNET, norm_eps=float("nan")), "denoiser", r"unet/config\.json: norm_eps: expected something"),
    "list for a word": (edit(UNET, act_fn=["silu"]), "denoiser", "act_fn: expected something such as 'silu'"),
    "a list": (write(UNET, "[]"), "denoiser", r"cannot read .*unet/config\.json: .*dictionary"),
    "deep": (write(UNET, '{"a":' * 10**5), "denoiser", r"unet/config\.json: it is nested"),
    "large": (write(UNET, '{"a": "%s"}' % ("x" * 2**20)), "denoiser", "more than the 1 MiB"),
    "endless schedule": (
        edit(SCHEDULER, num_train_timesteps=10**12),
        "scheduler",
        "num_train_timesteps: expected a num",
    ),
    "no steps": (edit(SCHEDULER, num_train_timesteps=0), "scheduler", r"gives no noise schedule|cannot load"),
    "no betas": (
        edit(SCHEDULER, beta_start=float("nan")),
        "scheduler",
        "beta_start: expected something such as 0",
    ),
    "odd betas": (edit(SCHEDULER, beta_start=5.0, beta_end=5.0), "scheduler", "it gives no noise schedule"),
    "text betas": (edit(SCHEDULER, beta_start="a"), "scheduler", "beta_start: expected something"),
    "one beta": (edit(SCHEDULER, trained_betas=False), "scheduler", r"gives no noise schedule|cannot load"),
    "a list of betas": (edit(SCHEDULER, trained_betas=["a"]), "scheduler", "cannot load .*scheduler"),
    "more betas": (edit(SCHEDULER, trained_betas=[0.1] * 200_000), "scheduler", "trained_betas: expected a list of at"),
    "other tokens": (edit(TEXT, vocab_size=5), "text", "text_encoder"),
}


@pytest.mark.parametrize(("change", "role", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_config_may_not_say_is_one_clear_error(folder, change, role, words):
    change(folder)
    with nothing_foreign(), pytest.raises(UserError, match=words) as error:
        load(folder, role)
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000
    assert torch.get_default_dtype() == torch.float32


def test_a_tokenizer_must_not_know_more_than_its_text_encoder(folder):
    tokenizer = json.loads((folder / "tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    marks = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": 5000, "content": "<new>", **marks})
    (folder / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match=r"the tokenizer has tokens up to \d+, but its text encoder knows"):
        load(folder, "text")


def test_a_tokenizer_must_not_give_more_than_the_text_encoder_reads(folder):
    edit_json(folder / TOKENIZER, model_max_length=10**9)
    with pytest.raises(UserError, match="prompts of 1000000000 tokens"):
        load(folder, "text")


def test_a_tokenizer_without_a_limit_has_that_of_its_text_encoder(folder):
    """A tokenizer.json alone says none."""
    (folder / TOKENIZER).unlink()
    assert load(folder, "text")["tokenizer"].model_max_length == tinymodels.CLIP_LENGTH
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))
    limit, cut = cut_prompts(sd, source, ["a", "a" * 100], None)
    assert limit == tinymodels.CLIP_LENGTH and list(cut) == [False, True]


@pytest.mark.parametrize("name", ["quantized unet", "a path for a word", "no number", "text betas", "endless layers"])
def test_a_config_is_looked_through_before_any_part_is_loaded(folder, name):
    """The UNet is loaded when all images and prompts have been encoded."""
    change, _, words = REFUSED[name]
    change(folder)
    with pytest.raises(UserError, match=words):
        loading.family_of(loading.resolve_source(Model(pretrained_model_name_or_path=str(folder))))


ENTRIES = [
    *(["transformers", "AutoModel"], ["diffusers", "AutoModel"], ["diffusers", "StableDiffusionPipeline"]),
    *(["transformers", "CLIPTextModel"], ["diffusers_modules", "UNet2DConditionModel"], ["unet.code", "UNet"]),
    *(["diffusers", "UNet2DConditionModel", "x"], ["diffusers", 5], ["diffusers", None], "diffusers.UNet"),
    *(["diffusers.models", "UNet2DConditionModel"], ["diffusers", "models.UNet2DConditionModel"], ["", ""]),
    *(5, True, {"a": 1}, {}, [], [[], []], ["diffusers", ["UNet2DConditionModel"]], ["os", "system"]),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_a_part_has_one_of_the_classes_that_its_family_declares(folder, entry):
    edit_json(folder / "model_index.json", unet=entry)
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))
    for read in (lambda: sd.load(source, "denoiser", torch.float32), lambda: loading.family_of(source)):
        with nothing_foreign(), pytest.raises(UserError, match=r"where diffusers\.UNet2DConditionModel is expected"):
            read()


@pytest.mark.parametrize("name", ["AutoModel", "StableDiffusionPipeline", "UNet2DConditionModel", 7, None, ["a", "b"]])
def test_another_autoencoder_has_one_of_the_classes_too(folder, sd_folder, name):
    edit_json(folder / "vae/config.json", _class_name=name)
    for path in (folder, folder / "vae"):
        with nothing_foreign(), pytest.raises(UserError, match=r"class of 'vae', where diffusers\.AutoencoderKL or"):
            load(sd_folder, "vae", pretrained_vae_model_name_or_path=str(path))


@pytest.mark.parametrize("name", tinymodels.SAVERS)
def test_loading_asks_nobody(name, tmp_path):
    folder = tinymodels.SAVERS[name](tmp_path / name)
    with nothing_foreign():
        source = loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))
        family = loading.family_of(source)
        for role in family.PARTS:
            family.load(source, role, torch.float32)
        family.resolution(source)


def test_a_model_of_the_hub_is_looked_through_before_it_is_fetched(folder, tmp_path, monkeypatch):
    """Its files are links into blobs; what an index names is asked for only if it may be named."""
    weights = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    shards = {f"part-{i}.safetensors": dict(list(weights.items())[i::2]) for i in range(2)}
    for shard, tensors in shards.items():
        save_file(tensors, folder / "unet" / shard, metadata={"format": "pt"})
    names = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    hub = FakeHub(tmp_path / "hub")
    snapshot = hub.commit("owner/name", "1" * 40, folder)
    assert (snapshot / "unet/part-0.safetensors").is_symlink()
    unet = load("owner/name", "denoiser", cache_dir=hub.cache)["unet"]
    assert torch.equal(unet.conv_in.bias, weights["conv_in.bias"])

    names["conv_in.bias"] = "../vae/diffusion_pytorch_model.safetensors"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    hub.commit("owner/name", "2" * 40, folder)
    fetched: list[str] = []
    original = Place.file

    def recording(place: Any, name: str) -> Path:
        fetched.append(name)
        return original(place, name)

    monkeypatch.setattr(Place, "file", recording)
    with pytest.raises(UserError, match=r"it names '\.\./vae/diffusion_pytorch_model\.safetensors'"):
        load("owner/name", "denoiser", cache_dir=hub.cache)
    assert fetched == ["config.json"]


@pytest.mark.parametrize("scheduler", sd.PARTS["scheduler"]["scheduler"])
def test_every_scheduler_keeps_its_settings(scheduler, folder):
    part_class = getattr(diffusers, scheduler.partition(".")[2])
    edit_json(folder / "model_index.json", scheduler=scheduler.split("."))
    if isinstance(part_class, diffusers.utils.DummyObject):
        with pytest.raises(UserError, match=r"which diffusers has only with .*(torchsde|scipy)"):
            load(folder, "scheduler")
        return
    stock = part_class(beta_start=0.001, beta_end=0.02, num_train_timesteps=500)
    stock.save_pretrained(folder / "scheduler")
    found = load(folder, "scheduler")["scheduler"]
    hidden = {"_use_default_values", "_class_name", "_diffusers_version"}
    settings = [{key: value for key, value in one.config.items() if key not in hidden} for one in (found, stock)]
    assert settings[0] == settings[1] and type(found) is part_class
    assert len(sd.objective(found, Train()).alphas_cumprod) == 500


FILES = [TEXT, UNET, SCHEDULER, "vae/config.json", "model_index.json"]


builds = settings(fuzzed, max_examples=max(20, CASES // 10))
"""Each case makes a whole module; what the configs' reader does with them is tried more often beside it."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A folder to write changed files into, and what they were."""
    folder = tinymodels.save_sd(tmp_path_factory.mktemp("fuzz") / "sd")
    contents = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in FILES}
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))
    return SimpleNamespace(folder=folder, contents=contents, source=source)


def refused_or_loaded(sound: SimpleNamespace, file: str, name: str, data: st.DataObject) -> Any:
    """The part called ``name`` with a changed file, or the error."""
    (classes,) = (parts[name] for parts in sd.PARTS.values() if name in parts)
    try:
        (sound.folder / file).write_bytes(as_json(data.draw(changed(copy.deepcopy(sound.contents[file])))))
        found = harmless(lambda: loading.load_components(sound.source, {name: classes}, torch.float32))
    finally:
        (sound.folder / file).write_bytes(as_json(sound.contents[file]))
    return found if isinstance(found, UserError) else found[name]


@builds
@given(st.data())
def test_fuzz_text_encoder(sound, data):
    refused_or_loaded(sound, TEXT, "text_encoder", data)


@builds
@given(st.data())
def test_fuzz_unet(sound, data):
    refused_or_loaded(sound, UNET, "unet", data)


@builds
@given(st.data())
def test_fuzz_autoencoder(sound, data):
    refused_or_loaded(sound, "vae/config.json", "vae", data)


@builds
@given(st.data())
def test_fuzz_model_index(sound, data):
    refused_or_loaded(sound, "model_index.json", "scheduler", data)
    harmless(lambda: loading.family_of(sound.source))


@builds
@given(st.data())
def test_fuzz_scheduler(sound, data):
    scheduler = refused_or_loaded(sound, SCHEDULER, "scheduler", data)
    if not isinstance(scheduler, UserError):
        objective = harmless(lambda: sd.objective(scheduler, Train()))
        assert isinstance(objective, UserError) or objective.alphas_cumprod.isfinite().all()


@builds
@given(st.data())
def test_fuzz_flow_scheduler(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "flow"
    part_class = diffusers.FlowMatchEulerDiscreteScheduler
    part_class(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder)
    file = folder / "scheduler_config.json"
    file.write_bytes(as_json(data.draw(changed(json.loads(file.read_text(encoding="utf-8"))))))
    scheduler = harmless(lambda: building.load_scheduler(part_class, Place(str(folder), None, None)))
    if not isinstance(scheduler, UserError):
        objective = harmless(lambda: flux.objective(scheduler, Train()))
        assert ((objective.sigmas >= 0) & (objective.sigmas <= 1)).all()
