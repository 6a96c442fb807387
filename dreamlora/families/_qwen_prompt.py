"""The template that Qwen-Image, and what was made like it, have around a prompt."""

from __future__ import annotations

BEFORE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n"
DROPPED = 34
"""Tokens before the prompt, whose states the transformer does not see."""
END = 5
"""Tokens after the prompt, which count as its own."""
