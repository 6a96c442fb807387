"""Base of optimizers that update the two factors of a LoRA layer together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreamlora.optimizers import _checks
from dreamlora.optimizers._batch import Moves, PairBatch
from dreamlora.optimizers._clipping import clip_lora_grad_norm_
from dreamlora.optimizers._groups import pair_problem
from dreamlora.optimizers._kernels import EXP_AVG, EXP_AVG_SQ, STEP, AdamWHyper, adamw_, compute_dtype, without_tf32
from dreamlora.optimizers._states import own_state, sign
from dreamlora.optimizers._units import UNIT_SCALES, problem_of_units, scaled_for_step, scaling_in_units

# Largest batch, in bytes of stacked factors. CPU: the allocator reuses temporaries of this size (much larger ones are
# mapped anew, and their page faults cost more than the arithmetic), and they are few. GPU: few large launches.
_BATCH_BYTES = {"cpu": 2**22}
_BATCH_BYTES_DEFAULT = 64 * 2**20
# FSDP2 does not synchronise what it ignores: every process would train a LoRA of its own.
_AVERAGED = "and average their gradients over the processes before each step (torch.distributed.all_reduce)"
_HIDDEN_PAIRS = (
    "FSDP1 and DeepSpeed ZeRO flatten parameters and ZeroRedundancyOptimizer deals them out to processes, which hides "
    f"the pairs: train with DDP, or with FSDP2 and the LoRA parameters ignored, {_AVERAGED}"
)

Group = dict[str, Any]


class LoraPairOptimizer(Optimizer):
    """An optimizer over LoRA pairs, with AdamW for whatever else trains.

    It takes parameter groups, as ``lora_param_groups`` makes them: ``{"params": [A1, B1, A2, B2, ...], "lora_pairs":
    True}`` (optional keys: "scalings", "lr_ratio_B", "unit_scales") and ``{"params": [...], "lora_pairs": False}``.
    Pairs are found by position in "params", so that frameworks may move or replace parameters.

    A subclass gives ``update_pairs`` (or ``update_all_pairs``), ``pair_state_shapes`` if it does not keep AdamW's
    moments, and in ``defaults`` at least lr, betas, eps, weight_decay and maximize (the fallback AdamW uses them too).
    State is per parameter and at least float32, also for
    bfloat16 parameters.

    A factor whose gradient is None is left alone, like a parameter without gradient in torch's optimizers.

    Raises:
        ValueError: no pair group; a group without "lora_pairs"; factors that do not belong together; a hyper-parameter
            out of range; sharded or flattened parameters (FSDP, DeepSpeed ZeRO), which hide the pairs.
    """

    knows_units = True
    COUNTERS: tuple[str, ...] = ("fallbacks",)
    """What ``stats`` counts; ``fallbacks``: updates left out, or left unscaled, as a matrix could not be factored."""

    def __init__(self, params: list[Group], defaults: dict[str, Any]) -> None:
        _checks.of_kind(type(self).__name__, params, Iterable, "parameter groups: pass lora_param_groups(model)")
        groups = [dict(group) if isinstance(group, dict) else group for group in params]
        defaults = {"lora_pairs": None, "lr_ratio_B": 1.0, **defaults}
        self.validate_group(defaults)  # also where every group has values of its own
        self._reset()
        super().__init__(groups, defaults)
        if not any(group["lora_pairs"] for group in self.param_groups):
            raise ValueError(
                f"{type(self).__name__} got no group of LoRA pairs: pass lora_param_groups(model) as parameters"
            )

    def update_all_pairs(self, work: list[tuple[Group, list[PairBatch]]]) -> None:
        """Update the pairs of all groups in place; for methods in which groups share something, such as a norm."""
        for group, batches in work:
            self.update_pairs(group, batches)

    def update_pairs(self, group: Group, batches: list[PairBatch]) -> None:
        """Update these pairs of the group in place. Gradients are not to be changed."""
        raise NotImplementedError

    def validate_group(self, group: Group) -> None:
        """Raise ValueError for hyper-parameters out of range; subclasses add their own.

        Args:
            group: a group with all its values, or the defaults, which have no parameters.
        """
        for name in ("lr", "eps", "weight_decay"):
            _checks.at_least_zero(name, group[name])
        _checks.above_zero("lr_ratio_B", group["lr_ratio_B"])
        _checks.two_fractions("betas", group["betas"])
        _checks.all_finite("scalings", group.get("scalings") or [])
        for name in ("maximize", "scale_correction", "differentiable"):
            _checks.switch(name, group.get(name, False))
        if group.get("scale_correction") and not all(group.get("scalings") or [1.0]):
            raise ValueError("scale_correction: got True with a scaling (alpha/r) of 0, must be all other than 0")
        if group.get("differentiable"):
            raise ValueError("differentiable: got True, must be False (gradients of the update are not supported)")

    def added_settings(self, saved: Group) -> Group:
        """Settings that earlier versions did not have, as they were without them.

        Args:
            saved: a group of a state that may be such a version's.
        """
        return {"layer_power": 0.0} if "layer_power" in self.defaults else {}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, checked; see the class for its keys.

        Raises:
            ValueError: see the class.
        """
        if not isinstance(param_group, dict) or param_group.get("lora_pairs") is None:
            raise ValueError(
                f"{type(self).__name__} needs to know which parameters are LoRA pairs: pass lora_param_groups(model), "
                'or groups with the key "lora_pairs" (True for [A1, B1, A2, B2, ...], False for other parameters)'
            )
        params = param_group["params"]
        group = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
        self.validate_group({**self.defaults, **group})
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        if group["lora_pairs"]:
            _check_pairs(tensors, group)
        for p in tensors:
            _refuse_strided(p)
        super().add_param_group(group)
        self._batches.clear()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with a note of who wrote it."""
        state_dict = super().state_dict()
        sign(self, state_dict)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep float32 where parameters are bfloat16 or float16 (torch would round them).

        Raises:
            ValueError: the state is of another class, rank or model, or damaged; nothing was changed then.
        """
        state_dict = own_state(self, state_dict)
        super().load_state_dict(state_dict)
        self._batches.clear()
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params, strict=True):
            for key, saved in state_dict["state"].get(i, {}).items():
                if not isinstance(saved, Tensor) or not saved.is_floating_point():
                    continue
                self.state[p][key] = saved.to(device=p.device, dtype=self.state_dtype(key, p))

    def state_dtype(self, key: str, p: Tensor) -> torch.dtype:
        """The precision in which ``state[p][key]`` is kept."""
        return torch.float32 if key == STEP else compute_dtype(p.dtype)

    def state_shapes(self, group: Group, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept of ``group["params"][index]``, by its name in the state."""
        p = group["params"][index]
        if group["lora_pairs"]:
            return self.pair_state_shapes(p, p.shape[index % 2])
        return {STEP: (), EXP_AVG: tuple(p.shape), EXP_AVG_SQ: tuple(p.shape)}

    def pair_state_shapes(self, p: Tensor, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept of one factor of a pair."""
        return {STEP: (), EXP_AVG: tuple(p.shape), EXP_AVG_SQ: tuple(p.shape)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: evaluates the model anew and returns the loss; called once, before gradients are read.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: parameters were replaced by sharded or flattened ones since the optimizer was made.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(index, group) for index, group in enumerate(self.param_groups) if group["params"]]
        if any(p.grad is not None and p.grad.is_sparse for _, group in groups for p in group["params"]):
            raise RuntimeError(f"{type(self).__name__} does not take sparse gradients")
        pairs = [(group, self._batches_with_gradients(index, group)) for index, group in groups if group["lora_pairs"]]
        with contextlib.ExitStack() as stack:
            # A step inside an autocast region would otherwise multiply in half precision.
            for device in sorted({p.device.type for _, group in groups for p in group["params"]}):
                stack.enter_context(torch.autocast(device, enabled=False))
                if device == "cuda":
                    stack.enter_context(without_tf32())
            stack.enter_context(scaled_for_step(self))
            self.update_all_pairs(pairs)
            for _, group in groups:
                if not group["lora_pairs"]:
                    self.adamw_update(group, [(p, p.grad) for p in group["params"] if p.grad is not None])
        return loss

    def clip_lora_grad_norm_(self, max_norm: float, damping: float = 1e-6) -> Tensor:
        """Clip the gradients of all LoRA pairs together, in place, by a norm that does not see the factorisation.

        ``√Σ(⟨gA, (BᵀB)⁻¹gA⟩ + ⟨gB, gB(AAᵀ)⁻¹⟩)``: the size of the part of the full weight's gradient that the factors
        can follow. ``torch.nn.utils.clip_grad_norm_`` takes the norm of ``gA`` and ``gB`` themselves, which changes
        when the same product is split otherwise. Parameters outside of pairs are left alone.

        Args:
            max_norm: > 0; in units of the full weight's gradient times ``alpha/r``.
            damping: relative, of the inverses.

        Returns:
            The norm before clipping ``()``; on the device of the first pair, without waiting for it.

        Raises:
            ValueError: ``max_norm`` or ``damping`` is out of range.
        """
        _checks.above_zero("max_norm", max_norm)
        _checks.at_least_zero("damping", damping)
        groups = [(i, g) for i, g in enumerate(self.param_groups) if g["lora_pairs"] and g["params"]]
        batches = [batch for i, group in groups for batch in self._batches_with_gradients(i, group)]
        return clip_lora_grad_norm_(batches, max_norm, damping)

    @property
    def pair_count(self) -> int:
        """Pairs of all groups."""
        return sum(len(group["params"]) // 2 for group in self.param_groups if group["lora_pairs"])

    @property
    def stats(self) -> dict[str, int]:
        """Counts since the start, by the names in ``COUNTERS``. Reading them waits for a GPU."""
        return {name: sum(int(count) for count in each.values()) for name, each in self._counts.items()}

    def count(self, name: str, flags: Tensor) -> None:
        """Add the number of true flags to one of ``COUNTERS``, without waiting for their device."""
        each, number = self._counts[name], flags.sum()
        each[number.device] = each[number.device] + number if number.device in each else number

    def adamw_update(self, group: Group, moves: Moves) -> None:
        """torch's AdamW along given directions instead of gradients, with the group's hyper-parameters."""
        hyper = AdamWHyper(group["lr"], group["betas"], group["eps"], group["weight_decay"], group["maximize"])
        adamw_([p for p, _ in moves], [d for _, d in moves], [self.state[p] for p, _ in moves], hyper)

    def _batches_with_gradients(self, index: int, group: Group) -> list[PairBatch]:
        """Batches of the pairs that have a gradient; cached while parameters keep shape, dtype and device."""
        params = group["params"]
        signature = [(id(p), p.shape, p.dtype, p.device) for p in params], group.get(UNIT_SCALES)
        cached = self._batches.get(index)
        if cached is None or cached[0] != signature:
            _check_pairs(params, group)
            cached = (signature, list(_batches(_pairs_of(group))))
            self._batches[index] = cached
        if all(p.grad is not None for p in params):
            return cached[1]
        present = [pair for pair in _pairs_of(group) if pair[0].grad is not None or pair[1].grad is not None]
        return list(_batches(present))

    def _reset(self) -> None:
        """Forget what is derived from the parameters, and begin to count."""
        self._counts: dict[str, dict[torch.device, Tensor]] = {name: {} for name in self.COUNTERS}
        self._batches: dict[int, tuple[Any, list[PairBatch]]] = {}


def _pairs_of(group: Group) -> list[tuple[Tensor, Tensor, float]]:
    params = group["params"]
    scalings = group.get("scalings") or [1.0] * (len(params) // 2)
    if units := group.get(UNIT_SCALES):
        scalings = [scaling_in_units(*each) for each in zip(scalings, units[0::2], units[1::2], strict=True)]
    return list(zip(params[0::2], params[1::2], scalings, strict=True))


def _batches(pairs: list[tuple[Tensor, Tensor, float]]) -> Iterator[PairBatch]:
    """Bucket pairs by device, dtype, shape and scaling, and cut large buckets."""
    buckets: dict[Any, list[tuple[Tensor, Tensor, float]]] = {}
    for pair in pairs:
        A, B, s = pair
        buckets.setdefault((A.device, A.dtype, A.shape, B.shape, s), []).append(pair)
    for members in buckets.values():
        A, B, _ = members[0]
        room = _BATCH_BYTES.get(A.device.type, _BATCH_BYTES_DEFAULT)
        size = max(1, room // (4 * (A.numel() + B.numel())))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            yield PairBatch([A for A, _, _ in part], [B for _, B, _ in part], [s for _, _, s in part])


def _check_pairs(params: list[Tensor], group: Group) -> None:
    """Raise ValueError unless ``params`` are [A1, B1, A2, B2, ...] that can be updated as pairs."""
    if any(hasattr(p, "device_mesh") for p in params):
        raise ValueError(
            "LoRA factors are sharded (DTensor): a factor must be whole to be preconditioned. Train with DDP, or leave "
            f"the LoRA parameters out of FSDP (ignored_params), {_AVERAGED}; they are small"
        )
    names = group.get("pair_names") or [f"number {i}" for i in range(len(params) // 2)]
    flat = any(p.ndim < 2 for p in params)
    if flat or len(params) % 2:
        raise ValueError(
            f"a group of LoRA pairs must be [A1, B1, A2, B2, ...], got {len(params)} tensors"
            f"{', some of them 1-D' if flat else ''}. {_HIDDEN_PAIRS}"
        )
    if len({id(p) for p in params}) < len(params):
        raise ValueError("a parameter is in more than one LoRA pair: shared factors go to a group without pairs")
    for key in ("scalings", "pair_names"):
        if group.get(key) and len(group[key]) != len(params) // 2:
            raise ValueError(f"{key}: got {len(group[key])} values for {len(params) // 2} LoRA pairs. {_HIDDEN_PAIRS}")
    if problem := problem_of_units({**group, "params": params}, group):
        raise ValueError(problem)
    for name, A, B in zip(names, params[0::2], params[1::2], strict=True):
        problem = pair_problem(A, B)
        if problem:
            raise ValueError(f"LoRA pair {name}: {problem}; got A {tuple(A.shape)} and B {tuple(B.shape)}")


def _refuse_strided(p: Tensor) -> None:
    """Raise ValueError for a parameter that is a view with gaps: its state would have other strides."""
    if p.device.type != "meta" and torch.empty_like(p, device="meta").stride() != p.stride():
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is a view with gaps: make it contiguous first")
