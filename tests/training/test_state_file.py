"""Training states that others made: nothing but tensors, numbers and words, and all of them those of the run."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.training import state
from dreamlora.training.ema import MovingAverage
from dreamlora.training.state_file import read_state
from tests.fuzzing import changed, damaged, fuzzed, harmless
from tests.optimizers.test_states import same

pytestmark = pytest.mark.usefixtures("no_report")

FAILURES = (ValueError, OSError)
"""What ``state.open_checkpoint`` makes one message of."""


class Counter(nn.Module):
    """Two LoRA pairs."""

    def __init__(self) -> None:
        super().__init__()
        for number in range(2):
            pair = {"lora_A": nn.Linear(4, 2, bias=False), "lora_B": nn.Linear(2, 3, bias=False)}
            self.add_module(f"layer{number}", nn.ModuleDict(pair))


def fake_run(optimizer: str = "adamw", init: str = "kaiming", averaged: bool = False) -> Any:
    """As much of a run as a state is of."""
    torch.manual_seed(0)
    module = Counter()
    parameters = dict(module.named_parameters())
    plugin = registry.load("optimizers", optimizer)
    pairs = [parameters[f"layer{n}.lora_{f}.weight"] for n in range(2) for f in "AB"]
    group = {"params": pairs, "lora_pairs": True, "pair_names": ["layer0", "layer1"], "lr": 1e-2, "weight_decay": 1e-2}
    made = plugin.build([group], plugin.Options())
    return SimpleNamespace(
        trainables=parameters,
        optimizer=made,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.9**step),
        accelerator=SimpleNamespace(scaler=None, unwrap_model=lambda model: model),
        model=module,
        config=SimpleNamespace(lora=SimpleNamespace(init=init)),
        step=0,
        skipped_steps=0,
        counted={},
        average=MovingAverage(parameters, 0.9) if averaged else None,
    )


def stepped(optimizer: str = "adamw", steps: int = 3) -> Any:
    run = fake_run(optimizer)
    for _ in range(steps):
        for parameter in run.trainables.values():
            parameter.grad = parameter.detach() * 0.1 + 0.01
        run.optimizer.step()
        run.lr_scheduler.step()
        run.step += 1
    return run


def state_of(run: Any) -> dict[str, Any]:
    run.optimizer.optimizer = run.optimizer
    try:
        return copy.deepcopy(state._state(run))
    finally:
        del run.optimizer.optimizer


def restored(run: Any, saved: dict[str, Any]) -> None:
    run.optimizer.optimizer = run.optimizer
    state.restore(run, copy.deepcopy(saved))


def written(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


SOUND = state_of(stepped())


def reading(tmp_path: Path, content: bytes) -> Any:
    file = tmp_path / "training_state.pt"
    file.write_bytes(content)
    return harmless(lambda: read_state(file, tmp_path), *FAILURES)


def from_pickle(pickled: bytes, **storages: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for name, storage in storages.items():
            archive.writestr(f"archive/data/{name.removeprefix('_')}", storage)
    return content.getvalue()


def tuples_of_tuples() -> bytes:
    """60 tuples, each of the last one twice, as a key: its hash takes 2^60 steps."""
    made = b"\x80\x02](K\x01e)q\x00a"
    for number in range(60):
        made += b"h" + bytes([number]) + b"h" + bytes([number]) + b"\x86q" + bytes([number + 1]) + b"a"
    return from_pickle(made + b"}h" + bytes([60]) + b"K\x01sa.")


def lists_of_lists() -> bytes:
    """Ten lists, each of the last one a thousand times."""
    made = b"\x80\x02]q\x00"
    for number in range(10):
        made += b"]q" + bytes([number + 1]) + b"(" + (b"h" + bytes([number])) * 1000 + b"e"
    return from_pickle(made + b".")


def named(module: str, name: str, arguments: bytes) -> bytes:
    return from_pickle(b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R.")


def expanded() -> bytes:
    """One number that says it is 2^30."""
    with zipfile.ZipFile(io.BytesIO(written({**SOUND, "step": torch.zeros(4)}))) as archive:
        pickled = archive.read("archive/data.pkl")
        storages = {
            f"_{name[13:]}": archive.read(name) for name in archive.namelist() if name.startswith("archive/data/")
        }
    place = pickled.index(b"K\x00K\x04\x85")
    size = b"K\x00J" + struct.pack("<i", 2**30) + b"\x85"
    rest = pickled[place + 5 :].replace(b"K\x01\x85", b"K\x00\x85", 1)
    return from_pickle(pickled[:place] + size + rest, **storages)


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def packed() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(10**8))
    return content.getvalue()


BOMBS: dict[str, Callable[[], bytes]] = {
    "a pickle that runs code": lambda: pickle.dumps(Trap()),
    "the same in torch's format": lambda: from_pickle(pickle.dumps(Trap(), protocol=2)),
    "tuples of tuples": tuples_of_tuples,
    "lists of lists": lists_of_lists,
    "ten gigabytes of zeros": lambda: named("__builtin__", "bytearray", b"J\xff\xff\xff\x7f\x85"),
    "a class of tensors that allocates": lambda: named("torch", "FloatTensor", b"J\xff\xff\xff\x7f\x85"),
    "a function of torch": lambda: named("torch", "load", b"X\x01\x00\x00\x00a\x85"),
    "one number as 2^30": expanded,
    "packed": packed,
    "torch's old format": lambda: old_format(),
    "nothing": lambda: b"",
    "a word": lambda: written("a"),
    "a list": lambda: written([1]),
    "a set as a setting": lambda: written({**SOUND, "scaler": {1}}),
}


def old_format() -> bytes:
    file = io.BytesIO()
    torch.save(SOUND, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_what_is_no_state_is_refused_at_once(
    content: Callable[[], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = content()
    assert isinstance(reading(tmp_path, made), ValueError)
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_none_or_lie_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "step-000003"
    folder.mkdir()
    (folder / "settings.json").write_text("{}", encoding="utf-8")
    (tmp_path / "outside.pt").write_bytes(written(SOUND))
    (folder / "training_state.pt").symlink_to(tmp_path / "outside.pt")
    with pytest.raises(state.DamagedCheckpoint, match="link leads out"):
        state.open_checkpoint(folder)
    (folder / "training_state.pt").unlink()
    os.mkfifo(folder / "training_state.pt")
    with pytest.raises(state.DamagedCheckpoint, match="not a file"):
        state.open_checkpoint(folder)


def test_the_step_is_that_of_the_folder(tmp_path: Path) -> None:
    for name in ("step-000003", "step-000005", "mine"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "settings.json").write_text("{}", encoding="utf-8")
        (folder / "training_state.pt").write_bytes(written(SOUND))
    assert state.open_checkpoint(tmp_path / "step-000003").state["step"] == 3
    assert state.open_checkpoint(tmp_path / "mine").state["step"] == 3
    with pytest.raises(state.DamagedCheckpoint, match="its state is of step 3"):
        state.open_checkpoint(tmp_path / "step-000005")


SETTINGS = [b"", b"[", b"[1]", b"1", b'"a"', b"null", b"\xff", b"[" * 10**6, b'{"a": ' * 1000, b"{}" + b" " * 2**27]


@pytest.mark.parametrize("content", SETTINGS, ids=lambda content: repr(content[:6]))
def test_settings_that_are_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    (tmp_path / "training_state.pt").write_bytes(written(SOUND))
    error = harmless(lambda: state.open_checkpoint(tmp_path))
    assert isinstance(error, state.DamagedCheckpoint) and len(str(error)) < 1000


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        holder: Any = saved
        for part in path[:-1]:
            holder = holder[part]
        holder[path[-1]] = value

    return change


DAMAGED = {
    "a step of -5": put("step", value=-5),
    "a step that is true": put("step", value=True),
    "a step of 2^60": put("step", value=2**60),
    "a broken step": put("step", value=1.5),
    "a step that is a tensor": put("step", value=torch.tensor(3)),
    "more skipped than made": put("skipped_steps", value=4),
    "skipped below 0": put("skipped_steps", value=-1),
    "weights that are none": put("trainables", value=None),
    "averaged weights that are none": put("averaged", value=[1]),
    "averaged weights that are not finite": put(
        "averaged", value={"layer0.lora_A.weight": torch.full((2, 4), torch.nan)}
    ),
    "weights that are numbers": put("trainables", "layer0.lora_A.weight", value=1.0),
    "weights that are not finite": put("trainables", "layer0.lora_A.weight", value=torch.full((2, 4), torch.nan)),
    "starts that are none": put("starts", value=[1]),
    "a start without B": put("starts", value={"layer0": {"A": torch.ones(2, 4)}}),
    "an optimizer that is none": put("optimizer", value=5),
    "groups that are none": put("optimizer", "param_groups", value=5),
    "parameters that are none": put("optimizer", "param_groups", 0, "params", value=5),
    "names that are none": put("optimizer", "param_groups", 0, "names", value=5),
    "a state that is none": put("optimizer", "state", value=[]),
    "a signature that is none": put("optimizer", "written_by", value=7),
    "a schedule that is none": put("lr_scheduler", value=None),
    "a schedule below 0": put("lr_scheduler", "last_epoch", value=-1),
    "rates that are none": put("lr_scheduler", "base_lrs", value=["fast"]),
    "a rate that is none": put("lr_scheduler", "base_lrs", value=[float("nan")]),
    "a scale below 0": put("scaler", value={"scale": -1.0}),
    "a scale that is none": put("scaler", value=3),
    "counts that are none": put("uncounted", value={"clipped": "many"}),
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_state_of_other_types_or_out_of_bounds_is_damaged(change: Any, tmp_path: Path) -> None:
    saved = copy.deepcopy(SOUND)
    change(saved)
    folder = tmp_path / "any"
    folder.mkdir()
    (folder / "settings.json").write_text("{}", encoding="utf-8")
    (folder / "training_state.pt").write_bytes(written(saved))
    error = harmless(lambda: state.open_checkpoint(folder))
    assert isinstance(error, state.DamagedCheckpoint) and "remove it" in str(error)


FIRST = ("optimizer", "state", 0)
MISFITS = {
    "broadcast weights": put("trainables", "layer0.lora_A.weight", value=torch.ones(1, 4)),
    "one weight for all": put("trainables", "layer0.lora_A.weight", value=torch.ones(())),
    "weights in half precision": put("trainables", "layer0.lora_A.weight", value=torch.ones(2, 4).half()),
    "a weight more": put("trainables", "layer9.lora_A.weight", value=torch.ones(2, 4)),
    "an average of a run without": put("averaged", value={"layer0.lora_A.weight": torch.ones(2, 4)}),
    "no weights": put("trainables", value={}),
    "starts of a LoRA without": put("starts", value={"layer0": {"A": torch.ones(2, 4), "B": torch.ones(3, 2)}}),
    "a schedule ahead": put("lr_scheduler", "last_epoch", value=7),
    "a schedule behind": put("lr_scheduler", "last_epoch", value=1),
    "another rate": put("lr_scheduler", "base_lrs", value=[1.0]),
    "one rate more": put("lr_scheduler", "base_lrs", value=[1e-2, 1e-2]),
    "skipped without fp16": put("skipped_steps", value=2),
    "a rate of 10^10": put("optimizer", "param_groups", 0, "lr", value=1e10),
    "a rate below 0": put("optimizer", "param_groups", 0, "lr", value=-1e-3),
    "a rate that is a word": put("optimizer", "param_groups", 0, "lr", value="fast"),
    "other betas": put("optimizer", "param_groups", 0, "betas", value=(2.0, 5.0)),
    "another eps": put("optimizer", "param_groups", 0, "eps", value=-1.0),
    "another decay": put("optimizer", "param_groups", 0, "weight_decay", value=1e9),
    "broadcast moments": put(*FIRST, "exp_avg", value=torch.ones(1, 4)),
    "one moment for all": put(*FIRST, "exp_avg", value=torch.ones(())),
    "moments of other dimensions": put(*FIRST, "exp_avg", value=torch.ones(8)),
    "whole moments": put(*FIRST, "exp_avg", value=torch.ones(2, 4).int()),
    "a moment that is a number": put(*FIRST, "exp_avg", value=0.5),
    "a moment that is nothing": put(*FIRST, "exp_avg", value=None),
    "moments that are not finite": put(*FIRST, "exp_avg", value=torch.full((2, 4), torch.inf)),
    "a step for each number": put(*FIRST, "step", value=torch.ones(2, 4)),
    "one value more": put(*FIRST, "more", value=torch.ones(2, 4)),
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_a_state_must_fit_exactly_and_changes_nothing_if_it_does_not(change: Any, tmp_path: Path) -> None:
    saved = copy.deepcopy(SOUND)
    change(saved)
    run = fake_run()
    before = state_of(run)
    read = reading(tmp_path, written(saved))
    assert not isinstance(read, Exception), "what only the run can tell is told by the run"
    with pytest.raises(UserError, match="cannot go on from there"):
        restored(run, read)
    del run.optimizer.optimizer
    assert same(state_of(run), before)


@pytest.mark.parametrize("optimizer", registry.names("optimizers"))
def test_a_state_of_its_own_fits_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    try:
        run = stepped(optimizer)
    except UserError as error:
        pytest.skip(str(error))
    saved = state_of(run)
    resumed = fake_run(optimizer)
    restored(resumed, reading(tmp_path, written(saved)))
    del resumed.optimizer.optimizer
    again = state_of(resumed)
    assert same({**again, "lr_scheduler": None}, {**saved, "lr_scheduler": None})
    assert resumed.lr_scheduler.get_last_lr() == run.lr_scheduler.get_last_lr()
    for each in (run, resumed):
        for parameter in each.trainables.values():
            parameter.grad = torch.ones_like(parameter)
        each.optimizer.step()
        each.lr_scheduler.step()
    assert all(torch.equal(p, q) for p, q in zip(run.trainables.values(), resumed.trainables.values(), strict=True))


def test_an_average_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def go_on(run: Any, steps: int) -> None:
        for _ in range(steps):
            run.average.train()
            for parameter in run.trainables.values():
                parameter.grad = parameter.detach() * 0.1 + 0.01
            run.optimizer.step()
            run.lr_scheduler.step()
            run.average.update(run.lr_scheduler.last_epoch)
            run.average.eval()
            run.step += 1

    run = fake_run(averaged=True)
    go_on(run, 3)
    saved = state_of(run)
    assert not same(saved["averaged"], saved["trainables"])
    resumed = fake_run(averaged=True)
    restored(resumed, reading(tmp_path, written(saved)))
    del resumed.optimizer.optimizer
    for each in (run, resumed):
        go_on(each, 2)
    assert same({**state_of(run), "lr_scheduler": None}, {**state_of(resumed), "lr_scheduler": None})


@pytest.mark.parametrize("averaged", [{}, {"layer0.lora_A.weight": torch.ones(2, 4)}])
def test_a_state_without_all_that_the_average_is_of(averaged: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="what the average is of has 4 tensors there and"):
        restored(fake_run(averaged=True), reading(tmp_path, written({**copy.deepcopy(SOUND), "averaged": averaged})))


def test_an_fp16_run_goes_on_with_the_scale_of_its_loss(tmp_path: Path) -> None:
    def scaled(run: Any) -> Any:
        run.accelerator.scaler = torch.amp.GradScaler("cpu")
        return run

    run = scaled(fake_run())
    for gradient in (math.inf, 0.01, 0.02):  # the first step is skipped
        loss = sum(parameter.sum() for parameter in run.trainables.values()) * gradient
        run.accelerator.scaler.scale(loss).backward()
        run.accelerator.scaler.unscale_(run.optimizer)
        if math.isfinite(gradient):
            run.optimizer.step()
            run.lr_scheduler.step()
        run.optimizer.zero_grad()
        run.accelerator.scaler.update()
        run.step += 1
    other = scaled(fake_run())
    restored(other, reading(tmp_path, written(state_of(run))))
    assert (other.step, other.lr_scheduler.last_epoch, other.accelerator.scaler.get_scale()) == (3, 2, 2.0**15)
    assert other.accelerator.scaler.state_dict() == run.accelerator.scaler.state_dict()
    assert state_of(other)["optimizer"]["state"].keys() == state_of(run)["optimizer"]["state"].keys()


def test_a_schedule_takes_over_numbers_alone(tmp_path: Path) -> None:
    """torch puts whatever stands in a state into the schedule, methods included."""
    saved = copy.deepcopy(SOUND)
    saved["lr_scheduler"] |= {"step": "gone", "_get_closed_form_lr": 1, "optimizer": None, "_last_lr": ["x"]}
    run = fake_run()
    restored(run, reading(tmp_path, written(saved)))
    assert callable(run.lr_scheduler.step) and run.lr_scheduler.optimizer is run.optimizer
    assert run.lr_scheduler.get_last_lr() == [pytest.approx(1e-2 * 0.9**3)] and run.step == 3


def test_a_state_of_an_older_version_fits(tmp_path: Path) -> None:
    saved = copy.deepcopy(SOUND)
    del saved["skipped_steps"], saved["uncounted"], saved["averaged"], saved["optimizer"]["written_by"]
    saved["trainables"] = OrderedDict(saved["trainables"])
    run = fake_run()
    restored(run, reading(tmp_path, written(saved)))
    assert (run.step, run.skipped_steps, run.counted) == (3, 0, {})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "settings.json").write_text("{}", encoding="utf-8")
    return folder


@fuzzed
@given(
    st.one_of(
        changed(SOUND),
        changed(SOUND).map(lambda saved: {**SOUND, "optimizer": saved["optimizer"]} if "optimizer" in saved else saved),
    )
)
def test_fuzz_training_state(place: Path, saved: Any) -> None:
    try:
        content = written(saved)
    except (UnicodeEncodeError, OverflowError, AttributeError, TypeError):
        return
    (place / "training_state.pt").write_bytes(content)
    checkpoint = harmless(lambda: state.open_checkpoint(place))
    if isinstance(checkpoint, UserError):
        return
    run = fake_run()
    harmless(lambda: restored(run, checkpoint.state))
    assert 0 <= run.step <= 2**53


@fuzzed
@given(damaged(written(SOUND)))
def test_fuzz_damaged_state(place: Path, content: bytes) -> None:
    (place / "training_state.pt").write_bytes(content)
    harmless(lambda: state.open_checkpoint(place))


PICKLED = zipfile.ZipFile(io.BytesIO(written(SOUND))).read("archive/data.pkl")


@fuzzed
@given(damaged(PICKLED))
def test_fuzz_pickle(place: Path, pickled: bytes) -> None:
    (place / "training_state.pt").write_bytes(from_pickle(pickled, _0=bytes(32), _1=bytes(24)))
    harmless(lambda: state.open_checkpoint(place))


@fuzzed
@given(damaged(b'{"learning_rate": 0.1, "lora_layers": ["to_q"], "base model": "x"}'))
def test_fuzz_settings(place: Path, content: bytes) -> None:
    folder = place / "settings"
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_bytes(content)
    (folder / "training_state.pt").write_bytes(written(SOUND))
    harmless(lambda: state.open_checkpoint(folder))
