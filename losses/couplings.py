"""Who is paired with whom: the joint distribution of noise x0 and data x1 within a batch."""

from abc import ABC, abstractmethod

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Pairs = tuple[Tensor, Tensor, Tensor | None]


class Coupling(ABC):
    """Pairs a batch of noise with a batch of data."""

    @abstractmethod
    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        """x0, x1 (B, ...) and label (B,) reordered into pairs; a label stays with its x1. No row is lost or repeated."""


class IndependentCoupling(Coupling):
    """Noise and data as they come."""

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        return x0, x1, label


class MinibatchOTCoupling(Coupling):
    """Exact optimal transport within the batch: the assignment of least total squared distance (Tong et al. 2023,
    arXiv 2302.00482; Pooladian et al. 2023). Without replacement, and deterministic: it needs no randomness of its own.
    """

    def pair(self, x0: Tensor, x1: Tensor, label: Tensor | None, generator: torch.Generator) -> Pairs:
        cost = torch.cdist(x0.flatten(1), x1.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").square()
        partner = torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(x1.device)
        return x0, x1[partner], None if label is None else label[partner]
