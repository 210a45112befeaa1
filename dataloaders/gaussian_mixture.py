"""Isotropic Gaussian mixtures, and mixtures of regressions on a condition: data whose flow is known in closed form."""

import math
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class ConditionalMixture:
    """Pairs of a condition y = c_k + q_k e and a state x = m_k + a (y - c_k) + s_k e', with k drawn by weight.

    weights, stds s, condition_stds q (K,); means m, condition_means c (K, D); slope a. Given y, x - a y is a mixture of
    components N(m_k - a c_k, s_k^2 I) with weights p(k | y); over all y, x is one of N(m_k, (s_k^2 + a^2 q_k^2) I).
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    condition_means: Tensor
    condition_stds: Tensor
    slope: float

    @property
    def residual(self) -> GaussianMixture:
        """Return the mixture of x - a y, with the weights of no y."""
        return GaussianMixture(self.weights, self.means - self.slope * self.condition_means, self.stds)

    @property
    def conditions(self) -> GaussianMixture:
        """Return the mixture of y."""
        return GaussianMixture(self.weights, self.condition_means, self.condition_stds)

    @property
    def marginal(self) -> GaussianMixture:
        """Return the mixture of x, over all y, as one class."""
        stds = (self.stds.square() + (self.slope * self.condition_stds).square()).sqrt()
        return GaussianMixture(self.weights, self.means, stds)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ConditionalMixture":
        """Return the same law on another device or in another precision."""
        numbers = {name: value.to(device=device, dtype=dtype) for name, value in vars(self).items() if name != "slope"}
        return replace(self, **numbers)

    def chances(self, y: Tensor) -> Tensor:
        """Return p(k | y) (B, K) for conditions y (B, D)."""
        return self.conditions.to(y.device, y.dtype).component_log_probs(y).softmax(1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `count` states and their conditions, (count, D) each, fp32, on the generator's device."""
        conditions, residual = (law.to(generator.device, torch.float32) for law in (self.conditions, self.residual))
        y, k = conditions.sample(count, generator)
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        return self.slope * y + residual.means[k] + residual.stds[k, None] * noise, y
