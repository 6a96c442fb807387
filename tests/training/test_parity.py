"""The check at the end of a run: good files pass it in every precision, and what is wrong with others is seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamlora.lora.pairs import is_adapted
from dreamlora.models.parts import ROLES, Parts
from dreamlora.precision import quantize
from dreamlora.report import words
from dreamlora.report.facts import RunFacts
from dreamlora.runfolder import RunFolder
from dreamlora.training import parity
from dreamlora.training.loop import Run
from dreamlora.training.parity import Call, compare_calls, compare_images
from tests.fakemps import MPS, Bus
from tests.tinymodels.deep import deepened

Tensors = dict[str, Tensor]
Train = Callable[..., RunFolder]

TEXT = "text_encoder"


def scaled(factor: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value * (factor if "lora_B" in name else 1) for name, value in tensors.items()}


def without(word: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if word not in name}


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], float]] = {
    "twice the alpha": (scaled(2), 0.7),
    "half the alpha": (scaled(0.5), 0.35),
    "nothing at all": (scaled(0), 0.85),
    "no text encoder": (without(TEXT), 0.07),
    "no values": (without("to_v"), 0.05),
}
"""What can be wrong with a file, and the error of the call that it makes at least."""


def edit(file: Path, change: Callable[[Tensors], Tensors]) -> None:
    with safe_open(file, framework="pt") as opened:
        settings = opened.metadata()
    save_file(change(load_file(file)), file, metadata=settings)


def verdict_on(folder: RunFolder, found: dict[str, Any]) -> tuple[str, str]:
    summary = json.loads(folder.summary_file.read_text(encoding="utf-8"))
    folder.summary_file.write_text(json.dumps({**summary, "parity": found}), encoding="utf-8")
    return words.parity(RunFacts(folder))


@pytest.mark.parametrize(
    ("kind", "precision"), [("lean", "no"), ("lean", "fp16"), ("lean", "bf16"), ("full", "no"), ("full", "bf16")]
)
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_good_file_passes_and_a_wrong_one_is_seen(
    family: str,
    kind: str,
    precision: str,
    train: Train,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The figures that report/words.py cites come from here."""
    check, found = parity.check, {}

    def check_others_too(parts: Parts, expected: parity.ExpectedOutput, *, full: bool) -> dict[str, Any]:
        assert full == (kind == "full")
        good, wrong = RunFolder(expected.lora_folder), RunFolder(expected.lora_folder / "wrong")
        wrong.path.mkdir()
        for name, (change, _) in FAULTS.items():
            wrong.lora_file.write_bytes(good.lora_file.read_bytes())
            edit(wrong.lora_file, change)
            found[name] = check(parts, replace(expected, lora_folder=wrong.path), full=full)
            parts.free(*(ROLES if full else ("text", "vae", "scheduler")))
        return check(parts, expected, full=full)

    monkeypatch.setattr(parity, "check", check_others_too)
    model = request.getfixturevalue(f"{family}_folder")
    run = train(
        *f"--pretrained_model_name_or_path {model} --mixed_precision {precision} --train_text_encoder --lora_alpha 4 "
        f"--max_train_steps 3 --eval_steps 0 --sample_steps 3 --checkpointing_steps 0 --parity {kind}".split()
    )
    good = json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]
    call = good["call"]
    assert good["kind"] == kind and verdict_on(run, good)[0] == "good"
    assert call["error"] <= call["rounding"] and call["scale"] == pytest.approx(1, abs=0.02)
    assert (call["rounding"] * call["effect"] > 1e-4) == (precision != "no")
    for name, (_, least) in FAULTS.items():
        assert found[name]["call"]["error"] > least, name
        verdict, text = verdict_on(run, found[name])
        assert verdict == "bad" and "does not do what it did in training" in text, name
    assert any(found[name]["psnr_db"] > 40 for name in FAULTS) or family == "sd"  # the image alone would say: good


ALIKE = {
    "two text encoders": ("sdxl", "--train_text_encoder"),
    "new tokens": ("sd", "--new_tokens sks:2 --no_train_text_encoder"),
    "DoRA": ("sd", "--adapter dora --train_text_encoder"),
    "LoHa": ("sdxl", "--adapter loha --train_text_encoder"),
    "LoKr": ("flux", "--adapter lokr"),
    "a start of its own": ("flux", "--init pissa --train_text_encoder"),
    "an average": ("sd", "--ema_decay 0.5"),
    "fewer bits": ("flux", "--base_precision int8 --text_encoder_precision int8"),
    "blocks that wait": ("flux", "--offload_blocks 2 --gradient_checkpointing"),
    "checkpointing": ("flux", "--gradient_checkpointing --mixed_precision bf16"),
    "T5 besides two": ("sd3", ""),
    "four text encoders": ("hidream", ""),
    "another number of tokens": ("flux", "--max_sequence_length 16"),
}
"""What a run can leave in its base: the model, and flags."""


@pytest.mark.parametrize("what", ALIKE)
def test_the_base_that_has_trained_does_what_a_fresh_one_does(
    what: str, train: Train, tiny_folder: Any, monkeypatch: pytest.MonkeyPatch, no_report: None, tmp_path: Path
) -> None:
    check, full = parity.check, {}

    def both(parts: Parts, expected: parity.ExpectedOutput, **kind: bool) -> dict[str, Any]:
        assert parts.get("denoiser") and kind == {"full": False}
        [denoiser] = (part for part in parts.get("denoiser").values() if isinstance(part, nn.Module))
        assert not is_adapted(denoiser) and not any(p.requires_grad for p in denoiser.parameters())
        found = check(parts, expected, **kind)
        assert "text" not in parts._loaded  # gone before the denoiser works
        fresh = Parts(parts.family, parts.source, parts.device, parts._dtype)
        full.update(check(fresh, expected, full=True))
        return found

    monkeypatch.setattr(parity, "check", both)
    model, flags = ALIKE[what]
    folder = deepened(tiny_folder(model), tmp_path / "deep") if "offload" in flags else tiny_folder(model)
    run = train(
        *f"--pretrained_model_name_or_path {folder} --max_train_steps 2 --eval_steps 0 --sample_steps 2 "
        f"--checkpointing_steps 0 {flags}".split()
    )
    lean = json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]
    assert lean.pop("base_changed") is False and (lean.pop("kind"), full.pop("kind")) == ("lean", "full")
    assert lean["call"] == pytest.approx(full["call"], rel=0.01, abs=1e-6)
    assert lean["max_abs"] <= full["max_abs"] + 1
    assert verdict_on(run, {**lean, "kind": "lean"})[0] == "good"


@pytest.mark.parametrize(("model", "more"), [("sdxl", "--train_text_encoder"), ("flux", "")])
def test_on_a_device_no_text_encoder_is_beside_the_denoiser(
    model: str,
    more: str,
    train: Train,
    tiny_folder: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    no_report: None,
) -> None:
    check, found = parity.check, {}

    def there_too(parts: Parts, expected: parity.ExpectedOutput, **kind: bool) -> dict[str, Any]:
        bus: Bus = request.getfixturevalue("bus")
        device = Parts(parts.family, parts.source, MPS, torch.float32)
        device.get("denoiser")
        found.update(check(device, expected, full=False), seen=bus.seen)
        return check(parts, expected, **kind)

    monkeypatch.setattr(parity, "check", there_too)
    run = train(
        *f"--pretrained_model_name_or_path {tiny_folder(model)} --max_train_steps 2 --eval_steps 0 --sample_steps 2 "
        f"--checkpointing_steps 0 {more}".split()
    )
    text = [names for names in found["seen"] if any("CLIP" in name or "T5" in name for name in names)]
    assert len(text) >= 2 and all(len(names) == 1 for names in text)
    assert found["call"]["error"] < 1e-4 and found["max_abs"] <= 1
    assert json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]["max_abs"] == 0


def test_a_whole_pipeline_is_given_embeddings_where_its_encoders_are_elsewhere(
    train: Train, tiny_folder: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, no_report: None
) -> None:
    """A stock pipeline sends tokens to the device that it draws on."""
    check, found = parity.check, {}

    def there_too(parts: Parts, expected: parity.ExpectedOutput, **kind: bool) -> dict[str, Any]:
        request.getfixturevalue("bus")
        found.update(check(Parts(parts.family, parts.source, MPS, torch.float32), expected, full=True))
        return {}

    monkeypatch.setattr(parity, "check", there_too)
    train(
        *f"--pretrained_model_name_or_path {tiny_folder('sd')} --max_train_steps 2 --eval_steps 0 --sample_steps 2 "
        "--checkpointing_steps 0 --text_encoder_device cpu --parity full".split()
    )
    assert found["call"]["error"] < 1e-4 and found["max_abs"] <= 1


def test_a_base_that_has_changed_in_training_is_seen(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = parity.ask

    def one_bit(run: Run, *others: Any) -> Call:
        call = ask(run, *others)
        weight = run.accelerator.unwrap_model(run.model).denoiser.conv_in.weight
        weight.view(torch.int32).bitwise_xor_(1)
        return call

    monkeypatch.setattr(parity, "ask", one_bit)
    run = train("--max_train_steps", "1", "--eval_steps", "0", "--checkpointing_steps", "0")
    verdict, text = words.parity(RunFacts(run))
    assert verdict == "bad" and "own weights changed while the LoRA trained" in text


def test_bits_are_those_of_every_weight_however_it_is_stored() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2)).requires_grad_(False)
    seen = {parity.bits_of(model)}
    model[1].weight.view(torch.int32)[0, 0] ^= 1
    seen.add(parity.bits_of(model))
    quantize(model, "int8", torch.device("cpu"))
    seen.add(parity.bits_of(model))
    model[0][0].numbers[1, 2] += 1
    seen.add(parity.bits_of(model))
    seen.add(parity.bits_of(model.to(torch.device("cpu"))))
    assert len(seen) == 4


def test_the_figures_of_a_call_follow_their_formulas() -> None:
    """b = (3, 4), Δ = (0, 2); what is fresh has half of Δ, and a base that is off by 0.2."""
    base, change = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    call = Call(base, {}, base, 1.0, None, with_lora=base + change, without_lora=base, rounded=base + change + 0.01)
    fresh = base + torch.tensor([0.0, 0.2])
    figures = compare_calls(call, fresh + change / 2, fresh)
    assert figures == pytest.approx({"effect": 2 / 5, "error": (1 - 0.2) / 2, "rounding": 0.2 / 2, "scale": 1 / 2})
    figures = compare_calls(call, base + change, base)
    assert figures["rounding"] == pytest.approx(0.01 * math.sqrt(2) / 2, rel=1e-4) and figures[
        "scale"
    ] == pytest.approx(1)
    still = replace(call, with_lora=base)
    assert compare_calls(still, base, base) == {"effect": 0}


def test_the_difference_of_two_images() -> None:
    white, grey = (Image.new("RGB", (2, 1), colour) for colour in ("#ffffff", "#fefefe"))
    assert compare_images(white, white)["psnr_db"] == 999
    grey.putpixel((0, 0), (255, 255, 255))
    expected = {"max_abs": 1, "mean_abs": 0.5, "psnr_db": 10 * math.log10(255**2 / 0.5)}
    assert compare_images(white, grey) == pytest.approx(expected)


def test_the_check_can_be_switched_off_and_a_resume_may_do_so(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train("--max_train_steps", "1")
    monkeypatch.setattr(parity, "ask", lambda *_: pytest.fail("the denoiser was asked"))
    monkeypatch.setattr(parity, "check", lambda *_: pytest.fail("the file was checked"))
    run = train("--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--no_parity_check")
    assert words.parity(RunFacts(run)) == ("unknown", "Not checked: it was switched off (--no_parity_check).")
    assert run.report_html.exists()
