"""``--training_adapter``: a frozen LoRA that is active while training, and off in samples and in the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreamlora import registry
from dreamlora.cli.parse import parse_run
from dreamlora.commands.doctor.diagnosis import diagnose
from dreamlora.config import Lora, Model, Train
from dreamlora.errors import UserError
from dreamlora.interfaces import View
from dreamlora.lora.applying import weights_for
from dreamlora.lora.assistant import ASSISTANT, add_assistant, switch, without_assistant
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.lora.names import flat
from dreamlora.lora.pairs import adapted_layers
from dreamlora.lora.saving import save_lora
from dreamlora.lora.settings import METADATA_KEY
from dreamlora.models import loading
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop
from tests import tinymodels
from tests.lora.test_foreign import dora, locon_with_core, loha, lokr
from tests.training.test_processes import assert_same_weights, train_forked

pytestmark = pytest.mark.usefixtures("no_report")

RANK, ALPHA = 3, 6.0
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"


def random_lora(model: Path, folder: Path, layers: tuple[str, ...] = ()) -> Path:
    """A LoRA of a model's denoiser that changes a lot, and its file."""
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(model)))
    family = loading.family_of(source)
    denoiser = family.load(source, "denoiser", torch.float32)[family.DENOISER]
    add_lora(denoiser, Lora(rank=RANK, lora_alpha=ALPHA), layers or family.LORA_LAYERS)
    draws = torch.Generator().manual_seed(5)
    for parameter in trainable_parameters(denoiser).values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draws)
    return save_lora(folder, {family.DENOISER: denoiser})


@pytest.fixture(scope="module")
def adapter(sd_folder: Path, tmp_path_factory) -> Path:
    """On some of the layers that train, and on others that do not."""
    return random_lora(sd_folder, tmp_path_factory.mktemp("adapter"), ("to_q", "to_v", "proj_in", "conv1"))


@pytest.fixture(scope="module")
def merged(sd_folder: Path, adapter: Path, tmp_path_factory) -> Path:
    """The same model with the adapter in its weights, computed here."""
    folder = Path(shutil.copytree(sd_folder, tmp_path_factory.mktemp("merged") / "sd"))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights, factors = load_file(file), load_file(adapter)
    for key, down in factors.items():
        if ".lora_A." in key:
            up = factors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("unet.").replace(".lora_A", "")
            change = up.flatten(1) @ down.flatten(1)
            weights[name] += ALPHA / RANK * change.view(weights[name].shape)
    save_file(weights, file, {"format": "pt"})
    return folder


def first_loss(run: Any) -> torch.Tensor:
    run.model.train()
    return loop.micro_batch_loss(run, loop.next_batches(run, 0, 0), 0)


def drawn(folder: Any, step: int) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.sample_dir(step).glob("*.png"))]


def test_the_loss_is_that_of_a_model_with_the_adapter_merged(prepare, sd_folder, merged, adapter) -> None:
    with_adapter = first_loss(prepare(sd_folder, "--training_adapter", str(adapter)))
    torch.testing.assert_close(with_adapter, first_loss(prepare(merged)), rtol=1e-5, atol=1e-6)
    assert abs(with_adapter - first_loss(prepare(sd_folder))) > 1e-3


@pytest.mark.parametrize("kind", [dora, loha, lokr, locon_with_core])
def test_an_adapter_of_another_kind_and_of_another_program(prepare, sd_folder, tmp_path, kind) -> None:
    """Beside a LoRA in the same layer, and in one that has none."""
    file = sd_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights, tensors = load_file(file), {}
    layers = ["down_blocks.0.resnets.0.conv1"]
    if kind is not locon_with_core:
        layers.append("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    torch.manual_seed(0)
    for layer in layers:
        made, weights[f"{layer}.weight"] = kind(weights[f"{layer}.weight"])
        tensors |= {f"lora_unet_{flat(layer)}.{end}": each.contiguous() for end, each in made.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    merged = Path(shutil.copytree(sd_folder, tmp_path / "merged"))
    save_file(weights, merged / "unet" / file.name, {"format": "pt"})
    with_adapter = prepare(sd_folder, "--training_adapter", str(tmp_path / "adapter.safetensors"))
    torch.testing.assert_close(first_loss(with_adapter), first_loss(prepare(merged)), rtol=1e-4, atol=1e-5)
    switch(with_adapter.model.denoiser, on=False)
    assert torch.equal(first_loss(with_adapter), first_loss(prepare(sd_folder)))


@pytest.mark.parametrize("init", ["pissa", "lora_ga", "eva", "orthogonal"])
def test_inits_see_the_adapter_and_leave_it_alone(prepare, sd_folder, adapter, init: str) -> None:
    """A start changes nothing: neither with the adapter, nor without it."""
    run = prepare(sd_folder, "--training_adapter", str(adapter), "--init", init)
    plain = prepare(sd_folder, "--training_adapter", str(adapter))
    torch.testing.assert_close(first_loss(run), first_loss(plain), rtol=1e-5, atol=1e-6)
    for one in (run, plain):
        switch(one.model.denoiser, on=False)
    torch.testing.assert_close(first_loss(run), first_loss(plain), rtol=1e-5, atol=1e-6)
    weights = [value for name, value in run.model.denoiser.named_parameters() if f".{ASSISTANT}." in name]
    saved = list(load_file(adapter).values())
    assert sum(map(torch.numel, weights)) == sum(map(torch.numel, saved))


def test_samples_file_and_parity_are_without_it(train, sd_folder, adapter, tmp_path) -> None:
    plain = train("--output_dir", str(tmp_path / "plain"))
    run = train("--output_dir", str(tmp_path / "assisted"), "--training_adapter", str(adapter))
    assert drawn(run, 0) == drawn(plain, 0), "nothing is learned yet: the base model alone"
    assert drawn(run, 6) != drawn(plain, 6), "what was learned differs"
    call = json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]["call"]
    assert call["error"] < 1e-3 and abs(call["scale"] - 1) < 1e-3 and call["effect"] > 0
    with safe_open(run.lora_file, "pt") as ours, safe_open(plain.lora_file, "pt") as theirs:
        assert sorted(ours.keys()) == sorted(theirs.keys())
        assert all(ours.get_slice(key).get_shape() == theirs.get_slice(key).get_shape() for key in ours.keys())  # noqa: SIM118
        assert ours.metadata()[METADATA_KEY] == theirs.metadata()[METADATA_KEY]
    losses = [
        {row["step"]: row["value"] for row in each.metrics() if row["name"] == "eval/loss"} for each in (run, plain)
    ]
    assert losses[0].keys() == losses[1].keys() and losses[0][0] != losses[1][0]
    ids = [json.loads(each.evalset_file.read_text(encoding="utf-8"))["evalset_id"] for each in (run, plain)]
    assert ids[0] != ids[1], "losses of different models are not compared"


def test_a_resumed_run_ends_the_same_to_the_last_bit(train, adapter, tmp_path) -> None:
    whole = train("--output_dir", str(tmp_path / "whole"), "--training_adapter", str(adapter))
    parts = ["--output_dir", str(tmp_path / "parts")]
    train(*parts, "--training_adapter", str(adapter), "--max_train_steps", "4")
    moved = Path(shutil.copy(adapter, tmp_path / "elsewhere.safetensors"))  # what it holds counts, not where it lies
    again = train(*parts, "--training_adapter", str(moved), "--resume_from_checkpoint", "latest")
    before, after = load_file(whole.lora_file), load_file(again.lora_file)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_resumed_run_needs_the_same_one(train, adapter, sd_folder, tmp_path) -> None:
    train("--training_adapter", str(adapter), "--max_train_steps", "4")
    other = random_lora(sd_folder, tmp_path / "other", ("to_k",))
    for more in (["--training_adapter", str(other)], []):
        with pytest.raises(UserError, match="training adapter"):
            train("--resume_from_checkpoint", "latest", *more)


def test_a_step_changes_what_trains_alone(prepare, sd_folder, adapter) -> None:
    run = prepare(sd_folder, "--training_adapter", str(adapter), "--optimizer", "lora_muon", "--gradient_checkpointing")
    names = {name: value.clone() for name, value in run.model.denoiser.named_parameters()}
    assert not any(ASSISTANT in name for name in run.trainables)
    run.model.train()
    loop.optimizer_step(run, loop.next_batches(run, 0, 0))
    changed = {name for name, value in run.model.denoiser.named_parameters() if not torch.equal(value, names[name])}
    assert changed and all(".default." in name for name in changed)


def test_gradients_are_the_same_with_checkpointing(prepare, sd_folder, adapter) -> None:
    """What is computed again in the backward pass must have the adapter too."""
    gradients = []
    for more in ([], ["--gradient_checkpointing"]):
        run = prepare(sd_folder, "--training_adapter", str(adapter), *more)
        first_loss(run).backward()
        gradients.append([parameter.grad for parameter in run.trainables.values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", registry.names("families"))
def test_every_family_can_have_one(name: str, tmp_path: Path) -> None:
    tiny = tinymodels.of(name)
    model = tiny.save(tmp_path / "model")
    file = random_lora(model, tmp_path / "adapter")
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(model)))
    family = loading.family_of(source)
    parts = {role: family.load(source, role, torch.float32) for role in ("text", "denoiser")}
    denoiser = parts["denoiser"][family.DENOISER]
    with torch.no_grad():
        tokens = family.tokenize(parts["text"], ["a cat"], tiny.length)
        conditioning = family.encode_tokens(parts["text"], tokens)
        conditioning |= family.describe_views([View((tiny.side,) * 2, (0, 0), (tiny.side,) * 2)])
    scheduler = family.load(source, "scheduler", torch.float32)["scheduler"]
    times = family.objective(scheduler, Train()).spread_times(torch.tensor([0.5]))
    noisy = torch.randn(1, *tiny.latents, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def answer() -> torch.Tensor:
        return family.predict(denoiser, noisy, times, conditioning, 1.0)

    base = answer()
    weights = weights_for(family.pipeline(parts["denoiser"]), file)[family.DENOISER]
    add_lora(denoiser, Lora(), family.LORA_LAYERS)
    add_assistant(denoiser, weights)
    assisted = answer()
    with without_assistant(denoiser):
        assert torch.equal(answer(), base)
    assert torch.equal(answer(), assisted) and not torch.allclose(assisted, base)
    assert {name.split(".")[-2] for name in trainable_parameters(denoiser)} == {"default"}
    assert len(list(adapted_layers(denoiser))) > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: {**tensors, TEXT.format("A"): torch.ones(2, 16), TEXT.format("B"): torch.ones(16, 2)},
            "is for a 'text_encoder', which is not loaded",
        ),
        (lambda tensors: {key.replace("to_q", "to_nothing"): value for key, value in tensors.items()}, "to_nothing"),
        (
            lambda tensors: {key: value.repeat(2, 2) if value.ndim == 2 else value for key, value in tensors.items()},
            "fit",
        ),
        (lambda tensors: {"weight": torch.ones(2)}, "is not a LoRA"),
        (lambda tensors: {key: value * float("nan") for key, value in tensors.items()}, "not finite"),
    ],
    ids=["text encoder", "other layers", "other sizes", "no LoRA", "not finite"],
)
def test_one_that_cannot_be_used_is_refused_before_any_work(flags, adapter, tmp_path, change, said) -> None:
    file = tmp_path / "wrong.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(adapter)).items()}, file)
    found = diagnose(*parse_run([*flags, "--training_adapter", str(file)]))
    assert said in " ".join(found["errors"]) and "memory" not in found


def test_its_memory_is_counted(flags, adapter) -> None:
    with_adapter, without = (
        {stage["stage"]: stage["held"] for stage in diagnose(*parse_run([*flags, *more]))["memory"]["stages"]}
        for more in (["--training_adapter", str(adapter)], [])
    )
    numbers = sum(tensor.numel() for tensor in load_file(adapter).values())
    assert with_adapter["training"] - without["training"] == 4 * numbers
    assert with_adapter["encoding images"] == without["encoding images"]


def test_a_missing_one_is_refused(flags, tmp_path) -> None:
    found = diagnose(*parse_run([*flags, "--training_adapter", str(tmp_path / "nowhere.safetensors")]))
    assert "no such LoRA file or folder" in found["errors"][0]


def test_two_processes_equal_one(flags, train, adapter, tmp_path) -> None:
    more = ["--optimizer", "sgd", "--learning_rate", "0.1", "--max_train_steps", "3", "--sample_steps", "3"]
    one = train(*more, "--training_adapter", str(adapter), "--output_dir", str(tmp_path / "one"))
    train_forked([*flags, *more, "--training_adapter", str(adapter)])
    two = RunFolder(tmp_path / "run")
    assert_same_weights(one, two)
    assert drawn(one, 0) == drawn(two, 0)
