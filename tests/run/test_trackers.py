"""What trackers get, read back from what they have written; and that no run hangs on them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreamlora.callbacks.trackers import USUAL, Beginning, RunTracker, Shown, tracker_of
from dreamlora.config import Data, DataSet, Lora, Model, RunConfig, Train
from dreamlora.errors import UserError
from dreamlora.run.trackers import check_tracker, hyperparameters
from dreamlora.runfolder import RunFolder
from tests.training.conftest import train_with

TOKEN = "hf_" + "a" * 20
PROMPT = "a photo of sks creature on grass"


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the run; everything of the trackers' stays offline and in it."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path / "io")}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "somewhere"


def trained(tracker: str, place: Path, *more: str) -> RunFolder:
    """A run of the embedded model with all that trackers get."""
    place.mkdir(exist_ok=True)
    prompts = place / "prompts.txt"
    prompts.write_text(f"{PROMPT}\n", encoding="utf-8")
    flags = "--max_train_steps 4 --sample_steps 2 --eval_steps 2 --checkpointing_steps 2 --num_inference_steps 1 "
    flags += "--no_with_prior_preservation --final_eval_items 8 --no_parity_check --save_best --no_train_text_encoder"
    told = ["--sample_prompts", str(prompts), "--eval_metrics", "clip_score", "--hub_token", TOKEN]
    own = ["--output_dir", str(place / "my-run"), "--report_to", tracker]
    return train_with([*flags.split(), *told, *own, *more])


def resumed(tracker: str, place: Path) -> RunFolder:
    """The same run, as if it had been stopped after its last step but before its end."""
    return trained(tracker, place, "--resume_from_checkpoint", "step-000002")


def values_of(run: RunFolder) -> dict[str, dict[int, float]]:
    """What metrics.jsonl has, by name and step."""
    values: dict[str, dict[int, float]] = {}
    for row in run.metrics():
        values.setdefault(row["name"], {})[row["step"]] = row["value"]
    return values


def check_values(got: dict[str, list[tuple[int, float]]], run: RunFolder) -> None:
    """Every metric, under its own name and under the usual one, at each step once."""
    known = {name: row for name, row in values_of(run).items() if name in got or not name.endswith("_change")}
    wanted = known | {usual: known[name] for name, usual in USUAL.items()}
    assert {"loss", "lr", "eval/loss", "lora/dw_norm", "img/clip_t", "eval/final_loss"} <= wanted.keys()
    assert sorted(got["loss"])[0][0] == 1 and [step for step, _ in sorted(got["eval/loss"])] == [0, 2, 4]
    for name in wanted.keys() - {"train/steps_per_s"}:
        assert sorted(got[name]) == [(step, pytest.approx(value)) for step, value in sorted(wanted[name].items())], name


def check_private(place: Path, *more: Path) -> None:
    """No path and no secret in what a tracker holds."""
    files = [file for folder in (place, *more) for file in folder.rglob("*") if file.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        for word in (TOKEN, "somewhere", "prompts.txt"):
            assert word.encode() not in content, f"{word} in {file.name}"


def test_tensorboard(private: Path) -> None:
    for run in (trained("tensorboard", private), resumed("tensorboard", private)):
        events = EventAccumulator(str(run.path / "logs" / "dreamlora"), {"images": 0, "tensors": 0, "scalars": 0})
        events.Reload()
        names = events.Tags()
        check_values({name: [(e.step, e.value) for e in events.Scalars(name)] for name in names["scalars"]}, run)
        single = next(name for name in names["images"] if name.startswith("samples/"))
        for name in ("grid", "validation", single):
            assert [image.step for image in events.Images(name)] == [0, 2, 4]
        texts = {
            name: events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()
            for name in ("report", "samples/prompts")
        }
        assert PROMPT in texts["samples/prompts"] and "**The loss on" in texts["report"]
        check_private(run.path / "logs")
    assert [file for file in (run.path / "logs").rglob("*") if file.is_dir()] == [run.path / "logs" / "dreamlora"]


def records(file: Path) -> Iterator[Any]:
    """Those of a .wandb file, which is a log as LevelDB has it."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no head fits into the rest of a block
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""


def test_wandb(private: Path) -> None:
    pytest.importorskip("wandb")
    run = trained("wandb", private)
    resumed("wandb", private)
    folders = sorted((run.path / "logs" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    got: dict[str, list[tuple[int, Any]]] = {}
    about = []
    for folder in folders:
        for record in records(next(folder.glob("*.wandb"))):
            if record.HasField("run"):
                about.append((record.run.project, record.run.display_name, record.run.run_id))
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for name, value in items.items():
                    got.setdefault(name, []).append((items["_step"], value))
    assert set(about) == {("dreamlora", "my-run", run.trackers()["wandb"])}
    numbers = {name: [one for one in row if isinstance(one[1], float | int)] for name, row in got.items()}
    check_values(numbers, run)
    assert [step for step, _ in got["grid/size"]] == [step for step, _ in got["validation/captions"]] == [0, 2, 4]
    assert got["validation/captions"][0][1] == [PROMPT]
    page = next(folders[0].rglob("report_*.html")).read_text(encoding="utf-8")
    assert "The loss on" in page and "data:image/webp" in page and "Images it was trained on" not in page
    for folder in folders:
        check_private(folder / "files")
        assert not list(folder.rglob("wandb-metadata.json")) and not list(folder.rglob("output.log"))
        raw = next(folder.glob("*.wandb")).read_bytes()
        assert TOKEN.encode() not in raw and b"prompts.txt" not in raw


def test_trackio(private: Path) -> None:
    pytest.importorskip("trackio")
    trained("trackio", private)
    run = resumed("trackio", private)
    with sqlite3.connect(private.parent / "io" / "dreamlora.db") as database:
        rows = [(name, step, json.loads(text)) for name, step, text in database.execute(
            "select run_name, step, metrics from metrics order by id")]  # fmt: skip
        ids = {one for (one,) in database.execute("select run_id from metrics")}
        options = [json.loads(text) for (text,) in database.execute("select config from configs")]
    assert {name for name, _, _ in rows} == {"my-run"} and len(ids) == 1
    got: dict[str, list[tuple[int, Any]]] = {}
    for _, step, values in rows:
        for name, value in values.items():
            got.setdefault(name, []).append((step, value))
    check_values({name: row for name, row in got.items() if not isinstance(row[0][1], dict)}, run)
    assert [step for step, _ in got["grid"]] == [0, 2, 4]
    single = next(row for name, row in got.items() if name.startswith("samples/"))
    assert [(step, value["caption"]) for step, value in single] == [(step, PROMPT) for step in (0, 2, 4)]
    assert got["report"][0][1]["_type"] == "trackio.html"
    assert options[0]["rank"] == run.config()["rank"] and "output_dir" not in options[0]


def full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_run_whose_tracker_fails_goes_on(
    private: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking.TensorBoardTracker, "log", full)
    run = trained("tensorboard", private, "--eval_steps", "0", "--no_save_best", "--eval_metrics")
    told = [one.getMessage() for one in caplog.records if "tensorboard has failed" in one.getMessage()]
    assert len(told) == 1 and "No space left on device" in told[0]
    assert sorted(values_of(run)["train/loss"]) == [1, 2, 3, 4] and run.lora_file.exists() and run.report_html.exists()


class Recorded:
    """A tracker of accelerate's that has no class of its own here."""

    name, requires_logging_directory = "aim", True

    def __init__(self, project: str, folder: str) -> None:
        self.got: list[Any] = [(project, folder)]

    def start(self) -> None:
        pass

    def store_init_configuration(self, options: dict[str, Any]) -> None:
        self.got.append(options)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.got.append((step, values))

    def log_images(self, values: dict[str, Any], step: int) -> None:
        self.got.append((step, {name: pixels.shape for name, pixels in values.items()}))

    def finish(self) -> None:
        self.got.append("finished")


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunTracker, list[Any]]]:
    """Starts a tracker; what it then gets."""

    def start(**more: Any) -> tuple[RunTracker, list[Any]]:
        made: list[Recorded] = []

        class Kind(Recorded):
            def __init__(self, *words: str) -> None:
                super().__init__(*words)
                made.append(self)

        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "aim", Kind)
        tracker = tracker_of("aim", replace(Beginning("p", "r", "0" * 8, tmp_path), **more), pytest.fail)
        tracker.start({"rank": 4})
        return tracker, made[0].got

    return start


@pytest.mark.parametrize("broken", ["start", "store_init_configuration", "log", "log_images", "finish"])
def test_what_fails_is_told_once(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "aim", type("Kind", (Recorded,), {broken: full}))
    tracker = tracker_of("aim", Beginning("p", "r", "0" * 8, tmp_path), told.append)
    tracker.start({"rank": 4})
    for step in (1, 2):
        tracker.log({"train/loss": 0.5}, step)
        tracker.log_samples([], Image.new("RGB", (16, 12)), step)
    tracker.finish()
    assert len(told) == 1 and told[0].startswith("aim has failed") and "No space left on device" in told[0]
    assert not tracker.is_on


def test_other_trackers_get_metrics_and_images(begun: Callable[..., Any], tmp_path: Path) -> None:
    tracker, got = begun()
    tracker.log({"train/loss": 0.5, "eval/loss": 0.25}, 1)
    tracker.log_samples([Shown("p00", "a dog", Image.new("RGB", (8, 4)))], Image.new("RGB", (16, 12)), 1)
    tracker.log_report("<p>", "text")
    tracker.finish()
    tracker.log({"train/loss": 0.5}, 2)
    assert got == [
        ("p", str(tmp_path)),
        {"rank": 4},
        (1, {"train/loss": 0.5, "eval/loss": 0.25, "loss": 0.5}),
        (1, {"samples/p00": (1, 4, 8, 3), "grid": (1, 12, 16, 3)}),
        "finished",
    ]


def test_what_a_tracker_got_before_a_resume_does_not_come_twice(begun: Callable[..., Any]) -> None:
    tracker, got = begun(
        step=2, sent=frozenset({(3, "train/loss"), (4, "train/loss"), (2, "eval/loss"), (4, "validation")})
    )
    for step in (3, 4, 5):
        tracker.log({"train/loss": float(step)}, step)
    tracker.log({"eval/loss": 1.0}, 4)
    for step in (4, 5):
        tracker.log_samples([], Image.new("RGB", (16, 12)), step)
    grid = {"grid": (1, 12, 16, 3)}
    assert got[2:] == [(5, {"train/loss": 5.0, "loss": 5.0}), (4, {"eval/loss": 1.0}), (5, grid)]


def test_an_overwritten_run_leaves_nothing_in_tensorboard(tmp_path: Path) -> None:
    for steps in (5, 2):
        tracker = tracker_of("tensorboard", Beginning("p", "r", "0" * 8, tmp_path), pytest.fail)
        tracker.start({"rank": 4})
        for step in range(1, steps + 1):
            tracker.log({"train/loss": float(steps)}, step)
        tracker.finish()
    events = EventAccumulator(str(tmp_path / "p"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 2.0)]


def test_options_that_trackers_get_name_no_place_and_no_secret(tmp_path: Path) -> None:
    config = RunConfig(
        model=Model(pretrained_model_name_or_path=str(tmp_path), revision="main"),
        data=Data(instance_data_dir=tmp_path, instance_prompt="a photo of sks dog", mask_data_dir=Path("masks")),
        lora=Lora(training_adapter=str(tmp_path / "adapter.safetensors")),
        train=Train(hub_token=TOKEN, resume_from_checkpoint="~/runs/step-000002", max_train_steps=7),
    )
    told = hyperparameters(config)
    assert (
        told["max_train_steps"] == 7 and told["instance_prompt"] == "a photo of sks dog" and told["revision"] == "main"
    )
    assert not told.keys() & {"mask_data_dir", "output_dir", "logging_dir", "hub_token", "training_adapter"}
    for word in (str(tmp_path), "~", TOKEN, "***"):
        assert word not in json.dumps(told), word
    hub = replace(config, model=Model(pretrained_model_name_or_path="owner/model"))
    assert hyperparameters(hub)["pretrained_model_name_or_path"] == "owner/model"
    sets = (DataSet(instance_data_dir=tmp_path, instance_prompt="a dog"),)
    assert "datasets" not in hyperparameters(replace(config, data=Data(datasets=sets)))


def test_who_is_not_logged_in_to_wandb_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    config = RunConfig(train=Train(report_to="wandb"))
    for mode, logged_in, refused in (("online", False, True), ("online", True, False), ("offline", False, False)):
        monkeypatch.setattr(wandb, "setup", lambda mode=mode: SimpleNamespace(settings=SimpleNamespace(mode=mode)))
        monkeypatch.setattr(wandb, "login", lambda logged_in=logged_in, **_: logged_in)
        if refused:
            with pytest.raises(UserError, match="Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"):
                check_tracker(config)
        else:
            check_tracker(config)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", "a:b", "50%", "a\nb", "x" * 129])
@pytest.mark.parametrize("option", ["tracker_project_name", "tracker_run_name"])
def test_names_that_cannot_be_folders_or_projects_are_refused(option: str, name: str) -> None:
    with pytest.raises(UserError, match=f"--{option} must be a name of at most 128 characters"):
        Train(**{option: name})
