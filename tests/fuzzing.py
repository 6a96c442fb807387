"""Hostile input for readers of files, and what no reader may do with it: a traceback, a hang, a grab for memory.

The suite tries ``CASES`` of each reader; by hand: ``DREAMLORA_FUZZ_CASES=20000 pytest -k fuzz``.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dreamlora.errors import UserError
from tests.limits import memory_limit

CASES = int(os.environ.get("DREAMLORA_FUZZ_CASES", "200"))
SECONDS = 2.0
"""Of computing: a machine with other work may take longer by the clock."""
MEMORY = 2**30
"""That a reader may take more than there was."""

fuzzed = settings(
    max_examples=CASES,
    deadline=None,  # ``harmless`` measures
    database=None,
    derandomize="DREAMLORA_FUZZ_CASES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
"""For a test called test_fuzz_…: the same cases in every run of the suite, others each time by hand."""


def harmless(read: Callable[[], Any], *allowed: type[Exception]) -> Any:
    """What ``read`` gives, or the exception that it may end with: a UserError, or one of ``allowed``."""
    began = time.process_time()
    try:
        with memory_limit(MEMORY):
            result = read()
    except (UserError, *allowed) as error:
        result = error
        assert len(str(error)) < 20_000, "the message is as long as what it is about"
    took = time.process_time() - began
    assert took < SECONDS, f"took {took:.1f} s"
    return result


odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**53 + 1, 2**64, -(2**70), 10**400]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", "../../etc/passwd", "/etc/passwd", "a\nb: c", "\x1b[2J", "javascript:alert(1)", "\ud800", "\0"]
    ),
    st.sampled_from(
        ["x" * 100_000, "inf", "NaN", "1e999", "True", "<script>", "```", "${x}", "{}", "%s", "{0.__class__}"]
    ),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
"""What a field may hold that should hold something else."""


def changed(sound: Any) -> st.SearchStrategy[Any]:
    """Copies of a sound object of lists and mappings in which up to three places are gone, odd or twice there."""
    return st.lists(
        st.tuples(st.integers(0, 2**16), st.sampled_from(["set", "drop", "twice", "rename"]), odd_values),
        min_size=1,
        max_size=3,
    ).map(lambda changes: _with(copy.deepcopy(sound), changes))


def _with(value: Any, changes: list[tuple[int, str, Any]]) -> Any:
    for number, kind, odd in changes:
        places = list(_places(value))
        if not places:
            return odd
        holder, key = places[number % len(places)]
        if kind == "drop":
            del holder[key]
        elif kind == "twice" and isinstance(holder, list):
            holder.append(holder[key])
        elif kind == "rename" and isinstance(holder, dict):
            holder[str(odd)[:30]] = holder.pop(key)
        else:
            holder[key] = odd
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, own in list(items):
        yield value, key
        yield from _places(own)


def as_json(value: Any) -> bytes:
    """JSON text of a changed object, also where that is no valid JSON or no valid UTF-8."""
    return json.dumps(value).encode("utf-8", errors="surrogatepass")


def damaged(sound: bytes) -> st.SearchStrategy[bytes]:
    """Copies of a file's bytes that are cut, overwritten or grown in places, or are anything else."""
    place = st.integers(0, max(len(sound), 1))
    piece = st.one_of(
        st.binary(max_size=8), st.sampled_from([b"\xff" * 8, b"\0" * 64, b"[" * 5000, b"9" * 5000, b"\n"])
    )
    edits = st.lists(st.tuples(place, st.integers(0, 64), piece), min_size=1, max_size=4)
    cut = place.map(lambda end: sound[:end])
    return st.one_of(edits.map(lambda list_: _edited(sound, list_)), cut, st.binary(max_size=200))


def _edited(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for start, removed, piece in edits:
        content = content[:start] + piece + content[start + removed :]
    return content
