"""Stage `tokenizer`: a CLIP byte-pair tokenizer of about 900 tokens in which every word of the world is one token."""

import json
import random

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from dreamlora.tiny import world

MAX_LENGTH = 32  # tokens of a prompt, begin and end included
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build() -> CLIPTokenizer:
    """Train the tokenizer on the vocabulary (each word often enough to become a token of its own)."""
    reference = CLIPTokenizer().backend_tokenizer  # for CLIP's own normalizer and pre-tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = letters + [letter + WORD_END for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # never reached: training ends when every word is whole
        special_tokens=[START, END],
        initial_alphabet=letters,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    trained = Tokenizer(models.BPE(end_of_word_suffix=WORD_END, unk_token=END))
    trained.normalizer, trained.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    trained.train_from_iterator([_corpus()], trainer)
    vocabulary, merges = _vocabulary_and_merges(trained, alphabet)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def _corpus() -> str:
    """Every word often, in a fixed order (ties between merges would depend on it)."""
    words = world.vocabulary()
    random.Random(0).shuffle(words)
    return " ".join(words * 10)


def _vocabulary_and_merges(trained: Tokenizer, alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Renumber as CLIP does: bytes, bytes at word ends, merges, then the two special tokens last."""
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), START, END])
    return {token: index for index, token in enumerate(tokens)}, merges
