"""Programs show what the package says while it works; who only imports it sees nothing of this."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from dreamlora.__main__ import COMMANDS, main
from dreamlora.cli.messages import console_messages

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


def test_a_progress_bar_stays_in_one_piece(capsys: pytest.CaptureFixture[str]) -> None:
    with console_messages(), tqdm(total=2, desc="bar", ncols=40) as bar:
        bar.update()
        logger.info("a note")
        bar.update()
    assert "a note" in capsys.readouterr().err.splitlines(), "else it stands behind the bar"
