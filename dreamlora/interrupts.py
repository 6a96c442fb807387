"""Signals that end a program: Ctrl-C, what schedulers and launchers send, a terminal that closes.

They raise ``Interrupted`` where the program is, unless it is in a block that is to be finished first (``deferred``):
then the signal is noted, and whoever works there asks for it when its work is in order (``asked``, ``heed``). A second
Ctrl-C does not wait.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Those that are heeded; SIGUSR1 is what SLURM can be told to send some time before it ends a job."""
BURST_S = 1.0
"""A launcher hands on the Ctrl-C that the terminal has sent already: in so short a time two are one."""
AGAIN_S = 0.1
"""So much later a signal comes again that came where nothing can be raised."""
PIPE = 13
"""SIGPIPE, which Windows lacks: what ends a program that writes to a reader who has gone."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the program.

    Attributes:
        signum: which one.
    """

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(signum)
        self.signum = int(signum)

    @property
    def name(self) -> str:
        """For a person."""
        if self.signum == PIPE:
            return "nobody reads the output any more"
        return "Ctrl-C" if self.signum == signal.SIGINT else signal.Signals(self.signum).name


@dataclass
class _State:
    """What is known of signals in this process."""

    owner: int = 0
    depth: int = 0
    asked: int = 0
    pressed: float | None = None
    previous: dict[signal.Signals, Any] = field(default_factory=dict)


_state = _State()


@contextmanager
def heeded() -> Iterator[None]:
    """For a whole program: from here on signals raise ``Interrupted``; those that are ignored stay so."""
    global _state
    before, _state = _state, _State(owner=os.getpid())
    if threading.current_thread() is threading.main_thread():
        for signum in SIGNALS:
            if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                _state.previous[signum] = signal.signal(signum, _heed)
    mine, hook = _state, sys.unraisablehook
    sys.unraisablehook = _again(hook)
    try:
        yield
    finally:
        for signum, handler in mine.previous.items():
            signal.signal(signum, handler)
        sys.unraisablehook = hook
        _state = before


def _again(otherwise: Callable[[Any], object]) -> Callable[[Any], None]:
    """Let a signal come once more that came in what Python calls as it tidies up, where ``Interrupted`` has no way."""

    def hook(failed: Any) -> None:
        if not isinstance(failed.exc_value, Interrupted):
            otherwise(failed)
            return
        later = threading.Timer(AGAIN_S, _thread.interrupt_main, (failed.exc_value.signum,))
        later.daemon = True
        later.start()

    return hook


@contextmanager
def unheeded() -> Iterator[None]:
    """For the imports of a program: Ctrl-C ends it as it ends programs that are not in Python, without a traceback."""
    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def deferred() -> Iterator[None]:
    """For work that is to be finished: in here signals are noted. After the block ``heed`` says whether one came."""
    state = _state
    state.depth += 1
    try:
        yield
    finally:
        state.depth -= 1


def asked() -> int:
    """The signal that has asked for the end; 0: none has."""
    return _state.asked


def request(signum: int) -> None:
    """Ask for the end as a signal would.

    Raises:
        Interrupted: unless the work that is under way is to be finished first.
    """
    _state.asked = _state.asked or signum
    if threading.current_thread() is not threading.main_thread():
        _thread.interrupt_main()
    elif not _state.depth:
        raise Interrupted(_state.asked)


def heed() -> None:
    """For the end of a block of ``deferred``, and for work that is long but may be left.

    Raises:
        Interrupted: a signal has come meanwhile, and no other such block is open.
    """
    if _state.asked and not _state.depth:
        raise Interrupted(_state.asked)


def _heed(signum: int, _: FrameType | None) -> None:
    if os.getpid() != _state.owner:  # a process that was forked to read images: it has nothing to finish
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    if signum == signal.SIGINT:
        now = time.monotonic()
        if _state.pressed is not None and now - _state.pressed > BURST_S:
            raise Interrupted(signum)
        _state.pressed = _state.pressed or now
    request(signum)
