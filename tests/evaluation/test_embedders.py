"""Which model serves which metric."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dreamlora.config import Encoders
from dreamlora.data.cache import TensorCache
from dreamlora.errors import UserError
from dreamlora.evaluation.embedders import Embedders, EncoderPlace
from dreamlora.evaluation.encoders import TransformersEncoder, load_encoder


@pytest.fixture
def place(tmp_path: Path) -> EncoderPlace:
    return EncoderPlace(torch.device("cpu"), TensorCache(tmp_path))


def test_the_embedded_clip_serves_the_embedded_model_for_everything(place: EncoderPlace) -> None:
    embedders = Embedders(Encoders(), True, place)
    clip = embedders("clip")
    assert clip.encoder.id.startswith("tiny@")
    assert embedders("dino") is clip and embedders("features") is clip
    embedders.free()
    assert embedders("clip") is not clip


def test_models_leave_the_device_until_they_are_asked_for_again(
    place: EncoderPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[torch.device] = []
    embedders = Embedders(Encoders(), True, dataclasses.replace(place, device=torch.device("cuda", 7)))
    monkeypatch.setattr(embedders, "_load", lambda name: load_encoder(name, torch.device("cpu")))
    monkeypatch.setattr(TransformersEncoder, "to", lambda self, device: places.append(device))
    embedders("clip")
    embedders.put_away()
    embedders("dino")
    assert places == [torch.device("cuda", 7), torch.device("cpu"), torch.device("cuda", 7)]


def test_options_win_and_errors_name_their_flag(place: EncoderPlace, encoder_folders: dict[str, Path]) -> None:
    embedders = Embedders(Encoders(dino_model=str(encoder_folders["dinov2"])), True, place)
    assert embedders("dino").encoder.id.startswith("dinov2@")
    assert embedders("features") is embedders("dino") and embedders("clip").encoder.id.startswith("tiny@")
    others = Embedders(Encoders(inception_weights=Path("no/such.pth")), False, place)
    with pytest.raises(UserError, match=r"--clip_model: .*openai/clip-vit-base-patch32"):
        others("clip")
    with pytest.raises(UserError, match=r"--dino_model: .*facebook/dino-vits16"):
        others("dino")
    with pytest.raises(UserError, match=r"no file no/such.pth: --inception_weights takes weights-inception-2015"):
        others("features")


def test_a_model_without_texts_is_no_clip(place: EncoderPlace, encoder_folders: dict[str, Path]) -> None:
    embedders = Embedders(Encoders(clip_model=str(encoder_folders["dinov2"])), True, place)
    with pytest.raises(UserError, match=r"knows no texts: a CLIP or SigLIP model is needed \(--clip_model\)"):
        embedders("clip")
