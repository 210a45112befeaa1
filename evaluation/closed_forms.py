"""The exact flow of a Gaussian mixture: what every objective and sampler is held against."""

import math

import torch
from torch import Tensor

from dataloaders.gaussian_mixture import GaussianMixture
from evaluation.threads import one_thread
from losses.paths import LinearPath, PathPoint, ProbabilityPath
from solvers.dopri5 import Dopri5

TOLERANCE = 1e-9  # of the adaptive solver; on kmeans the worst of 10,000 end states is then within 1e-6 of the truth


class ExactFlow:
    """Marginal flow of z_t = alpha_t x1 + sigma_t x0, x1 ~ sum_k w_k N(m_k, s_k^2 I) and x0 ~ N(0, s_0^2 I) independent.

    z_t is the mixture of N(alpha m_k, S_k^2 I), S_k^2 = alpha^2 s_k^2 + sigma^2 s_0^2, and its velocity E[dz_t/dt | z_t] is
        v(z, t) = sum_k p(k | z) (alpha' m_k + (alpha alpha' s_k^2 + sigma sigma' s_0^2) / S_k^2 (z - alpha m_k)).
    Callable as a field. States (B, ...) of any shape with D entries, float32 or float64; times scalar or (B,).
    """

    def __init__(self, mixture: GaussianMixture, source_std: float, path: ProbabilityPath):
        self.mixture, self.source_std, self.path = mixture, source_std, path

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        """Return v(z, t), of z's shape. As trained: later than path.last_time it follows the path's own bounded sigma'."""
        mixture = self.mixture.to(z.device, z.dtype)
        p = self.path.at(t.to(z.device, z.dtype))
        offsets, variances, log_joint = self.components(z, p)
        noise_rate = p.sigma * p.sigma_dot * self.source_std**2
        rate = (p.alpha * p.alpha_dot * mixture.stds[:, None].square() + noise_rate) / variances
        share = log_joint.softmax(0)
        flat = p.alpha_dot * (mixture.means.T @ share) + ((share * rate)[:, None] * offsets).sum(0)
        return flat.T.reshape(z.shape)

    def log_prob(self, z: Tensor, t: Tensor) -> Tensor:
        """Return log p_t(z) in nats: (B,)."""
        return self.components(z, self.path.at(t.to(z.device, z.dtype)))[2].logsumexp(0)

    def components(self, z: Tensor, p: PathPoint) -> tuple[Tensor, Tensor, Tensor]:
        """Return z - alpha m_k (K, D, B), S_k^2 (K, 1 or B) and log(w_k N(z; alpha m_k, S_k^2 I)) (K, B)."""
        # The batch comes last, several times faster than first; differences before squares: no cancellation in float32.
        mixture = self.mixture.to(z.device, z.dtype)
        offsets = z.flatten(1).T.contiguous() - p.alpha * mixture.means[:, :, None]
        variances = (p.alpha * mixture.stds[:, None]).square() + (p.sigma * self.source_std).square()
        squared = offsets.square().sum(1)
        normaliser = 0.5 * mixture.means.shape[1] * (2 * math.pi * variances).log()
        return offsets, variances, mixture.weights.log()[:, None] - normaliser - 0.5 * squared / variances

    @torch.no_grad()
    def flow_map(self, z: Tensor, r: float, t: float) -> Tensor:
        """Return X(z, r, t): where the flow carries the states z (B, ...) of time r by time t, of z's dtype and device.

        One component: alpha_t m + S(t) / S(r) (z - alpha_r m). More: integrated in float64 on the CPU along the linear path,
        where sigma' is bounded; every path is that one in its own clock, z / (alpha + sigma) at alpha / (alpha + sigma).
        """
        times = torch.tensor([r, t], dtype=torch.float64)
        states = z.detach().to("cpu", torch.float64)
        end = self.scaled(states, times) if len(self.mixture.weights) == 1 else self.integrated(states, times)
        return end.to(z.device, z.dtype)

    def scaled(self, z: Tensor, times: Tensor) -> Tensor:
        """Return the flow map between the two times for a single component."""
        mixture = self.mixture.to("cpu", torch.float64)
        p = self.path.at(times)
        std = ((p.alpha * mixture.stds).square() + (p.sigma * self.source_std).square()).sqrt()
        mean = mixture.means[0].reshape(z.shape[1:])
        return p.alpha[1] * mean + std[1] / std[0] * (z - p.alpha[0] * mean)

    def integrated(self, z: Tensor, times: Tensor) -> Tensor:
        """Return the flow map between the two times for several components."""
        p = self.path.at(times)
        scale = p.alpha + p.sigma
        linear = ExactFlow(self.mixture.to("cpu", torch.float64), self.source_std, LinearPath())
        with one_thread():
            end = Dopri5(rtol=TOLERANCE, atol=TOLERANCE).solve(linear, z / scale[0], p.alpha / scale)
        return scale[1] * end
