"""Whether the kind of adapter, its start and its optimizer go together. No torch here."""

from __future__ import annotations

from dreamlora import registry
from dreamlora.config.run import Lora, Optim, RunConfig
from dreamlora.errors import UserError


def check_adapter(config: RunConfig) -> None:
    """Nothing, if the adapter can be started and trained as the options say.

    Raises:
        UserError: it cannot.
    """
    lora = config.lora
    start = registry.load("inits", lora.init)
    if registry.load("adapters", lora.adapter).PAIRS:
        _check_ranks(lora, start.RANK_MULTIPLE)
        if lora.adapter == "dora" and start.OFFSET:
            raise UserError(
                f"--init {lora.init} starts away from zero, which --adapter dora cannot: its magnitudes are those of "
                "the base weights. Give --init gaussian, kaiming, nora or eva"
            )
        return
    own = f"--adapter {lora.adapter} has no pair of factors A and B"
    if lora.init != Lora.init:
        raise UserError(f"--init {lora.init} starts A and B, and {own}, but a start of its own: leave --init out")
    if lora.training_adapter:
        raise UserError(f"--training_adapter is a LoRA, which PEFT puts beside a LoRA or DoRA alone, and {own}")
    if lora.use_rslora:
        raise UserError(f"--use_rslora is for LoRA and DoRA, and {own}: leave it out, or give --lora_alpha")
    if lora.lora_dropout:
        raise UserError(
            f"--lora_dropout drops inputs of A, and {own}: give --adapter_args rank_dropout {lora.lora_dropout:g} or "
            f"module_dropout {lora.lora_dropout:g}"
        )
    if config.optim.lora_units != Optim.lora_units:
        raise UserError(f"--lora_units {config.optim.lora_units} is about A and B, and {own}: leave it out")
    if _needs_pairs(config.optim.optimizer):
        others = [name for name in registry.names("optimizers") if not _needs_pairs(name)]
        raise UserError(
            f"--optimizer {config.optim.optimizer} works on pairs of factors, and {own}: give --adapter lora or dora, "
            f"or one of the optimizers {', '.join(others)}"
        )


def _needs_pairs(optimizer: str) -> bool:
    return getattr(registry.load("optimizers", optimizer), "NEEDS_PAIRS", False)


def _check_ranks(lora: Lora, multiple: int) -> None:
    for flag, ranks in (
        ("rank", [lora.rank]),
        ("text_encoder_rank", [lora.of_text_encoder.rank]),
        ("rank_pattern", lora.ranks.values()),
    ):
        for rank in ranks:
            if rank % multiple:
                raise UserError(f"--init {lora.init} needs a --{flag} that is a multiple of {multiple} (got {rank})")
