"""Fine-tune text-to-image diffusion models with LoRA; see every step, measure every step.

Importing the package loads nothing else: ``dreamlora.optimizers`` needs torch alone, and
``dreamlora --help`` not even that.
"""

__version__ = "0.1.0"
