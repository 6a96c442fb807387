"""What is read from a run folder, whatever of it is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dreamlora.errors import UserError
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.report.facts import RunFacts
from dreamlora.runfolder import RunFolder


def test_evaluation_finds_base_final_and_best(make_run: Callable[..., RunFolder]) -> None:
    found = RunFacts(make_run()).evaluation
    assert found is not None and found.held_out
    assert found.base == pytest.approx(0.5)
    assert (found.final_step, found.best_step) == (300, 225)
    assert found.best < found.final < found.best * 1.01
    assert not found.past_best
    assert found.change == pytest.approx(found.final / 0.5 - 1)


def test_without_held_out_images_the_training_images_stand_in_with_a_warning(
    make_run: Callable[..., RunFolder],
) -> None:
    facts = RunFacts(make_run(name="eval/loss_train"))
    assert facts.evaluation is not None and not facts.evaluation.held_out
    assert any("overfitting cannot be seen" in text for text in facts.warnings)


def test_a_killed_run_says_how_far_it_came(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run(steps=120, summary=None)
    with folder.metrics_file.open("a") as file:
        file.write('{"v": 1, "step": 121, "na')
    facts = RunFacts(folder)
    assert not facts.finished and facts.steps == 120
    assert "The run has not ended (or was stopped): this is its state at step 120 of 300." in facts.warnings


def test_values_that_are_not_finite_are_counted(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    folder.log_all(301, {"train/loss": float("nan")})
    assert "1 values of train/loss were not finite (NaN or infinite)." in RunFacts(folder).warnings


def test_lines_that_cannot_be_read_are_told_and_hide_nothing(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    first, *others = folder.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
    folder.metrics_file.write_text("".join([first, "\0\0\0\n", *others]), encoding="utf-8")
    facts = RunFacts(folder)
    assert facts.steps == 300
    assert f"{folder.metrics_file}: line 2 cannot be read and is left out." in facts.warnings


@pytest.mark.parametrize("content", [b"rank: [", b"rank", b"rank: \xff"])
def test_a_broken_config_is_named(content: bytes, make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    folder.config_file.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*config\.yaml"):
        RunFacts(folder)


def test_the_change_of_every_image_is_the_mean_over_its_items(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    assert RunFacts(folder).fall_by_image == pytest.approx([0.1] * 5)
    rows = {0: np.array([1.0, 2.0, 3.0]), 9: np.array([0.5, 2.5, 4.0])}
    ItemLosses("ab", np.array([0, 0, 1]), np.array([0.1, 0.5, 0.9]), rows).save(folder.eval_items_file)
    assert RunFacts(folder).fall_by_image == pytest.approx([0.0, -1.0])


def test_options_are_split_by_default_and_secrets_hidden(make_run: Callable[..., RunFolder]) -> None:
    facts = RunFacts(make_run())
    changed, unchanged = facts.options
    assert ("rank", "8", "4") in changed and ("learning_rate", "0.01", "automatic") in changed
    assert ("hub_token", "(hidden)", "automatic") in changed
    assert ("seed", "0", "0") in unchanged
    assert facts.command is not None and "hf_secret" not in facts.command
    assert "--hub_token ***" in facts.command and "--instance_prompt 'a photo of sks creature'" in facts.command


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run in .*: config\.yaml is missing"):
        RunFacts(RunFolder(tmp_path))


def test_a_broken_summary_is_named(make_run: Callable[..., RunFolder]) -> None:
    folder = make_run()
    folder.summary_file.write_text(json.dumps({"a": 1})[:-1], encoding="utf-8")
    facts = RunFacts(folder)
    assert facts.summary == {}
    assert any(text.startswith(f"cannot read {folder.summary_file}: ") for text in facts.warnings)
