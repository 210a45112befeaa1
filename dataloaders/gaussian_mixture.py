"""Isotropic Gaussian mixtures: the data whose flow is known in closed form."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianMixture:
    """sum_k w_k N(m_k, s_k^2 I). weights (K,), means (K, D), stds (K,); one component is a plain Gaussian.

    classes (K,): the class that each component belongs to; None: each is a class.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    classes: Tensor | None = None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "GaussianMixture":
        """Return the same mixture on another device or in another precision."""
        weights, means, stds = (p.to(device=device, dtype=dtype) for p in (self.weights, self.means, self.stds))
        return GaussianMixture(weights, means, stds, None if self.classes is None else self.classes.to(device))

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `count` draws (count, D) and the components (count,) they came from."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        size = (count, self.means.shape[1])
        noise = torch.randn(size, generator=generator, device=self.means.device, dtype=self.means.dtype)
        mean, std = self.means.index_select(0, component), self.stds.index_select(0, component)
        return mean.addcmul_(std[:, None], noise), component

    def labelled(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `count` draws (count, D) and their classes (count,)."""
        x, component = self.sample(count, generator)
        return x, component if self.classes is None else self.classes[component]

    def of_class(self, label: int) -> "GaussianMixture":
        """Return the mixture of one class's components, in itself a single class."""
        chances = self.by_class()[label]
        kept = chances > 0
        return GaussianMixture(chances[kept], self.means[kept], self.stds[kept], kept.new_zeros(int(kept.sum())).long())

    def by_class(self) -> Tensor:
        """Return p(component | class) (C + 1, K); the last row, that of the null label C, is of all classes."""
        classes = torch.arange(len(self.weights)).to(self.weights.device) if self.classes is None else self.classes
        joint = torch.nn.functional.one_hot(classes).T * self.weights
        return torch.cat([joint / joint.sum(1, keepdim=True), self.weights[None]])

    def component_log_probs(self, x: Tensor) -> Tensor:
        """Return log(w_k N(x; m_k, s_k^2 I)) for x (B, D): (B, K)."""
        squared = (x[:, None, :] - self.means).square().sum(-1)
        dim = self.means.shape[1]
        normaliser = dim * (self.stds.log() + 0.5 * math.log(2 * math.pi))
        return self.weights.log() - normaliser - 0.5 * squared / self.stds.square()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats at x (B, D): (B,)."""
        return self.component_log_probs(x).logsumexp(dim=1)
