"""The compiler: which blocks it gets, how many graphs, and what is said where there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from dreamlora.errors import UserError
from dreamlora.models import compiling

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).tanh()


class Model(nn.Module):
    """Three blocks in a list, and a head that is not in one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels, which take long to make."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, backend="eager", **how))
    torch._dynamo.reset()
    counters.clear()


def test_blocks_are_those_that_the_class_names_else_the_entries_of_its_lists() -> None:
    model = Model()
    assert list(compiling.repeated_blocks(model)) == list(model.blocks)
    model._repeated_blocks = ["Block"]  # type: ignore[assignment]
    assert list(compiling.repeated_blocks(model)) == [*model.blocks, model.head]


def test_all_blocks_share_a_graph_for_each_shape_and_further_ones_are_computed_without(traced: None) -> None:
    plain, model = Model(), Model()
    model.load_state_dict(plain.state_dict())
    with torch._dynamo.config.patch(recompile_limit=1):
        compiling.compile_blocks(model, shapes=2)
        for rows in (1, 2, 3, 4, 5, 6):
            x = torch.randn(rows, 4)
            assert torch.equal(model(x), plain(x))
    assert counters["stats"]["unique_graphs"] == 2 * compiling.PER_SHAPE


def test_limits_have_names_that_the_oldest_torch_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    config = SimpleNamespace(cache_size_limit=8, accumulated_cache_size_limit=64)  # all that torch 2.6 has
    monkeypatch.setattr(torch._dynamo, "config", config)
    compiling.compile_blocks(Model(), shapes=100)
    assert vars(config) == {"cache_size_limit": 200, "accumulated_cache_size_limit": compiling.MOST}


def test_without_gradients_nothing_is_compiled(traced: None) -> None:
    model = Model()
    compiling.compile_blocks(model, shapes=1)
    with torch.no_grad():
        model(torch.randn(2, 4))
    assert not counters["stats"]["unique_graphs"]


def test_no_compiler_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(function: object, **how: object) -> object:
        raise RuntimeError("\nInvalidCxxCompiler: No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(UserError) as error:
        compiling.require_compiler(CPU)
    message = str(error.value)
    assert message.startswith("--compile: torch.compile does not work here: InvalidCxxCompiler: No working C++")
    assert "much more" not in message and message.endswith("Install it, or leave the flag out")
