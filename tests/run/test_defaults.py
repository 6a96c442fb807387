"""What is left open is decided by the model, then by the number of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dreamlora import registry
from dreamlora.cli.parse import parse_run
from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.config.rates import rate_outside_pairs
from dreamlora.errors import UserError
from dreamlora.interfaces import SampleDefaults
from dreamlora.run import defaults, preflight
from dreamlora.run.defaults import ImageCounts


def flux_recipe(**eval_options: int) -> RunConfig:
    """README's command for FLUX.1, as far as the evaluation's price depends on it."""
    plain = RunConfig()
    return replace(
        plain,
        model=replace(plain.model, gradient_checkpointing=True),
        train=replace(plain.train, train_batch_size=1, gradient_accumulation_steps=4, max_train_steps=800),
        eval=replace(plain.eval, **eval_options),
    )


def test_the_evaluation_of_the_flux_recipe_costs_a_tenth_at_most() -> None:
    for images in (ImageCounts(5, 5, 0), ImageCounts(24, 5, 16), ImageCounts(100, 16, 16)):
        config = defaults.by_length(flux_recipe(), images, world=1)
        assert config.eval.eval_steps and config.eval.final_eval_items
        assert defaults.eval_price(config, images, world=1).share <= 0.1


def test_class_images_and_processes_count_as_training() -> None:
    images = ImageCounts(20, 4, 16)
    plain = flux_recipe()
    prior = replace(plain, data=replace(plain.data, with_prior_preservation=True, class_prompt="a dog"))
    one, two, with_prior = (
        defaults.eval_price(defaults.by_length(config, images, world), images, world).training
        for config, world in ((plain, 1), (plain, 2), (prior, 1))
    )
    assert two == with_prior == 2 * one


@pytest.mark.parametrize("name", registry.names("optimizers"))
def test_the_units_decide_the_learning_rate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "check_needs", lambda kind, name: None)
    plugin = registry.load("optimizers", name)
    model = ["--pretrained_model_name_or_path", "some/model", "--optimizer", name]
    for units, own in (("plain", plugin.DEFAULT_LR), ("start", getattr(plugin, "START_LR", plugin.DEFAULT_LR))):
        config, _ = parse_run([*model, "--lora_units", units, "--train_text_encoder"])
        decided = defaults.by_model(config, 512, SampleDefaults(20, 3.0), world=1).optim
        assert (decided.learning_rate, decided.text_encoder_lr) == (own, own)
        # what is in no pair is in plain units whatever the LoRA is in
        assert rate_outside_pairs(decided, own) == pytest.approx(plugin.DEFAULT_LR)


@pytest.mark.parametrize("units", ["plain", "start"])
def test_until_a_test_finds_a_rate_it_is_that_of_a_run_without_the_flag(units: str) -> None:
    flags = ["--pretrained_model_name_or_path", "tiny-flow", "--optimizer", "adamw", "--lora_units", units]
    with_auto, without = (
        defaults.by_model(parse_run([*flags, *more])[0], 64, SampleDefaults(20, 3.0), world=1).optim
        for more in (["--learning_rate", "auto"], [])
    )
    assert with_auto == without


def test_a_plug_in_without_a_rate_in_these_units_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(registry.load("optimizers", "sgd"), "START_LR")
    flags = ["--pretrained_model_name_or_path", "some/model", "--optimizer", "sgd", "--lora_units", "start"]
    with pytest.raises(UserError, match=r"--lora_units start: --optimizer sgd names no .*: give --learning_rate"):
        defaults.by_model(parse_run(flags)[0], 512, SampleDefaults(20, 3.0), world=1)
    config = defaults.by_model(parse_run([*flags, "--learning_rate", "2"])[0], 512, SampleDefaults(20, 3.0), world=1)
    assert config.optim.learning_rate == 2


def test_decided_options_stay() -> None:
    config = defaults.by_length(flux_recipe(eval_steps=10, final_eval_items=0), ImageCounts(5, 5, 0), world=1)
    assert (config.eval.eval_steps, config.eval.final_eval_items) == (10, 0)


@pytest.mark.parametrize("place", ["instance_images", "samples/step_000010", "references"])
@pytest.mark.parametrize("flag", ["--instance_data_dir", "--class_data_dir"])
def test_images_that_overwriting_would_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / place).mkdir(parents=True)
    argv = [flag, f"run/{place}", "--overwrite_output_dir"]
    if flag == "--class_data_dir":
        argv += ["--with_prior_preservation", "--class_prompt", "a dog"]
    config, _ = parse_run([*argv, "--output_dir", "run"])
    with pytest.raises(UserError, match=rf"{flag} run/{place} is where the run writes files of its own"):
        defaults.run_folder(config)
    assert defaults.run_folder(parse_run([*argv, "--output_dir", "elsewhere"])[0]).path == Path("elsewhere")


def test_images_beside_what_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a person's is removed there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert defaults.run_folder(parse_run(["--instance_data_dir", "photos", "--output_dir", "."])[0]).path == Path()


@pytest.mark.parametrize(
    "place", ["samples", "checkpoints", "checkpoints/candidates", "eval_images", "best", "references"]
)
@pytest.mark.parametrize("target", ["large", "nowhere", "/", "itself"])
@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]])
def test_a_run_lies_in_one_place(place: str, target: str, flags: list[str], tmp_path: Path) -> None:
    """Else its report would have no samples, and it could not be resumed: readers follow no link out of the folder."""
    (tmp_path / "large").mkdir()
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to({"/": Path("/"), "itself": link}.get(target, tmp_path / target))
    config, _ = parse_run(["--subject", "checkerling", "--output_dir", str(tmp_path / "run"), *flags])
    with pytest.raises(
        UserError, match=rf"run/{place} is a link that leads out of the run's folder, .* or make it a link"
    ):
        defaults.run_folder(config)


@pytest.mark.parametrize("way", [".", "above"])
def test_which_may_be_behind_a_link(way: str, tmp_path: Path) -> None:
    (tmp_path / "large" / "kept" / "samples").mkdir(parents=True)
    (tmp_path / "large" / "eval_images").symlink_to("kept/samples")
    (tmp_path / "large" / "checkpoints").symlink_to("kept")
    (tmp_path / "link").symlink_to(tmp_path / "large")
    path = {".": tmp_path / "link", "above": tmp_path / "link" / "kept"}[way]
    assert defaults.run_folder(parse_run(["--subject", "checkerling", "--output_dir", str(path)])[0]).path == path


def test_folders_are_looked_at_again_for_those_who_call_from_python(tmp_path: Path) -> None:
    plain = RunConfig()
    data = replace(plain.data, instance_data_dir=tmp_path)
    config = replace(plain, data=data, train=replace(plain.train, output_dir=tmp_path / "run"))
    with pytest.raises(UserError, match="lies in --instance_data_dir"):
        defaults.run_folder(config)


@pytest.mark.parametrize(
    ("given", "steps"), [("0.1", 80), ("0.0001", 1), ("0.999", 799), ("0", 0), ("1", 1), ("1.0", 1), ("500", 500)]
)
def test_a_warm_up_below_one_is_a_share_of_the_steps(given: str, steps: int) -> None:
    """config.yaml and the checkpoints' settings have the number of steps, whole."""
    plain, (config, _) = flux_recipe(), parse_run(["--lr_warmup_steps", given])
    settled = defaults.by_length(replace(plain, optim=config.optim), ImageCounts(5, 5, 0), world=1)
    assert as_flat_dict(settled)["lr_warmup_steps"] == steps
    assert isinstance(settled.optim.lr_warmup_steps, int)


def test_a_share_counts_the_steps_that_epochs_make() -> None:
    plain, (config, _) = RunConfig(), parse_run(["--lr_warmup_steps", "0.5"])
    config = replace(plain, optim=config.optim, train=replace(plain.train, num_train_epochs=10, train_batch_size=2))
    assert defaults.by_length(config, ImageCounts(8, 5, 0), world=1).optim.lr_warmup_steps == 20


def test_the_saved_config_has_the_prompts_as_they_are_drawn() -> None:
    """Another program that reads it knows no subject."""
    argv = ["--validation_prompt", "a {} at night", "--negative_prompt", "a blurred {}"]
    argv += ["--instance_prompt", "a photo of sks dog"]
    config, _ = parse_run([*argv, "--pretrained_model_name_or_path", "other"])
    sample = defaults.by_model(config, 64, SampleDefaults(20, 3.0), world=1).sample
    assert (sample.validation_prompt, sample.negative_prompt) == ("a sks dog at night", "a blurred sks dog")


def test_the_saved_config_has_the_familys_own_negative_prompt() -> None:
    config, _ = parse_run(["--pretrained_model_name_or_path", "other"])
    assert defaults.by_model(config, 64, SampleDefaults(20, 3.0, " "), world=1).sample.negative_prompt == " "
    assert defaults.by_model(config, 64, SampleDefaults(20, 3.0), world=1).sample.negative_prompt is None


def test_an_average_of_an_average_is_refused() -> None:
    flags = ["--optimizer", "schedulefree_adamw", "--ema_decay", "0.99", "--subject", "checkerling"]
    pytest.importorskip("schedulefree")
    for check in (preflight.check_inputs, lambda config: defaults.by_model(config, 64, SampleDefaults(2, 1.0), 1)):
        with pytest.raises(UserError, match="--ema_decay: --optimizer schedulefree_adamw keeps an average of its own"):
            check(parse_run(flags)[0])
        check(parse_run([*flags, "--ema_decay", "0"])[0])
        check(parse_run([*flags, "--optimizer", "adamw"])[0])


@pytest.mark.parametrize("decay", ["-0.1", "1", "nan"])
def test_a_decay_that_is_none(decay: str) -> None:
    with pytest.raises(UserError, match="--ema_decay must be at least 0 and below 1"):
        parse_run(["--ema_decay", decay])
