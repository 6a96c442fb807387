"""Rows of tensors that processes hold in shares, put together by torchmetrics: what all our metrics are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, int64, zeros

from dreamlora.errors import UserError
from dreamlora.processes import wait_for_everyone

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except Exception as error:  # with torch-fidelity but without torchvision, importing torchmetrics fails
    raise UserError(
        f"torchmetrics cannot be imported ({error}): it computes the evaluation loss and image metrics. With "
        "torch-fidelity it needs torchvision: install that, or uninstall torch-fidelity"
    ) from error


class GatheredRows(Metric):
    """State, reset and synchronisation of a metric over rows; a subclass computes.

    ``compute`` sees the rows of all processes, in an order that does not depend on who held which: every row comes with
    its place. Processes may hold different numbers of rows, or none.

    Args:
        sides: an empty tensor for every set of rows, of their shape and type.
        kwargs: of ``torchmetrics.Metric``.
    """

    full_state_update = False

    def __init__(self, sides: Mapping[str, Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        places = zeros(0, dtype=int64)
        self._empty = {_state(name): rows for name, rows in sides.items()} | {_places(name): places for name in sides}
        for state in self._empty:
            self.add_state(state, default=[], dist_reduce_fx="cat")
        self._put_empty_rows()

    def update(self, places: Tensor, **rows: Tensor) -> None:
        """Add rows to the sides that are named.

        Args:
            places: ``[k]`` int64, where these rows belong among those of all processes.
            rows: ``[k, ...]`` each.

        Raises:
            TypeError: there is no such side.
            ValueError: a side has another number of rows.
        """
        for name, added in rows.items():
            if _state(name) not in self._empty:
                raise TypeError(f"{type(self).__name__} has no rows called {name}")
            if len(added) != len(places):
                raise ValueError(f"{len(added)} rows of {name} for {len(places)} places")
            getattr(self, _state(name)).append(added.detach().to(self.device))
            getattr(self, _places(name)).append(places.to(self.device))

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self._put_empty_rows()

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """torchmetrics' synchronisation, once all have come: one may have worked alone for long before."""
        if not self._is_synced:
            wait_for_everyone()
        super().sync(*args, **kwargs)

    def rows(self, name: str) -> Tensor:
        """All rows of a side by their places, on the CPU.

        Raises:
            RuntimeError: two have one place.
        """
        held, places = (dim_zero_cat(getattr(self, state)).cpu() for state in (_state(name), _places(name)))
        if len(places.unique()) < len(places):  # such as of processes that do not know that they share the work
            raise RuntimeError(f"{type(self).__name__} was given rows of {name} twice for one place")
        return held[places.argsort()]

    def _put_empty_rows(self) -> None:
        """Every process has a tensor of the right shape to gather, else those that have data would wait for ever."""
        for state, rows in self._empty.items():
            setattr(self, state, [rows.to(self.device)])


def _state(name: str) -> str:
    """The attribute of a side's rows: "training" alone is one of every module's."""
    return f"{name}_rows"


def _places(name: str) -> str:
    return f"{name}_places"
