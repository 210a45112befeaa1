"""Named loss terms, whatever form an objective returns them in."""

from collections.abc import Mapping

import torch
from torch import Tensor

from common.contracts import in_words
from common.errors import UserError

LossOutput = Tensor | list[Tensor] | Mapping[str, Tensor]


def named_terms(output: LossOutput, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return named losses with "loss" the total. One loss is the total; a list becomes term_0, term_1, ...

    The total of a dict without "loss", and of a list, is the sum of its terms times loss_weights (1 unless given).
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
        terms["loss"] = torch.stack([weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
    return terms
