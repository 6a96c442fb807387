"""Training objectives as pure functions: the times, the corruption, the target of the prediction and its weight.

Latents and noise are ``[B, C, h, w]``, times and weights ``[B]``. Nothing here draws a random number: times come from
uniform numbers that the caller draws (``randomness``).
"""

from dreamlora.objectives.diffusion import Diffusion
from dreamlora.objectives.flow import RectifiedFlow
from dreamlora.objectives.losses import TrainingLoss, squared_errors, training_loss

__all__ = ["Diffusion", "RectifiedFlow", "TrainingLoss", "squared_errors", "training_loss"]
