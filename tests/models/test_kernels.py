"""Attention by name, and channels innermost: what is set; and one message for what cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.models import kernels, loading
from dreamlora.models.parts import Parts

CPU = torch.device("cpu")


def loaded(folder: Path, **options: Any) -> SimpleNamespace:
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(folder), **options))
    family = loading.family_of(source)
    denoiser = Parts(family, source, CPU, torch.float32).get("denoiser")[family.DENOISER]
    return SimpleNamespace(family=family, source=source, denoiser=denoiser)


def refusal(model: SimpleNamespace, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(UserError) as error:
        kernels.require(model.family, model.denoiser, model.source, CPU, dtype)
    return str(error.value)


def backends(denoiser: Any) -> set[AttentionBackendName | None]:
    processors = (getattr(module, "processor", None) for module in denoiser.modules())
    return {processor._attention_backend for processor in processors if hasattr(processor, "_attention_backend")}


def test_attention_is_that_of_the_name_and_other_models_keep_theirs(flux_folder: Path) -> None:
    before = _AttentionBackendRegistry.get_active_backend()
    model = loaded(flux_folder, attention_backend="_native_math")
    assert backends(model.denoiser) == {AttentionBackendName._NATIVE_MATH}
    assert _AttentionBackendRegistry.get_active_backend() == before
    kernels.require(model.family, model.denoiser, model.source, CPU, torch.float32)
    assert backends(loaded(flux_folder).denoiser) == {None}


@pytest.mark.parametrize("name", ["flash", "xformers", "sage", "_native_xla", "_native_cudnn", "flex", "nonsense"])
def test_what_cannot_be_had_here_is_refused_with_what_can(flux_folder: Path, name: str) -> None:
    model = loaded(flux_folder)
    model.source = loading.resolve_source(Model(pretrained_model_name_or_path=str(flux_folder), attention_backend=name))
    message = refusal(model)
    assert message.startswith(f"--attention_backend {name}: ")
    assert message.endswith("In float32 on cpu this model can have native, _native_flash, _native_math")


def test_attention_without_a_gradient_is_refused(flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(flux_folder, attention_backend="native")
    monkeypatch.setattr(kernels, "dispatch_attention_fn", lambda query, *_, **__: query.detach())
    assert "native: it has no gradient, and cannot be trained through" in refusal(model)


def test_models_whose_prompts_have_masks_need_attention_that_takes_them(tiny_folder: Any) -> None:
    model = loaded(tiny_folder("qwen_image"), attention_backend="_native_flash")
    assert "`attn_mask` is not supported" in refusal(model)


@pytest.mark.parametrize(("name", "way"), [("sd", "--enable_xformers"), ("sd3", "leave it out")])
def test_models_without_a_choice_say_so(tiny_folder: Any, name: str, way: str) -> None:
    message = refusal(loaded(tiny_folder(name), attention_backend="native"))
    assert "always has torch's own choice of attention" in message and way in message


def test_convolutions_have_their_channels_innermost(sd_folder: Path) -> None:
    model = loaded(sd_folder, channels_last=True)
    weight = model.denoiser.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    kernels.require(model.family, model.denoiser, model.source, CPU, torch.float32)


def test_models_without_convolutions_refuse_channels_last(flux_folder: Path) -> None:
    assert "FluxTransformer2DModel has none in its blocks" in refusal(loaded(flux_folder, channels_last=True))


def test_cudnn_attention_is_only_for_those_who_name_it(flux_folder: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    loaded(flux_folder)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_the_signature_of_an_attention_processor_is_found_once(sd_folder: Path) -> None:
    processors = set(map(type, loaded(sd_folder).denoiser.attn_processors.values()))
    for processor in processors:
        assert list(vars(processor)["__call__"].__signature__.parameters)[:2] == ["self", "attn"]
