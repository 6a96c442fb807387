"""Flags without effect and values that can hardly be meant are told; what a preset or a default sets is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dreamlora import registry
from dreamlora.cli.declared import options_of
from dreamlora.cli.parse import parse_run
from dreamlora.config import RunConfig, TextToImageConfig
from dreamlora.config.data import DataSet
from dreamlora.config.plausible import _IDLE, _OF_FAMILIES, _USUAL, doubts
from dreamlora.config.programs import PROGRAMS
from dreamlora.families import flux, flux2, sd
from dreamlora.interfaces import SampleDefaults
from dreamlora.run import defaults
from dreamlora.run.defaults import ImageCounts
from tests.test_docs import COMMANDS, command_and_flags

MODEL = ["--pretrained_model_name_or_path", "somewhere/else"]
OPTIMIZERS = registry.names("optimizers")


def told(argv: str | list[str], family: Any = sd, images: int = 8, own: int = 512, embedded: bool = False) -> list[str]:
    """Of a run by its flags, decided as a run decides them."""
    words = argv.split() if isinstance(argv, str) else argv
    return told_of(parse_run([*([] if embedded else MODEL), *words])[0], family, images, own)


def told_of(
    config: RunConfig, family: Any, images: int, own: int, scheduler: dict[str, Any] | None = None
) -> list[str]:
    config = defaults.by_model(config, own, SampleDefaults(20, 3.0), world=1)
    config = defaults.by_length(config, ImageCounts(images, 2, 2), world=1)
    return doubts(config, defaults.facts(config, family.OWN_OPTIONS, scheduler or {}, own, images, world=1))


STEPS = "--max_train_steps 200 "
IDLE = [
    ("--lr_num_cycles 3", "--lr_scheduler cosine_with_restarts --lr_warmup_steps 5"),
    ("--lr_power 2", "--lr_scheduler polynomial --lr_warmup_steps 5"),
    ("--lr_warmup_steps 10", "--lr_scheduler cosine"),
    ("--image_column photo", "--dataset_name a/b"),
    ("--dataset_config_name x", "--dataset_name a/b"),
    ("--num_class_images 50", "--with_prior_preservation --class_prompt dog"),
    ("--prior_loss_weight 0.5", "--with_prior_preservation --class_prompt dog"),
    ("--prior_generation_precision fp32", "--with_prior_preservation --class_prompt dog"),
    ("--adam_weight_decay_text_encoder 0.1", "--train_text_encoder"),
    ("--clip_model x", "--eval_metrics clip_score"),
    ("--dino_model x", "--eval_metrics dino"),
    ("--caption_variants 8", "--shuffle_tags"),
    ("--hub_token x", "--push_to_hub"),
    ("--hub_model_id x", "--push_to_hub"),
    ("--logging_dir x", "--report_to tensorboard"),
    ("--huber_c 0.2", "--loss_type huber"),
    ("--huber_schedule constant", "--loss_type smooth_l1"),
    ("--huber_scale 2", "--loss_type huber --huber_schedule exponential"),
    ("--unmasked_weight 0.1", "--alpha_mask --instance_data_dir prompts"),
    ("--unmasked_weight 0.1", "--mask_data_dir docs --instance_data_dir prompts"),
    ("--alpha_mask", "--instance_data_dir prompts"),
]
OF_FLOWS = [
    ("--logit_mean 0.5", "--weighting_scheme logit_normal"),
    ("--logit_std 2", "--timestep_sampling logit_normal --weighting_scheme cosmap"),
    ("--mode_scale 1", "--timestep_sampling mode"),
    ("--sigmoid_scale 2", "--timestep_sampling sigmoid"),
    ("--timestep_beta 2,5", "--timestep_sampling beta"),
    ("--timestep_table 1 2", "--timestep_sampling table"),
]


@pytest.mark.parametrize(("flags", "counts"), IDLE)
def test_a_flag_counts_only_beside_another(flags: str, counts: str) -> None:
    name = flags.split()[0]
    assert [doubt for doubt in told(STEPS + flags) if doubt.startswith(f"{name} has no effect: ")]
    assert not told(f"{STEPS}{flags} {counts}")


@pytest.mark.parametrize(("flags", "counts"), OF_FLOWS)
def test_a_flag_of_rectified_flows_too(flags: str, counts: str) -> None:
    (doubt,) = told(STEPS + flags, flux)
    assert doubt.startswith(f"{flags.split()[0]} has no effect: ") and "--timestep_sampling" in doubt
    assert not told(f"{STEPS}{flags} {counts}", flux)


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ("--num_train_epochs 9 --max_train_steps 5 --lr_warmup_steps 0", "num_train_epochs"),
        ("--validation_epochs 2 --sample_steps 5", "validation_epochs"),
        ("--num_images_per_prompt 2 --num_validation_images 3", "num_images_per_prompt"),
        ("--validation_prompt dog --sample_steps 0", "validation_prompt"),
        ("--sample_steps 0 --num_images_per_prompt 2", "num_images_per_prompt"),
        ("--final_eval_items 64 --eval_steps 0", "final_eval_items"),
        ("--eval_batch_size 4 --eval_steps 0", "eval_batch_size"),
        ("--checkpoints_total_limit 3 --checkpointing_steps 0", "checkpoints_total_limit"),
        ("--subject checkerling --instance_data_dir prompts", "subject"),
        ("--subject checkerling --dataset_name a/b", "subject"),
        ("--crop_variants 8 --center_crop", "crop_variants"),
        ("--adam_beta1 0.5 --optimizer sgd", "adam_beta1"),
        ("--adam_beta2 0.9 --optimizer adafactor", "adam_beta2"),
        ("--adam_epsilon 1e-7 --optimizer lion", "adam_epsilon"),
        ("--huber_scale 2 --loss_type huber --huber_schedule snr", "huber_scale"),
    ],
)
def test_one_flag_silences_another(flags: str, idle: str) -> None:
    assert [doubt for doubt in told(flags) if doubt.startswith(f"--{idle} has no effect: ")]


@pytest.mark.parametrize("flag", _OF_FAMILIES)
def test_options_of_other_families_are_told(flag: str) -> None:
    values = {"prediction_type": "epsilon", "weighting_scheme": "mode", "negative_prompt": "x"}
    values |= {"timestep_sampling": "uniform", "timestep_beta": "3,4", "timestep_table": "1 2"}
    values |= {"precondition_outputs": "1", **dict.fromkeys(("debiased_estimation_loss", "rescale_betas_zero_snr"), "")}
    more = {"logit_mean": "--weighting_scheme logit_normal", "logit_std": "--weighting_scheme logit_normal"}
    more |= {"sigmoid_scale": "--timestep_sampling sigmoid", "timestep_beta": "--timestep_sampling beta"}
    more |= {"timestep_table": "--timestep_sampling table"}
    argv = f"{STEPS}--{flag} {values.get(flag, '2' if flag != 'max_sequence_length' else '64')} {more.get(flag, '')}"
    argv = argv.replace("tokenizer_max_length 2", "tokenizer_max_length 20")
    argv += " --weighting_scheme mode" if flag == "mode_scale" else ""
    by_family = {
        family: [d for d in told(argv, family) if d.startswith(f"--{flag} has no effect: it is for")]
        for family in (sd, flux, flux2)
    }
    assert 0 < sum(map(bool, by_family.values())) < len(by_family), "some use it, some do not"


def test_every_family_s_options_are_options_and_explained() -> None:
    for name in registry.names("families"):
        own = registry.load("families", name).OWN_OPTIONS
        assert set(own) <= _OF_FAMILIES.keys() and registry.load("families", name).PROMPT_LENGTH in own
    known = options_of(RunConfig).keys() | options_of(TextToImageConfig).keys() | options_of(DataSet).keys()
    assert {flag for idle in _IDLE for flag in idle.flags} | _OF_FAMILIES.keys() | _USUAL.keys() <= known


FAR = {
    "adam_beta1": "0 0.9999",
    "adam_beta2": "0.1 0.9999999",
    "adam_epsilon": "0.1",
    "adam_weight_decay": "1",
    "adam_weight_decay_text_encoder": "2",
    "caption_dropout": "0.99",
    "caption_variants": "100",
    "crop_variants": "1000",
    "dataloader_num_workers": "1000",
    "eval_batch_size": "5000",
    "eval_num_images": "500",
    "gradient_accumulation_steps": "1000",
    "guidance_scale": "-1 100",
    "huber_c": "1e-6 50",
    "huber_scale": "1e-3 1e4",
    "logit_mean": "9 -9",
    "logit_std": "0.001 40",
    "lora_dropout": "0.9",
    "lr_power": "0 50",
    "max_grad_norm": "1e6",
    "max_train_steps": "1000000000",
    "mode_scale": "-20 100",
    "noise_offset": "10",
    "num_class_images": "1 1000000",
    "num_images_per_prompt": "500",
    "num_inference_steps": "1 1000",
    "num_train_epochs": "10000000",
    "num_validation_images": "500",
    "prior_loss_weight": "0 100",
    "repeats": "100000",
    "sample_batch_size": "10000",
    "sample_guidance_scale": "100",
    "sigmoid_scale": "0.001 40",
    "snr_gamma": "0.01 500",
}


@pytest.mark.parametrize("flag", sorted(_USUAL.keys() & options_of(RunConfig).keys()))
def test_numbers_far_from_the_usual_are_told_and_defaults_are_usual(flag: str) -> None:
    low, high, usual = _USUAL[flag]
    default = options_of(RunConfig)[flag].default
    assert default is None or low <= default <= high
    for value in FAR[flag].split():
        more = ["--eval_metrics", "dino"] if flag == "eval_num_images" else []
        found = told([f"--{flag}={value}", *more], flux if flag in flux.OWN_OPTIONS else sd)
        assert [doubt for doubt in found if f"is far from what is usual ({usual})" in doubt], (value, found)


@pytest.mark.parametrize("units", ["plain", "start"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_knows_its_rates(name: str, units: str) -> None:
    plugin = registry.load("optimizers", name)
    try:
        registry.check_needs("optimizers", name)
    except Exception:
        pytest.skip("not installed")
    idle = getattr(plugin, "UNITS_FREE", False) and units == "start"
    own = plugin.START_LR if units == "start" and not idle else plugin.DEFAULT_LR
    flags = f"{STEPS}--optimizer {name} --lora_units {units} --learning_rate"
    preset = parse_run(["--optimizer", name, "--lora_units", units])[0].optim.learning_rate
    for usual in (own, own * 5, own / 5, preset):
        assert [doubt for doubt in told(f"{flags} {usual}") if "lora_units" not in doubt] == []
    for far in (own * 1000, own / 1000):
        doubt = told(f"{flags} {far}")[-1]
        assert doubt.startswith(f"--learning_rate {far:g} is far from what --optimizer {name} needs")
        assert ("in units of the start" in doubt) == (units == "start" and not idle)
    assert "learns nothing" in told(f"{flags} 0")[-1]
    assert any(doubt.startswith("--lora_units has no effect") for doubt in told(f"{flags} {own}")) == idle


@pytest.mark.parametrize("name", ["prodigy", "sgd", "scaled_gd", "lora_muon", "adafactor"])
def test_adamw_s_rate_is_doubted_where_the_unit_is_another(name: str) -> None:
    assert "is far from what" in told(f"{STEPS}--optimizer {name} --learning_rate 1e-4")[0]


def test_the_text_encoder_s_rate_too() -> None:
    assert told(f"{STEPS}--train_text_encoder --text_encoder_lr 3")[0].startswith("--text_encoder_lr 3 is far")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rank 8 --lora_alpha 2", r"--lora_alpha 2 with --rank 8 scales the LoRA by 0.25: diffusers reads"),
        ("--rank 8 --lora_alpha 0.0001", "which is far from what is usual"),
        ("--rank 4 --lora_alpha 64", "which is far from what is usual"),
        ("--resolution 64", "--resolution 64 is far from the 512 pixels"),
        ("--resolution 2048", "--resolution 2048 is far from the 512 pixels"),
        ("--train_batch_size 16", "a step of 16 samples is more than the 8 of an epoch"),
        ("--gradient_accumulation_steps 8", "a step of 32 samples"),
        ("--lr_scheduler cosine --lr_warmup_steps 200", "covers all 200 steps"),
        ("--checkpointing_steps 500", "--checkpointing_steps 500 is more than the 200 steps of the run"),
        ("--sample_steps 500", "--sample_steps 500 is more than the 200 steps"),
        ("--eval_steps 500", "--eval_steps 500 is more than the 200 steps"),
        ("--lr_scheduler cosine_with_restarts --lr_warmup_steps 0 --lr_num_cycles 300", "--lr_num_cycles 300 is more"),
        ("--optimizer schedulefree_adamw --lr_scheduler cosine --lr_warmup_steps 0", "averages in place of a schedule"),
    ],
)
def test_values_that_do_not_go_with_others(flags: str, words: str) -> None:
    assert [doubt for doubt in told(STEPS + flags) if words in doubt], told(STEPS + flags)


def test_nothing_is_said_of_presets_and_defaults() -> None:
    assert not told([], embedded=True, own=64)
    assert not told("--num_train_epochs 40")
    for optimizer in OPTIMIZERS:
        try:
            assert not told(f"--optimizer {optimizer}", embedded=True, own=64)
        except Exception as error:
            assert "needs the package" in str(error)


@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize("images", [5, 96])
def test_nothing_is_said_of_the_commands_in_documents(words, images, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command, flags = command_and_flags(words, tmp_path)
    if command in PROGRAMS:
        config, _ = parse_run(flags, PROGRAMS[command])
        is_flux = "FLUX" in config.model.pretrained_model_name_or_path
        assert not told_of(config, flux if is_flux else sd, images, own=64 if config.embedded else 512)


def test_nothing_is_said_of_values_that_are_the_default() -> None:
    """As the commands of others have them, and saved configs."""
    argv = "--lr_num_cycles 1 --lr_power 1.0 --image_column image --num_class_images 100 --prior_loss_weight 1.0"
    assert not told(f"{STEPS}{argv} --lr_scheduler constant --lr_warmup_steps 0 --logging_dir logs")


def test_entries_of_data_sets_are_doubted_by_name(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    entry = f"{{instance_data_dir: {photos}, instance_prompt: a, KEY: VALUE}}"
    for key, value, words in (
        ("repeats", "100000", "repeats of photos 100000 is far from what is usual (1 to 20)"),
        ("loss_weight", "500", "loss_weight of photos 500 is far from what is usual (1)"),
        ("resolution", "64", "resolution of photos 64 is far from the 512 pixels"),
        ("max_train_samples", "1000000", ""),
    ):
        file = tmp_path / "sets.yaml"
        file.write_text(f"datasets: [{entry.replace('KEY', key).replace('VALUE', value)}]", encoding="utf-8")
        doubts_told = told(f"{STEPS}--config {file}")
        assert [doubt for doubt in doubts_told if doubt.startswith(words)] if words else not doubts_told


def test_repeats_of_a_single_data_set_only_make_epochs_longer(tmp_path):
    file = tmp_path / "sets.yaml"
    file.write_text("datasets: [{instance_data_dir: prompts, instance_prompt: a}]", encoding="utf-8")
    for flags in (f"{STEPS}--repeats 3", "--repeats 3 --pretrained_model_name_or_path tiny"):
        assert told(flags) == ["--repeats has no effect: the number of steps decides, not the epochs"]
    for flags in ("--repeats 3", f"{STEPS}--repeats 3 --validation_epochs 1", f"{STEPS}--repeats 3 --config {file}"):
        assert not told(flags)


def test_a_warm_up_that_a_preset_sets_is_not_doubted() -> None:
    assert not told("--max_train_steps 10", embedded=True, own=64)
    assert told("--max_train_steps 10 --lr_scheduler cosine", embedded=True, own=64)
    assert told("--max_train_steps 10 --lr_warmup_steps 10", embedded=True, own=64)


def test_what_was_given_survives_every_decision_and_makes_no_other_config() -> None:
    config, _ = parse_run([*MODEL, "--rank", "8"])
    assert config.given == {"pretrained_model_name_or_path", "rank"}
    settled = defaults.by_model(config, 512, SampleDefaults(20, 3.0), world=1)
    assert settled.given == config.given
    assert config == replace(config, given=frozenset())


def of_model(name: str, scheduler: dict[str, Any], flags: str = "", family: Any = sd) -> list[str]:
    config, _ = parse_run(["--pretrained_model_name_or_path", name, *STEPS.split(), *flags.split()])
    return told_of(config, family, 8, 512, scheduler)


V = ["Laxhar/noobai-XL-Vpred-1.0", "models/noobaiXL_vPred10", "somebody/model_v-prediction", "a/b-v_parameterization"]
EPSILON = ["Laxhar/noobai-XL-1.0-eps", "models/noobaiXLNAIXL_epsilonPred11Version", "a/model-EPS"]
OTHERS = ["stabilityai/sdxl", "a/dev-predictions", "a/steps", "a/v1-5-pruned", "a/reprieve"]


@pytest.mark.parametrize("name", V)
def test_a_model_named_after_v_whose_scheduler_says_epsilon_is_doubted(name: str) -> None:
    for scheduler in ({"prediction_type": "epsilon"}, {}):
        (doubt,) = of_model(name, scheduler)
        assert f"{name} is named like a model that predicts v, and its scheduler_config.json says epsilon" in doubt
        assert "--prediction_type v_prediction" in doubt and "--rescale_betas_zero_snr" in doubt
    (doubt,) = of_model(name, {"prediction_type": "v_prediction"}, "--prediction_type epsilon")
    assert "and --prediction_type says epsilon" in doubt
    assert not of_model(name, {"prediction_type": "v_prediction"})
    assert not of_model(name, {"prediction_type": "epsilon"}, "--prediction_type v_prediction --rescale_betas_zero_snr")
    assert not of_model(name, {}, family=flux), "it is no diffusion model"


@pytest.mark.parametrize("name", EPSILON)
def test_a_model_named_after_epsilon_whose_scheduler_says_v_is_doubted(name: str) -> None:
    (doubt,) = of_model(name, {"prediction_type": "v_prediction"})
    assert f"{name} is named like a model that predicts epsilon" in doubt and "--prediction_type epsilon" in doubt
    assert not of_model(name, {"prediction_type": "epsilon"})


@pytest.mark.parametrize("name", OTHERS)
def test_names_that_say_nothing_of_it_are_not_doubted(name: str) -> None:
    for prediction in ("epsilon", "v_prediction"):
        assert not of_model(name, {"prediction_type": prediction})


def test_a_schedule_that_ends_in_pure_noise_wants_v() -> None:
    (doubt,) = of_model("a/b", {"prediction_type": "epsilon", "rescale_betas_zero_snr": True})
    assert "says rescale_betas_zero_snr, which goes with models that predict v" in doubt
    assert not of_model("a/b", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
