"""What a run's config.yaml says of its options."""

from __future__ import annotations

import pytest

from dreamlora.cli.saved import saved_options

TOGETHER = (
    {"buckets": True, "bucket_step": 16},
    {"shuffle_tags": True, "keep_tags": 2},
    {"max_token_length": 150, "tokenizer_max_length": 152},
    {"mask_data_dir": "masks", "instance_data_dir": "photos"},
)


@pytest.mark.parametrize("options", TOGETHER, ids=lambda options: " ".join(options))
def test_options_that_go_together_only_are_kept(options: dict) -> None:
    assert saved_options(options) == (options, [])


def test_one_that_cannot_be_right_costs_no_other() -> None:
    kept, wrong = saved_options({"rank": -1, "lora_alpha": 2.0, "buckets": True, "bucket_step": 16})
    assert kept == {"lora_alpha": 2.0, "buckets": True, "bucket_step": 16}
    assert len(wrong) == 1 and "rank" in wrong[0]
