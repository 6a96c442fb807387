"""The pretraining of the embedded models, as far as no weights tell of it."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import pytest
import torch

from dreamlora.tiny import world

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def t5(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module("pretraining.t5")
    for name in [name for name in sys.modules if name.split(".")[0] == "pretraining"]:
        monkeypatch.delitem(sys.modules, name)


def captions(count: int) -> list[str]:
    rng = random.Random(0)
    return [world.describe(world.sample_pair(rng), rng) for _ in range(count)]


def test_states_of_clip_stand_at_the_words_of_t5(t5) -> None:
    """A state is its own word's: with another first word, all states from there on are others, and none before."""
    texts = t5.Texts(torch.device("cpu"))
    words = ["a photo of a red star above a blue moon", "a photo of a red star above a pink moon"]
    tokens, summaries, states = texts.read(words)
    assert tokens.shape == (2, 32) and summaries.shape == (2, 96) and states.shape == (2, 31, 96)
    (first,) = (tokens[0] != tokens[1]).nonzero()[:, 0].tolist()
    apart = (states[0] - states[1]).abs().amax(1)
    assert (apart[:first] == 0).all() and (apart[first : (tokens[0] != 0).sum()] > 1e-3).all()


def test_the_distance_is_that_of_words_and_ends(t5) -> None:
    texts = t5.Texts(torch.device("cpu"))
    tokens, _, states = texts.read(captions(8))
    guessed = torch.zeros(8, 32, 96)
    guessed[:, :-1] = states
    guessed[:, :-1][tokens[:, :-1] == 0] += 100.0  # padding
    assert t5.distance(guessed, states, tokens) == 0
    guessed[0, 3] += 1.0
    assert t5.distance(guessed, states, tokens) == pytest.approx(1 / float((tokens != 0).sum()), rel=1e-5)


def test_a_few_steps_teach_t5(t5) -> None:
    torch.manual_seed(0)
    reader, texts = t5.Reader(), t5.Texts(torch.device("cpu"))
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3)
    tokens, _, states = texts.read(captions(32))
    found = []
    for _ in range(12):
        loss = t5.distance(reader(tokens)[1], states, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    assert found[-1] < 0.6 * found[0]
