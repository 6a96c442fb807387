"""Text encoders come onto a device one at a time, whatever family calls them; numbers are those without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamlora.config import Model
from dreamlora.data.shown_prompts import tokenized
from dreamlora.interfaces import Components, Family
from dreamlora.models.loading import family_of, resolve_source
from dreamlora.models.parts import Parts
from dreamlora.models.turns import HOST, TOGETHER, Turns
from tests import fakemps, tinymodels
from tests.fakemps import Bus


@torch.no_grad()
def encoded(family: Family, text: Components, prompt: str) -> dict[str, Tensor]:
    return family.encode_tokens(text, tokenized(family, text, [prompt], None))


def parts_on(device: torch.device, folder: Path, **options: Any) -> Parts:
    source = resolve_source(Model(pretrained_model_name_or_path=str(folder), **options))
    return Parts(family_of(source), source, device, torch.float32)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """On the device, both of them."""
    return found.keys() == expected.keys() and all(
        value.device == fakemps.MPS and torch.equal(value.inner, expected[name].inner) for name, value in found.items()
    )


@pytest.mark.parametrize("name", tinymodels.SAVERS)
def test_the_encoders_of_every_family_take_turns(name: str, tiny_folder: Any, bus: Bus) -> None:
    parts = parts_on(fakemps.MPS, tiny_folder(name))
    family = parts.family
    if family.text_pictures(parts.source):
        pytest.skip("its one encoder sees pictures too")
    prompts = ["a cat", "two red dogs", "", "a cat in a hat"]
    at_once = family.load(parts.source, "text", torch.float32)
    for part in at_once.values():
        if isinstance(part, nn.Module):
            fakemps.moved(part)
    expected = [encoded(family, at_once, prompt) for prompt in prompts]
    assert same(encoded(family, parts.get("text"), prompts[0]), expected[0])
    alone = bus.arrivals
    found = parts.in_turns(lambda prompt: encoded(family, parts.get("text"), prompt), prompts)
    assert all(same(*each) for each in zip(found, expected, strict=True))
    assert bus.most == 1
    encoders = [part for part in parts.text.values() if isinstance(part, nn.Module)]
    assert alone == len(encoders) and bus.arrivals - alone == (0 if alone == 1 else alone)
    parts.rest("text")
    assert not bus.here


class Numbered(nn.Module):
    """``x + w``, and how often it was asked."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w]))
        self.asked = 0

    def forward(self, x: Tensor) -> tuple[Tensor]:
        self.asked += 1
        return (x + self.w,)


def test_many_go_through_in_groups_and_each_is_asked_once(bus: Bus) -> None:
    one, other = Numbered(1.0), Numbered(10.0)
    taking_turns = Turns([one, other], fakemps.MPS)

    @torch.no_grad()
    def compute(number: int) -> float:
        x = torch.tensor([float(number)])
        for module in (other, one, other):
            x = module(x)[0]
        return x.item()

    count = 2 * TOGETHER + 3
    assert taking_turns.each(compute, range(count)) == [number + 21 for number in range(count)]
    assert (one.asked, other.asked) == (count, 2 * count)
    assert bus.arrivals == 1 + 2 * 3 and bus.most == 1  # the one that a group ends with begins the next
    assert taking_turns.each(compute, []) == []
    assert compute(0) == 21 and bus.arrivals == 7 + 2


def test_an_error_ends_the_turns_and_nothing_else(bus: Bus) -> None:
    one, other = Numbered(1.0), Numbered(10.0)
    taking_turns = Turns([one, other], fakemps.MPS)

    @torch.no_grad()
    def compute(number: int) -> float:
        x = one(torch.tensor([float(number)]))[0]
        if number == 2:
            raise ValueError("no such number")
        return other(x)[0].item()

    with pytest.raises(ValueError, match="no such"):
        taking_turns.each(compute, range(4))
    assert compute(0) == 11 and taking_turns.each(compute, [1]) == [12]


@pytest.mark.parametrize("name", ["sdxl", "sd"])
def test_on_the_cpu_they_are_called_where_they_are(name: str, tiny_folder: Any, bus: Bus) -> None:
    parts = parts_on(fakemps.MPS, tiny_folder(name), text_encoder_device="cpu")
    found = parts.in_turns(lambda prompt: encoded(parts.family, parts.get("text"), prompt), ["a cat"])
    assert not bus.here and all(value.device == HOST for value in found[0].values())
    parts.get("denoiser")
    with parts.text_alone():
        assert len(bus.here) == 1  # the denoiser need not go


def test_the_denoiser_makes_room_and_comes_back(tiny_folder: Any, bus: Bus) -> None:
    parts = parts_on(fakemps.MPS, tiny_folder("sdxl"))
    denoiser = parts.get("denoiser")["unet"]
    parts.get("vae")
    with parts.text_alone():
        encoded(parts.family, parts.get("text"), "a cat")
        assert bus.here == [parts.text["text_encoder_2"]]
    assert not bus.here
    assert parts.get("denoiser")["unet"] is denoiser and bus.here == [denoiser]


def test_encoders_that_train_stay_and_the_others_can_be_forgotten(tiny_folder: Any, bus: Bus) -> None:
    source = resolve_source(Model(pretrained_model_name_or_path=str(tiny_folder("flux"))))
    family = family_of(source)
    parts = Parts(family, source, fakemps.MPS, torch.float32, family.TEXT_ENCODERS)
    text = parts.get("text")
    assert len(bus.here) == 2  # CLIP, which trains, and T5
    parts.forget_frozen_text()
    assert "text_encoder_2" not in text and "text_encoder" in text
