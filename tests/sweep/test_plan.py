"""What a command line asks for: methods, grids, seeds, folders, flags of every run. Torch-free."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from dreamlora.cli.parse import parse_run
from dreamlora.config.programs import PROGRAMS, TextToImageConfig
from dreamlora.errors import UserError
from dreamlora.sweep import plan
from dreamlora.sweep.config import parse


def sweep(*argv: str) -> plan.Sweep:
    return plan.sweep_of(*parse(argv))


def message(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        sweep(*argv)
    return str(error.value)


def test_defaults_are_seven_rates_three_seeds_and_five_fresh_ones() -> None:
    found = sweep("--optimizers", "adamw", "scaled_adamw")
    grid = found.grid(found.entries[0])
    assert len(grid) == 7 and grid[3] == 2e-3  # the embedded model's preset
    ratios = [high / low for low, high in itertools.pairwise(grid)]
    assert ratios == pytest.approx([math.sqrt(10)] * 6, rel=2e-3)
    assert (found.seeds, found.headline_seeds) == ((0, 1, 2), (3, 4, 5, 6, 7))
    assert found.root == Path("outputs/adamw-vs-scaled_adamw")


def test_grids_share_their_rates() -> None:
    """scaled_adamw's own rate is 6e-3: the lattice through 2e-3 has 6.32e-3."""
    found = sweep("--optimizers", "adamw", "scaled_adamw")
    adamw, scaled = (found.grid(entry) for entry in found.entries)
    assert scaled[3] == 6.32e-3
    assert set(adamw) & set(scaled) == set(adamw[1:])


def test_quick_is_smaller_and_flags_win_over_it() -> None:
    found = sweep("--optimizers", "adamw", "--quick")
    assert (len(found.grid(found.entries[0])), found.seeds, found.headline_seeds) == (3, (0,), (1, 2, 3))
    more = sweep("--optimizers", "adamw", "--quick", "--seeds", "4", "9", "--headline_seeds", "2")
    assert (more.seeds, more.headline_seeds) == ((4, 9), (10, 11))


def test_given_rates_are_for_all() -> None:
    found = sweep("--optimizers", "adamw", "sgd", "--learning_rates", "1e-2", "1e-3")
    assert [found.grid(entry) for entry in found.entries] == [[1e-3, 1e-2]] * 2


def test_captioned_images_can_be_what_is_trained() -> None:
    found = sweep(
        "--program", "text-to-image", "--optimizers", "adamw", "adamw+caption_dropout=0", "--style", "woodcut"
    )
    assert found.grid(found.entries[0])[3] == 4e-3  # the preset of that program
    jobs = [job for entry in found.entries for job in found.headline(entry, 1e-3)]
    configs = [parse_run(job.argv, PROGRAMS[job.program])[0] for job in jobs]
    assert {(type(config), config.data.style) for config in configs} == {(TextToImageConfig, "woodcut")}
    assert [config.data.caption_dropout for config in configs] == [0.1] * 5 + [0] * 5


def test_other_models_start_from_the_optimizers_own_rate() -> None:
    found = sweep("--optimizers", "adamw", "--pretrained_model_name_or_path", "some/model")
    assert found.grid(found.entries[0])[3] == 1e-4


@pytest.mark.parametrize(("model", "rates"), [("tiny", (2e-3, 6e-3, 9e-2)), ("some/model", (1e-4, 4e-4, 1e-2))])
def test_units_belong_to_a_method_and_so_does_their_rate(model: str, rates: tuple[float, ...]) -> None:
    methods = ("adamw", "adamw+lora_units=start", "lora_muon+lora_units=start")
    found = sweep("--optimizers", *methods, "--pretrained_model_name_or_path", model)
    assert [entry.usual_lr for entry in found.entries] == list(rates)
    assert [entry.label for entry in found.entries] == list(methods)
    configs = [parse_run(found.headline(entry, 1e-3)[0].argv)[0] for entry in found.entries]
    assert [config.optim.lora_units for config in configs] == ["plain", "start", "start"]


def test_methods_carry_settings_and_flags() -> None:
    found = sweep(
        "--optimizers",
        "adamw",
        "ScaledAdamW:betas=0.8,0.9,damping=0.2+rank=16+lora_layers=to_q,to_k".lower().replace(
            "scaledadamw", "scaled-adamw"
        ),
    )
    entry = found.entries[1]
    assert entry.label == "scaled_adamw:betas=0.8,0.9,damping=0.2+rank=16+lora_layers=to_q,to_k"
    config, options = parse_run(found.headline(entry, 1e-3)[0].argv)
    assert (config.optim.optimizer, config.lora.rank, config.lora.lora_layers) == ("scaled_adamw", 16, ("to_q", "to_k"))
    assert (options.betas, options.damping) == ((0.8, 0.9), 0.2)


def test_every_run_has_a_command_line_and_a_folder_of_its_own() -> None:
    found = sweep("--optimizers", "adamw", "adamw+rank=2", "--max_train_steps", "9")
    jobs = [job for entry in found.entries for job in found.tuning(entry, [1e-3, 1e-2])]
    assert len({job.folder for job in jobs}) == len(jobs) == 12
    config, _ = parse_run(jobs[-1].argv)
    assert (config.optim.learning_rate, config.train.seed, config.train.max_train_steps) == (1e-2, 2, 9)
    assert jobs[-1].folder == found.runs / "adamw+rank=2" / "lr0.01" / "seed2"


def test_tuning_draws_nothing_and_nothing_is_checkpointed() -> None:
    found = sweep("--optimizers", "adamw", "--sample_steps", "5")
    (entry,) = found.entries
    tuning, _ = parse_run(found.tuning(entry, [1e-3])[0].argv)
    headline, _ = parse_run(found.headline(entry, 1e-3)[0].argv)
    assert (tuning.sample.sample_steps, headline.sample.sample_steps) == (0, 5)
    assert (tuning.eval.save_best, headline.eval.save_best) == (False, True)
    assert tuning.train.checkpointing_steps == headline.train.checkpointing_steps == tuning.eval.final_eval_items == 0
    assert headline.eval.final_eval_items == 256
    kept = sweep("--optimizers", "adamw", "--checkpointing_steps", "50")
    assert parse_run(kept.headline(kept.entries[0], 1e-3)[0].argv)[0].train.checkpointing_steps == 50


def test_class_images_are_shared() -> None:
    found = sweep("--optimizers", "adamw", "sgd", "--output_dir", "out")
    places = {parse_run(found.headline(entry, 1.0)[0].argv)[0].data.class_data_dir for entry in found.entries}
    assert places == {Path("out/class_images")}
    without = sweep("--optimizers", "adamw", "--no_with_prior_preservation")
    assert parse_run(without.headline(without.entries[0], 1.0)[0].argv)[0].data.class_data_dir is None


def test_a_method_can_find_its_rates() -> None:
    found = sweep("--optimizers", "adamw", "adamw+learning_rate=Auto")
    given, entry = found.entries
    assert (given.tests, entry.tests) == (False, True) and entry.label == "adamw+learning_rate=Auto"
    assert len(found.grid(entry)) == 1, "there is nothing to choose from"
    jobs = [*found.tuning(entry, found.grid(entry)), *found.headline(entry, 0.1)]
    assert [parse_run(job.argv)[0].optim.learning_rate for job in jobs] == ["auto"] * 8
    assert {job.rate for job in jobs} == {"auto"} and len({job.folder for job in jobs}) == 8
    assert jobs[0].folder == found.runs / entry.slug / "lrauto" / "seed0"


def test_grids_grow_at_the_edge() -> None:
    assert plan.extended([1e-3, 3.16e-3, 1e-2], "high", 2) == [0.0316, 0.1]
    assert plan.extended([1e-3, 3.16e-3, 1e-2], "low", 1) == [0.000316]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "give either --optimizers, to train, or --runs"),
        (["--optimizers", "adamw", "--runs", "x"], "give either --optimizers"),
        (["--optimizers", "adam"], "Did you mean 'adamw'?"),
        (["--optimizers", "adamw", "adamw"], "--optimizers has a value twice"),
        (["--optimizers", "adamw", "AdamW"], "--optimizers has a method twice: adamw adamw"),
        (["--optimizers", "adamw:eps"], "settings are written name=value"),
        (["--optimizers", "adamw:epz=1"], "adamw has no setting 'epz'"),
        (["--optimizers", "adamw+rnk=3"], "unknown flag --rnk. Did you mean --rank?"),
        (["--optimizers", "adamw+seed=3"], "seed cannot differ between methods"),
        (["--optimizers", "adamw", "--max_train_step", "3"], "Did you mean --max_train_steps?"),
        (["--optimizers", "adamw", "--style", "woodcut"], "--program text-to-image"),
        (["--optimizers", "adamw", "--program", "text-to-image", "--subject", "x"], "here there is --style"),
        (["--optimizers", "adamw", "--program", "evaluate"], "--program takes one of dreambooth, text-to-image"),
        (["--optimizers", "adamw", "--learning_rate", "1"], "give --learning_rates"),
        (["--optimizers", "adamw", "--learning_rate", "auto"], "a method adamw+learning_rate=auto"),
        (["--optimizers", "adamw+learning_rate=1"], "learning_rate cannot differ between methods"),
        (["--optimizers", "adamw", "--seed", "1"], "give --seeds"),
        (["--optimizers", "adamw", "--optimizer=sgd"], "give --optimizers"),
        (["--optimizers", "adamw", "--learning_rates", "0"], "--learning_rates must be above 0"),
        (["--optimizers", "adamw", "--learning_rates", "-.5"], "--learning_rates must be above 0 (got -0.5)"),
        (["--optimizers", "adamw", "--seeds", "1", "1"], "--seeds has a value twice"),
        (["--optimizers", "adamw", "--workers", "0"], "--workers must be at least 1"),
        (["--optimizers", "adamw", "--baseline", "sgd"], "--baseline must be one of --optimizers"),
        (["--optimizers", "adamw", "--eval_steps", "0"], "--eval_steps 0 leaves nothing to compare"),
        (["--runs", "x", "--rank", "4"], "--rank trains nothing"),
        (["--runs", "x", "--program", "text-to-image"], "--program is for training: with --runs"),
        (["--runs", "x", "--quick"], "--quick is for training"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value) or "nothing",
)
def test_mistakes_are_told_before_anything_runs(argv: list[str], expected: str) -> None:
    assert expected in message(*argv)


def test_a_launcher_with_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "plain python" in message("--optimizers", "adamw")


def test_a_folder_of_other_flags_is_refused(tmp_path: Path) -> None:
    out = ["--output_dir", str(tmp_path)]
    plan.check_settings(sweep("--optimizers", "adamw", "--rank", "4", *out))
    plan.check_settings(sweep("--optimizers", "adamw", "sgd", "--rank", "4", "--sample_steps", "7", *out))
    with pytest.raises(UserError, match=r"made with other flags \(rank: 4 then, 2 now\)"):
        plan.check_settings(sweep("--optimizers", "adamw", "--rank", "2", *out))


def test_damaged_settings_are_told_instead_of_passed_over(tmp_path: Path) -> None:
    out = ["--output_dir", str(tmp_path)]
    plan.check_settings(sweep("--optimizers", "adamw", "--rank", "4", *out))
    (tmp_path / "settings.json").write_text('{"rank": 4', encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot read .*settings\.json"):
        plan.check_settings(sweep("--optimizers", "adamw", "--rank", "2", *out))
