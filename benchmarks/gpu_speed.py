"""Training real architectures on a GPU by this program, by diffusers' own scripts and as bare steps: speed and memory.

    python benchmarks/gpu_speed.py --diffusers_examples diffusers/examples/dreambooth --folder /dev/shm/gpu_speed
    python benchmarks/gpu_speed.py --folder /dev/shm/gpu_speed --cases sdxl1 klein --programs ours compile bare
    python benchmarks/gpu_speed.py --tiny --device cpu             # tries the program where there is no GPU
    python benchmarks/gpu_speed.py --estimate results/gpu_speed_h100_80gb_hbm3.json     # needs no GPU
    python benchmarks/gpu_speed.py --table results/gpu_speed_h100_80gb_hbm3.json

SD 1.5 at 512 pixels, SDXL at 1024, FLUX.2 [klein] 4B and FLUX.1 at 512, the latter at bf16, fp8, nf4 and with blocks in
host memory. Models have the real architectures and random weights, written once to --folder. Each program is a process
of its own with the same settings, one after the other; figures are taken alike for all (see _watched.py). Steps per
second are those after the warm-up, by the end of each optimizer step; wall time is that of the whole command.

Every measurement is written as soon as it is there, to results/gpu_speed_<card>.json, beside those of earlier runs:
so a part can be measured alone, or anew. What is not begun within --minutes is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _cli
import _gpu_cases as plan
import _machine
import torch
from _children import environment, python
from _gpu_cases import BARE, CASES, COMPILED, CONTEXT_GIB, DIFFUSERS, OURS, PROGRAMS, Case, Found, Measured, Places
from _watched import CAP
from PIL import Image

from dreamlora.run import provenance
from dreamlora.tiny.subjects import write_instance_images

HERE = Path(__file__).parent
USUAL = [OURS, DIFFUSERS, BARE]
IMAGES = 8
PATIENCE_S = 180.0
"""After which a program is given up."""
LONGEST_MESSAGE = 800
ROW_S = 20.0
"""So long a measurement is thought to take until one has taken longer."""


def measure(case: Case, program: str, places: Places, device: str, patience: float) -> Measured:
    """One program once, in a process of its own."""
    for name in ("output", "cache"):
        shutil.rmtree(places.scratch / name, ignore_errors=True)
    result = places.scratch / "watched.json"
    result.unlink(missing_ok=True)
    command = python([str(HERE / "_watched.py"), str(result), *plan.command(case, program, places, device)])
    capped = program == plan.CAPPED and case.card_gib is not None
    own = {CAP: str(case.card_gib - CONTEXT_GIB)} if capped and case.card_gib else {}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    variables = {**os.environ, **environment(_machine.usable_cores()), **own, **hidden}
    started = time.time()
    log = places.scratch / f"{case.model}-{program}.log"
    with log.open("w", encoding="utf-8") as said:
        try:
            status = subprocess.run(command, env=variables, stdout=said, stderr=said, timeout=patience).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {patience:.0f} s"
    wall = {"wall_s": round(time.time() - started, 1)}
    if status != 0:
        return {"failed": f"{status}: {_last_words(log, places)}", **wall}
    try:
        return {**figures(json.loads(result.read_text(encoding="utf-8")), case), **wall}
    except ValueError as error:
        return {"failed": str(error), **wall}


def figures(watched: dict[str, Any], case: Case) -> Measured:
    """Of what ``_watched`` wrote: rate and median time of the steps after the warm-up, and peaks.

    Raises:
        ValueError: it made another number of steps than it was told.
    """
    ends = watched["ends_ms"]
    if len(ends) != case.steps:
        raise ValueError(f"{case.steps} steps were asked for, and {len(ends)} made")
    timed = [b - a for a, b in zip(ends[case.warm_up - 1 : -1], ends[case.warm_up :], strict=True)]
    peaks = {name: watched[name] for name in ("allocated_gib", "reserved_gib", "host_gib")}
    return {
        "steps_per_s": round(1e3 * len(timed) / sum(timed), 4),
        "median_ms": round(statistics.median(timed), 2),
        **{name: None if value is None else round(value, 3) for name, value in peaks.items()},
    }


def _last_words(log: Path, places: Places) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")[-LONGEST_MESSAGE:]
    for place in (places.models, places.images, places.scratch, HERE.parent, Path.home()):
        text = text.replace(str(place), place.name)
    return text


class Result:
    """The file of a card: what is measured is put beside what was.

    Args:
        about: card and machine; those of a file that is there hold on where they are not given.
    """

    def __init__(self, name: str, folder: Path, about: dict[str, Any]) -> None:
        self._name, self._folder = name, folder
        file = folder / f"{name}.json"
        self.content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cases": {}}
        self.content |= about

    @property
    def found(self) -> Found:
        """All that was measured."""
        cases: Found = self.content["cases"]
        return cases

    def add(self, case: str, program: str, measured: Measured) -> Path:
        """Put one measurement in the place of an earlier one, and write."""
        versions = {"commit": provenance.git_commit(), "torch": torch.__version__}
        self.found.setdefault(case, {})[program] = {**measured, **versions}
        ordered = {name: self.found[name] for name in CASES if name in self.found}
        self.content = {
            **{name: value for name, value in self.content.items() if name not in ("ratios", "targets", "cases")},
            "ratios": plan.ratios(ordered),
            "targets": [asdict(target) for target in plan.targets(ordered)],
            "cases": ordered,
        }
        return _machine.write(self._name, self.content, self._folder)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown, a line for each case."""
    found, ratios = result["cases"], result["ratios"]
    head = [
        "",
        "steps/s",
        "× bare step",
        "× diffusers",
        "peak GiB",
        "estimated",
        "× diffusers",
        "command, s",
        "× diffusers",
    ]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    for name, programs in found.items():
        for program in (OURS, COMPILED):
            if program in programs:
                lines.append(_line(name, program, found, ratios.get(name, {})))
    with_torch = result["machine"]["versions"]["torch"]
    title = f"**{result['card']['name']}** (torch {with_torch}):"
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines)])


def _line(name: str, program: str, found: Found, ratios: dict[str, float]) -> list[str]:
    words = name if program == OURS else f"{name}, {program}"
    measured = found[name][program]
    if "failed" in measured:
        return [words, "failed", *[""] * 7]

    expected = found[name].get(plan.ESTIMATE, {}).get("allocated_gib")

    def ratio(what: str) -> str:
        if program != OURS:
            return ""
        return f"{ratios[what]:.2f}" if what in ratios else "–"

    return [
        words,
        f"{measured['steps_per_s']:.2f}",
        ratio("steps / bare"),
        ratio(f"steps / {DIFFUSERS}"),
        f"{plan.peak(measured):.2f}",
        f"{expected:.2f}" if expected and program == OURS else "",
        ratio(f"peak / {DIFFUSERS}"),
        f"{measured['wall_s']:.0f}",
        ratio(f"wall time / {DIFFUSERS}"),
    ]


def main() -> None:
    """Parse the flags, write the models, measure, print."""
    options = _options()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if options.estimate:
        print(f"\n{table(estimate(options.estimate).content)}")
        return
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        scratch = folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        places = Places(folder / ("tiny" if options.tiny else "models"), folder / "images", scratch, options.examples)
        _write_models(places.models, options.cases, ["--device", options.device, *(["--tiny"] if options.tiny else [])])
        card = _machine.card(options.device)
        about = {"card": card, "machine": _machine.describe(_machine.usable_cores())}
        result = Result(_machine.file_name("gpu_speed", card["name"]), options.results, about)
        failed = _measure_all(options, places, result, end)
    print(f"\n{table(result.content)}" if result.found else "nothing was measured")
    sys.exit(1 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    programs = "; ".join(f"{name}: {words}" for name, words in PROGRAMS.items())
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=USUAL, help=programs)
    parser.add_argument(
        "--diffusers_examples", type=Path, dest="examples", help="diffusers' folder examples/dreambooth"
    )
    parser.add_argument("--folder", type=Path, help="for models and what is written; kept. Default: a temporary one")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, few steps: whether the program works")
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help="folder of the file")
    parser.add_argument("--table", type=Path, help="print the Markdown table of such a file, and do nothing else")
    parser.add_argument("--estimate", type=Path, help="add the expected peaks to such a file, and do nothing else")
    options = parser.parse_args()
    if not (options.table or options.estimate) and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --tiny tries the program without one")
    return options


def _write_models(folder: Path, cases: Iterable[str], flags: list[str]) -> None:
    """Those of the cases that are not there, in a process of its own, which gives the GPU back."""
    names = dict.fromkeys(CASES[case].model for case in cases)
    missing = [name for name in names if not plan.is_written(folder / name)]
    if missing:
        script = str(HERE / "_random_pipelines.py")
        subprocess.run(python([script, str(folder), *missing, *flags]), check=True)


def estimate(file: Path) -> Result:
    """Put the peak that dreamlora expects of each case beside what was measured of it."""
    result = Result(file.stem, file.parent, {})
    with tempfile.TemporaryDirectory() as temporary:
        places = Places(Path(temporary), Path(temporary) / "images", Path(temporary), None)
        _write_models(places.models, result.found, ["--hollow"])
        for name in list(result.found):
            _write_images(places.images, CASES[name].resolution)
            words = plan.command(CASES[name], OURS, places, "cuda")[2:]
            variables = os.environ | environment(_machine.usable_cores())
            command = python([str(HERE / "_estimate.py"), *words])
            done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8", check=False)
            if done.returncode != 0:
                print(f"{name:17s} left out: {done.stderr.splitlines()[-1]}", flush=True)
                continue
            stages = json.loads(done.stdout.splitlines()[-1])
            gib = {stage: round(size / 2**30, 3) for stage, size in stages.items()}
            result.add(name, plan.ESTIMATE, {"allocated_gib": max(gib.values()), "stages_gib": gib})
            print(f"{name:17s} {gib}", flush=True)
    return result


def _measure_all(options: argparse.Namespace, places: Places, result: Result, end: float) -> bool:
    """Whether any failed."""
    failed, longest = False, ROW_S
    for name in options.cases:
        case = CASES[name].tiny() if options.tiny else CASES[name]
        _write_images(places.images, case.resolution)
        for program in plan.programs_of(case, options.programs, places.examples, options.device):
            left = end - time.monotonic()
            if left < longest:
                print(f"{name:17s} {program:15s} left out: no time was left", flush=True)
                continue
            measured = measure(case, program, places, options.device, min(left, PATIENCE_S))
            result.add(name, program, measured)
            longest = max(longest, min(measured["wall_s"], 2 * ROW_S))
            failed |= "failed" in measured
            print(f"{name:17s} {program:15s} {_words(measured)}", flush=True)
    return failed


def _write_images(folder: Path, side: int) -> None:
    """Of the subject of the embedded model, enlarged."""
    if not folder.exists():
        write_instance_images(folder, "checkerling", IMAGES)
    for file in folder.iterdir():
        with Image.open(file) as image:
            large = image.resize((side, side), Image.Resampling.BICUBIC)
        large.save(file)


def _words(measured: Measured) -> str:
    if "failed" in measured:
        return f"FAILED {measured['failed']}"
    return (
        f"{measured['steps_per_s']:7.3f} steps/s, {plan.peak(measured):6.2f} GiB "
        f"({measured['reserved_gib'] or 0:.2f} reserved), {measured['wall_s']:6.1f} s"
    )


if __name__ == "__main__":
    _cli.start(main)
