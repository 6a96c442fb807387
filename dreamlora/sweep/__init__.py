"""Optimizers × learning rates × seeds: which runs a comparison needs, and the processes that make them."""
