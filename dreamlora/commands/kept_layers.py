"""What became of each layer at a lower rank: as JSON can say it, and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dreamlora.commands.columns import in_columns
from dreamlora.lora.low_rank import Kept
from dreamlora.lora.weights import AdapterWeights


@dataclass
class KeptLayers:
    """Layers of a LoRA as they are approximated.

    Attributes:
        weights: of what is kept.
        rows: of each layer, its name first with the component's before it.
    """

    weights: AdapterWeights = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, component: str, layer: str, kept: Kept, norm: float, before: int | None = None) -> None:
        """One more.

        Args:
            component, layer: names.
            kept: of it.
            norm: of its ΔW.
            before: the rank that it had.
        """
        self.weights.setdefault(component, {})[layer] = kept.weights
        self.rows.append(
            {
                "layer": f"{component}.{layer}",
                **({} if before is None else {"rank_before": before}),
                "rank": kept.weights.rank,
                "alpha": kept.weights.alpha,
                "norm": norm,
                "kept_energy": kept.energy,
                "relative_error": kept.error,
            }
        )

    def summary(self) -> dict[str, Any]:
        """All layers, and what they are together."""
        whole = sum(row["norm"] ** 2 for row in self.rows)
        lost = sum((row["norm"] * row["relative_error"]) ** 2 for row in self.rows)
        share = lost / whole if whole else 0.0
        return {"layers": self.rows, "kept_energy": 1 - share, "relative_error": math.sqrt(share)}


def table_of(found: Mapping[str, Any]) -> Iterator[str]:
    """Of a summary."""
    rows = found["layers"]
    yield from in_columns([("layer", "rank", "alpha", "|ΔW|", "kept energy", "relative error"), *map(_row, rows)])
    ranks = sorted(row["rank"] for row in rows)
    changed = any(row.get("rank_before", row["rank"]) != row["rank"] for row in rows)
    before = sorted({row["rank_before"] for row in rows if row.get("rank_before")}) if changed else []
    yield (
        f"{len(rows)} layers: rank {_span(before)} -> {_span(ranks)}"
        if before
        else f"{len(rows)} layers: rank {_span(ranks)}"
    ) + f", {_percent(found['kept_energy'])} of the energy kept, relative error {found['relative_error']:.2g}"


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    before = row.get("rank_before") or row["rank"]
    rank = str(row["rank"]) if before == row["rank"] else f"{before} -> {row['rank']}"
    figures = f"{row['norm']:.3g}", _percent(row["kept_energy"]), f"{row['relative_error']:.2g}"
    return row["layer"], rank, f"{row['alpha']:g}", *figures


def _span(ranks: list[int]) -> str:
    return str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"


def _percent(share: float) -> str:
    """Never 100 % of what is not whole."""
    return "100 %" if share == 1 else f"{min(share * 100, 99.9999):.4g} %"
