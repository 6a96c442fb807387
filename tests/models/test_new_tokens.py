"""New tokens in a CLIP text encoder: the same numbers as a larger matrix gives, and no other rows that train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dreamlora.config.new_tokens import NewToken
from dreamlora.errors import UserError
from dreamlora.families import _parts
from dreamlora.interfaces import Components
from dreamlora.models import new_tokens
from tests.tinymodels.parts import clip, clip_tokenizer

TOKENS = [NewToken("sks", 2, ("d", "o")), NewToken("<style>", 3, ("p",)), NewToken("[v]")]
PROMPT = "a sks, <style> [v]"


@pytest.fixture
def text() -> Components:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    encoder = clip(tokenizer).requires_grad_(False).eval()
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def put(text: Components, tokens: list[NewToken] = TOKENS, seed: int = 0) -> new_tokens.TokenEmbeddings:
    return new_tokens.put_in(text, new_tokens.starts(text, ["text_encoder"], tokens, seed))["text_encoder"]


def ids_of(text: Components, prompt: str = PROMPT) -> torch.Tensor:
    return _parts.token_ids(text["tokenizer"], [prompt], 16)["input_ids"]


def test_start_is_the_words_embedding(text: Components) -> None:
    weight = text["text_encoder"].get_input_embeddings().weight
    number = {word: text["tokenizer"](word, add_special_tokens=False).input_ids[0] for word in "dop"}
    rows = put(text).rows
    assert rows.dtype == torch.float32 and rows.requires_grad
    assert torch.equal(rows[:5], weight[[number[word] for word in "doppp"]])
    drawn = new_tokens.starts({**text}, ["text_encoder"], [NewToken("other", 60)], 1)["other"]["text_encoder"]
    assert float(drawn.std()) == pytest.approx(float(weight.std()), rel=0.1)
    assert torch.equal(rows[5:], put_anew(0)["[v]"]) and not torch.equal(rows[5:], put_anew(1)["[v]"])


def put_anew(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    parts = {"tokenizer": tokenizer, "text_encoder": clip(tokenizer)}
    found = new_tokens.starts(parts, ["text_encoder"], TOKENS, seed)
    return {token: each["text_encoder"] for token, each in found.items()}


def test_a_token_stands_for_all_of_its_vectors(text: Components) -> None:
    first = len(text["tokenizer"])
    put(text)
    found = [int(number) for number in ids_of(text)[0] if number >= first]
    assert found == list(range(first, first + 6))
    assert _parts.count_tokens(text["tokenizer"], [PROMPT, "a d"]) == [2 + 1 + 2 + 1 + 3 + 1, 4]


def test_states_and_gradients_are_those_of_a_larger_matrix(text: Components) -> None:
    larger: Any = copy.deepcopy(text["text_encoder"])
    rows = put(text).rows
    own = larger.get_input_embeddings().weight.detach()
    matrix = torch.nn.Embedding.from_pretrained(torch.cat([own, rows.detach()]), freeze=False)
    larger.set_input_embeddings(matrix)
    ids = ids_of(text)
    states, expected = (model(ids).last_hidden_state for model in (text["text_encoder"], larger))
    assert torch.equal(states, expected)
    direction = torch.randn_like(states)
    (states * direction).sum().backward()
    (expected * direction).sum().backward()
    assert torch.equal(rows.grad, matrix.weight.grad[len(own) :]) and bool(rows.grad.abs().sum(dim=1).gt(0).all())


def test_nothing_else_trains(text: Components) -> None:
    before = {name: tensor.clone() for name, tensor in text["text_encoder"].state_dict().items()}
    part = put(text)
    assert not [name for name, p in text["text_encoder"].named_parameters() if p.requires_grad]
    assert [name for name, _ in part.named_parameters()] == ["rows"]
    optimizer = torch.optim.AdamW(part.parameters(), lr=0.1)
    text["text_encoder"](ids_of(text)).last_hidden_state.square().sum().backward()
    optimizer.step()
    assert not torch.equal(part.rows, part.start)
    after = {name.replace(".own.", "."): tensor for name, tensor in text["text_encoder"].state_dict().items()}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_prompt_without_them_is_as_before(text: Components) -> None:
    prompt = "a photo of dog"
    before = text["text_encoder"](ids_of(text, prompt)).last_hidden_state
    put(text)
    assert torch.equal(text["text_encoder"](ids_of(text, prompt)).last_hidden_state, before)


def test_lengths_go_back_to_the_start(text: Components) -> None:
    part = put(text)
    part.settle()
    assert torch.equal(part.rows, part.start), "what has its first length is left alone, to the last bit"
    part.rows.data *= torch.tensor([8.0, 0.5, 1, 1, 1, 1])[:, None]
    part.settle()
    ratio = part.rows.norm(dim=1) / part.start.norm(dim=1)
    assert torch.allclose(ratio, torch.tensor([8**0.9, 0.5**0.9, 1, 1, 1, 1]))
    part.rows.data.zero_()
    part.settle()
    assert bool(part.rows.isfinite().all())
    part.rows.data.fill_(9.0)
    part.rows.requires_grad_(False)
    part.settle()
    assert bool((part.rows == 9.0).all()), "what trains no longer stays as it is"


def test_they_go_again(text: Components) -> None:
    tokenizer, before = text["tokenizer"], ids_of(text)
    layer = text["text_encoder"].get_input_embeddings()
    vectors = new_tokens.starts(text, ["text_encoder"], TOKENS, 0)
    for _ in range(2):
        with new_tokens.put_for_a_while(text, vectors):
            assert not torch.equal(ids_of(text), before)
        assert text["tokenizer"] is tokenizer and torch.equal(ids_of(text), before)
        assert text["text_encoder"].get_input_embeddings() is layer


def test_what_is_known_already(text: Components) -> None:
    with pytest.raises(UserError, match="the new token d: the text encoder has d among its own tokens"):
        new_tokens.check({"tokenizer": text["tokenizer"]}, [NewToken("d")])
    with pytest.raises(UserError, match="the text encoder reads 'dog' as 3 tokens \\(d o g</w>\\)"):
        new_tokens.check({"tokenizer": text["tokenizer"]}, [NewToken("sks", 1, ("dog",))])
    new_tokens.check({"tokenizer": text["tokenizer"]}, TOKENS)
    assert "sks" not in text["tokenizer"].get_vocab(), "copies are looked at"


def test_vectors_of_another_model(text: Components) -> None:
    with pytest.raises(UserError, match="the embedding of sks has 9 numbers, and those of this model's text_encoder"):
        new_tokens.put_in(text, {"sks": {"text_encoder": torch.zeros(1, 9)}})


def test_a_prompt_is_summed_up_at_its_end() -> None:
    """Where the config names another token as the end, transformers takes the highest number, that of a new token."""
    tokenizer = clip_tokenizer()
    encoder = clip(tokenizer, projection=True)
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = 2
    text = {"tokenizer": tokenizer, "text_encoder": encoder}
    plain = ids_of(text, "a dog")
    before = encoder(plain).text_embeds
    put(text, [NewToken("sks", 1, ("d",))])
    assert torch.equal(encoder(plain).text_embeds, before)
    output = encoder(ids_of(text, "a sks dog"), output_hidden_states=True)
    end = ids_of(text, "a sks dog")[0].tolist().index(tokenizer.eos_token_id)
    assert torch.equal(output.text_embeds[0], encoder.text_projection(output.last_hidden_state[0, end]))
