"""The exact flow of a Gaussian mixture: what every objective and sampler is held against."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dataloaders.gaussian_mixture import GaussianMixture
from evaluation.threads import one_thread
from losses.paths import LinearPath, PathPoint, ProbabilityPath
from solvers.base_solver import Field
from solvers.dopri5 import Dopri5

TOLERANCE = 1e-9  # of the adaptive solver; on kmeans the worst of 10,000 end states is then within 1e-6 of the truth
WIDE = 8  # dimensions from which matrix products save more than differences cost, in float64
NUMBERS = 2**23  # in a chunk's differences
Density = Callable[[Tensor], Tensor]  # states (B, ...) -> log density in nats (B,)


def in_chunks(field: Callable[..., Tensor], most: int, z: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Return field(z, t, label) at states z (N, ...), times t (N,) and labels (N,) or None, `most` of them at once."""
    labels = [None] * len(z) if label is None else label.split(most)
    return torch.cat([field(*part) for part in zip(z.split(most), t.split(most), labels, strict=False)])


def law_to(source: float | GaussianMixture, device: torch.device | str, dtype: torch.dtype) -> float | GaussianMixture:
    """Return the law of the noise from numbers on a device and in a precision."""
    return source.to(device, dtype) if isinstance(source, GaussianMixture) else source


class Pairs:
    """Every pair c = (k, j) of a component of the data and one of the noise, in a row (P): their numbers, and states beside.

    dimensions: of the space, where means have those of a part of it. States are (D, B): the batch comes last.
    """

    def __init__(self, mixture: GaussianMixture, source: float | GaussianMixture, dimensions: int):
        self.dimensions = dimensions
        noise = source if isinstance(source, GaussianMixture) else None
        count = 1 if noise is None else len(noise.weights)
        self.chances = mixture.by_class()
        parts = (mixture.means, mixture.stds)
        self.means, self.stds = (part.repeat_interleave(count, 0) for part in parts)
        self.source_means = None if noise is None else noise.means.to(mixture.means).repeat(len(mixture.weights), 1)
        stds = torch.tensor([source], dtype=torch.float64) if noise is None else noise.stds
        self.source_stds = stds.to(self.stds).repeat(len(mixture.weights))
        self.source_shares = torch.ones(1).to(self.stds) if noise is None else noise.weights.to(self.stds)

    def squared_offsets(self, flat: Tensor, p: PathPoint) -> tuple[Tensor, Tensor | None]:
        """Return |o_c|^2 (P, B) at the states (D, B), and, where states are small, o_c (P, D, B)."""
        # The batch comes last, several times faster than first; differences before squares: no cancellation in float32.
        means, noise = self.means.to(flat), None if self.source_means is None else self.source_means.to(flat)
        if flat.dtype != torch.float64 or len(flat) < WIDE:
            offsets = flat - p.alpha * means[:, :, None]
            offsets = offsets if noise is None else offsets - p.sigma * noise[:, :, None]
            return offsets.square().sum(1), offsets
        products, norms = p.alpha * (means @ flat), p.alpha.square() * means.square().sum(1, keepdim=True)
        if noise is not None:
            products = products + p.sigma * (noise @ flat)
            norms = norms + p.sigma.square() * noise.square().sum(1, keepdim=True)
            norms = norms + 2 * p.alpha * p.sigma * (means * noise).sum(1, keepdim=True)
        return (flat.square().sum(0) - 2 * products + norms).clamp(min=0), None

    def weighted_offsets(self, weight: Tensor, flat: Tensor, offsets: Tensor | None, p: PathPoint) -> Tensor:
        """Return sum_c weight_c o_c (D, B), for weights (P, B)."""
        if offsets is not None:
            return (weight[:, None] * offsets).sum(0)
        total = weight.sum(0) * flat - p.alpha * (self.means.to(flat).T @ weight)
        return total if self.source_means is None else total - p.sigma * (self.source_means.to(flat).T @ weight)

    def log_joint(self, squared: Tensor, p: PathPoint, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return S_c^2 (P, 1 or B) and log(p(c | label) N(z; o_c, S_c^2 I)) (P, B). label: classes (B,), or the weights of
        the data's components (B, K).
        """
        stds, source_stds, chances = (part.to(squared) for part in (self.stds, self.source_stds, self.chances))
        variances = (p.alpha * stds[:, None]).square() + (p.sigma * source_stds[:, None]).square()
        normaliser = 0.5 * self.dimensions * (2 * math.pi * variances).log()
        chosen = chances[-1:] if label is None else label if label.ndim == 2 else chances[label.to(chances.device)]
        weights = (chosen[:, :, None] * self.source_shares.to(squared)).flatten(1).T
        return variances, weights.log() - normaliser - 0.5 * squared / variances


class ExactFlow:
    """Marginal flow of z_t = alpha_t x1 + sigma_t x0, x1 ~ sum_k w_k N(m_k, s_k^2 I), x0 independent of it.

    source: the standard deviation of x0 ~ N(0, s_0^2 I), or the mixture sum_j u_j N(n_j, r_j^2 I) that x0 is drawn from. For
    each pair c = (k, j) of components z_t ~ N(alpha m_k + sigma n_j, S_c^2 I), S_c^2 = alpha^2 s_k^2 + sigma^2 r_j^2, with
    probability w_k u_j, and the velocity E[dz_t/dt | z_t] is, with o_c = z - alpha m_k - sigma n_j,
        v(z, t) = sum_c p(c | z) (alpha' m_k + sigma' n_j + (alpha alpha' s_k^2 + sigma sigma' r_j^2) / S_c^2 o_c).
    Callable as a field. States (B, ...) of any shape with D entries, float32 or float64; times scalar or (B,). label (B,):
    the classes whose data, p(k | class) in the place of w_k, the states lead to; the null label, and None, are all. label
    (B, K): each row's own weights in that place.
    """

    def __init__(
        self, mixture: GaussianMixture, source: float | GaussianMixture, path: ProbabilityPath, dimensions: int | None = None
    ):
        """dimensions: of the space, where these are numbers of a part of it (see `within`)."""
        self.mixture, self.source, self.path = mixture, source, path
        self.dimensions = dimensions or mixture.means.shape[1]
        self.pairs = Pairs(mixture, source, self.dimensions)

    @property
    def source_std(self) -> float:
        """Return the standard deviation of a Gaussian source."""
        assert not isinstance(self.source, GaussianMixture)
        return self.source

    @property
    def plain(self) -> "ExactFlow":
        """Return the flow without guidance, which this one is."""
        return self

    @property
    def key(self) -> dict[str, object]:
        """Return what, besides the data and the path, its flow map depends on, as JSON values."""
        if not isinstance(self.source, GaussianMixture):
            return {"source_std": self.source}
        return {"source": [part.tolist() for part in (self.source.weights, self.source.means, self.source.stds)]}

    def data(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return `count` draws of x1 (count, D), float32, and their labels."""
        return self.mixture.to(dtype=torch.float32).labelled(count, generator)

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` draws of x0 (count, D), float32."""
        if isinstance(self.source, GaussianMixture):
            return self.source.to(dtype=torch.float32).sample(count, generator)[0]
        return self.source * torch.randn(count, self.dimensions, generator=generator)

    def __call__(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return v(z, t), of z's shape. As trained: later than path.last_time it follows the path's own bounded sigma'."""
        most = max(1, NUMBERS // self.pairs.means.numel())
        if len(z) <= most:
            return self.velocity(z, t, label)
        return in_chunks(self.velocity, most, z, t.expand(len(z)), label)

    def velocity(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return v(z, t) of so many states that their differences from all pairs fit."""
        p = self.path.at(t.to(z.device, z.dtype))
        pairs, flat = self.pairs, z.flatten(1).T.contiguous()
        means, stds, source_stds = (part.to(z) for part in (pairs.means, pairs.stds, pairs.source_stds))
        squared, offsets = pairs.squared_offsets(flat, p)
        variances, log_joint = pairs.log_joint(squared, p, label)
        noise_rate = p.sigma * p.sigma_dot * source_stds[:, None].square()
        rate = (p.alpha * p.alpha_dot * stds[:, None].square() + noise_rate) / variances
        share = log_joint.softmax(0)
        moved = p.alpha_dot * (means.T @ share)
        if pairs.source_means is not None:
            moved = moved + p.sigma_dot * (pairs.source_means.to(z).T @ share)
        return (moved + pairs.weighted_offsets(share * rate, flat, offsets, p)).T.reshape(z.shape)

    def log_prob(self, z: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return log p_t(z) in nats: (B,)."""
        p = self.path.at(t.to(z.device, z.dtype))
        squared = self.pairs.squared_offsets(z.flatten(1).T.contiguous(), p)[0]
        return self.pairs.log_joint(squared, p, label)[1].logsumexp(0)

    @torch.no_grad()
    def flow_map(self, z: Tensor, r: float, t: float, label: Tensor | None = None) -> Tensor:
        """Return X(z, r, t): where the flow carries the states z (B, ...) of time r by time t, of z's dtype and device.

        One pair: its mean at t and S(t) / S(r) times the offset at r. More: integrated in float64 on the CPU along the
        linear path, where sigma' is bounded; see `carried`.
        """
        times = torch.tensor([r, t], dtype=torch.float64)
        states = z.detach().to("cpu", torch.float64)
        label = None if label is None else label.cpu()
        end = self.scaled(states, times) if len(self.pairs.means) == 1 else self.integrated(states, times, label)
        return end.to(z.device, z.dtype)

    def scaled(self, z: Tensor, times: Tensor) -> Tensor:
        """Return the flow map between the two times for a single pair."""
        p, pairs = self.path.at(times), self.pairs
        means, stds, source_stds = (part.to("cpu", torch.float64) for part in (pairs.means, pairs.stds, pairs.source_stds))
        std = ((p.alpha * stds).square() + (p.sigma * source_stds).square()).sqrt()
        mean = p.alpha[:, None] * means[0]
        if pairs.source_means is not None:
            mean = mean + p.sigma[:, None] * pairs.source_means[0].to(mean)
        first, last = mean.reshape(2, *z.shape[1:])
        return last + std[1] / std[0] * (z - first)

    def integrated(self, z: Tensor, times: Tensor, label: Tensor | None) -> Tensor:
        """Return the flow map between the two times for several pairs."""
        part = Part(z, [linear(self)])
        (flow,) = part.flows
        return part.back(carried(lambda states, t: flow(states, t, label), part.states, self.path, times))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "ExactFlow":
        """Return the same flow from numbers on a device and in a precision, for many calls with states of that kind."""
        return ExactFlow(self.mixture.to(device, dtype), law_to(self.source, device, dtype), self.path)

    def within(self, basis: Tensor) -> "ExactFlow":
        """Return the flow of coordinates along basis (D, R), which spans the means, and of the length of the rest."""

        def seen(law: GaussianMixture) -> GaussianMixture:
            means = torch.nn.functional.pad(law.means @ basis, (0, 1))
            return GaussianMixture(law.weights, means, law.stds, law.classes)

        source = seen(self.source) if isinstance(self.source, GaussianMixture) else self.source
        return ExactFlow(seen(self.mixture), source, self.path, self.dimensions)

    def of_class(self, label: int) -> "ExactFlow":
        """Return the flow to the data of one class."""
        return ExactFlow(self.mixture.of_class(label), self.source, self.path)

    def end_log_prob(self, x: Tensor, label: Tensor | None, source_log_prob: Density) -> Tensor:
        """Return log p_1(x) in nats of data x (B, ...), float64 on the CPU: (B,)."""
        if label is None:
            return self.mixture.log_prob(x)
        return self.log_prob(x, torch.ones(1, dtype=x.dtype), label)


class Part:
    """Flows and states (B, ...) in as few dimensions as the means span, and one: exact, and quicker where states are wide.

    What of a state is orthogonal to every mean keeps its direction, and its length stands for it: v of it is along it.
    """

    def __init__(self, z: Tensor, flows: list[ExactFlow]):
        flat = z.flatten(1)
        pairs = [flow.pairs for flow in flows]
        means = torch.cat([part for one in pairs for part in (one.means, one.source_means) if part is not None])
        _, sizes, rows = torch.linalg.svd(means, full_matrices=False)
        self.basis, self.shape = rows[sizes > 1e-12 * sizes.max()].T, z.shape
        self.is_whole = len(self.basis) < WIDE or self.basis.shape[1] + 1 >= len(self.basis)
        inside = flat @ self.basis
        self.left = flat - inside @ self.basis.T
        self.length = self.left.norm(dim=1, keepdim=True)
        self.states = z if self.is_whole else torch.cat([inside, self.length], 1)
        self.flows = flows if self.is_whole else [flow.within(self.basis) for flow in flows]

    def back(self, states: Tensor) -> Tensor:
        """Return states of the part (B, R + 1) as states of the space (B, ...)."""
        if self.is_whole:
            return states
        left = states[:, -1:] / self.length.clamp(min=1e-300) * self.left
        return (states[:, :-1] @ self.basis.T + left).reshape(self.shape)


def linear(flow: ExactFlow) -> ExactFlow:
    """Return the flow of the same data and source along the linear path, in float64 on the CPU."""
    flow = flow.to("cpu", torch.float64)
    return ExactFlow(flow.mixture, flow.source, LinearPath())


def carried(field: Field, z: Tensor, path: ProbabilityPath, times: Tensor) -> Tensor:
    """Return the states that z (B, ...), float64, of the first time is carried to by the second, along `path`.

    field: that along the linear path. Every path is that one in its own clock: z / (alpha + sigma) at
    alpha / (alpha + sigma).
    """
    p = path.at(times)
    scale = p.alpha + p.sigma
    with one_thread():
        end = Dopri5(rtol=TOLERANCE, atol=TOLERANCE).solve(field, z / scale[0], p.alpha / scale)
    return scale[1] * end
