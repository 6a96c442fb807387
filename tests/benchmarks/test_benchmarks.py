"""What the benchmarks compute from what they saw; the measuring itself is not run here."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from dreamlora.compare.records import read_record
from dreamlora.errors import UserError
from tests.compare.synthetic import Curve, make_run
from tests.tinymodels import save_sd

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str, folder: Path = BENCHMARKS) -> ModuleType:
    """A benchmark as a module; they are scripts in a folder that is no package."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCHMARKS))
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
        del sys.modules[name]
    return module


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    return load("train_speed")


@pytest.fixture(scope="module")
def full() -> ModuleType:
    return load("lora_vs_full")


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("training:  10%|#   | 20/200 [00:01<00:09, 19.5step/s, loss=0.1]", 20),
        ("\rSteps: 1/200 [a]\rSteps: 2/200 [b]", 2),
        ("Loading weights: 49/49 [00:00<00:00]", None),
        ("image 3 of 1200/2000 and 10/20, 120/2000", None),
        ("", None),
    ],
)
def test_the_last_state_of_the_bar_is_read(speed: ModuleType, text: str, step: int | None) -> None:
    assert speed.steps_shown(text, 200) == step


def test_rates_leave_the_warm_up_out(speed: ModuleType) -> None:
    marks = [
        speed.Mark(1, 0.0, 9.0),
        speed.Mark(20, 10.0, 12.0),
        speed.Mark(60, 11.0, 13.0),
        speed.Mark(70, 15.0, 13.5),
    ]
    steps_per_s, cpu_ms = speed.rates(marks, 20)
    assert steps_per_s == pytest.approx(50 / 5)
    assert cpu_ms == pytest.approx(1500 / 50)


def test_a_bar_seen_once_is_no_rate(speed: ModuleType) -> None:
    with pytest.raises(UserError, match="more --steps"):
        speed.rates([speed.Mark(3, 0.0, 0.0), speed.Mark(20, 1.0, 1.0)], 20)


def test_a_command_is_watched_and_measured(speed: ModuleType) -> None:
    program = (
        "import sys, time\n"
        "for i in range(1, 5):\n"
        "    sys.stderr.write(f'bar: {i}/4\\r'); sys.stderr.flush(); time.sleep(0.05)\n"
    )
    found = speed.measure([sys.executable, "-c", program], {}, 4, 1)
    assert 1 < found.steps_per_s < 40
    assert found.wall_s > 0.15
    assert 2 < found.peak_mib < 1000


def test_a_command_that_fails_says_why(speed: ModuleType) -> None:
    with pytest.raises(UserError, match="no such thing"):
        speed.measure([sys.executable, "-c", "raise SystemExit('no such thing')"], {}, 4, 1)


def test_ratios_are_medians_of_rounds_and_are_judged(speed: ModuleType) -> None:
    def measured(rate: float, peak: float = 500.0) -> object:
        return speed.Measured(rate, 1000 / rate, 10.0, 9.0, peak)

    rounds = [
        {
            speed.OURS: measured(9.6),
            speed.THEIRS: measured(8.0),
            speed.TUNED: measured(8.1),
            speed.BARE: measured(10.0),
        },
        {speed.OURS: measured(1.0), speed.THEIRS: measured(0.5), speed.TUNED: measured(0.9), speed.BARE: measured(1.0)},
        {
            speed.OURS: measured(9.0),
            speed.THEIRS: measured(9.0, 499.0),
            speed.TUNED: measured(9),
            speed.BARE: measured(10.0),
        },
    ]
    found = speed.ratios(rounds)
    assert found["rate / bare step"] == pytest.approx(0.96)
    assert found["rate / diffusers script"] == pytest.approx(1.2)
    assert found["rate of the bare step / diffusers tuned"] == pytest.approx(10 / 9)
    verdicts = speed.verdicts(found)
    assert set(verdicts) == set(speed.TARGETS)
    assert verdicts["rate / bare step"] and verdicts["rate / diffusers script"]
    assert not verdicts["rate / diffusers tuned"]
    assert not verdicts["wall time / diffusers script"]  # equal is not less
    assert verdicts["peak memory / diffusers script"]
    alone = [{program: rounds[0][program] for program in (speed.OURS, speed.BARE)}]
    assert set(speed.verdicts(speed.ratios(alone))) == {"rate / bare step"}


def test_both_programs_get_the_same_flags(speed: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "train_dreambooth_lora.py"
    options = speed.argparse.Namespace(model="m", rank=8, batch=4, steps=200, diffusers_script=script)
    found = speed.commands(options, tmp_path / "images", tmp_path)
    ours, theirs = found[speed.OURS], found[speed.THEIRS]
    shared = ours[ours.index("--pretrained_model_name_or_path") : ours.index("--sample_steps")]
    assert "--max_train_steps" in shared and "--rank" in shared
    assert theirs[theirs.index("--pretrained_model_name_or_path") :][: len(shared)] == shared
    assert set(found[speed.TUNED]) - set(theirs) == {"--pre_compute_text_embeddings", str(tmp_path / "tuned")}


def test_gain_ratio(full: ModuleType) -> None:
    lora = {0: 1.0, 25: 0.5, 50: 0.55}
    assert full.gain_ratio(lora, [{0: 1.0, 25: 0.6, 50: 0.7}, {0: 1.0, 25: 0.5, 50: 2.0}]) == pytest.approx(0.9)


def test_no_gain_of_full_fine_tuning_is_an_error(full: ModuleType) -> None:
    with pytest.raises(UserError, match="full_learning_rates"):
        full.gain_ratio({0: 1.0, 25: 0.9}, [{0: 1.0, 25: 1.2}])


def test_results_name_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load("_machine")
    monkeypatch.setattr(sys, "argv", ["x", "--diffusers_script", "/home/me/train_dreambooth_lora.py", "--rounds", "3"])
    assert machine.command("a.py") == "python benchmarks/a.py --diffusers_script train_dreambooth_lora.py --rounds 3"
    assert "/" not in str({key: value for key, value in machine.describe(2).items() if key not in ("processor", "gpu")})


def stand_in() -> ModuleType:
    """Its transforms, with the name of the package that they belong to only while they are loaded."""
    folder = BENCHMARKS / "torchvision_standin" / "torchvision" / "transforms"
    spec = importlib.util.spec_from_file_location("standin", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["standin"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["standin"]
    return module


def test_the_stand_in_transforms_as_torchvision_does() -> None:
    transforms = stand_in()
    image = Image.new("RGB", (40, 20), (255, 0, 51))
    pipeline = transforms.Compose(
        [
            transforms.Resize(10, interpolation=transforms.InterpolationMode.LANCZOS),
            transforms.CenterCrop(10),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    pixels = pipeline(image)
    assert pixels.shape == (3, 10, 10) and pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert transforms.Resize(10)(image).size == (20, 10)
    assert transforms.Resize((12, 7))(image).size == (7, 12), "of height and width"
    assert transforms.RandomCrop(20)(image).size == (20, 20)
    assert transforms.RandomCrop.get_params(image, (20, 40)) == (0, 0, 20, 40)
    top, left, height, width = transforms.RandomCrop.get_params(image, output_size=(10, 30))
    assert (height, width) == (10, 30) and 0 <= top <= 10 and 0 <= left <= 10
    image.putpixel((0, 3), (1, 2, 3))
    assert transforms.RandomHorizontalFlip(p=1.0)(image).getpixel((39, 3)) == (1, 2, 3)
    assert transforms.RandomHorizontalFlip(p=0.0)(image).getpixel((0, 3)) == (1, 2, 3)
    assert transforms.functional.crop(image, 3, 0, 2, 5).getpixel((0, 0)) == (1, 2, 3)
    assert transforms.functional.crop(image, 3, 0, 2, 5).size == (5, 2)
    assert transforms.functional.center_crop(image, (10, 30)).size == (30, 10)


def test_the_evaluation_benchmark_draws_captioned_pictures_and_judges_the_time(tmp_path: Path) -> None:
    benchmark = load("evaluate_speed")
    benchmark.draw_pictures(tmp_path / "pictures", 2, 40, seed=1)
    with Image.open(tmp_path / "pictures" / "00001.png") as picture:
        assert picture.size == (40, 40)
    assert (tmp_path / "pictures" / "metadata.jsonl").read_text(encoding="utf-8").count('"text"') == 2
    metrics = {"rows": [{"values": [{"name": "img/dino", "value": 0.5}]}]}
    found = benchmark.summary(59.0, 5.0, metrics)
    assert found["target_met"] and found["values"] == {"img/dino": 0.5}
    assert not benchmark.summary(61.0, 5.0, metrics)["target_met"]


def test_calibration_on_made_up_runs(tmp_path: Path) -> None:
    """Twenty equal runs: few false alarms. Runs that are 3 % worse: always found where pairs share their noise."""
    calibration = load("compare_calibration")
    pools = []
    for method, best, seeds in (("adamw", 0.46, 20), ("sgd", 0.46 * 1.03, 20)):
        folders = [make_run(tmp_path, method, 2e-3, seed, Curve(best=best), noise=0.003) for seed in range(seeds)]
        pools.append({seed: read_record(folder.path, method) for seed, folder in enumerate(folders)})
    found = calibration.calibrate(*pools, draws=40)
    alarms = found["itself"]["verdicts"]
    assert found["itself"]["runs_per_side"] == 10 and sum(alarms.values()) == 40
    assert alarms.get("better", 0) + alarms.get("worse", 0) <= 4
    assert found["worse"]["verdicts"] == {"worse": 40} and found["worse_by_pct"][0] == pytest.approx(3, abs=0.5)
    assert found["worse_unpaired"]["verdicts"].get("worse", 0) >= 30
    assert found["paired_sd_pct"] < found["sd_pct"]


def test_the_best_rate_that_a_proposal_is_compared_with_lies_between_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are parabolas whose lowest point is at 4e-3 after 100 steps and at 1e-3 after 300."""
    auto_rate = load("auto_rate")

    def make(cell: dict[str, Any], steps: int, rate: str) -> dict[str, Any]:
        if rate == "auto":
            found = {100: 2e-3, 300: 1e-3}[steps]
            return {"learning_rate": found, "steps": 12, "exponent": 0.5, "tried": [None] * 5, "share": 0.1}
        octaves = {step: math.log2(float(rate) / best) for step, best in ((100, 4e-3), (300, 1e-3))}
        return {"losses": {"0": 0.5, **{str(step): 0.4 + 0.01 * far**2 for step, far in octaves.items()}}}

    monkeypatch.setattr(auto_rate, "make", make)
    cell, file = {"method": "adamw", "subject": "bannerfish", "rank": 4}, tmp_path / "runs.jsonl"
    rows = auto_rate.of_cell(cell, (100, 300), auto_rate.Runs(file))
    assert [(row["best"], row["times"], row["reached"]) for row in rows] == [(4e-3, 0.5, 0.9), (1e-3, 1.0, 1.0)]
    assert rows[1]["exponent"] == pytest.approx(0.5, abs=1e-3)
    monkeypatch.setattr(auto_rate, "make", lambda *args: pytest.fail("made twice"))
    assert auto_rate.of_cell(cell, (100, 300), auto_rate.Runs(file)) == rows
    assert auto_rate.result(rows)["worst_factor"] == 2 and auto_rate.result(rows)["worst_reached"] == 0.9


def test_the_runs_of_a_proposal_are_commands_that_exist(tmp_path: Path) -> None:
    from dreamlora.cli.parse import parse_run

    auto_rate = load("auto_rate")
    for method, rank in itertools.product(auto_rate.METHODS, auto_rate.RANKS):
        cell = {"method": method, "subject": auto_rate.SUBJECTS[0], "rank": rank}
        config, _ = parse_run(auto_rate.flags(cell, 300, "auto", tmp_path / "run"))
        optimizer, _, units = method.partition("+lora_units=")
        assert (config.optim.optimizer, config.optim.lora_units) == (optimizer, units or "plain")
        assert (config.lora.rank, config.optim.learning_rate) == (rank, "auto")


def test_the_estimate_of_a_command_is_told_by_stage(tmp_path: Path) -> None:
    model = save_sd(tmp_path / "sd")
    words = ["dreambooth", "--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(tmp_path)]
    one, two = (
        load("_estimate").estimated_peaks([*words, "--resolution", "16", "--train_batch_size", size]) for size in "12"
    )
    assert list(one) == [
        *("encoding images", "encoding prompts", "training", "drawing samples", "check at the end"),
    ]
    assert 0 < one["training"] < two["training"]


@pytest.mark.parametrize("lengths", [["75"], ["0"], ["-50"], ["100", "50"], ["50", "50"]])
def test_lengths_of_auto_rate_are_looked_at_before_anything_is_trained(
    lengths: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        load("auto_rate").main(["--lengths", *lengths])
    assert "--lengths must be ascending multiples of 50" in capsys.readouterr().err
