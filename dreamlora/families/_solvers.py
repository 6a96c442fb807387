"""Rectified flows whose pipelines come with a solver that was made for diffusion models."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from dreamlora.interfaces import Classes

FLOW_SOLVERS: Classes = ("diffusers.DPMSolverMultistepScheduler", "diffusers.UniPCMultistepScheduler")
"""Those that take a flow's sigmas ("use_flow_sigmas")."""


def as_flow(scheduler: Any) -> Any:
    """The scheduler itself, or for a solver one of flows with the same sigmas.

    Solvers call a static shift "flow_shift". diffusers' scripts read the file of such a solver as
    FlowMatchEulerDiscreteScheduler, which does not know that name, and so train without shift.
    """
    if "flow_shift" not in scheduler.config:
        return scheduler
    return FlowMatchEulerDiscreteScheduler(scheduler.config.num_train_timesteps, shift=scheduler.config.flow_shift)
