"""The table of flags that other trainers have (that it is complete is tested with the command line)."""

from dreamlora.cli.declared import options_of
from dreamlora.cli.foreign import ELSEWHERE, UNNEEDED
from dreamlora.config import RunConfig


def test_no_flag_is_in_two_places() -> None:
    assert not ELSEWHERE.keys() & UNNEEDED.keys()
    assert not (ELSEWHERE | UNNEEDED).keys() & options_of(RunConfig).keys()
