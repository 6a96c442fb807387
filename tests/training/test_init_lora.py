"""``--init_lora``: training goes on from a LoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreamlora.callbacks.weights import base_model
from dreamlora.cli.parse import parse_run
from dreamlora.commands.doctor.diagnosis import diagnose
from dreamlora.errors import UserError
from dreamlora.families import sd
from dreamlora.lora import embeddings
from dreamlora.lora.files import read_weights
from dreamlora.lora.formats import kohya
from dreamlora.lora.names import names_of
from dreamlora.lora.pairs import tuned_layers
from dreamlora.lora.saving import save_content
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop
from tests.training.conftest import flags_of, train_with

pytestmark = pytest.mark.usefixtures("no_report")

SHORT = ["--sample_steps", "0", "--final_eval_items", "0", "--checkpointing_steps", "0"]
NAMES = names_of(sd, {"layers_per_block": 1, "block_out_channels": (8, 16)})


@pytest.fixture
def go_on(photos: Path, cache: Path, sd_folder: Path, tmp_path: Path) -> Callable[..., RunFolder]:
    """A run that goes on from a LoRA with more flags, without a rank."""

    def run(file: Path, *more: str, name: str = "on") -> RunFolder:
        return train_with([*plain(photos, cache, sd_folder, tmp_path / name), "--init_lora", str(file), *SHORT, *more])

    return run


def plain(photos: Path, cache: Path, model: Path, output: Path) -> list[str]:
    flags = flags_of(photos, cache, model, output)
    place = flags.index("--rank")
    return flags[:place] + flags[place + 2 :]


def losses(folder: RunFolder) -> dict[int, float]:
    rows = [row for row in folder.metrics() if row["name"] == "eval/loss"]
    return {row["step"]: row["value"] for row in rows}


def weights(folder: RunFolder) -> Any:
    return read_weights(folder.lora_file, NAMES)


EXACT = {
    "LoRA": [],
    "another alpha": ["--lora_alpha", "6"],
    "rsLoRA": ["--use_rslora"],
    "ranks by layer": ["--rank_pattern", "to_k", "3", "--alpha_pattern", "to_v", "5"],
    "convolutions": ["--lora_layers", "all"],
    "text encoder": ["--train_text_encoder", "--text_encoder_rank", "3", "--new_tokens", "sks:2=d,o"],
    "half precision": ["--mixed_precision", "bf16"],
    "DoRA": ["--adapter", "dora"],
    "LoHa": ["--adapter", "loha"],
    "LoKr": ["--adapter", "lokr"],
    "an average": ["--ema_decay", "0.5"],
}
TRAINED = ("--train_text_encoder", "--mixed_precision", "bf16", "--new_tokens", "sks:2=d,o")


@pytest.mark.parametrize("kind", EXACT)
def test_the_first_loss_is_the_last_one_of_a_finished_run(train, go_on, kind) -> None:
    """To the last bit; and the same layers train, in their ranks and scales."""
    first = train(*SHORT, *EXACT[kind])
    again = go_on(first.path, *(word for word in EXACT[kind] if word in TRAINED))
    assert losses(again)[0] == losses(first)[6] != losses(first)[0]
    assert losses(again)[6] != losses(again)[0]
    one, other = weights(first), weights(again)
    facts = {part: {name: (each.kind, each.rank, each.scale) for name, each in one[part].items()} for part in one}
    assert facts == {
        part: {name: (each.kind, each.rank, pytest.approx(each.scale)) for name, each in other[part].items()}
        for part in other
    }


def test_of_a_start_away_from_zero_the_difference_is_gone_on_from(train, go_on) -> None:
    first = train(*SHORT, "--init", "pissa")
    again = go_on(first.path)
    assert losses(again)[0] == pytest.approx(losses(first)[6], rel=1e-4)
    assert {each.rank for each in weights(again)["unet"].values()} == {4}


@pytest.fixture(scope="module")
def lora(sd_folder: Path, photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose LoRA has rank 2 and scale 2."""
    output = tmp_path_factory.mktemp("first") / "run"
    return train_with([*flags_of(photos, cache, sd_folder, output), *SHORT, "--lora_alpha", "4"])


def test_a_file_of_another_program(go_on, lora, tmp_path) -> None:
    file = save_content(tmp_path / "other" / "kohya.safetensors", kohya.write(weights(lora), NAMES))
    again = go_on(file)
    assert losses(again)[0] == losses(lora)[6]
    assert weights(again)["unet"].keys() == weights(lora)["unet"].keys()


def first_loss(run: Any) -> torch.Tensor:
    run.model.train()
    return loop.micro_batch_loss(run, loop.next_batches(run, 0, 0), 0).detach()


def test_the_base_model_is_the_untouched_one(prepare, sd_folder, lora) -> None:
    run = prepare(sd_folder, "--init_lora", str(lora.path))
    own = first_loss(run)
    with base_model(run):
        base = first_loss(run)
    assert torch.equal(base, first_loss(prepare(sd_folder))) and not torch.equal(base, own)
    assert torch.equal(first_loss(run), own)


def test_other_ranks_hold_the_same_or_the_most_of_it(prepare, sd_folder, lora, caplog) -> None:
    """More of them hold all; fewer the largest singular values, and how much that is is said."""
    same = first_loss(prepare(sd_folder, "--init_lora", str(lora.path)))
    more = prepare(sd_folder, "--init_lora", str(lora.path), "--rank", "5")
    torch.testing.assert_close(first_loss(more), same, rtol=1e-5, atol=1e-6)
    layers = list(tuned_layers(more.model))
    assert {(layer.rank, layer.scaling) for layer in layers} == {(5, 2.0)}
    assert all(layer.pair.B[:, 2:].eq(0).all() and layer.pair.A[2:].ne(0).all() for layer in layers), "could not learn"
    assert "hold" not in caplog.text
    fewer = prepare(sd_folder, "--init_lora", str(lora.path), "--rank", "1")
    assert {layer.rank for layer in tuned_layers(fewer.model)} == {1}
    [told] = [record.message for record in caplog.records if "the ranks that are asked for hold" in record.message]
    assert 0.2 < float(told.split("hold ")[1].split("%")[0]) / 100 < 1
    for layer in tuned_layers(fewer.model):
        product = weights(lora)["unet"][layer.name.removeprefix("denoiser.")].delta().flatten(1)
        U, S, V = torch.linalg.svd(product)
        best = S[0] * torch.outer(U[:, 0], V[0])
        found = layer.scaling * layer.pair.B.flatten(1) @ layer.pair.A.flatten(1)
        torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-6)


def test_another_alpha_is_another_scale_of_the_same(prepare, sd_folder, lora) -> None:
    same = first_loss(prepare(sd_folder, "--init_lora", str(lora.path)))
    run = prepare(sd_folder, "--init_lora", str(lora.path), "--lora_alpha", "1")
    assert {layer.scaling for layer in tuned_layers(run.model)} == {0.5}
    torch.testing.assert_close(first_loss(run), same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_layers_that_are_new_begin_without_effect(prepare, train, sd_folder, adapter) -> None:
    lora = train(*SHORT, "--lora_alpha", "4", "--adapter", adapter)
    same = first_loss(prepare(sd_folder, "--init_lora", str(lora.path)))
    run = prepare(sd_folder, "--init_lora", str(lora.path), "--lora_layers", "all")
    there = {layer.name: layer for layer in tuned_layers(run.model)}
    assert len(there) > len(weights(lora)["unet"])
    torch.testing.assert_close(first_loss(run), same, rtol=1e-5, atol=1e-6)
    assert {(layer.rank, layer.scaling) for layer in there.values()} == {(2, 2.0)}
    assert {layer.pair.magnitude is None for layer in there.values()} == {adapter == "lora"}


def test_a_resumed_run_is_the_uninterrupted_one(go_on, lora, tmp_path) -> None:
    """Its step 0 is what it began with, also where that has to be measured anew."""
    whole = go_on(lora.path, name="whole")
    part = go_on(lora.path, "--max_train_steps", "4", "--checkpointing_steps", "2", name="part")
    part.eval_items_file.unlink()
    again = go_on(lora.path, "--resume_from_checkpoint", "step-000004", name="part")
    assert losses(again)[0] == losses(whole)[0] == losses(lora)[6]
    one, other = (load_file(folder.lora_file) for folder in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_another_beginning_is_refused(go_on, lora, train, tmp_path) -> None:
    begun = go_on(lora.path, "--max_train_steps", "2", "--checkpointing_steps", "2")
    other = tmp_path / "other.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(lora.lora_file).items()}, other)
    for file in (other, None):
        with pytest.raises(
            UserError, match=r"made with other settings: .*LoRA that it began with: '[0-9a-f]{12}' then"
        ):
            if file:
                go_on(file, "--resume_from_checkpoint", "latest")
            else:
                train(*SHORT, "--output_dir", str(begun.path), "--resume_from_checkpoint", "latest")


def test_its_config_makes_the_same_run_again(go_on, train, tmp_path) -> None:
    """Also of layers of different ranks, for which there is no one option."""
    lora = train(*SHORT, "--rank_pattern", "to_k", "3")
    first = go_on(lora.path)
    options = first.config()
    assert "rank" not in options and "lora_alpha" not in options
    assert first.base_model()["init_lora"] and len(first.base_model()["init_lora"]) == 12
    again = train_with(["--config", str(first.config_file), "--output_dir", str(tmp_path / "again")])
    assert load_file(again.lora_file).keys() == load_file(first.lora_file).keys()
    assert all(torch.equal(one, load_file(again.lora_file)[name]) for name, one in load_file(first.lora_file).items())


TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
REFUSED: list[tuple[list[str], Callable[..., Any], str]] = [
    (["--init", "pissa"], lambda tensors: tensors, "--init starts a new LoRA, and --init_lora goes on from one"),
    (["--adapter", "loha"], lambda tensors: tensors, "--adapter loha: --init_lora .* is a lora"),
    (["--lora_layers", "to_q"], lambda tensors: tensors, r"layers that --lora_layers and --lora_blocks do not name"),
    ([], lambda tensors: {name.replace("to_q", "to_x"): each for name, each in tensors.items()}, "to_x"),
    (
        [],
        lambda tensors: {**tensors, TEXT.format("A"): torch.ones(2, 16), TEXT.format("B"): torch.ones(16, 2)},
        "for the text_encoder too, and that would be lost: give --train_text_encoder",
    ),
    ([], lambda tensors: {name: each * float("nan") for name, each in tensors.items()}, "not finite"),
    ([], lambda tensors: {"weight": torch.ones(2)}, "is not a LoRA"),
]


@pytest.mark.parametrize(("more", "change", "words"), REFUSED)
def test_what_cannot_be_gone_on_from_is_one_message(flags, lora, tmp_path, more, change, words) -> None:
    file = tmp_path / "changed.safetensors"
    save_file({name: each.contiguous() for name, each in change(load_file(lora.lora_file)).items()}, file)
    with pytest.raises(UserError, match=words):
        train_with([*flags, "--init_lora", str(file), *more])
    assert not (tmp_path / "run").exists()


def test_a_product_keeps_its_ranks_and_layers(train, go_on) -> None:
    lora = train(*SHORT, "--adapter", "loha")
    for more, words in (
        (["--rank", "3"], "--rank: --init_lora .* is a loha, which keeps its own"),
        (["--lora_layers", "all"], "has nothing for unet.*no loha can begin there"),
        (["--train_text_encoder"], "has nothing for text_encoder.*no loha can begin there"),
    ):
        with pytest.raises(UserError, match=words):
            go_on(lora.path, *more)


def test_a_text_encoder_begins_beside_a_lora_without_one(prepare, sd_folder, lora) -> None:
    same = first_loss(prepare(sd_folder, "--init_lora", str(lora.path)))
    run = prepare(sd_folder, "--init_lora", str(lora.path), "--train_text_encoder")
    text = [layer for layer in tuned_layers(run.model) if layer.name.startswith("encoders")]
    assert {(layer.rank, layer.scaling) for layer in text} == {(2, 2.0)}
    torch.testing.assert_close(first_loss(run), same, rtol=1e-5, atol=1e-6)


def test_embeddings_that_lie_beside_it_are_gone_on_from(prepare, sd_folder, lora, tmp_path) -> None:
    """The base model, and the length that they are kept at, are by the words, as in the run that they are from."""
    file, rows = Path(shutil.copy(lora.lora_file, tmp_path)), torch.full((2, 16), 0.5)
    embeddings.write(tmp_path, {"sks": {"text_encoder": rows}}, sd.EMBEDDING_KEYS)
    run = prepare(sd_folder, "--init_lora", str(file), "--new_tokens", "<other>=o", "sks:2=d,o")
    [part] = run.new_tokens.values()
    [other, *start] = part.start
    assert torch.equal(part.rows[1:], rows) and torch.equal(part.rows[0], other)
    assert not torch.equal(start[0], rows[0]) and torch.equal(start[1], other)
    told = json.loads(run.folder.outline_file.read_text(encoding="utf-8"))["LoRA"]
    assert "the new token <other> (a vector, from o)" in told
    assert "the new token sks (2 vectors, goes on from that LoRA's)" in told
    with base_model(run):
        assert torch.equal(part.rows, part.start)
    alone = prepare(sd_folder, "--init_lora", str(lora.path))
    assert run.settings["LoRA that it began with"] != alone.settings["LoRA that it began with"]
    for more, words in (
        ([], "has embeddings of the new token sks too, and these would be lost: give --new_tokens sks:2"),
        (["--new_tokens", "sks=d"], "has 2 embeddings of the new token sks, .*: give --new_tokens sks:2"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(sd_folder, "--init_lora", str(file), *more)


def test_a_missing_file_is_refused(flags, tmp_path) -> None:
    with pytest.raises(UserError, match="no such LoRA file or folder"):
        train_with([*flags, "--init_lora", str(tmp_path / "nowhere.safetensors")])


def test_doctor_goes_through_it(photos, cache, sd_folder, tmp_path, lora) -> None:
    flags = [*plain(photos, cache, sd_folder, tmp_path / "run"), "--init_lora", str(lora.path)]
    found = diagnose(*parse_run(flags))
    assert not found["errors"] and [(part["ranks"], part["alphas"]) for part in found["trained"]] == [((2,), (4.0,))]
