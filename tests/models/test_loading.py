"""Where models come from: ids that change with the content, and words for everything that can be missing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreamlora import tiny
from dreamlora.config import Model, Train
from dreamlora.errors import UserError
from dreamlora.families import _parts, flux, sd
from dreamlora.interfaces import ModelSource
from dreamlora.models import fetching, fingerprint, loading
from dreamlora.objectives.densities import LogitNormal
from tests import tinymodels
from tests.hubcache import FakeHub

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(sd_folder, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


def source(path: Path | str, **options) -> ModelSource:
    return loading.resolve_source(Model(pretrained_model_name_or_path=str(path), **options))


def test_id_follows_the_content_not_the_place_or_time(folder, sd_folder, tmp_path):
    before = source(folder).model_id
    copied = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "model"))
    (copied / WEIGHTS).touch()
    assert source(copied).model_id == before
    assert before.startswith("model@")
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.bias"][0] += 1e-3
    save_file(tensors, folder / WEIGHTS)
    assert source(folder).model_id != before
    assert source(sd_folder, variant="fp16").model_id != source(sd_folder).model_id


def test_sample_of_a_long_file_sees_its_start_middle_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE", 2**19)
    file = tmp_path / "weights.safetensors"
    content = bytearray(2**21)
    file.write_bytes(content)
    seen = {fingerprint.fingerprint(tmp_path)}
    middle = 64 * (len(content) - fingerprint.BLOCK) // (fingerprint.BLOCKS - 1)
    for place in (0, middle, len(content) - 1):
        changed = content.copy()
        changed[place] = 1
        file.write_bytes(changed)
        seen.add(fingerprint.fingerprint(tmp_path))
    file.write_bytes(content + b"\0")
    seen.add(fingerprint.fingerprint(tmp_path))
    assert len(seen) == 5


def test_other_autoencoder(sd_folder, tmp_path):
    other = tinymodels.save_sd(tmp_path / "other")
    config = json.loads((other / "vae/config.json").read_text(encoding="utf-8"))
    (other / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 2.0}), encoding="utf-8")
    ids = {source(sd_folder).model_id}
    for path in (other, other / "vae"):
        given = source(sd_folder, pretrained_vae_model_name_or_path=str(path))
        vae = sd.load(given, "vae", torch.float32)
        assert vae["vae"].config.scaling_factor == 2.0
        assert sd.resolution(given) == 16
        ids.add(given.model_id)
    assert len(ids) == 3


@pytest.mark.parametrize("name", tiny.MODELS)
def test_embedded_models(name):
    found = source(name)
    assert found.path == str(tiny.pipeline_path(name)) and found.model_id.startswith(f"{name}@")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((name, "tiny-flow") for name in ("tiny_flow", "tinyflow", "Tiny-Flow", "tiny flow", "tiny-flux")),
        *((name, "tiny") for name in ("Tiny", "tinny", "tiny_")),
    ],
)
def test_nearly_the_name_of_an_embedded_model(name, meant):
    with pytest.raises(UserError, match=f"there is no folder {name}, .* Did you mean {meant}\\?$"):
        source(name)


def test_names_that_only_look_like_those_of_embedded_models(sd_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_flow").symlink_to(sd_folder)
    assert source("tiny_flow").path == "tiny_flow"
    for name in ("owner/tiny", "gpt2"):
        with pytest.raises(UserError, match="the hub cannot be reached"):
            source(name)


def test_an_embedded_model_is_no_autoencoder(sd_folder):
    with pytest.raises(UserError, match="tiny is an embedded model, and a folder or the name of a hub repository"):
        source(sd_folder, pretrained_vae_model_name_or_path="tiny")


def test_pickles_are_refused_unless_allowed(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    with pytest.raises(
        UserError, match=r"unet: the weights are expected as diffusion_pytorch_model\.safetensors.*incomplete"
    ):
        sd.load(source(folder), "denoiser", torch.float32)
    torch.save(tensors, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights \(diffusion_pytorch_model\.bin\).*--allow_pickle"):
        sd.load(source(folder), "denoiser", torch.float32)
    unet = sd.load(source(folder, allow_pickle=True), "denoiser", torch.float32)["unet"]
    assert torch.equal(unet.conv_in.bias, tensors["conv_in.bias"])


def test_pickles_of_the_hub_are_refused_too(folder, tmp_path):
    torch.save(load_file(folder / WEIGHTS), folder / "unet/diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    hub = FakeHub(tmp_path / "hub")
    hub.commit("owner/name", FIRST, folder)
    with pytest.raises(UserError, match=r"owner/name/unet: the weights are expected as .*--allow_pickle"):
        sd.load(source("owner/name", cache_dir=hub.cache), "denoiser", torch.float32)
    allowed = source("owner/name", cache_dir=hub.cache, allow_pickle=True)
    assert sd.load(allowed, "denoiser", torch.float32).keys() == {"unet", "settings"}


def test_incomplete_folder(folder):
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="incomplete: no folder 'vae'"):
        sd.load(source(folder), "vae", torch.float32)


def test_damaged_weights(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"safetensors: it is damaged or not a safetensors file"):
        sd.load(source(folder), "denoiser", torch.float32)


@pytest.mark.parametrize(
    ("role", "file", "gone"),
    [("denoiser", WEIGHTS, "conv_out"), ("text", "text_encoder/model.safetensors", "final_layer_norm")],
)
def test_missing_tensors_are_not_filled_with_random_numbers(folder, role, file, gone):
    tensors = {key: value for key, value in load_file(folder / file).items() if gone not in key}
    save_file(tensors, folder / file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lack 2 tensors, .*{gone}"):
        sd.load(source(folder), role, torch.float32)


def test_weights_of_another_shape(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.bias"] = torch.zeros(3)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot load .*/unet: expected a UNet2DConditionModel"):
        sd.load(source(folder), "denoiser", torch.float32)


def test_missing_variant(folder):
    with pytest.raises(
        UserError,
        match=r"fp16\.safetensors.*\(variant fp16\), but there are diffusion_.*: check",
    ):
        sd.load(source(folder, variant="fp16"), "denoiser", torch.float32)


def test_old_attention_names_of_autoencoders_still_load(folder):
    """Stable Diffusion 1.5's own autoencoder has them."""
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    renamed = {}
    for key, value in tensors.items():
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        renamed[key] = value
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    vae = sd.load(source(folder), "vae", torch.float32)["vae"]
    assert torch.equal(
        vae.encoder.mid_block.attentions[0].to_q.weight, tensors["encoder.mid_block.attentions.0.to_q.weight"]
    )


def test_class_of_an_unknown_library_is_not_imported(folder):
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["this", "UNet"]}), encoding="utf-8")
    with pytest.raises(UserError, match=r"'this\.UNet' is named as the class of 'unet', where diffusers\.UNet2D"):
        sd.load(source(folder), "denoiser", torch.float32)
    assert "this" not in sys.modules
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": [None, None]}), encoding="utf-8")
    with pytest.raises(UserError, match="has no 'unet'"):
        sd.load(source(folder), "denoiser", torch.float32)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot read .*model_index.json"),
        ("{}", "does not name a pipeline"),
        ('{"_class_name": "WanPipeline"}', "is a WanPipeline"),
    ],
)
def test_unusable_index(folder, content, words):
    (folder / "model_index.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words) as error:
        loading.family_of(source(folder))
    if "Wan" in words:
        assert "sd: StableDiffusionPipeline" in str(error.value)
        assert "flux: FluxPipeline" in str(error.value)


def test_a_family_is_chosen_for_pipelines_of_none(folder):
    """SDXL as Stable Diffusion would be loaded whole, and stop in the first step."""
    index = folder / "model_index.json"
    written = json.loads(index.read_text(encoding="utf-8"))
    assert loading.family_of(source(folder), "sd") is sd
    for name, said in (("NewPipeline", None), ("StableDiffusionXLPipeline", "which is of the family sdxl: leave")):
        index.write_text(json.dumps(written | {"_class_name": name}), encoding="utf-8")
        if said is None:
            assert loading.family_of(source(folder), "sd") is sd
        else:
            with pytest.raises(UserError, match=f"--family sd: .* is a {name}, {said}"):
                loading.family_of(source(folder), "sd")


def test_not_a_pipeline_folder(tmp_path):
    with pytest.raises(UserError, match=r"no model_index\.json"):
        source(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        source(tmp_path / "model.safetensors")
    for path in (tmp_path / "missing", "./missing", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            source(path)


def test_hub_id_holds_the_commit(sd_folder, tmp_path, monkeypatch):
    snapshot = shutil.copytree(sd_folder, tmp_path / "models--owner--name" / "snapshots" / "c0ffee")
    monkeypatch.setattr(fetching, "hf_hub_download", lambda _, name, **_options: str(snapshot / name))
    found = source("owner/name", pretrained_vae_model_name_or_path="owner/vae")
    assert found.model_id == "owner/name@c0ffee+vae:owner/vae@c0ffee"


FIRST, SECOND = "1" * 40, "2" * 40
"""Commits."""


@pytest.fixture
def hub(sd_folder, tmp_path) -> FakeHub:
    """A pipeline and an autoencoder with two commits each, whose branches point to the first."""
    hub = FakeHub(tmp_path / "hub")
    second = Path(shutil.copytree(sd_folder, tmp_path / "second"))
    for file in second.rglob("*.safetensors"):
        tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    for file in (second / "vae/config.json", second / "scheduler/scheduler_config.json"):
        content = {"scaling_factor": 2.0, "prediction_type": "v_prediction"}
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | content))
    for commit, content in ((SECOND, second), (FIRST, sd_folder)):
        hub.commit("owner/name", commit, content)
        hub.commit("owner/vae", commit, content / "vae")
    return hub


@pytest.mark.parametrize("vae", [None, "owner/vae"], ids=["own autoencoder", "another autoencoder"])
def test_all_parts_come_from_the_commit_that_caches_name(hub, sd_folder, vae):
    """A branch of the hub may move while a run loads one part after the other, or between two processes."""
    found = source("owner/name", cache_dir=hub.cache, pretrained_vae_model_name_or_path=vae)
    assert found.model_id == f"owner/name@{FIRST}" + (f"+vae:owner/vae@{FIRST}" if vae else "")
    hub.move("owner/name", SECOND)
    hub.move("owner/vae", SECOND)
    for role in ("text", "vae", "denoiser"):
        parts = sd.load(found, role, torch.float32)
        expected = sd.load(source(sd_folder), role, torch.float32)
        for name, part in parts.items():
            if isinstance(part, torch.nn.Module):
                ours, theirs = next(part.parameters()), next(expected[name].parameters())
                assert torch.equal(ours, theirs), f"{name} is of the second commit"
    assert loading.read_config(found, "vae")["scaling_factor"] != 2.0
    assert sd.load(found, "scheduler", None)["scheduler"].config.prediction_type == "epsilon"
    assert loading.read_config(found, "scheduler")["prediction_type"] == "epsilon"
    assert source("owner/name", cache_dir=hub.cache).model_id == f"owner/name@{SECOND}"


def test_a_commit_can_be_asked_for(hub):
    found = source("owner/name", cache_dir=hub.cache, revision=SECOND)
    assert found.model_id == f"owner/name@{SECOND}" and found.revision == SECOND
    with pytest.raises(UserError, match="was not downloaded before"):
        source("owner/name", cache_dir=hub.cache, revision="3" * 40)


def test_the_prediction_type_of_a_run_takes_the_place_of_the_schedulers(sd_folder):
    model = Model(pretrained_model_name_or_path=str(sd_folder))
    found = loading.resolve_source(model, prediction_type="v_prediction")
    assert sd.load(found, "scheduler", None)["scheduler"].config.prediction_type == "v_prediction"
    own = loading.resolve_source(model)
    assert found.model_id == own.model_id == own.predictor_id, "latents and embeddings are the same"
    assert found.predictor_id == f"{own.model_id} with v_prediction"


def test_v_prediction_model(tmp_path):
    folder = tinymodels.save_sd(tmp_path / "v", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    scheduler = sd.load(source(folder), "scheduler", None)["scheduler"]
    objective = sd.objective(scheduler, Train(snr_gamma=5.0))
    assert objective.prediction_type == "v_prediction"
    assert objective.snr_gamma == 5.0
    assert objective.alphas_cumprod[-1] == 0
    torch.testing.assert_close(objective.alphas_cumprod, scheduler.alphas_cumprod)
    assert sd.objective(scheduler, Train(prediction_type="epsilon")).prediction_type == "epsilon"


def test_flux_objective_takes_the_schedulers_sigmas_and_refuses_diffusions_options(flux_folder):
    scheduler = flux.load(source(flux_folder), "scheduler", None)["scheduler"]
    objective = flux.objective(scheduler, Train(weighting_scheme="logit_normal", logit_mean=0.3, logit_std=0.6))
    assert torch.equal(objective.sigmas, torch.arange(1000, 0, -1) / 1000)
    assert objective.density == LogitNormal(0.3, 0.6)
    with pytest.raises(UserError, match="--snr_gamma is for diffusion models"):
        flux.objective(scheduler, Train(snr_gamma=5.0))


def test_prompt_length_limits(sd_folder, flux_folder):
    text = sd.load(source(sd_folder), "text", torch.float32)
    with pytest.raises(UserError, match=r"prompts of at most 16 tokens, .*\(got 17\)"):
        sd.tokenize(text, ["cat"], 17)
    assert sd.tokenize(text, ["cat"], 7)["input_ids"].shape == (1, 7)
    text = flux.load(source(flux_folder), "text", torch.float32)
    with pytest.raises(UserError, match="--max_sequence_length must be at most 512"):
        flux.tokenize(text, ["cat"], 513)
    assert flux.tokenize(text, ["cat"], 40)["input_ids_2"].shape == (1, 40)


def test_flux_with_and_without_guidance_embedding(flux_folder, tmp_path):
    noisy, times = torch.randn(1, 4, 4, 6), torch.tensor([0.4])
    conditioning = {"prompt_embeds": torch.randn(1, 5, 24), "pooled_prompt_embeds": torch.randn(1, 16)}
    plain = tinymodels.save_flux(tmp_path / "schnell", guidance_embeds=False)
    differs = []
    for folder in (flux_folder, plain):
        transformer = flux.load(source(folder), "denoiser", torch.float32)["transformer"]
        low, high = (flux.predict(transformer, noisy, times, conditioning, g) for g in (1.0, 5.0))
        differs.append(not torch.equal(low, high))
        assert low.shape == noisy.shape
    assert differs == [True, False]
    with pytest.raises(UserError, match="multiples of 16 pixels"):
        flux.predict(transformer, torch.randn(1, 4, 3, 4), times, conditioning, 1.0)


def test_autoencoder_without_posterior():
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    pixels = torch.rand(1, 3, 8, 8)
    latents = _parts.vae_latents({"vae": vae}, pixels)
    torch.testing.assert_close(latents.mean, vae.encode(pixels).latents)
    assert not latents.std.any()
