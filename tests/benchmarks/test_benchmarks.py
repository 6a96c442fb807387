"""What the benchmarks compute from what they saw; the measuring itself is not run here."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

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
    with pytest.raises(ValueError, match="more --steps"):
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
    with pytest.raises(RuntimeError, match="no such thing"):
        speed.measure([sys.executable, "-c", "raise SystemExit('no such thing')"], {}, 4, 1)


def test_ratios_are_medians_of_rounds_and_are_judged(speed: ModuleType) -> None:
    def measured(rate: float, peak: float = 500.0) -> object:
        return speed.Measured(rate, 1000 / rate, 10.0, 9.0, peak)

    rounds = [
        {speed.OURS: measured(9.6), speed.THEIRS: measured(8.0), speed.BARE: measured(10.0)},
        {speed.OURS: measured(1.0), speed.THEIRS: measured(0.5), speed.BARE: measured(1.0)},
        {speed.OURS: measured(9.0), speed.THEIRS: measured(9.0, 499.0), speed.BARE: measured(10.0)},
    ]
    found = speed.ratios(rounds)
    assert found["rate / bare rate"] == pytest.approx(0.96)
    assert found["rate / diffusers' rate"] == pytest.approx(1.2)
    assert speed.verdicts(found) == {
        "rate / bare rate": True,
        "rate / diffusers' rate": True,
        "wall time / diffusers' wall time": False,  # equal is not less
        "peak memory / diffusers' peak memory": True,
    }
    assert "rate / diffusers' rate" not in speed.ratios([{k: v for k, v in rounds[0].items() if k != speed.THEIRS}])


def test_both_programs_get_the_same_flags(speed: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "train_dreambooth_lora.py"
    options = speed.argparse.Namespace(model="m", rank=8, batch=4, steps=200, diffusers_script=script)
    found = speed.commands(options, tmp_path / "images", tmp_path)
    ours, theirs = found[speed.OURS], found[speed.THEIRS]
    shared = ours[ours.index("--pretrained_model_name_or_path") : ours.index("--sample_steps")]
    assert "--max_train_steps" in shared and "--rank" in shared
    assert theirs[theirs.index("--pretrained_model_name_or_path") :][: len(shared)] == shared


def test_gain_ratio(full: ModuleType) -> None:
    lora = {0: 1.0, 25: 0.5, 50: 0.55}
    assert full.gain_ratio(lora, [{0: 1.0, 25: 0.6, 50: 0.7}, {0: 1.0, 25: 0.5, 50: 2.0}]) == pytest.approx(0.9)


def test_no_gain_of_full_fine_tuning_is_an_error(full: ModuleType) -> None:
    with pytest.raises(ValueError, match="full_learning_rates"):
        full.gain_ratio({0: 1.0, 25: 0.9}, [{0: 1.0, 25: 1.2}])


def test_results_name_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = load("_machine")
    monkeypatch.setattr(sys, "argv", ["x", "--diffusers_script", "/home/me/train_dreambooth_lora.py", "--rounds", "3"])
    assert machine.command("a.py") == "python benchmarks/a.py --diffusers_script train_dreambooth_lora.py --rounds 3"
    assert "/" not in str({key: value for key, value in machine.describe(2).items() if key not in ("processor", "gpu")})


def test_the_stand_in_transforms_as_torchvision_does() -> None:
    transforms = load("transforms", BENCHMARKS / "torchvision_standin" / "torchvision")
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
    assert transforms.RandomCrop(20)(image).size == (20, 20)
