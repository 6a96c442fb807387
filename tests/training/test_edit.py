"""Models that edit: what is shown goes with the latents, the prompt and the call as in the stock pipelines."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dreamlora.commands.evaluate.command import main
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.commands.shown import with_shown
from dreamlora.config import Model
from dreamlora.data.shown_prompts import tokenized, with_pictures
from dreamlora.data.transforms import to_tensor
from dreamlora.errors import UserError
from dreamlora.eval_loss.evalset import EvalSet
from dreamlora.interfaces import PICTURE
from dreamlora.models import loading
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.sampler import SamplePlan
from tests import tinymodels
from tests.training.conftest import flags_of, train_with

pytestmark = pytest.mark.usefixtures("no_report")
SIDE = 64
"""The least that FLUX.2's pipelines edit."""


@pytest.fixture(
    scope="module", params=["flux-kontext", "flux2", "flux2-dev", "qwen_image-edit", "qwen_image-edit_plus"]
)
def case(request, tiny_folder, small_areas) -> SimpleNamespace:
    tiny, folder = tinymodels.of(request.param), tiny_folder(request.param)
    source = loading.resolve_source(Model(pretrained_model_name_or_path=str(folder)))
    family = loading.family_of(source)
    parts = {}
    for role in ("text", "vae", "denoiser", "scheduler"):
        parts |= family.load(source, role, torch.float32)
    stock = tiny.stock(folder)
    stock.set_progress_bar_config(disable=True)
    return SimpleNamespace(tiny=tiny, folder=folder, source=source, family=family, parts=parts, stock=stock)


def picture(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@torch.no_grad()
def test_prediction_equals_the_stock_pipelines_call_with_an_image(case) -> None:
    seen: list[tinymodels.Seen] = []
    module = getattr(case.stock, case.family.DENOISER)
    names = list(inspect.signature(module.forward).parameters)
    scale = case.tiny.side // case.tiny.latents[1]

    def hook(_: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        seen.append(case.tiny.read_call(given, output, (SIDE // scale, SIDE // scale)))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    own = {"max_area": SIDE * SIDE, "_auto_resize": False}
    known = inspect.signature(case.stock.__call__).parameters
    own = {name: value for name, value in own.items() if name in known}
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": 1, "output_type": "latent"}
    prompt = {"prompt": ["a cat"], **case.tiny.call, **case.family.call_options(1.0)}
    case.tiny.mended(case.stock)(image=picture(1), generator=torch.Generator().manual_seed(1), **prompt, **size, **own)
    handle.remove()
    seen_by_text = case.family.text_pictures(case.source)
    views = {PICTURE: seen_by_text(picture(1))[None]} if seen_by_text else {}
    tokens = tokenized(case.family, case.parts, with_pictures(["a cat"], views), case.tiny.length)
    conditioning = case.family.encode_tokens(case.parts, tokens)
    shown = case.family.encode_conditioning(case.parts, to_tensor(np.asarray(picture(1)))[None])
    assert all(value.dtype == torch.float32 and len(value) == 1 for value in shown.values())
    predict = case.family.predict
    denoiser = case.parts[case.family.DENOISER]
    found = predict(denoiser, seen[0].noisy, seen[0].times, {**conditioning, **shown}, 1.0)
    torch.testing.assert_close(found, seen[0].prediction, rtol=1e-4, atol=1e-4)
    alone = predict(denoiser, seen[0].noisy, seen[0].times, conditioning, 1.0)
    assert found.shape == alone.shape and (found - alone).abs().max() > 1e-4, "the image has no say"


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Path, Path]:
    """Images after an edit, and before it."""
    after, before = tmp_path / "after", tmp_path / "before"
    for folder, offset in ((after, 0), (before, 100)):
        folder.mkdir()
        for number in range(4):
            picture(offset + number, (80, 64)).save(folder / f"{number}.png")
    return after, before


@pytest.fixture
def flags(case, pairs, cache: Path, tmp_path: Path) -> list[str]:
    after, before = pairs
    more = f"--conditioning_data_dir {before} --resolution {SIDE} --max_train_steps 4 --train_batch_size 2 "
    more += "--num_inference_steps 1 --sample_steps 4 --eval_steps 4 --final_eval_items 8 --max_sequence_length "
    return [*flags_of(after, cache, case.folder, tmp_path / "run"), *more.split(), str(case.tiny.length or 512)]


def test_a_run_on_pairs(case, flags) -> None:
    run = train_with(flags)
    parity = json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]
    assert parity["call"]["effect"] > 1e-3 and parity["call"]["error"] < 1e-2 and parity["max_abs"] <= 2, parity
    views = EvalSet.load(run.evalset_file).views
    assert "conditioning_latents" in views
    assert (PICTURE in views) is bool(case.family.text_pictures(case.source))
    assert PICTURE not in views or views[PICTURE].dtype == torch.uint8
    rows = run.sample_rows()
    assert rows and all(run.conditioning_file(row["conditioning"]).exists() for row in rows)


def weights(run: RunFolder) -> dict[str, list]:
    from safetensors.torch import load_file

    return {name: tensor.tolist() for name, tensor in load_file(run.lora_file).items()}


LOOP = "--sample_steps 0 --eval_steps 0 --final_eval_items 0 --no_parity_check --checkpointing_steps 2"
one_model = pytest.mark.parametrize("case", ["flux-kontext"], indirect=True)
"""For what has nothing to do with the family."""


@one_model
def test_another_image_before_the_edit_is_another_training(case, flags, pairs, tmp_path) -> None:
    nothing = LOOP.split()
    first = train_with([*flags, *nothing])
    resumed = [*flags, *nothing, "--output_dir", str(tmp_path / "resumed")]
    train_with([*resumed, "--max_train_steps", "2"])
    assert weights(train_with([*resumed, "--resume_from_checkpoint", "latest"])) == weights(first)
    picture(7, (80, 64)).save(pairs[1] / "0.png")
    second = train_with([*flags, *nothing, "--output_dir", str(tmp_path / "second")])
    assert weights(first) != weights(second)
    with pytest.raises(UserError, match=r"another conditioning image: 0\.png"):
        train_with([*flags, *nothing, "--max_train_steps", "6", "--resume_from_checkpoint", "latest"])


@one_model
def test_what_is_wrong_is_told_before_the_model_loads(case, flags, pairs, sd_folder) -> None:
    (pairs[1] / "0.png").unlink()
    with pytest.raises(UserError, match=r"1 of 4 images have no conditioning image .* such as 0\.png"):
        train_with(flags)
    picture(9).save(pairs[1] / "other.png")
    with pytest.raises(UserError, match=r"belongs to no image, such as other\.png"):
        train_with(flags)
    with pytest.raises(UserError, match=r"--conditioning_data_dir: .* edits no images"):
        train_with([*flags, "--pretrained_model_name_or_path", str(sd_folder)])
    with pytest.raises(UserError, match="--with_prior_preservation makes class images"):
        train_with([*flags, "--with_prior_preservation", "--class_prompt", "dog"])
    if case.family.text_pictures(case.source):
        where = flags.index("--conditioning_data_dir")
        with pytest.raises(UserError, match=r"--conditioning_data_dir is needed: .* edits images, and does nothing"):
            train_with([*flags[:where], *flags[where + 2 :]])


def test_a_model_that_must_edit_is_given_an_image(tmp_path) -> None:
    """To draw samples of a LoRA that no run has made."""
    plan, nothing = SamplePlan(("a cat",), 1, 1.0, width=SIDE), SampleConfig(lora=("lora",))
    with pytest.raises(UserError, match="--validation_images is needed"):
        with_shown(plan, nothing, None, edits=True, must=True)
    assert with_shown(plan, nothing, None, edits=True).shown == {}
    file = tmp_path / "before.png"
    picture(3, (80, 64)).save(file)
    given = SampleConfig(lora=("lora",), validation_images=(file,))
    assert with_shown(plan, given, None, edits=True, must=True).shown["a cat"].size == (SIDE, SIDE)
    absent = SampleConfig(lora=("lora",), validation_images=(tmp_path / "absent.png",))
    with pytest.raises(UserError, match=r"--validation_images .*absent\.png: No such file"):
        with_shown(plan, absent, None, edits=True, must=True)


def test_the_loss_is_the_runs_in_evaluate(case, flags, tmp_path) -> None:
    """It makes embeddings anew, of the pictures that the evaluation set has if the text encoder sees them."""
    run = train_with([*flags, "--sample_steps", "0"])
    output, cache = tmp_path / "evaluated", tmp_path / "other cache"
    main(
        [
            str(run.path),
            "--trust_runs",
            *f"--output_dir {output} --metrics eval_loss --latents_cache_dir".split(),
            str(cache),
        ]
    )
    rows = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["rows"]
    found = [row["values"][0]["value"] for row in rows]
    told = json.loads(run.summary_file.read_text(encoding="utf-8"))["eval"]
    assert found == pytest.approx([told["base"], told["final"]], rel=1e-6)
