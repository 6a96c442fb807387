"""Prompts that are longer than CLIP reads: in chunks, as kohya's sd-scripts encode them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.families import _parts, sd
from dreamlora.models.loading import resolve_source
from tests.tinymodels import CLIP_LENGTH

CHUNK = CLIP_LENGTH - 2
BEGIN, END, PAD = 100, 101, 0


class Echo(torch.nn.Module):
    """A text encoder whose state at a place is the token there and the place; it notes what it was given."""

    def __init__(self, use_attention_mask: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=CLIP_LENGTH, use_attention_mask=use_attention_mask)
        self.device = torch.device("cpu")

    def forward(self, ids, attention_mask=None, output_hidden_states=False):
        self.ids, self.mask = ids, attention_mask
        states = torch.stack([ids, torch.arange(ids.shape[1]).expand_as(ids)], dim=-1)
        inner = (-states, states, states) if output_hidden_states else None
        return SimpleNamespace(last_hidden_state=states, hidden_states=inner, text_embeds=ids[:, 1:2])


def tokens(length: int, chunks: int, pad: int) -> dict[str, torch.Tensor]:
    """A text of so many tokens (1, 2, 3, ...), as a tokenizer cuts and pads it."""
    text = list(range(1, length + 1))[: chunks * CHUNK]
    ids = [BEGIN, *text, END]
    padding = chunks * CHUNK + 2 - len(ids)
    mask = [1] * len(ids) + [0] * padding
    return {"input_ids": torch.tensor([ids + [pad] * padding]), "attention_mask": torch.tensor([mask])}


def by_kohya(ids: list[int], pad: int) -> list[list[int]]:
    """The chunks of a text, written after the description of sd-scripts: windows of a row, with begin and last id."""
    rows = []
    for start in range(1, len(ids) - 1, CHUNK):
        row = [ids[0], *ids[start : start + CHUNK], ids[-1]]
        if pad != END:
            if row[-2] not in (END, pad):
                row[-1] = END
            if row[1] == pad:
                row[1] = END
        rows.append(row)
    return rows


@pytest.mark.parametrize("pad", [END, PAD])
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("length", [0, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 60])
def test_chunks_are_those_of_kohya(length: int, chunks: int, pad: int) -> None:
    encoder, tokenizer = Echo(), SimpleNamespace(pad_token_id=pad, eos_token_id=END)
    given = tokens(length, chunks, pad)
    states = _parts.clip_states(encoder, tokenizer, given)[0]
    expected = by_kohya(given["input_ids"][0].tolist(), pad)
    assert encoder.ids.tolist() == expected and encoder.mask is None
    assert states.shape == (1, chunks * CHUNK + 2, 2)
    inner = [token for row in expected for token in row[1:-1]]
    assert states[0, :, 0].tolist() == [BEGIN, *inner, expected[-1][-1]]
    places = [place for _ in range(chunks) for place in range(1, CHUNK + 1)]
    assert states[0, :, 1].tolist() == [0, *places, CLIP_LENGTH - 1]


def test_texts_of_a_batch_do_not_mix() -> None:
    encoder, tokenizer = Echo(), SimpleNamespace(pad_token_id=PAD, eos_token_id=END)
    two = [tokens(5, 2, PAD), tokens(20, 2, PAD)]
    together = {name: torch.cat([one[name] for one in two]) for name in two[0]}
    states = _parts.clip_states(encoder, tokenizer, together)[0]
    alone = [_parts.clip_states(encoder, tokenizer, one)[0] for one in two]
    assert torch.equal(states, torch.cat(alone))


def test_the_mask_goes_with_the_chunks() -> None:
    encoder, tokenizer = Echo(use_attention_mask=True), SimpleNamespace(pad_token_id=PAD, eos_token_id=END)
    _parts.clip_states(encoder, tokenizer, tokens(CHUNK + 2, 2, PAD))
    assert encoder.mask.shape == encoder.ids.shape
    assert encoder.mask.tolist() == [[1] * CLIP_LENGTH, [1] * 4 + [0] * (CHUNK - 2)]


def test_other_layers_go_in_chunks_too_and_the_first_chunk_is_pooled() -> None:
    encoder, tokenizer = Echo(), SimpleNamespace(pad_token_id=PAD, eos_token_id=END)
    given = tokens(CHUNK + 2, 2, PAD)
    last, _ = _parts.clip_states(encoder, tokenizer, given)
    first, pooled = _parts.clip_states(encoder, tokenizer, given, layer=0)
    assert torch.equal(first, -last)
    assert pooled.tolist() == [[1]]


def test_a_short_prompt_is_encoded_as_before(sd_folder) -> None:
    text = sd.load(resolve_source(Model(pretrained_model_name_or_path=str(sd_folder))), "text", torch.float32)
    ids = sd.tokenize(text, ["abc"], None)
    plain = text["text_encoder"](ids["input_ids"])[0]
    assert torch.equal(sd.encode_tokens(text, ids)["prompt_embeds"], plain)
    long = sd.encode_tokens(text, sd.tokenize(text, ["abc " * 10], 2 * CHUNK + 2))["prompt_embeds"]
    assert long.shape == (1, 2 * CHUNK + 2, plain.shape[-1])


@pytest.mark.parametrize("length", [CLIP_LENGTH + 1, 2 * CHUNK + 1, 2 * CHUNK + 3])
def test_lengths_that_are_no_whole_chunks_are_refused(length: int) -> None:
    with pytest.raises(UserError, match=f"at most {CLIP_LENGTH}.* --max_token_length {2 * CHUNK} or {3 * CHUNK}"):
        sd.prompt_limit(SimpleNamespace(model_max_length=CLIP_LENGTH), length)
