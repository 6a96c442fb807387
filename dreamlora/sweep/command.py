"""``dreamlora compare``: make the runs that are missing, compare them, write the report. No torch in this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from dreamlora import compare, figures, tiny
from dreamlora.cli.messages import work_beside_output
from dreamlora.cli.parse import parse_run
from dreamlora.compare.comparison import ComparisonPlan
from dreamlora.compare.methods import Group, group
from dreamlora.compare.records import Record, read_record
from dreamlora.compare.schema import Comparison
from dreamlora.compare.verdict import EDGES, found_text, table
from dreamlora.config import PROGRAMS
from dreamlora.credentials import command_line
from dreamlora.errors import UserError
from dreamlora.escapes import message, one_line
from dreamlora.report import write_compare_report
from dreamlora.run import preflight
from dreamlora.runfolder import RunFolder
from dreamlora.sweep import plan
from dreamlora.sweep.config import PROGRAM, CompareConfig, parse
from dreamlora.sweep.plan import Job, Sweep, SweepMethod
from dreamlora.sweep.pool import Ended, Pool
from dreamlora.sweep.seats import seats

COMPARISON = Path("outputs") / "comparison"
LOGS = "logs"


def main(argv: Sequence[str]) -> None:
    """Compare as the command line says and print the verdict and where the report is.

    Raises:
        UserError: a flag is wrong, runs cannot be compared, or no run could be made.
    """
    config, training = parse(argv)
    command = command_line([*PROGRAM.split(), *argv])
    if config.runs:
        root, comparison = _existing(config, command)
    else:
        sweep = plan.sweep_of(config, training)
        preflight.check_inputs(parse_run(training, PROGRAMS[config.program], PROGRAM)[0])
        for entry in sweep.entries:
            _check_method(config, training, entry)
        with work_beside_output():
            root, comparison = sweep.root, Sweeper(sweep, config, command).run()
    lines = one_line(comparison["sentence"]), one_line(str(write_compare_report(root)))
    sys.stdout.write(f"\n{table(comparison)}\n\n" + "".join(f"{line}\n" for line in lines))


def _check_method(config: CompareConfig, training: Sequence[str], entry: SweepMethod) -> None:
    method, _ = parse_run([*training, *entry.words], PROGRAMS[config.program], PROGRAM)
    try:
        preflight.check_methods(method)
    except UserError as error:
        raise UserError(f"--optimizers {entry.label}: {error}") from None


def _existing(config: CompareConfig, command: str) -> tuple[Path, Comparison]:
    """Compare runs that exist; a folder that is none stands for the runs in it."""
    root = config.output_dir or COMPARISON
    folders: list[Path] = []
    for path in config.runs:
        inside = [path] if RunFolder(path).holds_run() else sorted(file.parent for file in path.rglob("config.yaml"))
        if not inside:
            raise UserError(f"--runs: there is no run in {path} (no config.yaml)")
        folders += inside
    comparison = compare.compare_runs(
        list(dict.fromkeys(folders)), root, ComparisonPlan(baseline=config.baseline, command=command)
    )
    compare.write_comparison(comparison, root)
    return root, comparison


class Sweeper:
    """Makes the runs of a comparison in their order: tuning, rates beyond an edge, headline.

    Args:
        sweep: what is wanted.
        config: how many workers, see ``seats.seats``.
        command: the command line, for the report.
    """

    def __init__(self, sweep: Sweep, config: CompareConfig, command: str) -> None:
        self._sweep = sweep
        self._config = config
        self._command = command
        self._grids = {entry.label: sweep.grid(entry) for entry in sweep.entries}
        self._jobs: dict[Path, Job] = {}
        self._failure = ""

    def run(self) -> Comparison:
        """Make what is missing and compare. After Ctrl-C, or a kill, the next call goes on.

        Raises:
            UserError: another process works on this comparison, its runs were made with other flags, or no run could
                be made.
        """
        lock = RunFolder(self._sweep.root)
        lock.lock()
        try:
            plan.check_settings(self._sweep)
            self._make_all()
            return self._compare()
        except KeyboardInterrupt:
            with contextlib.suppress(UserError):  # nothing to show yet
                self._compare()
            sys.stderr.write("the same command goes on from here\n")
            raise
        finally:
            lock.release()

    def _make_all(self) -> None:
        """Tune, extend the grids where the best lies at an edge, then make the runs that are compared."""
        sweep = self._sweep
        embedded = sweep.settings["pretrained_model_name_or_path"] in tiny.MODELS
        places = seats(self._config.workers, embedded, self._config.processes_per_run)
        total = len(self._tuning()) + len(sweep.entries) * len(sweep.headline_seeds)
        with (
            Pool(places, sweep.root / LOGS) as pool,
            tqdm(total=total, desc="runs", unit="run", smoothing=0) as bar,
        ):
            self._make(pool, bar, self._tuning())
            for _ in range(0 if sweep.rates else sweep.effort.rounds):
                self._extend(bar)
                self._make(pool, bar, self._tuning())
            self._make(pool, bar, self._headline(bar))

    def _tuning(self) -> list[Job]:
        """Seed by seed, so that a comparison that is stopped early has seen all rates."""
        jobs = [job for entry in self._sweep.entries for job in self._sweep.tuning(entry, self._grids[entry.label])]
        return sorted(jobs, key=lambda job: self._sweep.seeds.index(job.seed))

    def _extend(self, bar: tqdm) -> None:
        """Add rates where the best lies at an edge."""
        before = len(self._tuning())
        for entry in self._sweep.entries:
            state = self._state(entry)
            if state is not None and state.edge is not None:
                rates = plan.extended(self._grids[entry.label], state.edge, self._sweep.effort.extension)
                self._grids[entry.label] = sorted([*self._grids[entry.label], *rates])
                rates_text = " ".join(f"{lr:g}" for lr in rates)
                bar.write(
                    f"{entry.label}: the best learning rate is the {EDGES[state.edge]} tried: {rates_text} as well"
                )
        bar.total = (bar.total or 0) + len(self._tuning()) - before

    def _headline(self, bar: tqdm) -> list[Job]:
        """Seed by seed, so that a comparison that is stopped early has pairs."""
        jobs: list[Job] = []
        for entry in self._sweep.entries:
            state = self._state(entry)
            if state is None or state.best is None:
                bar.write(f"{entry.label}: no learning rate worked")
                continue
            found = (
                f"learning rate {found_text(state.found)}" if state.found else f"best learning rate {state.best.lr:g}"
            )
            bar.write(f"{entry.label}: {found}")
            jobs += self._sweep.headline(entry, state.best.lr)
        return sorted(jobs, key=lambda job: job.seed)

    def _make(self, pool: Pool, bar: tqdm, jobs: Sequence[Job]) -> None:
        """Make those of the jobs that are new and not done."""
        new = [job for job in jobs if job.folder not in self._jobs]
        missing = [job for job in new if not job.done]
        self._jobs |= {job.folder: job for job in new}
        bar.update(len(new) - len(missing))

        def show(ended: Ended) -> None:
            if ended.status == "failed":
                self._failure = self._failure or ended.message
            bar.write(message(_line(ended)))
            bar.update()

        pool.run(missing, show)

    def _state(self, entry: SweepMethod) -> Group | None:
        """What is known of a method by now."""
        jobs = [job for job in self._jobs.values() if job.method == entry.label and RunFolder(job.folder).holds_run()]
        records = [record for job in jobs if (record := self._record(job)).ended != "unfinished"]
        return group(entry.label, records, self._sweep.headline_seeds) if records else None

    def _record(self, job: Job) -> Record:
        return read_record(job.folder, job.folder.relative_to(self._sweep.root).as_posix())

    def _compare(self) -> Comparison:
        """Compare the runs made so far, and write the comparison down."""
        sweep = self._sweep
        folders = [job.folder for job in self._jobs.values() if RunFolder(job.folder).holds_run()]
        if self._failure and not any(job.done for job in self._jobs.values()):
            raise UserError(f"no run could be made; the first one ended with: {self._failure}")
        known = {(entry.label, lr) for entry in sweep.entries for lr in sweep.grid(entry)}
        all_rates = {(label, lr) for label, grid in self._grids.items() for lr in grid}
        details = ComparisonPlan(
            baseline=sweep.baseline,
            headline_seeds=sweep.headline_seeds,
            added=all_rates - known,
            missing=sum(not job.done for job in self._jobs.values()),
            command=self._command,
        )
        comparison = compare.compare_runs(folders, sweep.root, details)
        compare.write_comparison(comparison, sweep.root)
        return comparison


def _line(ended: Ended) -> str:
    """What is said of a run that ended."""
    job = ended.job
    text = f"{job.method}  lr {job.rate}  seed {job.seed}: "
    if ended.status != "finished":
        return text + f"{ended.status} after {ended.seconds:.0f} s. {ended.message}"
    record = read_record(job.folder, job.folder.name)
    last = record.losses[-1]
    against = f"{figures.loss(last)} ({figures.change(last, record.base)} against the base model)"
    return f"{text}{record.metric} {against}, {ended.seconds:.0f} s"
