"""Named loss terms, whatever form an objective returns them in."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from common.contracts import in_words
from common.errors import UserError

LossOutput = Tensor | list[Tensor] | Mapping[str, Tensor]
Weight = float | list[list[float]]  # or its course over the run


def weight_at(name: str, weight: Weight, progress: float) -> float:
    """Return the weight of a term when `progress` in [0, 1] of the run is done: a number, or [[share, weight], ...].

    Between these points it is linear, before the first and after the last one constant. UserError for other points.
    """
    if not isinstance(weight, list):
        return weight
    shares = [point[0] if len(point) == 2 else -1 for point in weight]
    if not shares or shares != sorted(shares) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise UserError(
            f"loss_weights.{name}={weight} is no course over a run; write [[share, weight], ...] with rising shares of the "
            "run from 0 to 1, such as [[0,1],[0.5,0.1]]"
        )
    return float(np.interp(progress, shares, [point[1] for point in weight]))


def named_terms(output: LossOutput, weights: Mapping[str, Weight], progress: float = 1.0) -> dict[str, Tensor]:
    """Return named losses with "loss" the total. One loss is the total; a list becomes term_0, term_1, ...

    The total of a dict without "loss", and of a list, is the sum of its terms times loss_weights (1 unless given), as they
    are when `progress` in [0, 1] of the run is done.
    UserError when a weight names no term, or when it would be ignored because the objective gives its own total.
    """
    if isinstance(output, Tensor):
        output = {"loss": output}
    if not isinstance(output, Mapping | list | tuple):
        raise UserError(
            f'the objective\'s forward returned {in_words(output)}; it must return a dict of named losses, {{"loss": ...}}, '
            "a list of losses, or one loss"
        )
    if not isinstance(output, Mapping):
        output = {f"term_{i}": term for i, term in enumerate(output)}
    terms = dict(output)
    unknown = [name for name in weights if name not in terms or "loss" in terms]
    if unknown:
        raise UserError(
            f"loss_weights.{unknown[0]} weighs nothing: this objective's terms are {', '.join(terms)}"
            + (", already totalled by itself" if "loss" in terms else "")
        )
    shaped = next((name for name, term in terms.items() if not isinstance(term, Tensor) or term.ndim), None)
    if shaped is not None:
        what = f"has shape {list(terms[shaped].shape)}" if isinstance(terms[shaped], Tensor) else f"is {terms[shaped]!r:.60}"
        remedy = "add .mean()" if isinstance(terms[shaped], Tensor) else "leave out .item() or float()"
        raise UserError(f"the objective's {shaped} {what}, and a loss is one number, a tensor without dimensions; {remedy}")
    if "loss" not in terms:
        factors = {name: weight_at(name, weight, progress) for name, weight in weights.items()}
        terms["loss"] = torch.stack([factors.get(name, 1.0) * term for name, term in terms.items()]).sum()
    return terms
