"""Training steps as CUDA graphs: recorded once, replayed as often as needed.

Steps of small networks take longer to launch, kernel by kernel, than to compute. A step that does the same every time,
whatever the values, can be recorded; a replay is one launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def is_recordable(objective: Any) -> bool:
    """Whether an objective does the same at every step, so that one can be recorded and replayed.

    Its own class has to say so by a true ``recordable``: what it inherits or hands on was said of another step.
    """
    return "recordable" in vars(type(objective)) and bool(objective.recordable)


class RecordedStep:
    """Loss and gradient of a batch as a CUDA graph.

    Parameters
    ----------
    gradient : callable
        ``gradient(x, weights) -> loss``; leaves the gradient where the parameters keep it.
    x : Tensor of shape (B, *E)
        A batch on the device; those that follow have its shape.
    weights : Tensor of shape (B,) or None
    generator : torch.Generator
        What the objective draws from. Replays go on in it where other draws have left it.

    Raises
    ------
    RuntimeError
        If a step does what cannot be recorded, such as looking at a value. The generator is unusable then; the
        thread's current device and stream, and the device's global generator, are what they were.
    """

    def __init__(
        self,
        gradient: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        x: torch.Tensor,
        weights: torch.Tensor | None,
        generator: torch.Generator,
    ) -> None:
        self.x, self.weights = x.clone(), None if weights is None else weights.clone()
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)
        device = x.device
        common = torch.cuda.default_generators[device.index]
        kept = common.clone_state()
        try:
            with (
                # What runs on another device than the stream's is no part of a recording.
                torch.cuda.device(device),
                # If one fails, torch leaves its stream the current one.
                torch.cuda.stream(torch.cuda.current_stream(device)),
                # Other threads of the process may go on using the device meanwhile.
                torch.cuda.graph(
                    self.graph, stream=_recording_stream(device), capture_error_mode="thread_local"
                ),
            ):
                self.loss = gradient(self.x, self.weights)
        except BaseException:
            # The state that a failed recording leaves takes every later draw for a part of it.
            common.graphsafe_set_state(kept)
            raise

    def __call__(self, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        self.x.copy_(x)
        if self.weights is not None and weights is not None:
            self.weights.copy_(weights)
        self.graph.replay()
        return self.loss.clone()


def can_record(device: torch.device) -> bool:
    """Whether steps can be recorded on a device.

    2.11 is the oldest torch that it was tried with, failures among it.
    """
    return device.type == "cuda" and torch.__version__ >= "2.11"


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Stream on which steps are recorded: one a device, as libraries keep memory for each that they have met."""
    return torch.cuda.Stream(device)
