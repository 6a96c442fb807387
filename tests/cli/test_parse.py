"""Command lines: what they accept, in which order values win, and what each kind of mistake is told."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreamlora import registry, tiny
from dreamlora.__main__ import COMMANDS, ReportConfig, main, usage
from dreamlora.cli import presets
from dreamlora.cli.declared import options_of
from dreamlora.cli.foreign import ELSEWHERE, UNNEEDED
from dreamlora.cli.parse import Program, method_options, parse, parse_run, run
from dreamlora.config import RunConfig, TextToImageConfig, as_flat_dict
from dreamlora.errors import UserError, WriteError
from dreamlora.interrupts import PIPE, Interrupted, deferred

DIFFUSERS_FLAGS = """
pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir class_data_dir instance_prompt
class_prompt validation_prompt num_validation_images validation_epochs with_prior_preservation prior_loss_weight
num_class_images output_dir seed resolution center_crop train_text_encoder train_batch_size sample_batch_size
num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles
lr_power dataloader_num_workers use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision prior_generation_precision
local_rank enable_xformers_memory_efficient_attention pre_compute_text_embeddings tokenizer_max_length
text_encoder_use_attention_mask validation_images class_labels_conditioning rank lora_dropout
image_interpolation_mode
"""
"""All flags of diffusers' train_dreambooth_lora.py."""

SDXL_FLUX_FLAGS = """
pretrained_vae_model_name_or_path dataset_name dataset_config_name cache_dir image_column caption_column repeats
do_edm_style_training output_kohya_format random_flip text_encoder_lr snr_gamma optimizer prodigy_beta3
prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup adam_weight_decay_text_encoder use_dora
max_sequence_length lora_alpha guidance_scale weighting_scheme logit_mean logit_std mode_scale lora_layers
cache_latents upcast_before_saving enable_npu_flash_attention train_data_dir max_train_samples prediction_type
noise_offset bnb_quantization_config_path do_fp8_training skip_final_inference final_validation_prompt
aspect_ratio_buckets use_aspect_ratio_buckets offload remote_text_encoder fsdp_text_encoder caption_dropout
"""
"""What its SDXL, Flux and text-to-image relatives have besides."""

MODEL = ["--pretrained_model_name_or_path", "some/model"]
"""Keeps the embedded model's preset out."""


def parsed(*argv: str) -> RunConfig:
    return parse(RunConfig, argv)


def message(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse_run(argv)
    return str(error.value)


@pytest.fixture
def run_yaml(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return str(file)

    return write


# What is accepted


def test_no_flags_give_the_defaults() -> None:
    assert parsed() == RunConfig()


def test_flags_of_every_kind() -> None:
    config = parsed(
        *["--rank", "16", "--lora-layers", "to_q", "to_k", "--learning_rate=1e-4", "--output_dir", "out/x"],
        *["--optimizer", "AdamW", "--mixed_precision", "BF16", "--class_prompt", "a dog", "--with_prior_preservation"],
        *["--no_pre_compute_text_embeddings", "--negative-prompt=--odd", "--noise_offset", ".5"],
    )
    assert (config.lora.rank, config.lora.lora_layers) == (16, ("to_q", "to_k"))
    assert (config.optim.learning_rate, config.optim.optimizer) == (1e-4, "adamw")
    assert (config.train.output_dir, config.train.noise_offset) == (Path("out/x"), 0.5)
    assert config.model.mixed_precision == "bf16"
    assert config.data.with_prior_preservation and not config.data.pre_compute_text_embeddings
    assert config.sample.negative_prompt == "--odd"


def test_layers_may_be_one_text_with_commas_as_in_diffusers() -> None:
    assert parsed("--lora_layers", "attn.to_q,attn.to_k").lora.lora_layers == ("attn.to_q", "attn.to_k")


def test_the_last_of_a_repeated_flag_wins() -> None:
    assert parsed("--rank", "1", "--rank", "2").lora.rank == 2
    assert not parsed("--center_crop", "--no_center_crop").data.center_crop


def test_a_bare_word_goes_to_the_positional_flag() -> None:
    program = Program("dreamlora report", positional="run")
    assert parse(ReportConfig, ["outputs/a"], program).run == Path("outputs/a")
    assert parse(ReportConfig, ["--run", "outputs/a"], program).run == Path("outputs/a")
    with pytest.raises(UserError, match="--run is needed: The run's folder"):
        parse(ReportConfig, [], program)


def test_a_bare_word_after_a_switch_goes_to_the_positional_flag_if_that_is_free() -> None:
    program = Program("dreamlora report", positional="run")
    for argv in (["--live", "outputs/a", "--port", "80"], ["outputs/a", "--live", "--port", "80"]):
        assert parse(ReportConfig, argv, program) == ReportConfig(Path("outputs/a"), live=True, port=80)
    for argv in (["outputs/a", "--live", "outputs/b"], ["outputs/a", "--live=true"]):
        with pytest.raises(UserError, match="--live takes no value"):
            parse(ReportConfig, argv, program)


def test_the_port_is_for_live_reports() -> None:
    program = Program("dreamlora report", positional="run")
    with pytest.raises(UserError, match="--port is for --live"):
        parse(ReportConfig, ["outputs/a", "--port", "80"], program)
    with pytest.raises(UserError, match=r"--port takes a number from 1 to 65535 \(got 70000\)"):
        parse(ReportConfig, ["--live", "outputs/a", "--port", "70000"], program)


@pytest.mark.parametrize("flag", (DIFFUSERS_FLAGS + SDXL_FLUX_FLAGS).split())
def test_every_flag_of_diffusers_is_an_option_or_explained(flag: str) -> None:
    ways = [options_of(RunConfig), RunConfig.NOT_OFFERED, ELSEWHERE, UNNEEDED]
    assert sum(flag in way for way in ways) == 1


def test_explained_flags_name_only_flags_that_exist() -> None:
    for text in ELSEWHERE.values():
        for word in text.replace(";", " ").replace(")", " ").split():
            assert not word.startswith("--") or word[2:] in options_of(RunConfig), text


def test_explanations_name_only_settings_that_the_optimizers_have() -> None:
    named = re.compile(r"--optimizer_args (\w+)")
    for flag, text in ELSEWHERE.items():
        for setting in named.findall(text):
            (optimizer,) = re.findall(r"--optimizer (\w+)", text) or ["prodigy"]
            assert setting in options_of(registry.load("optimizers", optimizer).Options), flag


def test_unneeded_flags_are_accepted_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("--cache_latents", "--rank", "8").lora.rank == 8
    assert "note: --cache_latents is not needed: latents are always cached" in capsys.readouterr().err


# YAML


def test_flags_win_over_the_file_and_the_file_over_defaults(run_yaml: Any) -> None:
    file = run_yaml("lora: {rank: 8, lora_alpha: 4}\nmax-train-steps: 7\nlearning_rate: 1e-4\n")
    config = parsed("--rank", "2", "--config", file)
    assert (config.lora.rank, config.lora.lora_alpha) == (2, 4.0)
    assert config.train.max_train_steps == 7
    assert config.optim.learning_rate == 1e-4


def test_yaml_values_of_every_kind(run_yaml: Any) -> None:
    text = "center_crop: true\npre_compute_text_embeddings: false\nlora_layers: [to_q, to_k]\nrank: null\noptim:\n"
    text += "mixed_precision: no\noptimizer_args: {eps: 1e-6}\ninstance_prompt: --a dog\nsample_steps: 0\ntrain: {}\n"
    config = parsed("--config", run_yaml(text))
    assert config.data.center_crop and not config.data.pre_compute_text_embeddings
    assert config.lora.lora_layers == ("to_q", "to_k")
    assert (config.lora.rank, config.model.mixed_precision) == (4, "no")
    assert config.optim.optimizer_args == ("eps", "1e-6")
    assert (config.data.instance_prompt, config.sample.sample_steps) == ("--a dog", 0)


PATHS = [name for name, option in options_of(RunConfig).items() if option.kind is Path]
FOLDERS_OR_NAMES = ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "resume_from_checkpoint"]
FOLDERS_OR_NAMES += ["clip_model", "dino_model"]


@pytest.mark.parametrize("flag", [*PATHS, *FOLDERS_OR_NAMES])
@pytest.mark.parametrize("way", ["flag", "word", "yaml"])
def test_a_tilde_is_the_home_folder(
    flag: str, way: str, run_yaml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No shell puts it in behind ``--flag=``, and it would become a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = {"flag": [f"--{flag}=~/x/y"], "word": [f"--{flag}", "~/x/y"], "yaml": None}[way]
    needed = ["--with_prior_preservation", "--class_prompt", "a dog"] if flag == "class_data_dir" else []
    needed += ["--eval_metrics", "kid"] if flag == "eval_prompts" else []
    config = parsed(*needed, *(argv or ["--config", run_yaml(f"{flag}: ~/x/y")]))
    path = str(tmp_path / "x" / "y")
    assert as_flat_dict(config)[flag] == ([path] if options_of(RunConfig)[flag].several else path)


def test_the_home_of_nobody_is_told() -> None:
    assert "--output_dir takes a path (got '~nobody-of-this-name/x')" in message("--output_dir=~nobody-of-this-name/x")
    assert "no-one-here" in message("--config=~no-one-here/x.yaml")


def test_a_later_file_wins(tmp_path: Path) -> None:
    for name, rank in (("a", 8), ("b", 16)):
        (tmp_path / name).write_text(f"rank: {rank}\nseed: 3\n", encoding="utf-8")
    config = parsed("--config", str(tmp_path / "a"), "--config", str(tmp_path / "b"))
    assert (config.lora.rank, config.train.seed) == (16, 3)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--optimizer", "sgd", "--no_with_prior_preservation", "--lora_layers"],
        [*MODEL, "--instance_data_dir", "prompts", "--optimizer_args", "betas", "0.8,0.9", "--mixed_precision", "no"],
    ],
)
def test_a_saved_config_gives_the_same_config(argv: list[str], run_yaml: Any) -> None:
    config, options = parse_run(argv)
    file = run_yaml(yaml.safe_dump(as_flat_dict(config)))
    assert parse_run(["--config", file]) == (config, options)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rnak: 3", r"unknown key 'rnak' in \S+run.yaml. Did you mean --rank\?"),
        ("lora: {rnak: 3}", r"unknown key 'rnak' in \S+run.yaml. Did you mean --rank\?"),
        ("rank: x", r"run.yaml: rank takes a whole number \(got 'x'\)"),
        ("rank: [1, 2]", r"run.yaml: rank takes one value \(got 2: 1 2\)"),
        ("rank: true", r"run.yaml: rank takes a whole number \(got 'true'\)"),
        ("center_crop: maybe", r"run.yaml: center_crop takes true or false \(got 'maybe'\)"),
        ("- rank", r"must hold entries such as `rank: 8` \(got a list\)"),
        ("a: [", r"run.yaml: it is not valid YAML"),
        ("rank: 3\nrank: 4", r"run.yaml: line 2 has the key rank a second time"),
        ("datasets:\n- {dataset_name: a, dataset_name: b}", r"line 2 has the key dataset_name a second time"),
        ("rank: 3\nlora: {rank: 4}", r"run.yaml has rank twice: keep one"),
        ("lora-alpha: 3\nlora_alpha: 4", r"run.yaml has lora_alpha twice: keep one"),
        ("datasets: [{dataset_name: a, dataset-name: b}]", r"entry 1 of datasets has dataset_name twice: keep one"),
        ("use_8bit_adam: true", r"key 'use_8bit_adam' in \S+ is not offered: use --optimizer adamw8bit"),
    ],
)
def test_mistakes_in_a_file_name_the_file_and_the_key(text: str, told: str, run_yaml: Any) -> None:
    with pytest.raises(UserError, match=told):
        parsed("--config", run_yaml(text))


# Mistakes on the command line


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--lr_schedular x", ["unknown flag --lr_schedular", "Did you mean --lr_scheduler? Course of the"]),
        ("--learning 1", ["unknown flag --learning", "--learning_rate"]),
        ("--zzz", ["unknown flag --zzz", "All flags: dreamlora dreambooth --help"]),
        ("-r 8", ["unknown flag --r"]),
        ("stray", ["'stray' belongs to no flag"]),
        ("--rank x", ["--rank takes a whole number (got 'x')"]),
        ("--rank 1.5", ["--rank takes a whole number (got '1.5')"]),
        ("--rank 0", ["--rank must be at least 1 (got 0)"]),
        ("--rank", ["--rank needs a value: a whole number"]),
        ("--learning_rate nan", ["--learning_rate must be at least 0 (got nan)"]),
        ("--lr_scheduler cosin", ["one of constant, constant_with_warmup,", "(got 'cosin')", "Did you mean 'cosine'?"]),
        ("--report_to tensorbord", ["--report_to takes one of all, aim,", "Did you mean 'tensorboard'?"]),
        ("--instance_prompt a dog", ["--instance_prompt takes one value (got 2: a dog)", "quotes"]),
        ("--center_crop True", ["--center_crop takes no value (got 'True')", "--no_center_crop"]),
        ("--no_center_crop x", ["--no_center_crop takes no value (got 'x')"]),
        ("--no_rank", ["unknown flag --no_rank"]),
        (
            "--optimizer adamv",
            ["--optimizer: unknown name 'adamv'", "choose one of adafactor, adamw,", "mean 'adamw'?"],
        ),
        ("--use_8bit_adam", ["--use_8bit_adam is not offered", "use --optimizer adamw8bit"]),
        ("--class_labels_conditioning a", ["--class_labels_conditioning is not offered", "DeepFloyd IF"]),
        ("--no_train_text_encoder --text_encoder_lr 1e-3", ["only used together with --train_text_encoder"]),
        ("--config a b", ["--config takes one YAML file (got 2 words)"]),
        ("--config no/such.yaml", ["--config: cannot read no/such.yaml: No such file"]),
        ("--instance_data_dir no/such", ["--instance_data_dir: there is no no/such"]),
        ("--optimizer_args eps", ["--optimizer_args takes pairs"]),
        ("--optimizer_args esp 1", ["adamw has no setting 'esp'", "betas 2 values, each a number (default 0.9,0.999)"]),
        ("--optimizer_args eps x", ["--optimizer_args: eps takes a number (got 'x')"]),
        ("--optimizer_args betas 0.9", ["--optimizer_args: betas takes 2 values (got 1: 0.9)"]),
        ("--optimizer_args eps -1", ["--optimizer_args of adamw: eps: got -1.0"]),
        ("--init kaimin", ["--init: unknown name 'kaimin'", "Did you mean 'kaiming'?"]),
        (
            "--init lora_ga --init_args gama 1",
            ["--init_args: lora_ga has no setting 'gama'", "gamma a number (default 16"],
        ),
        ("--init nora --init_args sigma 0", ["--init_args of nora: sigma must be above 0 (got 0.0)"]),
        ("--init_args sigma", ["--init_args takes pairs"]),
        ("--init_args sigma 1", ["gaussian has no setting 'sigma'", "It has no settings."]),
        ("--optimizer_args amsgrad maybe", ["--optimizer_args: amsgrad takes true or false (got 'maybe')"]),
    ],
)
def test_every_kind_of_mistake_is_told_clearly(argv: str, told: list[str]) -> None:
    text = message(*argv.split())
    for part in told:
        assert part in text


@pytest.mark.parametrize("flag", ["--resolution", "--rank"])
def test_sizes_that_no_machine_holds_are_refused_before_it_tries(flag: str) -> None:
    """Systems promise more memory than they have, and then end whatever they like."""
    with pytest.raises(UserError, match=f"{flag} must be at least .* and below"):
        parse_run([*MODEL, flag, "100000"])


def test_a_mistake_ends_the_program_within_a_second_without_traceback() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "dreamlora", "dreambooth", "--optimizer_args", "dampin", "1"],
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - started < 3  # 0.2 s alone; the limit leaves room for a busy machine
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --optimizer_args: adamw has no setting 'dampin'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("--rank is odd"), 2, "error: --rank is odd"),
        (KeyboardInterrupt(), 130, "stopped"),
        (Interrupted(signal.SIGTERM), 143, "stopped (SIGTERM)"),
        (Interrupted(PIPE), 141, ""),
        (
            OSError(errno.ENOSPC, "No space left on device", "outputs/a/x"),
            1,
            "error: outputs/a/x: the disk is full. Free",
        ),
        (
            WriteError.of(Path("a/x"), OSError(errno.EROFS, "Read-only")),
            1,
            "error: cannot write a/x: Read-only. Choose",
        ),
        (
            MemoryError(),
            1,
            "error: memory does not suffice (MemoryError). What takes less: of a training a smaller --resolution",
        ),
        (OverflowError("int too big to convert"), 1, "memory does not suffice (int too big to convert)"),
        (UnicodeEncodeError("ascii", "ä", 0, 1, "ordinal not in range(128)"), 1, "Set PYTHONUTF8=1"),
    ],
)
def test_what_a_user_can_mend_is_one_message(
    error: BaseException, status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(argv: Any) -> None:
        raise error

    assert run(program, []) == status
    assert told in capsys.readouterr().err


def test_other_errors_keep_their_traceback() -> None:
    def program(argv: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "gone")

    with pytest.raises(FileNotFoundError):
        run(program, [])


def test_a_signal_that_comes_while_an_error_is_told_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def complain(error: Exception) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        return 1

    def fail(argv: Sequence[str]) -> None:
        raise UserError("x")

    monkeypatch.setattr(sys.modules[run.__module__], "_complaint", complain)
    assert run(fail, []) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped (SIGTERM)\n"


def test_what_fails_after_a_signal_to_all_processes_is_the_signal_s_doing(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: Sequence[str]) -> None:
        with deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("a collective without one of its processes")

    assert run(fail, []) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped (SIGTERM)\n"


# The optimizer's settings


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("adapters", "optimizers", "inits") for name in registry.names(kind)]
)
def test_every_optimizer_and_init_has_documented_settings(kind: str, name: str) -> None:
    options = method_options(kind, name, [], {})
    assert options == registry.load(kind, name).Options()
    assert all(option.help for option in options_of(type(options)).values())


def test_settings_come_from_the_arguments_then_from_the_common_flags() -> None:
    _, options = parse_run([*MODEL, "--adam_beta2", "0.99", "--adam_epsilon", "1e-6", "--optimizer_args", "eps", "1"])
    assert (options.betas, options.eps) == ((0.9, 0.99), 1.0)
    _, options = parse_run([*MODEL, "--optimizer", "lora_rite", "--adam_beta1", "0.8"])
    assert (options.betas, options.eps) == ((0.8, 0.999), 1e-6)  # its own where no flag is given
    _, options = parse_run([*MODEL, "--optimizer_args", "betas", "0.8,0.9", "fused", "false"])
    assert options.betas == (0.8, 0.9) and not options.fused


def test_values_of_common_flags_are_checked_by_the_optimizer_too() -> None:
    with pytest.raises(UserError, match=r"--optimizer_args of adamw: betas: got \(0.9, 2.0\)"):
        method_options("optimizers", "adamw", [], {"betas": (0.9, 2.0), "unknown": 1})


# The embedded models' presets


FLOW = ["--pretrained_model_name_or_path", "tiny-flow"]


def test_the_preset_is_for_the_embedded_model_only() -> None:
    config, _ = parse_run([])
    preset = yaml.safe_load((tiny.PRESETS / "preset.yaml").read_text(encoding="utf-8"))
    assert config.embedded and config.lora.rank == preset["rank"]
    assert config.data.subject == preset["built_in"]["subject"]
    assert config.sample.sample_prompts is not None and config.sample.sample_prompts.exists()
    assert parse_run(MODEL)[0] == replace(RunConfig(), model=parsed(*MODEL).model)


@pytest.mark.parametrize("optimizer", registry.names("optimizers"))
@pytest.mark.parametrize("model", tiny.MODELS)
def test_the_presets_know_every_optimizers_learning_rate(model: str, optimizer: str) -> None:
    given = {"optimizer": optimizer.upper(), "pretrained_model_name_or_path": model}
    assert presets.embedded(given, RunConfig.PRESET)["learning_rate"]


@pytest.mark.parametrize("program", [RunConfig, TextToImageConfig])
def test_another_embedded_model_has_the_same_preset_but_for_what_its_own_says(program: type[RunConfig]) -> None:
    default, flow = (as_flat_dict(parse_run(argv, program)[0]) for argv in ([], FLOW))
    own = yaml.safe_load((tiny.PRESETS / "preset_flow.yaml").read_text(encoding="utf-8"))
    rate = float(own.pop("by_optimizer")["adamw"]["learning_rate"])
    expected = {**default, "pretrained_model_name_or_path": "tiny-flow", **own, "learning_rate": rate}
    assert flow == expected and flow["max_sequence_length"] == 32
    config, _ = parse_run([*FLOW, "--dataset_name", "owner/name", "--max_sequence_length", "64"], program)
    assert config.embedded and config.data.subject is config.data.style is config.sample.sample_prompts is None
    assert (config.data.resolution, config.data.max_sequence_length) == (64, 64)


def test_the_embedded_model_measures_its_samples_if_there_are_any() -> None:
    def metrics(*argv: str) -> tuple[str, ...]:
        return parse_run(argv)[0].eval.eval_metrics

    assert metrics() == ("clip_score", "dino") and metrics(*MODEL) == ()
    assert metrics("--eval_metrics") == metrics("--sample_steps", "0") == ()
    assert metrics("--sample_steps", "0", "--eval_metrics_steps", "50") == ("clip_score", "dino")
    assert metrics("--eval_metrics", "KID", "kid", "clip-score") == ("kid", "clip_score")


def test_flags_and_files_win_over_the_preset(run_yaml: Any) -> None:
    file = run_yaml("rank: null\nmax_train_steps: 5\n")
    config, _ = parse_run(["--config", file, "--learning_rate", "0.5", "--instance_data_dir", "prompts"])
    assert config.lora.rank == 4  # null is the default of config
    assert (config.train.max_train_steps, config.optim.learning_rate) == (5, 0.5)
    assert config.data.subject is None
    assert parse_run(["--num_train_epochs", "3"])[0].train.max_train_steps is None


@pytest.mark.parametrize("own", [("--instance_data_dir", "prompts"), ("--dataset_name", "owner/name")])
@pytest.mark.parametrize("subject", [(), ("--subject", "bannerfish")])
def test_nothing_of_the_built_in_subject_is_said_of_own_images(own: tuple[str, ...], subject: tuple[str, ...]) -> None:
    """Photos without captions would train as "sks creature", beside class images of creatures."""
    plain, (config, _) = RunConfig(), parse_run([*own, *subject])
    for option in ("instance_prompt", "class_prompt", "with_prior_preservation", "num_class_images"):
        assert getattr(config.data, option) == getattr(plain.data, option), option
    assert config.sample.sample_prompts is None and config.sample.validation_prompt is None
    assert config.lora.rank == 8 and config.data.resolution == 64, "what suits the model stays"


def test_nothing_of_the_built_in_style_is_said_of_own_images() -> None:
    for own in (["--train_data_dir", "prompts"], ["--dataset_name", "owner/name"]):
        config, _ = parse_run(own, TextToImageConfig)
        assert config.data.style is None and config.sample.sample_prompts is None
    assert parse_run([], TextToImageConfig)[0].sample.sample_prompts is not None


def test_prompts_follow_the_built_in_subject() -> None:
    data = parse_run(["--subject", "bannerfish", "--class_prompt", "a fish"])[0].data
    assert (data.instance_prompt, data.class_prompt) == ("a photo of sks fish", "a fish")
    for model in ([], ["--pretrained_model_name_or_path", "another"]):
        assert "--subject takes one of checkerling, bannerfish" in message("--subject", "dog", *model)
        with pytest.raises(UserError, match=r"--style takes one of woodcut \(got 'nope'\)"):
            parse_run(["--style", "nope", *model], TextToImageConfig)
    assert message("--dataset_name", "") == "--dataset_name needs a name (got nothing)"


# The commands


def test_usage_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == usage()
    assert all(f"\n  {name} " in usage() for name in COMMANDS)
    assert main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err
    assert main(["--version"]) == 0


def test_clashing_names_of_groups_fail_at_once() -> None:
    @dataclass(frozen=True)
    class Group:
        rank: int = 1

    @dataclass(frozen=True)
    class Clash:
        group: Group = Group()
        rank: int = 2

    Clash.__annotations__.update(group=Group, rank=int)
    Group.__annotations__.update(rank=int)
    with pytest.raises(TypeError, match=r"declares {'rank'} twice"):
        options_of(Clash)


@pytest.mark.parametrize("name", ["seed", "max_train_steps", "sample_seed"])
@pytest.mark.parametrize("value", [2**63, -(2**63), 10**400])
def test_a_number_that_no_file_could_give_back_is_refused(name: str, value: int, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(f"{name}: {value}\n", encoding="utf-8")
    for argv in ([f"--{name}={value}"], ["--config", str(file)]):
        told = rf"{name} takes a whole number up to {2**63 - 1} \(got one of \d+ |a whole number of \d+ bits"
        with pytest.raises(UserError, match=told):
            parse_run(argv)
