"""Prompts as turns of a chat: as Qwen3's own template writes them, and the states of a language model's layers."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3ForCausalLM

from dreamlora.families import _chat, _parts
from tests.tinymodels.chat import qwen3, qwen_tokenizer

PROMPTS = ["a cat", "", "  two lines\n\nof 猫 <|im_end|> ", "{{ 1 + 1 }} {% raw %}"]


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_prompts_are_written_as_the_models_own_template_does(options):
    tokenizer = qwen_tokenizer()
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    own = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **options) for turn in turns]
    assert _chat.as_chats(tokenizer, _chat.QWEN, PROMPTS, **options) == own
    thoughts = "<think>\n\n</think>\n\n" if options.get("enable_thinking") is False else ""
    assert own[0] == f"<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n{thoughts}"
    assert _chat.count_tokens(tokenizer, _chat.QWEN, PROMPTS, **options) == [
        len(ids) for ids in tokenizer(own).input_ids
    ]


def test_a_template_of_ours_takes_the_place_of_the_models():
    parts = _chat.with_template({"tokenizer": qwen_tokenizer(), "scheduler": None}, "{{ messages[0].content }}!")
    assert parts["tokenizer"].apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"
    assert _chat.with_template({"scheduler": None}, _chat.QWEN) == {"scheduler": None}


@torch.no_grad()
def test_layers_are_those_of_the_whole_model():
    """With or without a head, whose logits are not computed."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    whole = qwen3(tokenizer, model=Qwen3ForCausalLM).eval()
    tokens = _parts.token_ids(tokenizer, PROMPTS, 40)
    expected = whole(**tokens, output_hidden_states=True).hidden_states
    whole.lm_head.register_forward_hook(lambda *_: pytest.fail("the head was asked"))
    for encoder in (whole, whole.model):
        found = _chat.layer_states(encoder, tokens, [0, 2, -2, -1])
        assert all(torch.equal(state, expected[layer]) for state, layer in zip(found, [0, 2, 2, 3], strict=True))


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_tokens_are_kept_and_come_first(side):
    states = torch.arange(1.0, 25).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    mask = mask if side == "right" else mask.flip(1)
    found, seen = _chat.unpadded(states, mask)
    assert found.shape == (2, 3, 3)
    assert torch.equal(found[0], states[0][mask[0].bool()])
    assert torch.equal(found[1, :1], states[1][mask[1].bool()])
    assert not found[1, 1:].any()
    assert torch.equal(seen, torch.tensor([[1, 1, 1], [1, 0, 0]]))


def test_a_mask_that_hides_nothing_is_none():
    """And one text alone has nothing to hide."""
    whole, some = torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert _chat.attended(whole) is None and _chat.attended(whole[:1]) is None
    seen = _chat.attended(some)
    assert seen is not None and torch.equal(seen, some == 1)


def test_what_is_shorter_gets_zeros_behind():
    longer = {"embeds": torch.ones(2, 5, 3), "mask": torch.ones(2, 5)}
    shorter = {"embeds": torch.ones(2, 2, 3), "mask": torch.ones(2, 2)}
    for first, second in ((longer, shorter), (shorter, longer)):
        one, other = _chat.equally_long(first, second)
        assert one["embeds"].shape == other["embeds"].shape == (2, 5, 3)
        assert one["mask"].shape == other["mask"].shape == (2, 5)
        assert one["embeds"].sum() == first["embeds"].sum() and other["mask"].sum() == second["mask"].sum()
    filled = _chat.equally_long(longer, shorter)[1]
    assert torch.equal(filled["mask"][0], torch.tensor([1.0, 1, 0, 0, 0]))
