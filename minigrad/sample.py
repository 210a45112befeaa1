"""Samples of a flow that scripts/export.py wrote, without torch: python -m minigrad.sample flow.npz n=1000 out=samples.npy

The file holds a network over (state, time features, class row), the noise to start from, and a Runge-Kutta plan.
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np

from common.command_line import front
from common.errors import BROKEN_ARRAYS, UserError, numpy_fault
from common.files import replacing, require
from minigrad.nn import MLP
from minigrad.tensor import Array


def features(flow: dict[str, Array], z: Array, r: float, t: float) -> Array:
    """Return the network's input (N, ...) for states z (N, D) at time r headed to t: both times, their sines, cosines."""
    angles = np.outer([r, t], flow["frequencies"]).ravel()
    times = np.concatenate([[r, t], np.sin(angles), np.cos(angles)])
    return np.concatenate([z, np.broadcast_to(times, (len(z), len(times))), flow["class_rows"][: len(z)]], axis=1)


def samples(flow: dict[str, Array], n: int) -> Array:
    """Return n samples (n, D) in the units of the data, from the first n rows of the noise.

    grid (K + 1,) times; matrix (S, S) and weights (S,) of the Runge-Kutta method; readings (K, S, 4): of each evaluation
    the time of the state, the time it is headed to, and (a, b) by which a z + b output is the velocity.
    """
    network, z = MLP.of_arrays(flow, "the flow"), flow["noise"][:n].astype(np.float64)
    for (start, end), stages in zip(pairwise(flow["grid"]), flow["readings"], strict=True):
        slopes = np.zeros((len(stages), *z.shape))
        for k, (r, t, a, b) in enumerate(stages):
            at = z + (end - start) * np.tensordot(flow["matrix"][k], slopes, 1)
            slopes[k] = a * at + b * network(features(flow, at, r, t)).data
        z = z + (end - start) * np.tensordot(flow["weights"], slopes, 1)
    return flow["mean"] + flow["std"] * z


def carry_out(words: list[str]) -> str:
    """Carry out the command; the line to print. UserError for other words, another file, or more than it has noise for."""
    given = dict(word.split("=", 1) for word in words if word.startswith(("n=", "out=")))
    paths = [word for word in words if not word.startswith(("n=", "out="))]
    if len(paths) != 1 or not given.get("n", "1").isdecimal() or not given.get("out", ".npy").endswith(".npy"):
        raise UserError(f"cannot use {' '.join(words)!r}; give one exported file, n=1000 (1 or more), out=samples.npy")
    require(path := Path(paths[0]), "scripts/export.py writes one")
    try:
        with np.load(path, allow_pickle=False) as file:
            flow = dict(file)
        found = samples(flow, n := int(given.get("n") or len(flow["noise"])))
    except BROKEN_ARRAYS as error:
        raise UserError(f"{path} is no exported flow ({numpy_fault(error)}); scripts/export.py writes one") from None
    if not 1 <= n == len(found):
        raise UserError(f"n={n}, and {path} holds noise for {len(flow['noise'])} samples; give 1 to so many, or export more")
    with replacing(out := Path(given.get("out") or path.with_suffix(".samples.npy"))) as saved:
        np.save(saved, found)
    return f"{out}: {n:,} samples, mean {found.mean(0).round(3)}, standard deviation {found.std(0).round(3)}"


if __name__ == "__main__":
    sys.exit(front(sys.argv[1:] or ["--help"], __doc__, carry_out))
