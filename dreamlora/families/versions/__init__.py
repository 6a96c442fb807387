"""The published models of a family, one file each, as far as the sizes of their layers tell them from others; no torch.

Each has ``VERSIONS``: ``lora.recognise.Version`` of all that were published. Source: the ``config.json`` of each, with
which diffusers' class makes layers of these sizes.
"""
