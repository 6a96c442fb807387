"""EVA: A spans the directions in which a layer's inputs vary most (arXiv 2410.07170; PEFT)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dreamlora.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from dreamlora.inits._start import Probe, Start, Target

OFFSET: bool = False
RANK_MULTIPLE: int = 1
MOST_PASSES = 50
"""Passes over the draws after which the components that still turn will not settle any more."""


@dataclass(frozen=True)
class Options:
    """Settings of EVA. Every layer keeps --rank: PEFT's redistribution of ranks (its rho) is not used.

    Raises:
        ValueError: a value is out of range.
    """

    draws: int = 128
    """Fixed (image, time, noise) draws whose inputs are looked at; repeated until the components settle."""
    tau: float = 0.99
    """A component has settled when its cosine with that of the batch before is at least this."""
    whiten: bool = False
    """Divide every component by the root of its singular value."""

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1 (got {self.draws})")
        if not 0 <= self.tau < 1:
            raise ValueError(f"tau must be at least 0 and below 1 (got {self.tau})")


def starts(targets: Sequence[Target], options: Options, probe: Probe) -> Iterator[Start]:
    """``A``: the first r principal components of the layer's inputs; ``B = 0``."""
    import torch

    from dreamlora.inits._start import Start

    for target in targets:
        target.size("--init eva", least=target.rank)
        if not isinstance(target.layer.base_layer, torch.nn.Linear):
            raise UserError(
                f"--init eva: PEFT's EVA takes Linear layers only, but {target.name} is a "
                f"{type(target.layer.base_layer).__name__}. Leave it out of --lora_layers, or use another --init"
            )
    components = _components(targets, options, probe)
    for target in targets:
        yield Start(components[_name(target)].float(), torch.zeros(target.shapes[1]))


def _components(targets: Sequence[Target], options: Options, probe: Probe) -> dict[str, Tensor]:
    """PEFT's EVA over the model without LoRA; every process computes the same."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    from dreamlora.linalg import decomposable

    count = probe.batches(options.draws)
    passes = 0

    def forward(model: Any, number: Tensor) -> None:
        nonlocal passes
        passes += 1
        if passes > MOST_PASSES * count:
            raise UserError(_unsettled(targets))
        probe.loss(int(number))

    config = LoraConfig(
        r=targets[0].rank,
        target_modules=[_name(target) for target in targets],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=options.tau, whiten=options.whiten),
    )
    state_dict: dict[str, Tensor] = get_eva_state_dict(
        _on_the_cpu(probe.model),
        [torch.tensor(number) for number in range(count)],
        config,
        forward_fn=forward,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda inputs, *_: decomposable(inputs[0].reshape(-1, inputs[0].shape[-1])),
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    return state_dict


def _on_the_cpu(model: Module) -> Module:
    """The model as PEFT takes it: of one that has adapters it expects methods of its own, hence the wrapper.

    PEFT brings the components, which are float64, to where the parameters are, but MPS has no float64.
    """
    import torch

    class Wrapper(torch.nn.ModuleDict):
        def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
            yield torch.nn.Parameter(torch.empty(0))

    return Wrapper({"model": model})


def _name(target: Target) -> str:
    return f"model.{target.name}.base_layer"


def _unsettled(targets: Sequence[Target]) -> str:
    from peft.tuners.lora.eva import SVDHook

    hooked = [
        target.name
        for target in targets
        if any(isinstance(hook, SVDHook) for hook in target.layer.base_layer._forward_hooks.values())
    ]
    names = ", ".join(hooked[:3]) + (f" and {len(hooked) - 3} more" if len(hooked) > 3 else "")
    return (
        f"--init eva: the inputs of {names} have no {targets[0].rank} directions that settle: they vary in fewer, or a "
        "batch has fewer rows (layers that see one vector per image). Leave these layers out of --lora_layers, give a "
        "smaller --rank, or use another --init"
    )
