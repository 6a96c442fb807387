"""Names of metrics: which are parts of others."""

from __future__ import annotations

import time

from dreamlora.metric_names import main_values


def test_main_values_are_those_that_are_no_part_of_another() -> None:
    names = ["img/a_p", "img/a", "img/b_p", "img/ab", "img/a_p_p", "img/a"]
    assert main_values(names) == ["img/a", "img/b_p", "img/ab"]


def test_a_file_with_a_hundred_thousand_names_is_no_hang() -> None:
    names = [f"img/metric_{number}" for number in range(10**5)]
    began = time.process_time()
    assert main_values(names) == names
    assert time.process_time() - began < 10
