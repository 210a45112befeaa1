"""The exact flow to data beside a condition."""

import torch
from torch import Tensor

from dataloaders.gaussian_mixture import ConditionalMixture, GaussianMixture
from evaluation.closed_forms import Density, ExactFlow, law_to
from losses.paths import ProbabilityPath
from models.inputs import join_condition


class ConditionalFlow:
    """The flow to p(x | y) of a ConditionalMixture, y in labels (B, 2 + D) as join_condition makes them; of a hidden y, and
    of None, that to all data.

    Given y, x - a y is a mixture with the weights p(k | y), whose flow v' is known, and
        v(z, t | y) = v'(z - alpha a y, t) + alpha' a y,      X(z, r, t | y) = X'(z - alpha_r a y, r, t) + alpha_t a y.
    Callable as a field, as ExactFlow is.
    """

    def __init__(self, law: ConditionalMixture, source: float | GaussianMixture, path: ProbabilityPath):
        self.law, self.source, self.path = law, source, path
        self.residual, self.all = ExactFlow(law.residual, source, path), ExactFlow(law.marginal, source, path)

    @property
    def plain(self) -> "ConditionalFlow":
        """Return the flow without guidance, which this one is."""
        return self

    @property
    def key(self) -> dict[str, object]:
        """Return what, besides the data and the path, its flow map depends on, as JSON values."""
        return self.all.key | {"conditional": True}

    def data(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `count` draws of x1 (count, D), float32, and their labels."""
        x, y = self.law.sample(count, generator)
        return x, join_condition(None, y)

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        return self.all.noise(count, generator)

    def __call__(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return v(z, t), of z's shape."""
        if label is None:
            return self.all(z, t)
        p = self.path.at(t.to(z.device, z.dtype).expand(len(z)))
        moved, chances = self.read(z, label)
        own = self.residual(z - p.alpha[:, None] * moved, t, chances) + p.alpha_dot[:, None] * moved
        return torch.where(label[:, 1:2] > 0, own, self.all(z, t))

    def read(self, z: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return a y (B, D) and p(k | y) (B, K) of labels, as z is."""
        y = label[:, 2:].to(z)
        return self.law.slope * y, self.law.chances(y)

    def flow_map(self, z: Tensor, r: float, t: float, label: Tensor | None = None) -> Tensor:
        """Return X(z, r, t), as ExactFlow does."""
        if label is None:
            return self.all.flow_map(z, r, t)
        p = self.path.at(torch.tensor([r, t], dtype=torch.float64))
        states = z.detach().to("cpu", torch.float64)
        moved, chances = self.read(states, label)
        own = self.residual.flow_map(states - p.alpha[0] * moved, r, t, chances) + p.alpha[1] * moved
        hidden = label[:, 1].cpu() == 0
        own[hidden] = self.all.flow_map(states[hidden], r, t) if hidden.any() else states[hidden]
        return own.to(z.device, z.dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "ConditionalFlow":
        """Return the same flow from numbers on a device and in a precision."""
        return ConditionalFlow(self.law.to(device, dtype), law_to(self.source, device, dtype), self.path)

    def end_log_prob(self, x: Tensor, label: Tensor | None, source_log_prob: Density) -> Tensor:
        """Return log p(x | y) in nats of data x (B, D), float64 on the CPU: (B,); no y is to be hidden."""
        one = torch.ones(1, dtype=x.dtype)
        if label is None:
            return self.all.log_prob(x, one)
        moved, chances = self.read(x, label)
        return self.residual.log_prob(x - moved, one, chances)
