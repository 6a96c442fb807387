"""How the embedded weights were made: one file per stage, run by `python tools/pretrain.py`."""
