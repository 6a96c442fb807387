"""What `sample` and `evaluate` take from the runs of the LoRAs, and what they say where runs are not alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dreamlora import tiny
from dreamlora.cli.parse import parse_run
from dreamlora.commands.rows import Row
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.commands.trained import DRAWN_WITH, TrainedRun, first_run, model_of, plan_for, run_of, settings_of
from dreamlora.commands.under_test import UnderTest, prepared
from dreamlora.config import Train
from dreamlora.errors import UserError
from dreamlora.interfaces import SampleDefaults
from dreamlora.memory import StageMemory
from tests.hubcache import FakeHub

DEFAULTS = SampleDefaults(num_inference_steps=30, guidance_scale=7.5)

CPU = torch.device("cpu")


@pytest.fixture
def run(sd_folder: Path, tmp_path: Path) -> Any:
    """Makes a run folder with these options, and with a note of this base model."""

    def make(name: str, base: dict[str, Any] | None = None, **options: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        options = {"pretrained_model_name_or_path": str(sd_folder), **options}
        (folder / "config.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
        if base:
            (folder / "base_model.json").write_text(json.dumps(base), encoding="utf-8")
        return folder

    return make


def under_test(*paths: Path, **flags: Any) -> UnderTest:
    config = SampleConfig(lora=paths, trust_runs=True, **flags)
    rows = [Row("base model"), *(Row(path.name, path / "lora", 1.0, run_of(path)) for path in paths)]
    return prepared(config, rows, first_run(config), StageMemory(CPU, []), DRAWN_WITH)


def notes(*paths: Path, **flags: Any) -> dict[str, list[str]]:
    return {label: found for label, found in under_test(*paths, **flags).notes.items() if found}


def test_the_precision_is_that_of_the_run_unless_another_is_given(run: Any, tmp_path: Path) -> None:
    half, full = run("half", mixed_precision="bf16"), run("full", mixed_precision="no")
    assert (under_test(half).dtype, under_test(full).dtype) == (torch.bfloat16, torch.float32)
    assert under_test(half, mixed_precision="no").dtype == torch.float32
    assert under_test(full, mixed_precision="fp16").dtype == torch.float16
    assert under_test(run("unknown")).dtype == torch.float32, "as suits a CPU"
    (tmp_path / "unquoted").mkdir()
    (tmp_path / "unquoted" / "config.yaml").write_text("mixed_precision: no", encoding="utf-8")
    found = run_of(tmp_path / "unquoted")
    assert found and found.options["mixed_precision"] == "no"


def test_runs_that_are_not_alike_are_told_by_name(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    first = run("first", mixed_precision="bf16", resolution=16, tokenizer_max_length=8)
    other = run("other", mixed_precision="no", resolution=32, tokenizer_max_length=9)
    same = run("same", mixed_precision="bf16", resolution=16, tokenizer_max_length=8)
    assert notes(first) == {} == notes(first, same)
    expected = [
        f"other was trained with --{theirs}, and is treated here as first was, with --{ours}"
        for theirs, ours in (
            ("mixed_precision no", "mixed_precision bf16"),
            ("tokenizer_max_length 9", "tokenizer_max_length 8"),
            ("resolution 32", "resolution 16"),
        )
    ]
    assert notes(first, other) == {"other": expected}
    assert expected[0] in caplog.text
    assert notes(first, other, mixed_precision="no", resolution=16) == {"other": expected[1:2]}, "flags were asked for"


def test_a_lora_in_another_base_model_is_told(run: Any, sd_folder: Path) -> None:
    same = run("same", base={"id": under_test(run("any")).source.model_id})
    assert notes(same) == {}
    [told] = notes(run("moved", base={"id": "sd@0ld"}))["moved"]
    assert told.startswith("moved was trained on sd@0ld, and is put into sd@")


def test_runs_that_predict_different_things_are_refused(run: Any) -> None:
    own, same = run("own"), run("same", prediction_type="epsilon")
    other = run("other", prediction_type="v_prediction")
    assert under_test(own, same).source.predictor_id.startswith("sd@")
    assert under_test(other).source.predictor_id.endswith(" with v_prediction")
    with pytest.raises(UserError, match=r"own to predict epsilon, other to predict v_prediction\. No model draws both"):
        under_test(own, other)


def test_the_scheduler_predicts_what_the_run_was_trained_to(run: Any) -> None:
    scheduler = under_test(run("other", prediction_type="v_prediction")).parts.pipeline().scheduler
    assert scheduler.config.prediction_type == "v_prediction"


def test_what_gpus_round_to_is_as_in_the_run(run: Any) -> None:
    for allowed in (True, False):
        under_test(run(f"tf32 {allowed}", allow_tf32=allowed))
        assert torch.backends.cuda.matmul.allow_tf32 is allowed and torch.backends.cudnn.allow_tf32 is allowed


def test_images_are_planned_as_the_run_drew_them(run: Any) -> None:
    found = run_of(run("dog", sample_seed=7, num_images_per_prompt=3, resolution=16, negative_prompt="blue"))
    assert found
    plan = plan_for(SampleConfig(lora=(Path("dog"),)), found.options, DEFAULTS, ("a dog",))
    assert (plan.seed, plan.num_images_per_prompt, plan.width, plan.negative_prompt) == (7, 3, 16, "blue")
    given = plan_for(
        SampleConfig(lora=(Path("dog"),), sample_seed=0, resolution=8), found.options, DEFAULTS, ("a dog",)
    )
    assert (given.seed, given.num_images_per_prompt, given.width) == (0, 3, 8)
    about = SampleConfig(lora=(Path("dog"),), negative_prompt="a blurred {}", subject="sks dog")
    assert plan_for(about, found.options, DEFAULTS, ("a dog",)).negative_prompt == "a blurred sks dog"
    unknown = plan_for(SampleConfig(lora=(Path("dog"),)), {}, DEFAULTS, ("a dog",))
    assert (unknown.seed, unknown.num_images_per_prompt) == (42, 1)


def test_the_base_model_is_of_the_commits_that_the_run_was_trained_on(
    run: Any, sd_folder: Path, tmp_path: Path
) -> None:
    first, second = "1" * 40, "2" * 40
    hub = FakeHub(tmp_path / "hub")
    for commit in (first, second):
        hub.commit("owner/name", commit, sd_folder)
        hub.commit("owner/vae", commit, sd_folder / "vae")
    base = {"id": f"owner/name@{first}+vae:owner/vae@{first}", "revision": first, "vae_revision": first}
    names = {"pretrained_model_name_or_path": "owner/name", "pretrained_vae_model_name_or_path": "owner/vae"}
    path = run("dog", base=base, revision="main", **names)
    assert under_test(path, cache_dir=hub.cache).source.model_id == base["id"]
    same = under_test(path, cache_dir=hub.cache, pretrained_model_name_or_path="owner/name")
    assert same.source.model_id == base["id"], "it is the same by any other way to say it"
    moved = under_test(path, cache_dir=hub.cache, revision="main")
    assert moved.source.revision == second and "put into owner/name@222" in moved.notes["dog"][0]


def test_another_base_model_inherits_nothing(run: Any) -> None:
    found = run_of(run("dog", base={"revision": "1" * 40}, variant="fp16", revision="main"))
    assert isinstance(found, TrainedRun)
    model = model_of(SampleConfig(lora=(Path("dog"),), pretrained_model_name_or_path="owner/other"), found)
    assert (model.pretrained_model_name_or_path, model.revision, model.variant) == ("owner/other", None, None)


@pytest.mark.parametrize("model", [None, *tiny.MODELS])
def test_without_a_run_an_embedded_model_draws_as_in_its_own_runs(model: str | None, run: Any) -> None:
    """FLUX's pipelines know nothing of a model's size and length of prompts: 512 pixels and 512 tokens."""
    config = SampleConfig(lora=(Path("file"),), pretrained_model_name_or_path=model)
    trained = parse_run(["--pretrained_model_name_or_path", model] if model else [])[0]
    settings = settings_of(config, None)
    plan = plan_for(config, settings, DEFAULTS, ("a cat",))
    drawn = (plan.width, plan.height, plan.num_inference_steps, plan.guidance_scale)
    assert drawn == (64, 64, trained.sample.num_inference_steps, trained.sample.sample_guidance_scale)
    assert settings.get("max_sequence_length") == trained.data.max_sequence_length
    assert settings.get("guidance_scale", Train.guidance_scale) == trained.train.guidance_scale
    assert settings_of(config, found := run_of(run("dog"))) == found.options, "a run's are all that counts"
    assert settings_of(SampleConfig(lora=(Path("file"),), pretrained_model_name_or_path="some/model"), None) == {}


def test_as_many_blocks_wait_as_in_the_run_unless_told_otherwise(run: Any, sd_folder: Path) -> None:
    found = run_of(run("dog", offload_blocks=2), trusted=True)

    def blocks(**flags: Any) -> int:
        return model_of(SampleConfig(lora=(Path("dog"),), **flags), found).offload_blocks

    assert (blocks(), blocks(offload_blocks=0), blocks(offload_blocks=1)) == (2, 0, 1)
    assert blocks(pretrained_model_name_or_path="owner/other") == 0
    assert model_of(SampleConfig(lora=(Path("dog"),)), run_of(run("older"), trusted=True)).offload_blocks == 0


def test_the_schedule_is_that_of_the_run(run: Any) -> None:
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    found = under_test(run("zero", **options), run("alike", **options))
    assert found.source.predictor_id.endswith(" with v_prediction and zero terminal SNR")
    scheduler = found.parts.pipeline().scheduler
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.timestep_spacing == "trailing"
    assert scheduler.alphas_cumprod[-1] < 1e-6


def test_runs_of_different_schedules_are_refused(run: Any) -> None:
    zero = run("zero", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    plain = run("plain", prediction_type="v_prediction", rescale_betas_zero_snr=False)
    words = "zero to predict v_prediction with zero terminal SNR, plain to predict v_prediction. No model draws both"
    with pytest.raises(UserError, match=words):
        under_test(zero, plain)


def test_runs_before_the_option_are_as_those_without_it(run: Any) -> None:
    assert under_test(run("old"), run("new", rescale_betas_zero_snr=False)).source.predictor_id.startswith("sd@")
