"""Metrics of drawn images: one file each, found by name. Importing one does not import torch.

A plug-in has the members of ``interfaces.ImageMetric``.
"""

from __future__ import annotations

from typing import Any

from dreamlora import registry


def by_value() -> dict[str, Any]:
    """The plug-ins by the names of their main values. A run may have values of others, which are not installed here."""
    plugins = (registry.load("metrics", name) for name in registry.names("metrics"))
    return {plugin.NAME: plugin for plugin in plugins}
