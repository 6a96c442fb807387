"""``dreamlora inspect``: what it says of files of every format, of foreign and of broken ones, without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from dreamlora import registry
from dreamlora.__main__ import main
from dreamlora.commands.inspect.findings import findings
from dreamlora.commands.inspect.words import lines_of
from dreamlora.errors import UserError
from dreamlora.lora.formats import FileContent
from dreamlora.lora.metadata import serialised
from dreamlora.lora.recognise import format_of, model_of
from dreamlora.lora.weights import AdapterWeights, LayerWeights, lora_weights
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless

UNET = "down_blocks.1.attentions.0.transformer_blocks.0."
TEXT = "encoder.layers.0.self_attn.q_proj"
FORMATS = [name for name in registry.names("lora.formats") if name != "peft"]


def weights() -> AdapterWeights:
    """Of SDXL's sizes, ranks 2 and 3, alphas 1 and 2."""
    draw = torch.Generator().manual_seed(0)

    def pair(rows: int, rank: int, columns: int, alpha: float) -> LayerWeights:
        return lora_weights(torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw), alpha)

    return {
        "unet": {
            f"{UNET}attn1.to_q": pair(640, 2, 640, 2.0),
            f"{UNET}attn2.to_k": pair(640, 3, 2048, 2.0),
            "mid_block.attentions.0.transformer_blocks.9.ff.net.2": pair(1280, 2, 5120, 1.0),
        },
        "text_encoder": {TEXT: pair(768, 2, 768, 2.0)},
        "text_encoder_2": {TEXT: pair(1280, 2, 1280, 2.0)},
    }


def written(form: str, metadata: dict[str, str] | None = None) -> bytes:
    content: FileContent = registry.load("lora.formats", form).write(weights(), model_of("sdxl"))
    return serialised(content.tensors, {**(metadata or {}), **content.metadata})


def saved(folder: Path, content: bytes, name: str = "a.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def text_of(path: Path) -> str:
    return "\n".join(lines_of(findings(path)))


@pytest.mark.parametrize("form", FORMATS)
def test_files_of_every_format(form, tmp_path):
    found = findings(saved(tmp_path, written(form)))
    assert (found["what"], found["format"]) == ("adapter", form)
    assert found["family"] == {
        "name": "sdxl",
        "models": ["Stable Diffusion XL"],
        "known": 1.0,
        "certainty": "certain",
        "or": [],
    }
    unet, first, second = found["parts"]
    assert [part["part"] for part in found["parts"]] == ["unet", "text_encoder", "text_encoder_2"]
    assert (unet["layers"], unet["adapted"], unet["of"]) == (3, 3, 794)
    assert (first["of"], second["of"]) == (72, 193)
    assert unet["ranks"] == {"2": 2, "3": 1}
    assert unet["kinds"] == {"lora": 3}
    assert found["problems"] == []
    expected = torch.cat([adapter.delta().double().flatten() for adapter in weights()["unet"].values()]).norm()
    assert unet["norm"] == pytest.approx(float(expected), rel=1e-5)
    assert unet["measured"] == 3
    assert 1 <= unet["stable_rank"][0] <= unet["stable_rank"][2] <= 3


def test_alphas_are_told_where_the_format_has_them(tmp_path):
    found = findings(saved(tmp_path, written("diffusers")))
    assert found["parts"][0]["alphas"] == {"2": 2, "1": 1}
    kohya = findings(saved(tmp_path, written("kohya")))
    assert kohya["parts"][0]["alphas"] == {"2": 3}
    assert findings(saved(tmp_path, written("comfyui")))["parts"][0]["alphas"] == {"2": 2, "3": 1}


@pytest.mark.parametrize("form", registry.names("lora.formats"))
def test_formats_are_told_by_the_names_that_they_write(form):
    content = registry.load("lora.formats", form).write(weights(), model_of("sdxl"))
    assert format_of(content.tensors) == form


def test_the_text_is_whole_and_for_a_person(tmp_path, capsys):
    header = {"modelspec.title": "my\ndog", "ss_network_dim": "2", "ss_network_alpha": "2.0"}
    header["dreamlora.version"] = "0.1.0"
    header["ss_tag_frequency"] = json.dumps({"1_dog": {"sks dog": 12, "grass ": 3}, "2_dog": {"sks dog": 5}})
    file = saved(tmp_path, written("kohya", header))
    assert main(["inspect", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{file}: LoRA for Stable Diffusion XL\n")
    assert re.search(r"\n  format +kohya\n", printed)
    assert re.search(r"\n  unet +3 +3 of 794 +2 \(2\), 3 \(1\) +2 +F32 ", printed)
    assert re.search(r"\n  title +my\\ndog\n", printed)
    assert re.search(r"\n  written by +dreamlora 0\.1\.0\n", printed)
    assert re.search(r"\n  most frequent tags +sks dog \(17\), grass \(3\)\n", printed)
    assert "warning" not in printed


def test_json_has_the_documented_fields(tmp_path, capsys):
    file = saved(tmp_path, written("diffusers"))
    assert main(["inspect", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {
        *("schema", "file", "bytes", "what", "format", "family", "parts", "problems", "tensors", "numbers", "types"),
        *("other_tensors", "about", "metadata", "hashes", "run"),
    }
    assert found["schema"] == 1
    assert found["parts"][0].keys() == {
        *("part", "layers", "adapted", "of", "kinds", "ranks", "alphas", "types", "numbers"),
        *("norm", "largest", "stable_rank", "measured", "not_finite", "zero"),
    }
    documented = (Path(__file__).parents[3] / "docs" / "inspect.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in (*found, *found["parts"][0], *found["hashes"]))


def test_no_torch_is_loaded(tmp_path):
    file = saved(tmp_path, written("kohya"))
    code = (
        "import sys\nfrom dreamlora.__main__ import main\n"
        "assert main(['inspect', sys.argv[1]]) == 0\n"
        "print(*(name for name in ('torch', 'diffusers', 'transformers', 'peft') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_the_header_s_hash_is_compared(tmp_path):
    header = {"modelspec.implementation": "diffusers"}
    content = written("diffusers", header)
    found = findings(saved(tmp_path, content))["hashes"]
    assert found["header_agrees"] is True
    assert found["AutoV2"] == found["sha256"][:10]
    assert found["AutoV3"] == found["tensors_sha256"][:12]
    assert findings(saved(tmp_path, written("diffusers")))["hashes"]["header_agrees"] is None
    changed_after = content[:-1] + bytes([content[-1] ^ 1])
    file = saved(tmp_path, changed_after)
    assert findings(file)["hashes"]["header_agrees"] is False
    assert "tensors were changed since, or hashed in another order" in text_of(file)


KINDS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "DoRA": ({"lora_down.weight": (2, 640), "lora_up.weight": (640, 2), "dora_scale": (640, 1)}, "dora"),
    "LoCon": (
        {"lora_down.weight": (2, 640, 1, 1), "lora_up.weight": (640, 2, 1, 1), "lora_mid.weight": (2, 2, 3, 3)},
        "lora of a Tucker decomposition",
    ),
    "LoHa": (
        {"hada_w1_a": (640, 2), "hada_w1_b": (2, 640), "hada_w2_a": (640, 2), "hada_w2_b": (2, 640)},
        "loha",
    ),
    "LoKr": ({"lokr_w1": (8, 8), "lokr_w2_a": (80, 2), "lokr_w2_b": (2, 80)}, "lokr"),
    "LoKr of whole matrices": ({"lokr_w1": (8, 8), "lokr_w2": (80, 80)}, "lokr"),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_adapters(name, tmp_path):
    parts, kind = KINDS[name]
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{layer}.{part}": torch.randn(shape) for part, shape in parts.items()}
    save_file({**tensors, f"{layer}.alpha": torch.tensor(1.0)}, tmp_path / "a.safetensors")
    found = findings(tmp_path / "a.safetensors")
    (part,) = found["parts"]
    assert part["kinds"] == {kind: 1}
    assert part["ranks"] == ({"whole": 1} if name == "LoKr of whole matrices" else {"2": 1})
    assert part["alphas"] == ({} if name == "LoKr of whole matrices" else {"1": 1})
    assert part["norm"] > 0
    assert part["adapted"] == 1
    assert found["problems"] == []


XLABS = "double_blocks.3.processor.qkv_lora1."
FOREIGN = {
    "xlabs": {f"{XLABS}down.weight": (4, 3072), f"{XLABS}up.weight": (9216, 4)},
    "original": {
        "double_blocks.3.img_attn.qkv.lora_A.weight": (4, 3072),
        "double_blocks.3.img_attn.qkv.lora_B.weight": (9216, 4),
    },
    "diffusers (old)": {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": (4, 1280),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight": (1280, 4),
    },
    "peft": {
        "base_model.model.double_blocks.3.img_attn.qkv.lora_A.weight": (4, 3072),
        "base_model.model.double_blocks.3.img_attn.qkv.lora_B.weight": (9216, 4),
    },
}


@pytest.mark.parametrize("form", FOREIGN)
def test_files_of_other_programs(form, tmp_path):
    save_file({name: torch.randn(shape) for name, shape in FOREIGN[form].items()}, tmp_path / "a.safetensors")
    found = findings(tmp_path / "a.safetensors")
    assert (found["what"], found["format"]) == ("adapter", form)
    assert found["parts"][0]["ranks"] == {"4": 1}
    assert found["parts"][0]["norm"] > 0
    families = [found["family"]["name"], *(other["name"] for other in found["family"]["or"])]
    assert ("sd" if form == "diffusers (old)" else "flux") in families


def test_both_streams_of_xlabs_are_layers_of_their_own(tmp_path):
    names = {
        "double_blocks.3.processor.qkv_lora1": (3072, 9216),
        "double_blocks.3.processor.qkv_lora2": (3072, 9216),
        "double_blocks.3.processor.proj_lora2": (3072, 3072),
        "single_blocks.37.processor.proj_lora": (15360, 3072),
    }
    tensors = {f"{name}.down.weight": torch.randn(4, columns) for name, (columns, _) in names.items()}
    tensors |= {f"{name}.up.weight": torch.randn(rows, 4) for name, (_, rows) in names.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    found = findings(tmp_path / "a.safetensors")
    assert found["other_tensors"] == []
    assert found["parts"][0]["layers"] == 4
    assert found["parts"][0]["adapted"] == 3 + 3 + 1 + 1
    assert found["family"]["models"] == ["FLUX.1"]


def test_what_is_wrong_with_a_file_is_told(tmp_path):
    content = registry.load("lora.formats", "kohya").write(weights(), model_of("sdxl"))
    names = list(dict.fromkeys(name.partition(".")[0] for name in content.tensors))
    content.tensors[f"{names[0]}.lora_up.weight"][3] = torch.nan
    content.tensors[f"{names[1]}.lora_up.weight"][:] = 0
    content.tensors[f"{names[2]}.alpha"] = torch.tensor(-1.0)
    content.tensors["bundle_emb.sks.string_to_param.*"] = torch.ones(2, 768)
    found = findings(saved(tmp_path, save(content.tensors)))
    assert found["parts"][0]["not_finite"] == [names[0]]
    assert found["parts"][0]["zero"] == [names[1]]
    assert found["other_tensors"] == ["bundle_emb.sks.string_to_param.*"]
    text = "\n".join(found["problems"])
    assert f"{names[0]}: numbers are not finite" in text
    assert f"{names[1]}: zeros" in text
    assert f"{names[2]}.alpha is no number above 0" in text
    assert "bundle_emb.sks.string_to_param.*: tensors that are no part" in text
    assert all(f"warning: {problem}" in text_of(tmp_path / "a.safetensors") for problem in found["problems"])


def test_a_header_of_another_model_is_told(tmp_path):
    lies = findings(saved(tmp_path, written("kohya", {"ss_base_model_version": "sd_v1"})))
    assert lies["problems"] == ["its header says that it is for the family sd, and its layers are those of sdxl"]
    honest = findings(saved(tmp_path, written("kohya", {"ss_base_model_version": "sdxl_base_v1-0"})))
    assert honest["problems"] == []


def test_metadata_that_does_not_go_with_the_tensors_is_told(tmp_path):
    content = registry.load("lora.formats", "diffusers").write(weights(), model_of("sdxl"))
    lies = {"lora_adapter_metadata": json.dumps({"unet.r": 9, "unet.lora_alpha": 9})}
    found = findings(saved(tmp_path, save(content.tensors, lies)))
    assert any("rank 9" in problem for problem in found["problems"])
    broken = findings(saved(tmp_path, save(content.tensors, {"lora_adapter_metadata": "{"})))
    assert any("lora_adapter_metadata" in problem for problem in broken["problems"])
    assert broken["parts"][0]["ranks"] == {"2": 2, "3": 1}


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({"emb_params": (4, 768)}, "embedding"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "embedding"),
        ({"<sks>": (1024,)}, "embedding"),
        ({"a": (2, 3)}, "other"),
        ({}, "other"),
        ({"encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_in.weight": (8, 4, 3, 3)}, "other"),
    ],
)
def test_what_is_no_lora(shapes, what, tmp_path):
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "a.safetensors")
    found = findings(tmp_path / "a.safetensors")
    assert found["what"] == what
    first = text_of(tmp_path / "a.safetensors").splitlines()[0]
    assert first.partition(": ")[2].startswith("an embedding" if what == "embedding" else "nothing that is known")


def test_an_embedding_says_which_models_it_is_for(tmp_path):
    save_file({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, tmp_path / "a.safetensors")
    assert "Stable Diffusion XL" in findings(tmp_path / "a.safetensors")["models"]
    assert "Stable Diffusion XL" in text_of(tmp_path / "a.safetensors").splitlines()[0]


def test_weights_of_a_model(tmp_path):
    layers = {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
        "conditioner.embedders.0.transformer.x.weight": (4, 4),
    }
    save_file({name: torch.ones(shape) for name, shape in layers.items()}, tmp_path / "a.safetensors")
    found = findings(tmp_path / "a.safetensors")
    assert found["what"] == "model"
    assert found["contents"] == ["denoiser", "text encoders", "autoencoder"]
    assert found["family"]["models"] == ["Stable Diffusion XL"]
    assert "weights of a model (denoiser, text encoders, autoencoder), Stable Diffusion XL" in text_of(
        tmp_path / "a.safetensors"
    )


def test_a_folder_of_peft_has_its_alphas_in_its_settings(tmp_path):
    layer = f"base_model.model.{UNET}attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.randn(4, 640), f"{layer}.lora_B.weight": torch.randn(640, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (part,) = findings(tmp_path)["parts"]
    assert part["alphas"] == {"16": 1}
    delta = 4 * tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
    assert part["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)


def test_a_run_tells_of_its_checkpoints(tmp_path):
    content = written("diffusers")
    name = "pytorch_lora_weights.safetensors"
    saved(tmp_path, b"optimizer: adamw\n", "config.yaml")
    with pytest.raises(UserError, match="without a LoRA yet"):
        findings(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    saved(tmp_path / "checkpoints" / "step-000020", content, name)
    found = findings(tmp_path)
    assert found["file"] == str(tmp_path / "checkpoints" / "step-000020" / name)
    assert found["run"]["result"] is False
    saved(tmp_path / "best", content, name)
    saved(tmp_path / "embeddings", content, "sks.safetensors")
    saved(tmp_path / "raw", content, name)
    assert findings(tmp_path)["file"] == str(tmp_path / "best" / name)
    saved(tmp_path, content, name)
    found = findings(tmp_path)
    assert found["file"] == str(tmp_path / name)
    assert found["run"]["best"]["file"] == str(tmp_path / "best" / name)
    assert found["run"]["checkpoints"] == [20]
    text = text_of(tmp_path)
    assert re.search(r"\n  checkpoints +20\n?", text)
    assert re.search(r"\n  embeddings of +sks\n", text)
    assert str(tmp_path / "raw" / name) in text
    assert str(tmp_path / "best" / name) in text


def test_a_run_s_link_that_leads_out_is_not_followed(tmp_path, capsys):
    outside = saved(tmp_path / "outside", written("diffusers"))
    run = tmp_path / "run"
    saved(run, b"optimizer: adamw\n", "config.yaml")
    (run / "pytorch_lora_weights.safetensors").symlink_to(outside)
    assert main(["inspect", str(run)]) == 2
    assert "leads out of" in capsys.readouterr().err


def _wrong(folder: Path, name: str) -> Path:
    sound = written("kohya")
    content: dict[str, Any] = {
        "empty.safetensors": b"",
        "cut.safetensors": sound[: len(sound) // 2],
        "text.safetensors": b"version https://git-lfs.github.com/spec/v1\n",
        "long.safetensors": (2**60).to_bytes(8, "little") + sound[8:],
        "a.pt": b"PK",
        "a.ckpt": sound,
    }
    return saved(folder, content[name], name) if name in content else folder / name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty.safetensors", "damaged or not a safetensors file"),
        ("cut.safetensors", "damaged or not a safetensors file"),
        ("text.safetensors", "git lfs pull"),
        ("long.safetensors", "damaged or not a safetensors file"),
        ("a.pt", "pickles can run any code"),
        ("a.ckpt", "pickles can run any code"),
        ("missing.safetensors", "no such file or folder"),
    ],
)
def test_broken_files_get_one_error(name, words, tmp_path, capsys):
    assert main(["inspect", str(_wrong(tmp_path, name))]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_folders_without_the_one_file_say_which_there_are(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "Its .safetensors are none" in capsys.readouterr().err
    for name in ("a", "b"):
        saved(tmp_path, written("kohya"), f"{name}.safetensors")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "a.safetensors, b.safetensors: name one" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    assert main(["inspect", str(tmp_path)]) == 2
    assert "dreamlora doctor" in capsys.readouterr().err


def test_tags_of_a_stranger_are_text(tmp_path):
    for value in ("[1]", "{", '{"a": {"b": "c", "\\u001b[2J": 3, "d": true}}', "[" * 9000):
        header = {"ss_tag_frequency": value, "modelspec.title": "\x1b[2J" + "x" * 9000}
        text = text_of(saved(tmp_path, written("kohya", header)))
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) < 400


def _sound() -> list[bytes]:
    layer = "lora_unet_a_attn1_to_q"
    tensors: dict[str, Tensor] = {
        f"{layer}.{part}": torch.ones(shape)
        for parts, _ in KINDS.values()
        for part, shape in (
            (part, tuple(min(side, 4) for side in shape)) for part, shape in parts.items() if "lora" in part
        )
    }
    lokr = {f"{layer}.{part}": torch.ones(2, 2) for part in ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")}
    loha = {f"{layer}.{part}": torch.ones(2, 2) for part in KINDS["LoHa"][0]}
    header = {"ss_tag_frequency": '{"a": {"b": 1}}', "lora_adapter_metadata": '{"unet.r": 4}'}
    return [save(tensors, header), save(lokr), save(loha), save({"emb_params": torch.ones(1, 768)})]


SOUND = _sound()


def headers_changed(content: bytes) -> st.SearchStrategy[bytes]:
    end = 8 + int.from_bytes(content[:8], "little")

    def put(header: object) -> bytes:
        text = as_json(header)
        return len(text).to_bytes(8, "little") + text + content[end:]

    return changed(json.loads(content[8:end])).map(put)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    return file


@fuzzed
@given(st.sampled_from(SOUND).flatmap(lambda sound: st.one_of(damaged(sound), headers_changed(sound))))
def test_fuzz_inspected_file(target: Path, content: bytes) -> None:
    target.write_bytes(content)
    found = harmless(lambda: findings(target))
    if isinstance(found, dict):
        json.dumps(found, ensure_ascii=False).encode()
        assert all("\x1b" not in line for line in lines_of(found))
