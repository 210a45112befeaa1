"""Small data sets (X, y): points X (n, d) and classes or values y (n,). noise: standard deviation of what is added."""

import numpy as np

from minigrad.tensor import Array


def make_moons(n_samples: int = 100, noise: float = 0.0, seed: int | None = None) -> tuple[Array, Array]:
    """Return two interleaved half circles of radius 1 in the plane, classes 0 and 1."""
    rng, first = np.random.default_rng(seed), n_samples // 2
    angle = np.pi * np.concatenate([np.linspace(0, 1, first), np.linspace(0, 1, n_samples - first)])
    y = (np.arange(n_samples) >= first).astype(np.int64)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.where(y[:, None] == 0, upper, [1.0, 0.5] - upper) + noise * rng.standard_normal((n_samples, 2)), y


def make_circles(
    n_samples: int = 100, noise: float = 0.0, factor: float = 0.8, seed: int | None = None
) -> tuple[Array, Array]:
    """Return a circle of radius 1, class 0, and one of radius `factor` inside it, class 1."""
    rng, first = np.random.default_rng(seed), n_samples // 2
    angle = 2 * np.pi * np.concatenate([np.arange(first) / first, np.arange(n_samples - first) / (n_samples - first)])
    y = (np.arange(n_samples) >= first).astype(np.int64)
    x = np.where(y == 0, 1.0, factor)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return x + noise * rng.standard_normal(x.shape), y


def make_linear_regression(
    n_samples: int = 100, n_features: int = 1, noise: float = 0.0, coef: Array | None = None, seed: int | None = None
) -> tuple[Array, Array]:
    """Return normal X (n, n_features) and y = X coef + noise; coef (n_features,) is drawn from N(0, 1) unless given."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_samples, n_features))
    weights = rng.standard_normal(n_features) if coef is None else np.asarray(coef)
    return x, x @ weights + noise * rng.standard_normal(n_samples)


def make_spirals(
    n_samples: int = 100, n_classes: int = 2, noise: float = 0.0, rotations: float = 1.0, seed: int | None = None
) -> tuple[Array, Array]:
    """Return `n_classes` arms around the origin, radius 0 to 1 over so many rotations, as equal in number as can be."""
    rng, y = np.random.default_rng(seed), np.arange(n_samples) % n_classes
    radius = (np.arange(n_samples) // n_classes + 1) / -(-n_samples // n_classes)
    angle = 2 * np.pi * (rotations * radius + y / n_classes)
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return x + noise * rng.standard_normal(x.shape), y
