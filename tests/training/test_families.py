"""Every family through the public command: no flag names it, and all that a run can do goes with all of them."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dreamlora import registry
from dreamlora.config.programs import TextToImageConfig
from dreamlora.eval_loss.evalset import EvalSet
from dreamlora.interfaces import View
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop
from dreamlora.training.loop import Run
from tests import tinymodels
from tests.training.conftest import flags_of, train_with, with_optimizer
from tests.training.forked import in_two_processes, run_forked

SHORT = (
    "--max_train_steps 4 --sample_steps 4 --eval_steps 4 --final_eval_items 8 --train_batch_size 2 "
    "--num_inference_steps 1"
)
pytestmark = pytest.mark.usefixtures("no_report")
LOOP = "--sample_steps 0 --eval_steps 0 --final_eval_items 0 --no_parity_check --checkpointing_steps 0"


@pytest.fixture(scope="module", params=registry.names("families"))
def model(request, tiny_folder) -> SimpleNamespace:
    """A family's small model as a folder."""
    name = request.param
    model = SimpleNamespace(family=registry.load("families", name), tiny=tinymodels.of(name), folder=tiny_folder(name))
    gc.collect()
    gc.freeze()  # what was imported for it; see ``frozen_imports``
    return model


@pytest.fixture
def flags(model, photos: Path, cache: Path, tmp_path: Path) -> list[str]:
    side = ["--resolution", str(model.tiny.side)]
    return [*flags_of(photos, cache, model.folder, tmp_path / "run"), *side, *SHORT.split()]


@pytest.fixture(autouse=True)
def small_samples(model, monkeypatch) -> None:
    """Of the size that is asked for, also where the stock pipeline scales it to a constant one."""
    stock, side = model.family.pipeline, model.tiny.side

    def pipeline(components: dict) -> object:
        made = stock(components)
        model.tiny.prepare(made, side, side)
        return made

    monkeypatch.setattr(model.family, "pipeline", pipeline)


def same(run: RunFolder, other: RunFolder, atol: float = 0.0) -> bool:
    left, right = load_file(run.lora_file), load_file(other.lora_file)
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=0, atol=atol) for name in left
    )


def parity(run: RunFolder) -> dict:
    return json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]


def test_a_stock_pipeline_with_the_file_draws_what_training_drew(model, flags) -> None:
    prior = ["--with_prior_preservation", "--class_prompt", "a photo of a dog", "--num_class_images", "2"]
    run = train_with([*flags, *prior])
    found = parity(run)
    assert found["call"]["effect"] > 1e-3 and found["call"]["error"] < 1e-2, found
    assert found["max_abs"] <= 2, found
    rows = run.sample_rows()
    assert rows and not any("problem" in row for row in rows)
    side = (model.tiny.side, model.tiny.side)
    assert EvalSet.load(run.evalset_file).views.keys() == model.family.describe_views([View(side, (0, 0), side)]).keys()


def test_a_text_encoder_trains_with_it(model, flags) -> None:
    if not model.family.TEXT_ENCODERS:
        pytest.skip("this family has no text encoder that trains")
    run = train_with([*flags, "--train_text_encoder"])
    names = load_file(run.lora_file)
    assert all(any(name.startswith(f"{encoder}.") for name in names) for encoder in model.family.TEXT_ENCODERS)
    assert parity(run)["call"]["error"] < 1e-2 and parity(run)["max_abs"] <= 2, parity(run)


@pytest.fixture
def captioned(model, photos: Path, tmp_path_factory) -> list[str]:
    """The data set: images of several shapes, with captions."""
    from PIL import Image

    side, folder = model.tiny.side, tmp_path_factory.mktemp("captioned")
    for number, file in enumerate(sorted(photos.glob("*.png"))):
        with Image.open(file) as photo:
            size = [(side, side), (2 * side, side), (side, 2 * side)][number % 3]
            photo.resize(size).save(folder / file.name)
        (folder / file.with_suffix(".txt").name).write_text("photo " * number + "of a dog", encoding="utf-8")
    return ["--train_data_dir", str(folder), "--buckets", "--bucket_step", str(model.family.SIDE_MULTIPLE)]


def test_killed_and_resumed_equals_uninterrupted(model, flags, captioned, tmp_path, monkeypatch) -> None:
    """On captioned images of several shapes, some of them without their captions."""
    place = flags.index("--instance_data_dir")
    shared = [*flags[:place], *flags[place + 2 :], *captioned, "--caption_dropout", "0.3", *LOOP.split()]
    place = shared.index("--instance_prompt")
    shared = [*shared[:place], *shared[place + 2 :], "--lora_dropout", "0.2", "--checkpointing_steps", "2"]
    whole = train_with([*shared, "--output_dir", str(tmp_path / "whole")], TextToImageConfig)
    killed = [*shared, "--output_dir", str(tmp_path / "killed")]
    step = loop.optimizer_step

    def dying(run: Run, batches):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, batches)

    monkeypatch.setattr(loop, "optimizer_step", dying)
    assert run_forked([lambda: train_with(killed, TextToImageConfig)], [{}]) == [-signal.SIGKILL]
    monkeypatch.undo()
    assert not RunFolder(tmp_path / "killed").lora_file.exists()
    resumed = train_with([*killed, "--resume_from_checkpoint", "latest"], TextToImageConfig)
    assert same(whole, resumed)


def test_two_processes_equal_one(model, flags, tmp_path) -> None:
    shared = [*flags, *LOOP.split(), "--optimizer", "sgd", "--learning_rate", "0.1"]
    one = train_with([*shared, "--output_dir", str(tmp_path / "one")])
    two = [*shared, "--train_batch_size", "1", "--output_dir", str(tmp_path / "two")]
    assert in_two_processes(lambda: train_with(two)) == [0, 0]
    summary = json.loads(RunFolder(tmp_path / "two").summary_file.read_text(encoding="utf-8"))
    assert summary["processes"] == 2
    assert same(one, RunFolder(tmp_path / "two"), atol=1e-6)


@pytest.fixture
def prepared(model, prepare: Callable[..., Run]) -> Callable[..., Run]:
    side = ["--resolution", str(model.tiny.side)]
    return lambda *more: prepare(model.folder, *side, "--train_batch_size", "2", *more)


def test_every_optimizer_makes_a_step(prepared) -> None:
    run = prepared()
    for name in registry.names("optimizers"):
        try:
            registry.check_needs("optimizers", name)
        except Exception:
            continue
        ready = with_optimizer(run, name)
        before = {key: value.detach().clone() for key, value in run.trainables.items()}
        ready.model.train()
        ready.optimizer.train()
        result, _ = loop.optimizer_step(ready, loop.next_batches(ready, 0, 0))
        ready.optimizer.eval()
        assert result.grad_norm > 0, name
        assert any(not torch.equal(before[key], value) for key, value in run.trainables.items()), name


def test_every_init_starts_at_the_base_model(prepared) -> None:
    for name in registry.names("inits"):
        plugin = registry.load("inits", name)
        few = ["--init_args", "draws", "2"] if hasattr(plugin.Options(), "draws") else []
        run = prepared("--init", name, "--rank", str(2 * plugin.RANK_MULTIPLE), *few)
        batch = loop.next_batches(run, 0, 0)[0]
        noisy = run.objective.corrupt(batch.latents, batch.noise, batch.times)
        run.model.eval()
        with torch.no_grad():
            started = run.predict(noisy, batch.times, batch.conditioning)
            run.accelerator.unwrap_model(run.model).denoiser.disable_adapters()
            base = run.predict(noisy, batch.times, batch.conditioning)
        torch.testing.assert_close(started, base, rtol=1e-3, atol=1e-4, msg=name)
