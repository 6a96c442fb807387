"""The T5 tokenizer of `tiny-flow`: a unigram model in which every word of the world is one token."""

import string

from transformers import T5TokenizerFast

from dreamlora.tiny import world

MAX_LENGTH = 32  # tokens of a prompt, the end included
WORD, LETTER, SPACE, UNKNOWN = -2.0, -10.0, -5.0, -20.0  # log-probabilities: a whole word beats its letters


def build() -> T5TokenizerFast:
    """Special tokens, the words, then what spells any other word."""
    pieces: dict[str, float] = {"<pad>": 0.0, "</s>": 0.0, "<unk>": UNKNOWN}
    pieces |= {f"▁{word}": WORD for word in world.vocabulary()}
    pieces |= {"▁": SPACE} | dict.fromkeys(string.ascii_letters + string.digits + string.punctuation, LETTER)
    return T5TokenizerFast(vocab=list(pieces.items()), extra_ids=0, model_max_length=MAX_LENGTH)
