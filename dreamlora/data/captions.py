"""What becomes of captions each time their image is seen: one is drawn, its tags are shuffled, or it is dropped.

Embeddings are cached before training, so the tags cannot be shuffled anew each time: a fixed number of orders
(``caption_variants``) is encoded for every caption, and training draws among these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dreamlora.config import Data
from dreamlora.randomness import generator, permutation


@dataclass(frozen=True)
class CaptionPlan:
    """See the options of the same names; by default, nothing happens to the one that is drawn.

    Attributes:
        seed: decides the shuffled orders.
        dropped: what takes the place of a caption that is left out.
    """

    dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 0
    variants: int = 4
    seed: int = 0
    dropped: str = ""

    @classmethod
    def of(cls, data: Data, seed: int, dropped: str) -> CaptionPlan:
        """As the options say."""
        return cls(data.caption_dropout, data.shuffle_tags, data.keep_tags, data.caption_variants, seed, dropped)

    def texts(self, captions: Sequence[str]) -> list[str]:
        """All that may be drawn for an image with these captions, besides no caption at all."""
        return [text for caption in captions for text in self._orders(caption)]

    def _orders(self, caption: str) -> list[str]:
        tags = [tag.strip() for tag in caption.split(",")]
        head, tail = tags[: self.keep_tags], tags[self.keep_tags :]
        if not self.shuffle_tags or len(tail) < 2:
            return [caption]
        orders = [permutation(len(tail), self.seed, "tags", caption, k) for k in range(self.variants)]
        return [", ".join([*head, *(tail[place] for place in order)]) for order in orders]

    def draw(self, captions: Sequence[str], *position: int | str) -> str:
        """The text of the sample at ``position``: a pure function of it, and ``dropped`` with probability
        ``dropout``.

        Which of several captions it is has a draw of its own: those of images with one are what they would be without.
        """
        which = 0
        if len(captions) > 1:
            which = int(torch.randint(len(captions), (), generator=generator(self.seed, "which caption", *position)))
        caption = captions[which]
        if not self.dropout and not self.shuffle_tags:
            return caption
        draw = generator(self.seed, "caption", *position)
        if torch.rand((), generator=draw) < self.dropout:
            return self.dropped
        texts = self._orders(caption)
        return texts[int(torch.randint(len(texts), (), generator=draw))]
