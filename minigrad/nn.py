"""Fully connected layers, alone and in a row, saved as .npz."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from minigrad.tensor import Array, Tensor

ACTIVATIONS = ("linear", "relu", "sigmoid", "silu", "softmax", "tanh")
RNG = np.random.default_rng()


class Layer:
    """Compute activation(x W + b) of rows x (N, nin): (N, nout).

    weight W (nin, nout) is drawn from N(0, 2 / (nin + nout)) (Glorot & Bengio 2010), bias b (nout,) is zero at first.
    activation: linear, relu, sigmoid, silu, softmax or tanh. rng: where the weights are drawn from.
    ValueError for another activation.
    """

    def __init__(self, nin: int, nout: int, activation: str = "linear", rng: np.random.Generator = RNG):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown; use {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.weight = Tensor(rng.standard_normal((nin, nout)) * np.sqrt(2 / (nin + nout)))
        self.bias = Tensor(np.zeros(nout))

    def __call__(self, x: Tensor | Array) -> Tensor:
        summed = Tensor.of(x) @ self.weight + self.bias
        return summed if self.activation == "linear" else getattr(summed, self.activation)()

    def parameters(self) -> list[Tensor]:
        return [self.weight, self.bias]


class MLP:
    """Layers in a row: nin numbers a row to nouts[0], to nouts[1], ...

    activation: of every layer but the last, which is linear; or a list, one for each layer. seed: of the weights.
    ValueError for a list of another length, or no layers.
    """

    def __init__(self, nin: int, nouts: list[int], activation: str | list[str] = "tanh", seed: int | None = None):
        each = [activation] * (len(nouts) - 1) + ["linear"] if isinstance(activation, str) else activation
        if not nouts or len(each) != len(nouts):
            raise ValueError(f"{len(nouts)} layers need as many activations, at least one, not {len(each)}")
        rng = np.random.default_rng(seed)
        sizes = zip(pairwise([nin, *nouts]), each, strict=True)
        self.layers = [Layer(before, after, name, rng) for (before, after), name in sizes]

    def __call__(self, x: Tensor | Array) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return Tensor.of(x)

    def parameters(self) -> list[Tensor]:
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        for parameter in self.parameters():
            parameter.grad = np.zeros_like(parameter.data)

    def arrays(self) -> dict[str, Array]:
        """Return weights, sizes and activations as a .npz holds them."""
        sizes = [self.layers[0].weight.shape[0], *(layer.weight.shape[1] for layer in self.layers)]
        named = {"sizes": np.array(sizes), "activations": np.array([layer.activation for layer in self.layers])}
        for index, layer in enumerate(self.layers):
            named |= {f"weight_{index}": layer.weight.data, f"bias_{index}": layer.bias.data}
        return named

    def save(self, path: str | Path) -> None:
        """Write the network without its gradients; .npz is added to a path without it."""
        np.savez_compressed(f"{str(path).removesuffix('.npz')}.npz", **self.arrays())  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> MLP:
        """Return a saved network, ready to be trained on. ValueError for a file that holds none, or is none."""
        if not (place := Path(f"{str(path).removesuffix('.npz')}.npz")).is_file():
            raise ValueError(f"there is no file {place}")
        with np.load(place, allow_pickle=False) as file:
            return cls.of_arrays(file, str(path))

    @classmethod
    def of_arrays(cls, named: Any, origin: str) -> MLP:
        """Return the network of arrays as arrays() gives them. ValueError, naming their origin, where they are not those."""
        if "sizes" not in named or "activations" not in named:
            raise ValueError(f"{origin} holds no network: the arrays sizes and activations are needed")
        nin, *nouts = (int(size) for size in named["sizes"])
        network = cls(nin, nouts, [str(name) for name in named["activations"]])
        for index, layer in enumerate(network.layers):
            for name, parameter in (("weight", layer.weight), ("bias", layer.bias)):
                stored = named[f"{name}_{index}"] if f"{name}_{index}" in named else np.zeros(())
                if stored.shape != parameter.shape:
                    raise ValueError(f"{origin}: {name}_{index} has shape {stored.shape}, not {parameter.shape}")
                parameter.data, parameter.grad = stored, np.zeros_like(stored)
        return network
