"""Language models that serve as text encoders: prompts as turns of a chat, states of layers, lengths of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from dreamlora.families import _parts
from dreamlora.interfaces import Classes, Components, Conditioning, ModelSource
from dreamlora.lora.pairs import bare

QWEN_TOKENIZERS: Classes = ("transformers.Qwen2Tokenizer", "transformers.Qwen2TokenizerFast")
GEMMA: dict[str, Classes] = {
    "tokenizer": ("transformers.GemmaTokenizer", "transformers.GemmaTokenizerFast"),
    "text_encoder": ("transformers.Gemma2Model",),
}
"""Parts of a pipeline whose text encoder is Gemma 2."""
NEGATIVE = "\0"
"""What ``marked_negative`` marks a text with."""
QWEN: str = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""What Qwen3's own template makes of plain turns; ``enable_thinking=False`` adds thoughts that are over already."""


def with_template(parts: Components, template: str) -> Components:
    """The parts, their "tokenizer" (if it is among them) with a template of ours, by which the stock pipeline writes
    chats: that of a model is a program of a stranger's, and is not loaded.
    """
    if "tokenizer" in parts:
        parts["tokenizer"].chat_template = template
    return parts


def as_chats(tokenizer: Any, template: str, prompts: Sequence[str], **options: Any) -> list[str]:
    """Each prompt as a user's turn, before the turn of the assistant; ``options`` are the template's."""
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            **options,
        )
        for prompt in prompts
    ]


def layer_states(encoder: Any, tokens: Mapping[str, Tensor], layers: Sequence[int]) -> list[Tensor]:
    """Hidden states ``[B, L, D]`` of some layers of a language model, without the logits that nobody asked for.

    Args:
        encoder: with or without a head.
        tokens: ``input_ids`` and ``attention_mask`` ``[B, L]``, as ``_parts.token_ids`` gives them; and of images among
            them ``pixel_values`` and ``image_grid_thw``.
        layers: as ``hidden_states`` counts them: 0 are the embeddings, -1 the last states after the norm.
    """
    device = bare(encoder).device
    states = bare(encoder).base_model(
        input_ids=tokens["input_ids"].to(device),
        attention_mask=tokens["attention_mask"].to(device),
        output_hidden_states=True,
        use_cache=False,
        **{name: tokens[name].to(device) for name in ("pixel_values", "image_grid_thw") if name in tokens},
    )
    return [states.hidden_states[layer] for layer in layers]


def unpadded(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """States ``[B, L, ...]`` of the tokens that a mask ``[B, L]`` has, from the front; zeros after them, as few as the
    longest text needs. And the mask so.
    """
    seen = mask.to(states.device).bool()
    rows = [own[kept] for own, kept in zip(states, seen, strict=True)]
    lengths = [row.new_ones(len(row), dtype=mask.dtype) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(lengths, batch_first=True)


def attended(mask: Tensor) -> Tensor | None:
    """A mask ``[B, L]`` as attention wants it: None where it hides nothing, as attention is faster without one.

    A single text has no padding. Looking at the masks of several waits for the GPU.
    """
    seen = mask.bool()
    return None if len(seen) == 1 or seen.all() else seen


def with_negative(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """See ``Family.call_arguments``: by the names of the conditioning, both of one length, as pipelines want them."""
    if negative is not None:
        conditioning, negative = equally_long(conditioning, negative)
    return _parts.with_negative(conditioning, negative)


def equally_long(conditioning: Conditioning, negative: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Both, with zeros behind the shorter one, of tensors ``[B, L, ...]``."""
    lengths = [next(iter(each.values())).shape[1] for each in (conditioning, negative)]

    def filled(each: Conditioning) -> Conditioning:
        missing = max(lengths) - next(iter(each.values())).shape[1]
        return {name: functional.pad(value, (*[0, 0] * (value.dim() - 2), 0, missing)) for name, value in each.items()}

    return filled(conditioning), filled(negative)


def count_tokens(tokenizer: Any, template: str, prompts: Sequence[str], **options: Any) -> list[int]:
    """How many tokens each prompt has as a chat."""
    return _parts.count_tokens(tokenizer, as_chats(tokenizer, template, prompts, **options))


def marked_negative(source: ModelSource, guidance_scale: float, given: str | None) -> str | None:
    """See ``Family.negative_prompt``: for pipelines that read an instruction before prompts, but not negative ones."""
    negative = _parts.negative_above_one(source, guidance_scale, given)
    return None if negative is None else NEGATIVE + negative
