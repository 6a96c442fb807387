"""What a header says, in words."""

from __future__ import annotations

from dreamlora.commands.inspect.about import about


def test_a_rate_in_units_of_the_start_is_told_as_such() -> None:
    said = {"ss_learning_rate": "0.006", "dreamlora.optimizer": "adamw"}
    assert about(said) == {"learning rate": "0.006", "optimizer": "adamw"}
    assert about({**said, "dreamlora.lora_units": "start"})["units of the learning rates"] == "start"
