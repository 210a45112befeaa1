"""torch's gradients of the objectives without a derivative along the flow, held against the same losses in minigrad."""

import numpy as np
import pytest
import torch

from common.seeds import generator_for
from configuration.compose import compose_config, resolved
from evaluation.parts import build_objective, build_source
from losses.objective import FlowObjective
from minigrad import MLP, Tensor
from scripts.export import network_arrays

ROWS = 64


class Flow:
    """A network's reading (z, r, t) -> u, and the numbers of one batch, in NumPy."""

    def __init__(self, objective: FlowObjective, batch):
        arrays = network_arrays(objective.network)
        self.network, self.frequencies = MLP.of_arrays(arrays, "here"), arrays["frequencies"]
        named = {"z": batch.input, "r": batch.r, "t": batch.t, "v": batch.conditional_velocity}
        named |= {name: getattr(batch, name) for name in ("share", "a") if getattr(batch, name, None) is not None}
        self.numbers = {
            name: value.double().numpy().reshape(len(batch), -1) if name in ("z", "v") else value.double().numpy()[:, None]
            for name, value in named.items()
        }
        self.rows = objective.time_sampler.interval_rows(len(batch))

    def __call__(self, z: np.ndarray, r: np.ndarray, t: np.ndarray) -> Tensor:
        times = np.concatenate([r, t], axis=1)
        angles = (times[:, :, None] * self.frequencies).reshape(len(times), -1)
        return self.network(np.concatenate([z, times, np.sin(angles), np.cos(angles)], axis=1))

    def part(self, intervals: bool) -> dict[str, np.ndarray]:
        return {k: v[: self.rows] if intervals else v[self.rows :] for k, v in self.numbers.items()}


def squared(
    flow: Flow, target: np.ndarray, z: np.ndarray, r: np.ndarray, t: np.ndarray, a: float | np.ndarray = 1.0
) -> Tensor:
    """Return the summed squared error of rows, each over a, as a share of the batch's mean."""
    return (((flow(z, r, t) - target) ** 2) / a).sum() / ROWS


def mse(flow: Flow) -> Tensor:
    n = flow.numbers
    return squared(flow, n["v"], n["z"], n["r"], np.ones_like(n["r"]))


def instants(flow: Flow) -> Tensor:
    n = flow.part(intervals=False)
    return squared(flow, n["v"], n["z"], n["r"], n["r"])


def shortcut(flow: Flow) -> Tensor:
    n, shortest = flow.part(intervals=True), 1 / 128
    d = (n["t"] - n["r"]) / 2
    middle, foot = n["r"] + d, d <= shortest
    first = flow(n["z"], n["r"], np.where(foot, n["r"], middle)).data
    second = flow(n["z"] + d * first, middle, np.where(foot, middle, n["t"])).data
    return squared(flow, (first + second) / 2, n["z"], n["r"], n["t"]) + instants(flow)


def split_meanflow(flow: Flow) -> Tensor:
    n = flow.part(intervals=True)
    s = n["r"] + n["share"] * (n["t"] - n["r"])
    first = flow(n["z"], n["r"], s).data
    second = flow(n["z"] + (s - n["r"]) * first, s, n["t"]).data
    return squared(flow, n["share"] * first + (1 - n["share"]) * second, n["z"], n["r"], n["t"]) + instants(flow)


def alpha_flow(flow: Flow) -> Tensor:
    n = flow.part(intervals=True)
    step = n["a"] * (n["t"] - n["r"])
    later = flow(n["z"] + step * n["v"], n["r"] + step, n["t"]).data
    target = n["a"] * n["v"] + (1 - n["a"]) * later
    return squared(flow, target, n["z"], n["r"], n["t"], n["a"]) + instants(flow)


@pytest.mark.parametrize("loss", [mse, shortcut, split_meanflow, alpha_flow], ids=lambda loss: loss.__name__)
def test_the_gradient_is_that_of_torch(loss):
    words = [f"loss={loss.__name__}", "dataloaders=kmeans", "model.width=16", "model.depth=2"]
    config = resolved(compose_config(["run_name=x", *words]))
    objective = build_objective(config, torch.device("cpu"))
    generator = generator_for(0, "minigrad")
    x1 = 2 * torch.randn(ROWS, 2, generator=generator)
    batch = objective.batch(build_source(config, torch.device("cpu")), x1, None, generator, 0.3)
    theirs = torch.autograd.grad(objective(batch)["loss"], list(objective.network.parameters()))
    flow = Flow(objective, batch)
    assert 0 < flow.rows < ROWS or loss is mse
    loss(flow).backward()
    ours = [p.grad.T if p.grad.ndim == 2 else p.grad for p in flow.network.parameters()]
    size = max(float(g.abs().max()) for g in theirs)
    for own, reference in zip(ours, theirs, strict=True):
        assert np.abs(own - reference.numpy()).max() < 1e-5 * size
