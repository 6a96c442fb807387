"""CLIP's tokenizer, which is in no single file: its vocabulary is the same for all models, and comes with us."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from pathlib import Path

from dreamlora.files import write_atomically

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_FIRST_OF_OTHERS = 256
"""Where bytes that are no printed character are put among the characters."""


def write_tokenizer(folder: Path, length: int, pad_token: str) -> None:
    """Write the files of a CLIPTokenizer.

    Args:
        folder: of the tokenizer.
        length: of prompts in tokens, with begin and end.
        pad_token: that fills them up.

    Raises:
        WriteError: the system refused.
    """
    merges = _merges()
    characters = _characters_of_bytes()
    tokens = [*characters, *(f"{one}</w>" for one in characters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, BEGIN, END])}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad_token,
        "model_max_length": length,
        "add_prefix_space": False,
        "do_lower_case": True,
    }
    write_atomically(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_atomically(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))
    write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2))


def _merges() -> list[str]:
    """Pairs of tokens that become one, in the order in which they do."""
    resource = files("dreamlora.models.single_file") / "vocabulary" / "clip_merges.txt.gz"
    return gzip.decompress(resource.read_bytes()).decode().splitlines()


def _characters_of_bytes() -> list[str]:
    """A visible character for every byte, as CLIP (and GPT-2) orders them: printed ones for themselves, then others."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in [*printed, *range(_FIRST_OF_OTHERS, 2 * _FIRST_OF_OTHERS - len(printed))]]
