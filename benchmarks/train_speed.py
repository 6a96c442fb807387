"""The same training by this program, by diffusers' own script and as bare steps: speed, wall time, peak memory.

    python benchmarks/train_speed.py --diffusers_script train_dreambooth_lora.py

Get the script from diffusers' repository (examples/dreambooth); without it, only this program and the bare step are
measured. Both programs get the same command line, with flags that switch off what only this program does (samples,
evaluation, the last checkpoint): one subject's images, LoRA on the attention layers, AdamW. diffusers' script runs
twice: with just that command line ("diffusers script"), and with --pre_compute_text_embeddings besides, its fastest way
("diffusers tuned"). "bare" is forward, backward and fused AdamW of the same LoRA model on tensors in memory: the limit
(see _bare_step.py).

All take turns, round by round; ratios are medians of each round's ratio, as another program may slow one round. A rate
is the steps between two states of the progress bar, the first after --warmup_steps, by the clock. cpu_ms_per_step is
the processor time between the same two (all threads), which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import _cli
import _machine
from _children import diffusers_script, environment, has_package, python

from dreamlora import tiny
from dreamlora.errors import UserError
from dreamlora.tiny.subjects import write_instance_images

HERE = Path(__file__).parent
OURS, THEIRS, TUNED, BARE = "dreamlora", "diffusers script", "diffusers tuned", "bare step"
TARGETS = {
    f"rate / {BARE}": (">=", 0.95),
    **{f"rate / {other}": (">=", 1.2) for other in (THEIRS, TUNED)},
    **{f"wall time / {other}": ("<", 1.0) for other in (THEIRS, TUNED)},
    **{f"peak memory / {other}": ("<=", 1.0) for other in (THEIRS, TUNED)},
}
FIGURES = {
    "rate": "steps_per_s",
    "processor time of a step": "cpu_ms_per_step",
    "wall time": "wall_s",
    "processor time": "cpu_s",
    "peak memory": "peak_mib",
}


@dataclass(frozen=True)
class Mark:
    """A state of the progress bar: steps done, when it was seen, and the processor time used by then."""

    step: int
    clock_s: float
    cpu_s: float


@dataclass(frozen=True)
class Measured:
    """One run of one program.

    Attributes:
        wall_s: of the whole command.
        cpu_s: processor time of the whole command, all threads.
        peak_mib: largest resident memory.
    """

    steps_per_s: float
    cpu_ms_per_step: float
    wall_s: float
    cpu_s: float
    peak_mib: float


def steps_shown(text: str, total: int) -> int | None:
    """The last ``n/total`` in a piece of a progress bar's output."""
    found = re.findall(rf"(?<![\d/])(\d+)/{total}(?!\d)", text)
    return int(found[-1]) if found else None


def rates(marks: list[Mark], warmup: int) -> tuple[float, float]:
    """Steps per second and processor milliseconds per step, from the first mark at or after ``warmup`` to the last.

    Raises:
        UserError: the bar was seen less than twice after the warm-up.
    """
    timed = [mark for mark in marks if mark.step >= warmup]
    if not timed or timed[-1].step == timed[0].step:
        raise UserError(f"the progress bar was seen too seldom after step {warmup}: more --steps are needed")
    first, last = timed[0], timed[-1]
    steps = last.step - first.step
    return steps / (last.clock_s - first.clock_s), 1e3 * (last.cpu_s - first.cpu_s) / steps


def measure(command: list[str], variables: dict[str, str], total: int, warmup: int) -> Measured:
    """Run a command to its end, watching its progress bar.

    Raises:
        UserError: it failed; the message ends with what it said.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    marks, said = watch(process.stderr, process.pid, total)
    _, status, usage = os.wait4(process.pid, 0)  # the only way to learn one child's peak memory
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{' '.join(command[:3])} ... failed ({process.returncode}):\n{said[-3000:]}")
    rate, cpu_ms = rates(marks, warmup)
    kib = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return Measured(rate, cpu_ms, wall, usage.ru_utime + usage.ru_stime, kib / 1024)


def watch(stderr: IO[bytes], pid: int, total: int) -> tuple[list[Mark], str]:
    """Read to the end; every new state of the bar of ``total`` steps, and all that was said."""
    marks: list[Mark] = []
    said = b""
    while piece := os.read(stderr.fileno(), 65536):
        now = time.perf_counter()
        said += piece
        # a number may be cut in two by the end of a piece: look back a little
        step = steps_shown(said[-len(piece) - 20 :].decode(errors="replace"), total)
        if step is not None and (not marks or step > marks[-1].step):
            marks.append(Mark(step, now, cpu_seconds(pid)))
    return marks, said.decode(errors="replace")


def cpu_seconds(pid: int) -> float:
    """Processor time of a running process so far; NaN where the system does not show it in /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def commands(options: argparse.Namespace, images: Path, scratch: Path) -> dict[str, list[str]]:
    """The command lines to compare; each writes into a folder of its own in ``scratch``."""
    words = (
        f"--pretrained_model_name_or_path {options.model} --instance_data_dir {images} --resolution 64 --seed 0 "
        f"--rank {options.rank} --train_batch_size {options.batch} --max_train_steps {options.steps} "
        f"--learning_rate 1e-3"
    )
    common = [*words.split(), "--instance_prompt", "a photo of sks creature"]
    ours = "--sample_steps 0 --eval_steps 0 --checkpointing_steps 0 --holdout 0 --optimizer adamw"
    theirs = [*common, "--checkpointing_steps", "1000000", "--output_dir"]
    bare = f"{options.model} --steps {options.steps} --batch {options.batch} --rank {options.rank}"
    found = {OURS: ["-m", "dreamlora", "dreambooth", *common, *ours.split(), "--output_dir", f"{scratch / 'ours'}"]}
    found[OURS] += ["--latents_cache_dir", f"{scratch / 'cache'}"]
    if options.diffusers_script:
        script = diffusers_script(options.diffusers_script)
        found[THEIRS] = [*script, *theirs, f"{scratch / 'theirs'}"]
        found[TUNED] = [*script, *theirs, f"{scratch / 'tuned'}", "--pre_compute_text_embeddings"]
    found[BARE] = [str(HERE / "_bare_step.py"), *bare.split()]
    return {name: python(words) for name, words in found.items()}


def ratios(rounds: list[dict[str, Measured]]) -> dict[str, float]:
    """Medians over the rounds of this program's figures divided by the others', and of the limit by diffusers'."""

    def median(program: str, other: str, figure: str) -> float:
        return statistics.median(getattr(r[program], figure) / getattr(r[other], figure) for r in rounds)

    peers = [name for name in (THEIRS, TUNED) if name in rounds[0]]
    found = {f"{words} / {BARE}": median(OURS, BARE, figure) for words, figure in list(FIGURES.items())[:2]}
    for peer in peers:
        found |= {f"{words} / {peer}": median(OURS, peer, figure) for words, figure in FIGURES.items()}
        found[f"rate of the {BARE} / {peer}"] = median(BARE, peer, "steps_per_s")
    return found


def verdicts(found: dict[str, float]) -> dict[str, bool]:
    """Which targets are met, among those that were measured."""
    tests = {">=": float.__ge__, "<=": float.__le__, "<": float.__lt__}
    return {name: tests[sign](found[name], bound) for name, (sign, bound) in TARGETS.items() if name in found}


def medians(rounds: list[dict[str, Measured]]) -> dict[str, dict[str, float]]:
    """Median of every figure of every program."""
    figures = [figure for figure in Measured.__dataclass_fields__]
    return {
        program: {f: round(statistics.median(getattr(r[program], f) for r in rounds), 3) for f in figures}
        for program in rounds[0]
    }


def main() -> None:
    """Parse the flags, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers_script", type=Path, help="diffusers' train_dreambooth_lora.py")
    parser.add_argument("--model", default=str(tiny.pipeline_path()), help="folder of a Stable Diffusion pipeline")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup_steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=_machine.usable_cores(), help="torch threads of every program")
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help="folder of train_speed.json")
    options = parser.parse_args()
    rounds = [_round(options, number) for number in range(options.rounds)]
    found = ratios(rounds)
    result = {
        "command": _machine.command("train_speed.py"),
        "settings": {name: getattr(options, name) for name in ("steps", "warmup_steps", "batch", "rank", "rounds")},
        "torchvision": "installed" if has_package("torchvision") else "missing: diffusers' script ran with a stand-in",
        "medians": medians(rounds),
        "ratios": {name: round(value, 3) for name, value in found.items()},
        "targets": {name: f"{sign} {bound}" for name, (sign, bound) in TARGETS.items()},
        "passed": verdicts(found),
        "rounds": [{program: asdict(measured) for program, measured in r.items()} for r in rounds],
        "machine": _machine.describe(options.threads),
    }
    for name, value in found.items():
        print(f"{name:45s} {value:6.3f}  {_wanted(name, found)}")
    print(f"wrote {_machine.write('train_speed', result, options.results)}")


def _round(options: argparse.Namespace, number: int) -> dict[str, Measured]:
    """Every program once, with fresh folders and an empty cache."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        write_instance_images(images, "checkerling", 16)
        for program, command in commands(options, images, Path(scratch)).items():
            measured = measure(command, environment(options.threads), options.steps, options.warmup_steps)
            print(
                f"round {number + 1} {program:16s} {measured.steps_per_s:6.2f} steps/s, "
                f"{measured.cpu_ms_per_step:6.1f} CPU ms/step, {measured.wall_s:6.1f} s, {measured.peak_mib:5.0f} MiB"
            )
            found[program] = measured
    return found


def _wanted(name: str, found: dict[str, float]) -> str:
    if name not in TARGETS:
        return ""
    sign, bound = TARGETS[name]
    return f"(wanted {sign} {bound}: {'met' if verdicts(found)[name] else 'MISSED'})"


if __name__ == "__main__":
    _cli.start(main)
