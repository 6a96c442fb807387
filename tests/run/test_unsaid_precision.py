"""What a run with ``--vram`` computes in where nobody has said it."""

from __future__ import annotations

from dreamlora.cli.parse import parse_run
from dreamlora.run.unsaid_precision import with_precision


def test_bf16_is_taken_where_nothing_was_said_of_precision(monkeypatch) -> None:
    def precision_of(*flags: str) -> str | None:
        return with_precision(parse_run(list(flags))[0], {}).model.mixed_precision

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert precision_of("--vram", "8") == "bf16"
    assert precision_of("--vram", "8", "--mixed_precision", "no") == "no"
    assert precision_of() is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert precision_of("--vram", "8") is None
