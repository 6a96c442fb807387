"""Signals raise where the program is, wait where something is to be finished, and are left alone where they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dreamlora import interrupts
from dreamlora.interrupts import PIPE, SIGNALS, Interrupted, asked, deferred, heed, heeded, request, unheeded


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(0)  # Python heeds it now


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
def test_a_signal_is_raised_and_afterwards_all_is_as_before(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as stop, heeded():
        send(signum)
    assert stop.value.signum == signum and asked() == 0
    assert signal.getsignal(signum) == before


def test_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with heeded():
            send(signal.SIGHUP)
            assert asked() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_work_that_is_to_be_finished_is_finished() -> None:
    with pytest.raises(Interrupted) as stop, heeded():
        with deferred():
            with deferred():
                send(signal.SIGTERM)
                heed()
            heed()
            assert asked() == signal.SIGTERM
        heed()
    assert stop.value.signum == signal.SIGTERM


def test_a_launcher_s_repetition_is_no_second_wish_but_a_person_s_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    with pytest.raises(Interrupted), heeded(), deferred():
        for _ in range(2):
            send(signal.SIGINT)
            send(signal.SIGTERM)
        assert asked() == signal.SIGINT
        now[0] = 2.0
        send(signal.SIGTERM)
        finished = True
        send(signal.SIGINT)
        finished = False
    assert finished


def test_a_reader_who_has_gone_asks_as_a_signal_does() -> None:
    with pytest.raises(Interrupted) as stop, heeded():
        with deferred():
            request(PIPE)
        request(signal.SIGTERM)
    assert stop.value.signum == PIPE


def test_a_thread_asks_the_main_one() -> None:
    with pytest.raises(Interrupted) as stop, heeded():
        thread = threading.Thread(target=request, args=(PIPE,))
        thread.start()
        thread.join()
        time.sleep(1)
    assert stop.value.signum == PIPE


def test_a_forked_process_ends_as_it_would() -> None:
    with heeded(), deferred():
        child = os.fork()
        if not child:
            send(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


class Interrupting:
    """What a signal comes into while Python tidies up."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)


def test_a_signal_that_cannot_be_raised_where_it_comes_is_raised_a_little_later(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(Interrupted) as stop, heeded():
        Interrupting()
        time.sleep(5)
    assert stop.value.signum == signal.SIGTERM and "Traceback" not in capsys.readouterr().err


def test_imports_of_a_program_are_ended_without_a_word() -> None:
    code = "import os; from dreamlora.interrupts import unheeded\nwith unheeded(): os.kill(os.getpid(), 2)"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=False)
    assert done.returncode in (-signal.SIGINT, 128 + signal.SIGINT) and done.stderr == b""
    with unheeded():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
