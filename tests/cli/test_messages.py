"""Programs show what the package says while it works; who only imports it sees nothing of this."""

from __future__ import annotations

import io
import logging
import re
import sys
import unicodedata
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from dreamlora.__main__ import COMMANDS, main
from dreamlora.cli.messages import _Tolerant, console_messages
from dreamlora.errors import UserError
from tests.fuzzing import fuzzed

logger = logging.getLogger("dreamlora.some.module")


@pytest.fixture(autouse=True)
def first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def root_handler() -> Iterator[io.StringIO]:
    """Another library's, for the messages of all."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logging.getLogger().addHandler(handler)
    yield heard
    logging.getLogger().removeHandler(handler)


def speak() -> None:
    logger.debug("inner workings")
    logger.info("a note on %s", "something")
    logger.warning("a warning")
    logging.getLogger("another.library").info("its own note")


def test_a_command_shows_notes_and_warnings_once_and_no_other_librarys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, root_handler: io.StringIO
) -> None:
    monkeypatch.setitem(COMMANDS, "report", lambda argv: speak())
    assert main(["report"]) == main(["report"]) == 0
    assert capsys.readouterr().err == "a note on something\na warning\n" * 2
    assert root_handler.getvalue() == ""


def test_of_several_processes_one_shows_the_notes_and_warnings_of_others_have_their_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with console_messages():
        speak()
    assert capsys.readouterr().err == "process 3: a warning\n"


def test_who_imports_the_package_has_its_loggers_as_they_were(root_handler: io.StringIO) -> None:
    package = logging.getLogger("dreamlora")
    before = package.level, package.propagate, list(package.handlers)
    with pytest.raises(ZeroDivisionError), console_messages():
        raise ZeroDivisionError
    assert (package.level, package.propagate, package.handlers) == before
    speak()
    assert root_handler.getvalue() == "a warning\n"


def test_what_bitsandbytes_lacks_on_a_cpu_is_not_told(root_handler: io.StringIO) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    with console_messages():
        logging.getLogger("bitsandbytes.backends").warning("Failed to load CPU gemm_4bit_forward")
    assert not root_handler.getvalue()


def test_a_progress_bar_stays_in_one_piece(capsys: pytest.CaptureFixture[str]) -> None:
    with console_messages(), tqdm(total=2, desc="bar", ncols=40) as bar:
        bar.update()
        logger.info("a note")
        bar.update()
    assert "a note" in capsys.readouterr().err.splitlines(), "else it stands behind the bar"


EVIL = "x\x1b[2J\x1b]0;t\x07\x9b1m\r\x08\u202e\u200b\x7f\x85\u2028\ud800\nERROR: run this"
SHOWN = r"x\x1b[2J\x1b]0;t\x07\x9b1m\r\x08\u202e\u200b\x7f\x85\u2028\ud800"


def test_text_from_outside_moves_nothing_on_the_terminal_and_forges_no_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: object) -> None:
        sys.stdout.write(f"result {EVIL}\n")
        logger.warning("note %s", EVIL)
        sys.stderr.write(f"library {EVIL}\n")
        with tqdm(total=1, desc=f"bar {EVIL}", ncols=300) as bar:
            bar.update()
        raise UserError(f"no {EVIL}")

    monkeypatch.setitem(COMMANDS, "report", fail)
    assert main(["report"]) == 2
    told = capsys.readouterr()
    assert told.out == f"result {SHOWN}\nERROR: run this\n"
    assert f"note {SHOWN}\n    ERROR: run this\n" in told.err and f"library {SHOWN}\n" in told.err
    assert told.err.endswith(f"error: no {SHOWN}\n    ERROR: run this\n") and f"\rbar {SHOWN}\\nERROR" in told.err
    assert not re.search(r"[^\n\r -~█▏▎▍▌▋▊▉]", told.err)


def test_bars_still_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    with console_messages(), tqdm(total=2, ncols=40) as outer, tqdm(total=2, ncols=40, position=1, leave=False) as bar:
        bar.update()
        outer.update()
        sys.stderr.write("\x1b[A\x1b[A")
        sys.stderr.write("\x1b[A a name")
    told = capsys.readouterr().err
    assert r"\x1b[A a name" in told, "a text is no bar's"
    assert "\r" in told and r"\r" not in told and "\x1b[A" in told


@fuzzed
@given(st.text(st.characters(), max_size=40))
def test_fuzz_terminal(text: str) -> None:
    written = io.StringIO()
    stream = _Tolerant(written, results=False)
    assert stream.write(f"a{text}") == len(text) + 1
    shown = written.getvalue()
    assert not any(unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") for one in shown if one != "\n")
    assert shown.count("\n") == text.count("\n") and shown.startswith("a")
