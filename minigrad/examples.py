"""Five examples, in seconds: python -m minigrad.examples"""

import tempfile
from collections.abc import Callable

import numpy as np

from minigrad import MLP, Tensor, make_linear_regression, make_moons, make_spirals
from minigrad.tensor import Array


def cross_entropy(scores: Tensor, y: Array) -> Tensor:
    """Return -mean log p(y) of rows of scores (N, C) for classes y (N,)."""
    return -((scores.softmax() * np.eye(scores.shape[1])[y]).sum(axis=1) + 1e-12).log().mean()


def fit(network: MLP, loss: Callable[[Tensor, Array], Tensor], x: Array, y: Array, steps: int, rate: float) -> MLP:
    """Return the network after so many steps of gradient descent with momentum .9."""
    speed = [np.zeros_like(parameter.data) for parameter in network.parameters()]
    for _ in range(steps):
        network.zero_grad()
        loss(network(x), y).backward()
        for v, parameter in zip(speed, network.parameters(), strict=True):
            v += -0.1 * v - rate * parameter.grad
            parameter.data = parameter.data + v
    return network


def accuracy(network: MLP, x: Array, y: Array) -> float:
    return float((network(x).data.argmax(axis=1) == y).mean())


def xor() -> float:
    """XOR: share of its 4 cases that are right"""
    x, y = np.array([[0.0, 0], [0, 1], [1, 0], [1, 1]]), np.array([0, 1, 1, 0])
    return accuracy(fit(MLP(2, [4, 2], seed=0), cross_entropy, x, y, 500, 0.3), x, y)


def moons() -> float:
    """moons, 40 points: accuracy on 400 others"""
    network = fit(MLP(2, [16, 2], seed=0), cross_entropy, *make_moons(40, noise=0.1, seed=0), 500, 0.3)
    return accuracy(network, *make_moons(400, noise=0.1, seed=1))


def linear_regression() -> float:
    """linear regression, 50 points with noise .01: largest error of 3 coefficients"""
    coef, error = np.array([2.0, -1.0, 0.5]), lambda found, y: ((found - y[:, None]) ** 2).mean()
    network = fit(MLP(3, [1], seed=0), error, *make_linear_regression(50, 3, 0.01, coef, seed=0), 300, 0.1)
    return float(np.abs(network.layers[0].weight.data[:, 0] - coef).max())


def save_and_load() -> float:
    """save and load: how far a network that was saved, loaded and trained on is from one never saved"""
    (x, y), network = make_moons(40, noise=0.1, seed=0), MLP(2, [16, 2], seed=0)
    with tempfile.TemporaryDirectory() as folder:
        fit(network, cross_entropy, x, y, 50, 0.3).save(f"{folder}/moons")
        pair = [fit(each, cross_entropy, x, y, 50, 0.3)(x).data for each in (network, MLP.load(f"{folder}/moons"))]
    return float(np.abs(pair[0] - pair[1]).max())


def spirals() -> float:
    """spirals of 5 arms: accuracy on 500 other points of the best of 12 checkpoints"""
    (x, y), held_out = make_spirals(500, 5, 0.01, seed=0), make_spirals(500, 5, 0.01, seed=1)
    network = MLP(2, [32, 32, 5], seed=0)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(12):
            fit(network, cross_entropy, x, y, 250, 0.1).save(f"{folder}/{index}")
        return max(accuracy(MLP.load(f"{folder}/{index}"), *held_out) for index in range(12))


if __name__ == "__main__":
    for example in (xor, moons, linear_regression, save_and_load, spirals):
        print(f"{example.__doc__}: {example():.4g}")
