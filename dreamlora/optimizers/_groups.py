"""Finding LoRA pairs in modules and turning them into parameter groups.

PEFT's layers are recognised by what they have (``lora_A``, ``lora_B``, ``scaling``), so PEFT is not imported; modules
of other makers are recognised by parameter names: kohya's, torchtune's, and bare parameters as in loralib and litgpt.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreamlora.optimizers import _checks
from dreamlora.optimizers._units import UNIT_SCALES, Units, check_units, unit_scales

logger = logging.getLogger(__name__)

# Names of the two factors where there is no PEFT layer: (A, B). "down"/"up" alone are also names of UNet blocks, hence
# the check for "lora" in the owner's name.
_NAME_PAIRS = ((".lora_A.", ".lora_B."), (".lora_a.", ".lora_b."), (".lora_down.", ".lora_up."), (".down.", ".up."))
_MODULES = "a module, or several"
_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_\w+)\.([^.]+)(?=\.|$)")


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one adapted layer, ``W = W0 + scaling · B A`` (convolutions flattened behind dimension 0).

    Attributes:
        name: of the adapted layer, and of the adapter if it is not "default".
        A: ``(r, n)`` or ``(r, c, *kernel)``.
        B: ``(m, r)`` or ``(m, r, 1, ...)``.
        scaling: ``alpha/r`` or ``alpha/sqrt(r)``; 1 if the layer does not tell.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scaling: float = 1.0


def pair_problem(A: Tensor, B: Tensor) -> str | None:
    """Why ``A`` and ``B`` cannot be the two factors of a product ``B A``, or None if they can."""
    if A.ndim < 2 or B.ndim < 2:
        return "a factor is flat (1-D)"
    if A.shape[0] != B.shape[1] or any(size != 1 for size in B.shape[2:]):
        return "the shapes do not multiply (a grouped convolution?)"
    if A.device != B.device or A.dtype != B.dtype:
        return "the factors differ in device or dtype"
    return None if A.is_floating_point() else "the factors are quantised"


def find_lora_pairs(module: nn.Module, adapter_names: Collection[str] | None = None) -> list[LoraPair]:
    """The trainable pairs of a module, in module order.

    Args:
        adapter_names: only these adapters; None is all that train.

    Raises:
        TypeError: it is no module.
    """
    _checks.of_kind("find_lora_pairs", module, nn.Module, "a module")
    if any(_is_peft_layer(layer) for layer in module.modules()):
        candidates = list(_peft_candidates(module))
    else:
        candidates = list(_named_candidates(module))
    if adapter_names is not None:
        adapter_names = _as_set(adapter_names)
        candidates = [candidate for candidate in candidates if candidate[0] in adapter_names]
    return _accept([(pair, problem) for _, pair, problem in candidates])


def lora_param_groups(  # noqa: PLR0913 - keywords, each a setting of the groups
    model: nn.Module | Sequence[nn.Module],
    *,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    adapter_names: Collection[str] | None = None,
    loraplus_ratio: float = 1.0,
    fallback_lr: float | Tensor | None = None,
    units: Units = "plain",
) -> list[dict[str, Any]]:
    """Parameter groups of a model with LoRA layers: one of pairs, one of whatever else trains (if anything does).

    Modules with their own learning rates: ``lora_param_groups(unet, lr=1e-4) + lora_param_groups(text, lr=5e-6)``.

    Args:
        model: a module or several that share all settings.
        lr, weight_decay: of the groups; None leaves the optimizer's own default.
        adapter_names: train only these adapters; None is all whose parameters require gradients.
        loraplus_ratio: learning rate of the B factors divided by that of the A factors (LoRA+, arXiv 2402.12354).
        fallback_lr: of the second group; None is ``lr``.
        units: of the pairs' learning rate. "start": as they are now is their start, by which the rate is normalised, so
            that it depends neither on alpha nor on how A was initialised, and hardly on the rank. Optimizers of other
            packages then have to go through ``in_units``.

    Returns:
        ``{"params": [A1, B1, A2, B2, ...], "lora_pairs": True, "pair_names": [...], "scalings": [...],
        "lr_ratio_B": ...}``, with "unit_scales" of all parameters in units of the start, and
        ``{"params": [...], "names": [...], "lora_pairs": False}``.

    Raises:
        TypeError: ``model`` is neither a module nor several.
        ValueError: there is no trainable pair, or no such units.
    """
    check_units(units)
    modules = _checks.all_of_kind("lora_param_groups", model, nn.Module, _MODULES)
    adapter_names = None if adapter_names is None else _as_set(adapter_names)
    pairs = _accept([(pair, None) for module in modules for pair in find_lora_pairs(module, adapter_names)])
    if not pairs:
        chosen = "" if adapter_names is None else f" of the adapters {sorted(adapter_names)}"
        raise ValueError(
            f"found no LoRA pair{chosen} whose factors both require gradients: add an adapter "
            "(peft.inject_adapter_in_model, model.add_adapter) and leave it trainable before building the optimizer"
        )
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    common = {key: value for key, value in settings.items() if value is not None}
    groups: list[dict[str, Any]] = [
        {
            "params": [factor for pair in pairs for factor in (pair.A, pair.B)],
            "lora_pairs": True,
            "pair_names": [pair.name for pair in pairs],
            "scalings": [pair.scaling for pair in pairs],
            "lr_ratio_B": float(loraplus_ratio),
            **common,
        }
    ]
    if units == "start":
        scales = [unit_scales(pair.A, pair.B, pair.scaling) for pair in pairs]
        groups[0][UNIT_SCALES] = [scale for both in scales for scale in both]
    rest = _other_trainables(modules, {id(p) for p in groups[0]["params"]}, adapter_names)
    if rest:
        lr_of_rest: dict[str, Any] = {} if fallback_lr is None else {"lr": fallback_lr}
        names, others = map(list, zip(*rest, strict=True))
        groups.append({"params": others, "names": names, "lora_pairs": False, **common, **lr_of_rest})
    logger.debug("%d LoRA pairs; %d other trainable tensors", len(pairs), len(rest))
    return groups


def group_without_pairs(
    model: nn.Module | Sequence[nn.Module], *, lr: float | Tensor | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """As ``lora_param_groups`` for adapters without pairs (LoHa, LoKr): the second group alone, of all that trains.

    Raises:
        TypeError: ``model`` is neither a module nor several.
        ValueError: nothing trains.
    """
    modules = _checks.all_of_kind("group_without_pairs", model, nn.Module, _MODULES)
    found = _other_trainables(modules, set(), None)
    if not found:
        raise ValueError("nothing requires gradients: add an adapter before building the optimizer")
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    names, params = map(list, zip(*found, strict=True))
    given = {key: value for key, value in settings.items() if value is not None}
    return [{"params": params, "names": names, "lora_pairs": False, **given}]


def plain_groups(param_groups: list[dict[str, Any]], default_lr: float) -> list[dict[str, Any]]:
    """The groups for an optimizer that knows no pairs: A and B of a group apart if their learning rates differ."""
    plain: list[dict[str, Any]] = []
    for group in param_groups:
        kept: dict[str, Any] = {key: group[key] for key in ("lr", "weight_decay") if key in group}
        ratio = group.get("lr_ratio_B", 1.0)
        if ratio == 1.0:
            plain.append({**_of_parameters(group, slice(None)), **kept})
        else:
            of_B = {**kept, "lr": kept.get("lr", default_lr) * ratio}
            plain.append({**_of_parameters(group, slice(0, None, 2)), **kept})
            plain.append({**_of_parameters(group, slice(1, None, 2)), **of_B})
    return plain


def names_of(group: Mapping[str, Any]) -> list[str]:
    """Names of a group's parameters, in their order; none where the group does not say."""
    pairs = group.get("pair_names") or ()
    return list(group.get("names") or [f"{name}.lora_{factor}" for name in pairs for factor in "AB"])


def _of_parameters(group: Mapping[str, Any], which: slice) -> dict[str, Any]:
    """What a group says of single parameters, for some of them."""
    lists = {"params": group["params"], "names": names_of(group), UNIT_SCALES: group.get(UNIT_SCALES)}
    return {key: list(values[which]) for key, values in lists.items() if values}


def with_fallback_lr(param_groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """The groups with another learning rate where there are no pairs, for methods whose rate AdamW cannot use; those
    that say so ("own_lr") keep theirs.
    """
    return [group if group.get("lora_pairs") or group.get("own_lr") else {**group, "lr": lr} for group in param_groups]


class NamedParameters:
    """Parameter groups in place of a model, for libraries that find LoRA pairs by name.

    Attributes:
        pairs: how many there are.
        convolutions: how many of them have factors that are no matrices.
    """

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self._named: dict[str, nn.Parameter] = {}
        self.pairs = self.convolutions = 0
        for group in param_groups:
            for i, p in enumerate(group["params"]):
                factor = f"lora_{'AB'[i % 2]}" if group.get("lora_pairs") else "other"
                number = i // 2 if group.get("lora_pairs") else i
                self._named[f"group{len(self._named) - i}.{number}.{factor}.weight"] = p
            if group.get("lora_pairs"):
                self.pairs += len(group["params"]) // 2
                self.convolutions += sum(p.ndim != 2 for p in group["params"][0::2])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of a module."""
        return iter(self._named.items())

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of a module."""
        return iter(self._named.values())


@torch.no_grad()
def check_compatibility(model: nn.Module | Iterable[LoraPair]) -> dict[str, float]:
    """Relative size of ``gA Aᵀ − Bᵀ gB`` per pair, from the gradients of a backward pass just done.

    Both terms are ``s BᵀGAᵀ`` with ``G`` the gradient of the full weight, so the difference is rounding (below 1e-5 in
    float32, 1e-2 in bfloat16) if and only if the factors belong together: linear, convolution, DoRA, dropout and
    global-norm clipping included. Clipping per tensor breaks it. Pairs without gradients, or with B at zero, give 0.

    Raises:
        TypeError: ``model`` is neither a module nor pairs.
        ValueError: no pair has gradients.
    """
    given = find_lora_pairs(model) if isinstance(model, nn.Module) else model
    pairs = _checks.all_of_kind("check_compatibility", given, LoraPair, "a module, or pairs of find_lora_pairs")
    errors: dict[str, float] = {}
    for pair in pairs:
        if pair.A.grad is None or pair.B.grad is None:
            continue
        A, B, gA, gB = (x.detach().cpu().double().flatten(1) for x in (pair.A, pair.B, pair.A.grad, pair.B.grad))
        left, right = gA @ A.mT, B.mT @ gB
        size = max(left.norm().item(), right.norm().item())
        errors[pair.name] = (left - right).norm().item() / size if size else 0.0
    if not errors:
        raise ValueError("no LoRA pair has gradients: call check_compatibility after loss.backward()")
    return errors


def _as_set(names: Collection[str]) -> set[str]:
    """One name alone is meant as that name, not as its letters."""
    return {names} if isinstance(names, str) else set(names)


def _is_peft_layer(layer: nn.Module) -> bool:
    """A LoRA layer of PEFT; AdaLoRA's, which has a third factor ``lora_E`` between the two, is none."""
    has_factors = hasattr(layer, "lora_A") and hasattr(layer, "lora_B") and not hasattr(layer, "lora_E")
    return has_factors and isinstance(getattr(layer, "scaling", None), Mapping)


def _peft_candidates(module: nn.Module) -> Iterator[tuple[str, LoraPair, str | None]]:
    """(adapter, pair, why it is none) of every PEFT LoRA layer; embeddings keep bare parameters."""
    for name, layer in module.named_modules():
        if not _is_peft_layer(layer):
            continue
        kinds: list[tuple[Any, Any]] = [(layer.lora_A, layer.lora_B)]
        kinds.append((getattr(layer, "lora_embedding_A", {}), getattr(layer, "lora_embedding_B", {})))
        for As, Bs in kinds:
            for adapter in As:
                if adapter not in Bs:
                    continue
                A, B = (getattr(x, "weight", x) for x in (As[adapter], Bs[adapter]))
                label = name if adapter == "default" else f"{name}[{adapter}]"
                pair = LoraPair(label, A, B, float(layer.scaling[adapter]))
                yield adapter, pair, _other_product(layer, adapter, As[adapter])


def _other_product(layer: Any, adapter: str, A: Any) -> str | None:
    """Why a PEFT layer moves its weight by another product than ``B A``, or None: variants keep the factors' names."""
    if getattr(layer, "num_experts", 1) > 1:
        return "every expert has factors of its own in one tensor"
    if adapter in getattr(layer, "lora_diag", ()):
        return "a third factor stands between the two (KaSA)"
    return "a factor is block-diagonal (BD-LoRA)" if hasattr(A, "nblocks") else None


def _named_candidates(module: nn.Module) -> Iterator[tuple[str, LoraPair, str | None]]:
    """(adapter, pair, why it is none) by parameter names, for layers that are not PEFT's."""
    # The dots let a name match that is not nested in any module, or has nothing nested in it.
    parameters = {f".{name}.": p for name, p in module.named_parameters(remove_duplicate=False)}
    for name, A in parameters.items():
        for mark_a, mark_b in _NAME_PAIRS:
            head, mark, tail = name.rpartition(mark_a)
            # Only the last occurrence is replaced: a block may itself be called "down" or "lora_A".
            B = parameters.get(head + mark_b + tail) if mark and (not tail or tail.endswith("weight.")) else None
            if B is None or (mark_a == ".down." and "lora" not in head):
                continue
            pair = LoraPair(head[1:], A, B, _named_scaling(module, head[1:], A))
            problem = "a third factor stands between the two" if f"{head}.lora_E." in parameters else None
            # Bare parameters do not tell from which side the layer multiplies.
            if not tail and A.ndim == 2 and A.shape[0] > A.shape[1]:
                problem = "the first factor is taller than wide (transposed?)"
            yield _adapter_of(name) or "default", pair, problem
            break


def _named_scaling(module: nn.Module, owner: str, A: Tensor) -> float:
    """What the module that holds the factors says: ``scaling`` (loralib), or ``alpha`` (kohya, torchtune) / rank."""
    layer = module.get_submodule(owner)
    scaling, alpha = getattr(layer, "scaling", None), getattr(layer, "alpha", None)
    if isinstance(scaling, (int, float)):
        return float(scaling)
    return float(alpha) / A.shape[0] if isinstance(alpha, (int, float, Tensor)) else 1.0


def _adapter_of(name: str) -> str | None:
    """The adapter a parameter belongs to, None if it belongs to none (or the layer has no names for adapters)."""
    names = _ADAPTER.findall(name)
    return None if not names or names[-1] in ("weight", "bias") else names[-1]


def _accept(candidates: list[tuple[LoraPair, str | None]]) -> list[LoraPair]:
    """The candidates that can be preconditioned; the others are reported once, by reason.

    Args:
        candidates: and what else is wrong with them, if anything.
    """
    unique = {(id(pair.A), id(pair.B)): (pair, problem) for pair, problem in candidates}
    uses = Counter(id(factor) for pair, _ in unique.values() for factor in (pair.A, pair.B))
    accepted: list[LoraPair] = []
    refused: Counter[str] = Counter()
    for pair, problem in unique.values():
        if not (pair.A.requires_grad or pair.B.requires_grad):
            continue
        reason = problem or pair_problem(pair.A, pair.B)
        if not (pair.A.requires_grad and pair.B.requires_grad):
            reason = "a factor is frozen"
        elif reason is None and max(uses[id(pair.A)], uses[id(pair.B)]) > 1:
            reason = "a factor is shared with another pair"
        if reason is None:
            accepted.append(pair)
        else:
            refused[reason] += 1
    for reason, count in refused.items():
        logger.warning("%d LoRA layers are trained without preconditioning: %s", count, reason)
    return accepted


def _other_trainables(
    modules: Iterable[nn.Module], in_pairs: set[int], adapter_names: Collection[str] | None
) -> list[tuple[str, nn.Parameter]]:
    """Parameters that train and are in no pair, with their names; those of adapters not chosen are left out."""
    trainables: dict[int, tuple[str, nn.Parameter]] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            adapter = _adapter_of(f".{name}")
            chosen = adapter_names is None or adapter is None or adapter in adapter_names
            if parameter.requires_grad and chosen and id(parameter) not in in_pairs:
                trainables[id(parameter)] = (name, parameter)
    return list(trainables.values())
