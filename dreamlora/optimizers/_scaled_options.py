"""Options that Scaled GD and Scaled AdamW share, and which of them go together; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dreamlora.optimizers import _checks

DampingMode = Literal["relative", "absolute"]
Order = Literal["jacobi", "gauss_seidel"]
Variant = Literal["gradient", "split"]
Geometry = Literal["product", "tangent", "balanced"]
BiasCorrection = Literal["torch", "folded", "none"]

_CHOICES = {"damping_mode": DampingMode, "order": Order, "variant": Variant, "geometry": Geometry}
# (option, value, other option, its value, why they exclude each other)
_EXCLUDED = (
    (
        "variant",
        "split",
        "damping_mode",
        "absolute",
        "an absolute damping undoes the independence of scale of the split",
    ),
    ("geometry", "balanced", "damping_mode", "absolute", "the geometric mean is damped relative to both factors"),
    ("geometry", "tangent", "order", "gauss_seidel", "the projection needs both factors at the same point"),
    ("geometry", "balanced", "order", "gauss_seidel", "the geometric mean needs both factors at the same point"),
    (
        "geometry",
        "balanced",
        "transport_momentum",
        True,
        "the transport belongs to the projections on the other factor",
    ),
)
# what the published step is made of, to which alone ``unscaled_below`` belongs
_PUBLISHED = {"damping_mode": "absolute", "geometry": "product", "transport_momentum": False}


@dataclass(frozen=True)
class ScaledOptions:
    """Knobs that Scaled GD and Scaled AdamW share.

    Raises:
        ValueError: a value is out of range, or two exclude each other.
    """

    damping: float = 0.1
    """Added to the Gram matrices before inversion; with relative damping a fraction of their mean eigenvalue."""
    damping_mode: DampingMode = "relative"
    """relative: no constant to tune per model; absolute: the step of the paper's programs, to reproduce them."""
    unscaled_below: float = 0.0
    """absolute: gradients stay unscaled while the Frobenius norm of the other factor's Gram matrix is at most this."""
    order: Order = "jacobi"
    """jacobi: both factors step from the same point; gauss_seidel: B is scaled by the A that has just been updated."""
    variant: Variant = "gradient"
    """gradient: moments of the scaled gradient; split: half of the scaling before the moments and half behind them."""
    geometry: Geometry = "product"
    """product: each gradient scaled by the other factor; tangent: LoRA-Pro's projection; balanced: RefLoRA's mean."""
    transport_momentum: bool = False
    """Carry the momentum along when the other factor changes (AltLoRA)."""
    scale_correction: bool = False
    """Divide the step by what alpha/r multiplies it with, so that the learning rate does not depend on alpha."""

    def __post_init__(self) -> None:
        check(vars(self))


def check(options: Mapping[str, Any]) -> None:
    """Check the options of ``ScaledOptions`` in a mapping (a parameter group, say).

    Raises:
        ValueError: a value is out of range, or two exclude each other; the message names them.
    """
    for name in ("damping", "unscaled_below"):
        _checks.at_least_zero(name, options[name])
    _checks.switch("transport_momentum", options["transport_momentum"])
    _checks.switch("scale_correction", options["scale_correction"])
    for name, choices in _CHOICES.items():
        _checks.one_of(name, options[name], get_args(choices))
    for name, value, other, other_value, why in _EXCLUDED:
        if options[name] == value and options[other] == other_value:
            raise ValueError(f"{name}: got {value!r} with {other} {other_value!r}, must be one or the other: {why}")
    for other, published in _PUBLISHED.items():
        below, found = options["unscaled_below"], options[other]
        if below and found != published:
            raise ValueError(
                f"unscaled_below: got {below} with {other} {found!r}, must be 0, or {other} {published!r}: it belongs "
                "to the published step"
            )


def check_adamw(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a bias correction of Scaled AdamW that is none, or without the step that it belongs to; and
    for options that do nothing without its first moment.
    """
    correction, mode = options["bias_correction"], options["damping_mode"]
    _checks.one_of("bias_correction", correction, get_args(BiasCorrection))
    if correction != "torch" and mode != "absolute":
        raise ValueError(
            f"bias_correction: got {correction!r} with damping_mode {mode!r}, must be 'torch', or damping_mode "
            "'absolute': it belongs to the published steps"
        )
    if options["transport_momentum"] and not options["betas"][0]:
        raise ValueError("transport_momentum: got True with betas[0] 0, must have betas[0] > 0: there is none to carry")


def check_gd(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a momentum of Scaled GD out of range, and for options that do nothing without it."""
    momentum = options["momentum"]
    _checks.fraction("momentum", momentum)
    if options["transport_momentum"] and not momentum:
        raise ValueError("transport_momentum: got True with momentum 0, must have momentum > 0: there is none to carry")
    if options["variant"] == "split" and not momentum:
        raise ValueError("variant: got 'split' with momentum 0, must have momentum > 0: else it is 'gradient'")
