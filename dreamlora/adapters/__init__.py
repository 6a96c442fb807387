"""Kinds of adapters: one file each, found by name.

A plug-in says what PEFT makes of it:

- ``NAME``: as it is written;
- ``PAIRS``: whether each layer has a pair of factors A and B, which inits and optimizers of pairs work on;
- ``Options``: its own settings, for ``--adapter_args``;
- ``config(scale, targets, options)``: PEFT's config.
"""
