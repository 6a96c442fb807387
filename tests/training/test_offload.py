"""--offload_blocks through the public command: the same bits as without, with whatever a run can do besides.

Copies are made as late as is allowed, with nonsense in their place until then.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.lora.pairs import starts_of
from dreamlora.models import offload
from dreamlora.models.offload import blocks_of
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop
from dreamlora.training.loop import Run
from tests import tinymodels
from tests.delayed import Delayed
from tests.tinymodels.deep import deepened
from tests.training.conftest import flags_of, train_with
from tests.training.forked import in_two_processes

pytestmark = pytest.mark.usefixtures("no_report")
SHORT = "--max_train_steps 4 --sample_steps 4 --eval_steps 2 --final_eval_items 8 --num_inference_steps 2"
LOOP = "--sample_steps 0 --eval_steps 0 --final_eval_items 0 --no_parity_check"
PRIOR = ["--with_prior_preservation", "--class_prompt", "a photo of a dog", "--num_class_images", "2"]


@pytest.fixture(autouse=True)
def delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "Copies", Delayed)


@pytest.fixture(scope="session")
def deep_folder(tiny_folder, tmp_path_factory) -> Callable[[str], Path]:
    """The small model of a family with more blocks."""
    place, made = tmp_path_factory.mktemp("deep"), {}
    return lambda name: made.get(name) or made.setdefault(name, deepened(tiny_folder(name), place / name))


@pytest.fixture
def deep_flags(deep_folder, photos, cache, tmp_path) -> Callable[..., list[str]]:
    """Of a complete run of a family's deep model in a folder of a name."""
    return lambda family, name, *more: [
        *flags_of(photos, cache, deep_folder(family), tmp_path / name),
        *SHORT.split(),
        *more,
    ]


@pytest.fixture
def run_deep(deep_flags) -> Callable[..., RunFolder]:
    return lambda *words: train_with(deep_flags(*words))


@pytest.fixture
def run_flux(run_deep) -> Callable[..., RunFolder]:
    return lambda *words: run_deep("flux", *words)


def prepared(prepare: Callable[..., Run], folder: Path, name: str, *more: str) -> Run:
    side = str(tinymodels.of(name).side)
    return prepare(folder, "--resolution", side, "--train_batch_size", "2", "--max_train_steps", "2", *more)


def most_blocks(run: Run) -> int:
    return len(blocks_of(run.accelerator.unwrap_model(run.model).denoiser)) - 2


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def same_runs(one: RunFolder, other: RunFolder) -> None:
    """The LoRA, all that was measured, and all that was drawn."""
    assert equal(load_file(one.lora_file), load_file(other.lora_file))
    values = [
        [(row["step"], row["name"], row["value"]) for row in run.metrics() if row["name"] != "train/steps_per_s"]
        for run in (one, other)
    ]
    assert values[0] == values[1]
    pictures = [[(run.samples / row["file"]).read_bytes() for row in run.sample_rows()] for run in (one, other)]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("name", registry.names("families"))
def test_every_family_trains_to_the_same_bits(name: str, deep_folder, prepare) -> None:
    more = ("--gradient_accumulation_steps", "2")
    plain = prepared(prepare, deep_folder(name), name, "--gradient_checkpointing", *more)
    run = prepared(prepare, deep_folder(name), name, "--offload_blocks", str(most_blocks(plain)), *more)
    denoiser = run.accelerator.unwrap_model(run.model).denoiser
    waiting = offload.waiting_blocks(denoiser, most_blocks(plain))
    seen: list[tuple[int, bool]] = []
    for number, block in enumerate(waiting):
        block.register_forward_pre_hook(lambda *_, n=number: seen.append((n, torch._C._current_graph_task_id() != -1)))
    for each in (plain, run):
        loop.train(each)
    assert equal(plain.trainables, run.trainables) and any(value.any() for value in run.trainables.values())
    passes = len(seen) // 2 // len(waiting)
    assert passes >= 4 and all(seen.count((n, back)) == passes for n in range(len(waiting)) for back in (True, False))
    answers = []
    for each in (plain, run):
        batch = loop.next_batches(each, 0, 0)[0]
        each.model.eval()
        with torch.no_grad():
            answers.append(each.model(batch.noise, batch.times, batch.conditioning))
    assert torch.equal(*answers)


@pytest.mark.parametrize(("family", "word"), [("flux", None), ("sd", "int8"), ("qwen_image", "nf4")])
def test_a_run_with_all_that_belongs_to_it_is_the_same(family: str, word: str | None, run_deep, request) -> None:
    if word == "nf4":
        request.getfixturevalue("bitsandbytes")
    more = [*PRIOR, *(["--base_precision", word] if word else [])]
    plain = run_deep(family, "plain", *more, "--gradient_checkpointing")
    waiting = run_deep(family, "waiting", *more, "--offload_blocks", "3")
    same_runs(plain, waiting)
    parity = json.loads(waiting.summary_file.read_text(encoding="utf-8"))["parity"]
    assert parity["call"]["error"] < 1e-2 and parity["max_abs"] <= 2, parity


def test_it_goes_with_a_text_encoder_that_trains_and_the_average_of_the_path(run_flux) -> None:
    more = ["--train_text_encoder", "--ema_decay", "0.5", "--lora_dropout", "0.2", "--mixed_precision", "bf16"]
    same_runs(run_flux("plain", *more, "--gradient_checkpointing"), run_flux("waiting", *more, "--offload_blocks", "8"))


@pytest.mark.parametrize("adapter", registry.names("adapters"))
def test_every_kind_of_adapter_trains_to_the_same_bits(adapter: str, deep_folder, prepare) -> None:
    more = ("--adapter", adapter, "--base_precision", "int8")
    plain = prepared(prepare, deep_folder("flux"), "flux", "--gradient_checkpointing", *more)
    run = prepared(prepare, deep_folder("flux"), "flux", "--offload_blocks", "8", *more)
    for each in (plain, run):
        loop.train(each)
    assert equal(plain.trainables, run.trainables)


@pytest.mark.parametrize("init", registry.names("inits"))
def test_every_init_starts_from_the_same_bits(init: str, deep_folder, prepare) -> None:
    plugin = registry.load("inits", init)
    few = ("--init_args", "draws", "2") if hasattr(plugin.Options(), "draws") else ()
    more = ("--init", init, "--rank", str(2 * plugin.RANK_MULTIPLE), *few)
    plain = prepared(prepare, deep_folder("sd"), "sd", "--gradient_checkpointing", *more)
    run = prepared(prepare, deep_folder("sd"), "sd", "--offload_blocks", "6", *more)
    assert equal(plain.trainables, run.trainables)
    starts = [starts_of(each.accelerator.unwrap_model(each.model).denoiser) for each in (plain, run)]
    assert starts[0].keys() == starts[1].keys()
    assert all(equal(start, starts[1][layer]) for layer, start in starts[0].items())


def test_a_run_goes_on_with_other_blocks_waiting_or_none(run_flux) -> None:
    whole = run_flux("whole", *LOOP.split(), "--offload_blocks", "8")
    for name, then, now in (("less", "8", "0"), ("more", "0", "5")):
        run_flux(name, *LOOP.split(), "--max_train_steps", "2", "--offload_blocks", then)
        more = ("--offload_blocks", now, "--resume_from_checkpoint", "latest")
        assert equal(load_file(run_flux(name, *LOOP.split(), *more).lora_file), load_file(whole.lora_file))


def test_two_processes_train_what_they_would_without(deep_flags, tmp_path) -> None:
    flags = [*LOOP.split(), "--train_batch_size", "1"]
    plain = deep_flags("flux", "plain", *flags, "--gradient_checkpointing")
    waiting = deep_flags("flux", "waiting", *flags, "--offload_blocks", "8")
    assert in_two_processes(lambda: train_with(plain)) == [0, 0]
    assert in_two_processes(lambda: train_with(waiting)) == [0, 0]
    files = [RunFolder(tmp_path / name).lora_file for name in ("plain", "waiting")]
    assert equal(*map(load_file, files))


def test_more_blocks_than_there_are_is_told_before_any_work(run_flux, tmp_path) -> None:
    with pytest.raises(UserError, match=r"--offload_blocks 9: this model has 10 blocks.*at most 8"):
        run_flux("none", "--offload_blocks", "9")
    assert not (tmp_path / "none").exists()


def test_checkpointing_is_switched_on_and_to_switch_it_off_is_refused(run_flux, caplog) -> None:
    run = run_flux("on", *LOOP.split(), "--offload_blocks", "8")
    assert run.config()["gradient_checkpointing"] is True
    model = json.loads(run.outline_file.read_text(encoding="utf-8"))["model"]
    assert "8 blocks wait in host memory, with gradient checkpointing" in model
    with pytest.raises(UserError, match="--offload_blocks 8 needs --gradient_checkpointing, which was switched off"):
        run_flux("off", "--offload_blocks", "8", "--no_gradient_checkpointing")


def test_compiling_besides_is_refused(run_flux) -> None:
    with pytest.raises(UserError, match="--compile cannot be combined with --offload_blocks"):
        run_flux("compiled", "--offload_blocks", "8", "--compile")
