"""Where what a program says goes: pipes whose reader has gone, full disks, terminals that cannot show a name."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dreamlora.__main__ import COMMANDS
from tests.data.odd_folder import picture

LOCALES = {
    "ascii alone": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "a pipe in ascii": {"PYTHONIOENCODING": "ascii"},
    "latin": {"PYTHONIOENCODING": "iso-8859-1", "PYTHONUTF8": "0"},
    "C": {"LC_ALL": "C"},
}


def start(*words: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "dreamlora", *words], **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("environment", LOCALES.values(), ids=LOCALES)
def test_a_name_that_cannot_be_shown_ends_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    program = start("report", str(tmp_path / "Bär-犬"), env=os.environ | environment, stderr=subprocess.PIPE)
    _, told = program.communicate()
    assert (
        program.returncode == 2 and told.startswith(b"error: ") and b"Traceback" not in told and told.count(b"\n") == 1
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_a_reader_who_has_gone_is_no_error(words: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    program = start(*words, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    _, told = program.communicate()
    assert program.returncode == 141 and told == b""  # as other programs whose output goes to `head`


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_table_whose_reader_has_gone_or_whose_disk_is_full(tmp_path: Path) -> None:
    """Its lines are written many at a time."""
    picture(tmp_path / "photos" / "a.png")
    words = ("dreambooth", "--instance_data_dir", str(tmp_path / "photos"), "--instance_prompt", "p", "--dry_run")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    read, write = os.pipe()
    os.close(read)
    with Path("/dev/full").open("wb") as full, os.fdopen(write, "wb") as pipe:
        for output, status, message in ((pipe, 141, b""), (full, 1, b"error: cannot write the output: the disk is")):
            program = start(*words, stdout=output, stderr=subprocess.PIPE, env=environment)
            _, told = program.communicate()
            assert program.returncode == status and told.startswith(message) and b"Traceback" not in told


def test_nobody_reads_the_errors_either() -> None:
    read, write = os.pipe()
    os.close(read)
    program = start("report", "nowhere", stdout=write, stderr=write)
    os.close(write)
    assert program.wait() == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_results_that_cannot_be_written_are_told() -> None:
    with Path("/dev/full").open("wb") as full:
        program = start("dreambooth", "--help", stdout=full, stderr=subprocess.PIPE)
        _, told = program.communicate()
    assert (
        program.returncode == 1
        and told == b"error: cannot write the output: the disk is full. Mend that, and start again\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_changes_nothing() -> None:
    with Path("/dev/full").open("wb") as full:
        assert start("report", "nowhere", stderr=full).wait() == 2


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(streams: str) -> None:
    for words, status in (("dreambooth --help", 0), ("report nowhere", 2)):
        program = f"{shlex.quote(sys.executable)} -m dreamlora {words} {streams}"
        done = subprocess.run(["sh", "-c", program], capture_output=True, check=False)
        assert done.returncode == status and b"Traceback" not in done.stderr


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What libraries write to standard error unasked would go into it."""
    code = (
        "import os, pathlib, sys; from dreamlora.cli.messages import console_messages\n"
        "with console_messages(), pathlib.Path(sys.argv[1]).open('w'): os.write(2, b'x')"
    )
    file = tmp_path / "metrics.jsonl"
    for streams in ("2>&-", "<&- >&- 2>&-"):
        program = shlex.join([sys.executable, "-c", code, str(file)])
        assert subprocess.run(["sh", "-c", f"{program} {streams}"], check=False).returncode == 0
        assert file.read_bytes() == b""


def test_work_beside_output_goes_on_when_its_reader_has_gone(tmp_path: Path) -> None:
    """And what is printed behind it goes nowhere, too."""
    code = (
        "import pathlib, sys; from dreamlora.cli.messages import console_messages, work_beside_output\n"
        "from dreamlora.cli.parse import run\n"
        "def main(argv):\n"
        "    with work_beside_output():\n"
        "        print('work', flush=True); print('work', flush=True)\n"
        "    pathlib.Path(argv[0]).touch()\n"
        "    print('a table', flush=True)\n"
        "with console_messages(): status = run(main, sys.argv[1:])\n"
        "sys.exit(status)"
    )
    read, write = os.pipe()
    os.close(read)
    program = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "made")], stdout=write)
    os.close(write)
    assert program.wait() == 0 and (tmp_path / "made").exists()


def test_messages_hold_no_token() -> None:
    code = (
        "import logging; from dreamlora.cli.messages import console_messages\n"
        "with console_messages(): logging.getLogger('dreamlora').warning('Bearer hf_' + 'a' * 34)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stderr == b"Bearer ***\n"
