"""Starts of a LoRA: one file each, found by name. Importing one (for its ``Options``) does not import torch.

A plug-in has ``Options`` (frozen dataclass), ``OFFSET`` (whether B₀ A₀ is not zero, so that it is subtracted by
``dreamlora.lora.offset``), ``RANK_MULTIPLE``, and ``starts(targets, options, probe)``, which yields a ``Start`` for
every target (``_start.Target``: an adapted layer and the key of its draws) in order, on any device.

Decompositions go through ``linalg.decomposable``, as torch has not all of them on Apple's GPUs.
"""
