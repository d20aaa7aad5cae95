"""Networks by name, between rows and images: the one place where a shape decides what a network is made of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from anomalib_gen.networks.convolution import ConvDecoder, ConvNet
from anomalib_gen.networks.mlp import MLP
from anomalib_gen.networks.resnet import ResidualMLP
from anomalib_gen.networks.unet import UNet

NETWORKS = ("auto", "convolutional", "mlp", "residual")
"""Names that `make_network` knows."""
MIN_CHANNELS = 8
CHANNELS_PER_FEATURE = {"unet": 1 / 16, "other": 1 / 8}
"""Channels of the finest maps, of each hidden feature that a network of rows would have."""

Shape = int | tuple[int, ...]
"""Width of a row, or ``(channels, height, width)`` of an image."""


def build_network(factory: Callable[..., Any], *sizes: Any, argument: str = "network") -> nn.Module:
    """Call a user's factory and see that it made a network.

    Parameters
    ----------
    factory : callable
        ``factory(*sizes) -> torch.nn.Module``.
    *sizes : Any
    argument : str, default="network"
        The argument that the factory came as, for messages.

    Raises
    ------
    TypeError
        If it is a network itself, which every fit would train further, does not take the sizes, or makes none.
    """
    if isinstance(factory, nn.Module):
        raise TypeError(
            f"{argument} must be a function that makes a network, got the network {type(factory).__name__}(...). "
            "Write it as a function of the sizes: each fit starts from a new one."
        )
    try:
        inspect.signature(factory).bind(*sizes)
    except TypeError as error:
        given = ", ".join(map(str, sizes))
        raise TypeError(
            f"{argument} is called with the sizes ({given}) and does not take them: {error}."
        ) from error
    except ValueError:  # callables written in C have no signature to look at
        pass
    network = factory(*sizes)
    if not isinstance(network, nn.Module):
        raise TypeError(f"{argument} must make a torch.nn.Module, and made a {type(network).__name__}.")
    return network


class Reshaped(nn.Module):
    """A network of rows for images: they are flattened, and what comes out is folded."""

    def __init__(self, network: nn.Module, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.output_shape = output_shape

    def forward(self, x: torch.Tensor, *context: torch.Tensor | None) -> torch.Tensor:
        """Map ``(B, *E)`` to ``(B, *output_shape)``."""
        return self.network(x.flatten(1), *context).reshape(-1, *self.output_shape)


def make_network(
    inputs: Shape,
    outputs: Shape,
    *,
    kind: str = "auto",
    hidden_features: int = 128,
    n_blocks: int = 1,
    context_features: int = 0,
    spectral_norm: float | None = None,
    zero_output: bool = True,
) -> nn.Module:
    """Build a network from rows or images to rows or images.

    Parameters
    ----------
    inputs, outputs : int or tuple of int
        Width of a row, or ``(channels, height, width)`` of an image. Images in and out have the same height and width.
    kind : {"auto", "residual", "mlp", "convolutional"}, default="auto"
        "residual" is a `ResidualMLP` and "mlp" an `MLP`, which see images as rows of pixels. "convolutional", for
        images only, is a `UNet` from images to images, a `ConvNet` from images to rows and a `ConvDecoder` from rows to
        images. "auto" takes "convolutional" for images and "residual" for rows.
    hidden_features : int, default=128
        Width of the hidden layers. Convolutional networks have an eighth of it as channels at the finest level, a
        U-Net, which has the most layers, a sixteenth; but at least 8.
    n_blocks : int, default=1
        Residual blocks, a level where there are levels; hidden layers of the "mlp".
    context_features : int, default=0
        Width of the conditioning vector; 0 means none.
    spectral_norm : float, optional
        Bound on the norm of every layer; None for no bound.
    zero_output : bool, default=True
        Start with an output that is zero everywhere.

    Returns
    -------
    module
        ``forward(x: (B, *inputs)[, context: (B, context_features)]) -> (B, *outputs)``.

    Raises
    ------
    ValueError
        If the kind is unknown, or does not suit the shapes.
    """
    if kind not in NETWORKS:
        raise ValueError(f"network={kind!r} is unknown. Known: {', '.join(map(repr, NETWORKS))}.")
    images = [not isinstance(shape, int) and len(shape) == 3 for shape in (inputs, outputs)]
    if kind == "auto":
        kind = "convolutional" if any(images) else "residual"
    if kind == "convolutional":
        if not any(images):
            raise ValueError(
                "network='convolutional' is for images of shape (n, channels, height, width); "
                "rows of columns have no neighbours. Choose 'residual' or 'mlp'."
            )
        share = CHANNELS_PER_FEATURE["unet" if all(images) else "other"]
        channels = max(MIN_CHANNELS, round(share * hidden_features))
        shared = {"channels": channels, "n_blocks": n_blocks, "zero_output": zero_output}
        if isinstance(inputs, int):
            assert not isinstance(outputs, int)
            return ConvDecoder(inputs, outputs, **shared)  # type: ignore[arg-type]
        if isinstance(outputs, int):
            return ConvNet(
                inputs,
                outputs,
                context_features=context_features,
                spectral_norm=spectral_norm,
                **shared,  # type: ignore[arg-type]
            )
        return UNet(inputs, outputs[0], context_features=context_features, **shared)  # type: ignore[arg-type]
    n_inputs, n_outputs = (
        shape if isinstance(shape, int) else math.prod(shape) for shape in (inputs, outputs)
    )
    sizes = {
        "hidden_features": hidden_features,
        "context_features": context_features,
        "spectral_norm": spectral_norm,
        "zero_output": zero_output,
    }
    network: nn.Module
    if kind == "mlp":
        network = MLP(n_inputs, n_outputs, n_layers=n_blocks, **sizes)  # type: ignore[arg-type]
    else:
        network = ResidualMLP(n_inputs, n_outputs, n_blocks=n_blocks, **sizes)  # type: ignore[arg-type]
    if not any(images):
        return network
    return Reshaped(network, (outputs,) if isinstance(outputs, int) else outputs)
