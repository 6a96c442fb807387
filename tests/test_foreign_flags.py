"""The table of flags that other trainers have (that it is complete is tested with the command line)."""

from dreamlora import foreign_flags
from dreamlora.config import RunConfig
from dreamlora.options import options_of


def test_no_flag_is_in_two_places() -> None:
    assert not foreign_flags.ELSEWHERE.keys() & foreign_flags.UNNEEDED.keys()
    assert not (foreign_flags.ELSEWHERE | foreign_flags.UNNEEDED).keys() & options_of(RunConfig).keys()
