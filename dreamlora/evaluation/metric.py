"""A plug-in of ``metrics/`` as a ``torchmetrics.Metric``; apart from its users: importing torchmetrics takes 0.4 s."""

from __future__ import annotations

from typing import Any

import torch

from dreamlora.interfaces import ImageMetric, MetricInputs, Reading
from dreamlora.metrics._gathered import GatheredRows


class PluginMetric(GatheredRows):
    """``update(places, generated=..., groups=..., with_subject=...)`` and what else the plug-in needs, as
    :class:`MetricInputs` describes it; ``compute`` gives the plug-in's :class:`Reading` of the images of all processes.

    Args:
        plugin: module in ``metrics/``.
        dim: length of the vectors; a process without any must know it too.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(self, plugin: ImageMetric, dim: int, **kwargs: Any) -> None:
        labels = {"groups": torch.zeros(0, dtype=torch.int64), "with_subject": torch.zeros(0, dtype=torch.bool)}
        vectors = {side: torch.zeros(0, dim) for side in ("generated", *sorted(plugin.NEEDS))}
        super().__init__({**labels, **vectors}, **kwargs)
        self._sides = (*labels, *vectors)
        self._compute_plugin = plugin.compute

    def compute(self) -> Reading:
        """The reading.

        Raises:
            ValueError: as the plug-in does, in every process.
        """
        return self._compute_plugin(MetricInputs(**{side: self.rows(side) for side in self._sides}))
