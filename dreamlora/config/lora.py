"""The options of the adapter. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dreamlora.config.ranges import above as _above
from dreamlora.config.ranges import at_least as _at_least
from dreamlora.config.ranges import numbers_by_name as _numbers_by_name
from dreamlora.config.ranges import pairs as _pairs
from dreamlora.config.ranges import respell as _respell
from dreamlora.config.ranges import within as _within
from dreamlora.errors import UserError

MOST_RANKS = 2**14
"""More than any layer has."""
MOST_ALPHA = 1e9


@dataclass(frozen=True)
class Lora:
    """The adapter.

    Attributes:
        ranks, alphas: what the patterns say, by place (``lora.targets``), in the order that they were given.
    """

    adapter: str = "lora"
    """Kind of adapter: {adapters}."""
    adapter_args: tuple[str, ...] = ()
    """Settings of the kind itself as name value pairs, e.g. decompose_factor 8. A wrong name lists the right ones."""
    rank: int = 4
    """Rank r of the update B·A."""
    lora_alpha: float | None = None
    """The update is scaled by alpha / rank. Default: alpha = rank, so a scale of 1."""
    use_rslora: bool = False
    """Scale it by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    rank_pattern: tuple[str, ...] = ()
    """Other ranks of some layers, as name value pairs: parts of layers' names, e.g. ff 16 transformer_blocks.0-4 8. The
    first that fits counts. Without --lora_alpha each layer's alpha is its rank."""
    alpha_pattern: tuple[str, ...] = ()
    """Other alphas of some layers, in the same way."""
    lora_dropout: float = 0.0
    """Probability that an input of lora_A is dropped."""
    lora_layers: tuple[str, ...] = ()
    """Layers of the denoiser to adapt: attn, attn-mlp, all-linear, all (convolutions too), or ends of their names
    (commas work too). Default: the family's."""
    lora_blocks: tuple[str, ...] = ()
    """Only the layers in these blocks of the denoiser: numbers and ranges of any list of blocks, e.g. 7-12 20, or parts
    of names, e.g. single_transformer_blocks.7-12 mid_block. Default: all."""
    train_text_encoder: bool = False
    """Adapt the text encoder too."""
    text_encoder_rank: int | None = None
    """Rank in the text encoder. Default: --rank."""
    init: str = "gaussian"
    """Start of the adapter, which never changes what the model does at first: {inits}."""
    init_args: tuple[str, ...] = ()
    """Settings of the start itself as name value pairs, e.g. gamma 64. A wrong name lists the right ones."""
    init_lora: str | None = None
    """Go on from a LoRA of whatever program: a run, a file, a folder or a hub name. Its kind, layers, ranks and alphas
    are kept where no others are given."""
    init_lora_weight_name: str | None = None
    """Its file in the folder or hub repository, if there are several."""
    training_adapter: str | None = None
    """A frozen LoRA (file, folder or hub name) that is active in the denoiser while it trains and in the loss that is
    measured, and off in samples and in the result: for models that were distilled to few steps."""
    training_adapter_weight_name: str | None = None
    """Its file in the folder or hub repository, if there are several."""

    def __post_init__(self) -> None:
        for option in ("lora_layers", "lora_blocks"):  # diffusers' scripts take one text with commas
            names = tuple(name.strip() for part in getattr(self, option) for name in part.split(",") if name.strip())
            object.__setattr__(self, option, names)
        _respell(self, "adapter", "adapters")
        _respell(self, "init", "inits")
        if self.init_lora is not None and (self.init != type(self).init or self.init_args):
            raise UserError("--init starts a new LoRA, and --init_lora goes on from one: give one of them")
        _pairs(self, "adapter_args")
        _pairs(self, "init_args")
        _at_least(self, 1, "rank", "text_encoder_rank")
        _within(self, 1, MOST_RANKS + 1, "rank", "text_encoder_rank")
        _above(self, 0, "lora_alpha")
        _within(self, 0, 1, "lora_dropout")
        _numbers_by_name(self, "rank_pattern", int, MOST_RANKS)
        _numbers_by_name(self, "alpha_pattern", float, MOST_ALPHA)

    @property
    def ranks(self) -> dict[str, int]:
        return _numbers_by_name(self, "rank_pattern", int, MOST_RANKS)

    @property
    def alphas(self) -> dict[str, float]:
        return _numbers_by_name(self, "alpha_pattern", float, MOST_ALPHA)

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same rank."""
        return not self.rank_pattern and self.text_encoder_rank is None

    @property
    def of_text_encoder(self) -> Lora:
        """The adapter of the text encoders."""
        return replace(self, rank=self.text_encoder_rank or self.rank, text_encoder_rank=None, lora_blocks=())

    def scale(self, rank: int, alpha: float) -> float:
        """What the update of a layer is multiplied by."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)
