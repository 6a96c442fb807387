"""The ``torchmetrics.Metric`` around every pure function: it collects vectors, and gathers them from all processes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

try:
    from torchmetrics import Metric
except Exception as error:  # with torch-fidelity but without torchvision, importing torchmetrics fails
    _REASON = str(error)

    class Metric:  # type: ignore[no-redef]
        """Stands in, so that the pure functions work all the same."""

        def __init__(self, **kwargs: Any) -> None:
            raise ImportError(
                f"torchmetrics cannot be imported ({_REASON}): install torchvision, or uninstall what asks for it"
            )


class EmbeddingMetric(Metric):
    """State, reset and synchronisation of a metric over vectors; a subclass names its sides and computes.

    Processes may hold different numbers of vectors, or none.

    Args:
        dim: length of the vectors; a process without any must know it too.
        kwargs: of ``torchmetrics.Metric``.
    """

    SIDES: ClassVar[tuple[str, ...]] = ()
    """Sets of vectors ``[n, dim]`` that ``update`` takes by name."""
    LABELS: ClassVar[tuple[str, ...]] = ()
    """Sets of whole numbers ``[n]`` that ``update`` takes by name."""
    full_state_update = False

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dim = dim
        for name in (*self.SIDES, *self.LABELS):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self._put_empty_rows()

    def update(self, **rows: Tensor) -> None:
        """Add rows to the sides that are named.

        Raises:
            TypeError: there is no such side.
        """
        if unknown := rows.keys() - {*self.SIDES, *self.LABELS}:
            raise TypeError(f"{type(self).__name__} takes {', '.join((*self.SIDES, *self.LABELS))} (got {unknown})")
        for name, added in rows.items():
            getattr(self, name).append(added.detach().to(self.device))

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self._put_empty_rows()

    def rows(self, name: str) -> Tensor:
        """All rows of a side, on the CPU."""
        held = getattr(self, name)
        return (held if isinstance(held, Tensor) else torch.cat(list(held))).cpu()

    def _put_empty_rows(self) -> None:
        """Every process has a tensor of the right shape to gather, else those that have data would wait for ever."""
        for name in self.SIDES:
            setattr(self, name, [torch.zeros(0, self.dim, device=self.device)])
        for name in self.LABELS:
            setattr(self, name, [torch.zeros(0, dtype=torch.int64, device=self.device)])
