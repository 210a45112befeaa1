"""How much of finite data a network has learned by heart: its velocity beside the exact flow of its training rows."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from common.device import full_products
from common.ranges import Count, CountOr0
from common.seeds import generator_for
from dataloaders.base_dataloaders import FlowDataset, Moments
from dataloaders.sources import Source
from dataloaders.tensor_dataset import TensorDataset
from evaluation.closed_forms import in_chunks
from evaluation.empirical_flow import DrawnFlow, EmpiricalFlow
from evaluation.generate import states_at_once
from evaluation.metrics.base_metric import Absent, Generation, LongMetric, Score
from evaluation.metrics.nearest import count_of, is_part, most_rows, stored_rows
from evaluation.metrics.oracles import standard_error, why_other_pairs, why_unknown
from helpers_cfg import Guidance
from losses.objective import FlowObjective, expand_time
from models.inputs import classes_in
from run_files.metrics_file import COPIES

EXCESS, COPYING = "oracle/empirical_excess_loss", "oracle/copying"
TIMES = 8  # the middles of so many equal parts of the path's time
POINTS = 2000  # training rows of data on disk, and held-out rows, at most
OPERATIONS = 2 * 10**10  # states times rows times dimensions, at most, but for LEAST states of each time
LEAST = 16


@dataclass(frozen=True)
class Memorisation:
    """Squared distances (8, n), summed over dimensions, at states made of training rows and of held-out rows.

    t: the 8 times. v is the network's velocity, v_c the conditional one that it was fitted to, v_emp the exact velocity of
    the training rows. excess |v - v_emp|^2 and without |v - v_emp without row i|^2, at states made of training row i; loss
    and least |v - v_c|^2 and |v_emp - v_c|^2 there. held_out_loss, memoriser_loss: these two at states made of held-out
    row j; of_memoriser |v - v_emp|^2 and with_row |v - v_emp with row j|^2 there. nearest: the posterior max_i w_i of the
    row that a state most likely was made of, at states made of training rows. of: what was looked at, in words.
    subsample (2, 8): where a part of the rows is looked at, the mean squares at each time of what leaving out half of them
    changes v_emp by, and of v_emp, at states made of held-out rows; None elsewhere.
    """

    t: Tensor
    excess: Tensor
    without: Tensor
    loss: Tensor
    least: Tensor
    held_out_loss: Tensor
    memoriser_loss: Tensor
    of_memoriser: Tensor
    with_row: Tensor
    nearest: Tensor
    of: str
    subsample: Tensor | None = None

    @property
    def subsample_error(self) -> float | None:
        """Return the root mean square change of v_emp by leaving out half of the rows over that of v_emp, if known."""
        if self.subsample is None:
            return None
        change, size = self.subsample.mean(1).tolist()
        return math.sqrt(change / size)

    @cached_property
    def copying(self) -> Tensor:
        """Return the median of |v - v_emp| / |v - v_emp without row i| at each time (8,)."""
        return median_ratio(self.excess, self.without)

    @cached_property
    def copying_held_out(self) -> Tensor:
        """Return the median of |v - v_emp with row j| / |v - v_emp| at each time (8,): `copying` of rows never seen."""
        return median_ratio(self.with_row, self.of_memoriser)

    @property
    def quotient(self) -> Tensor:
        """Return the two medians' quotient (8,): 1 where training rows are to the network as any others."""
        return self.copying / self.copying_held_out

    @property
    def by_time(self) -> dict[str, Tensor]:
        """Return what is logged at each time, as oracle/<name>_t<k>: (8,) each."""
        losses = {
            "empirical_excess_loss": self.excess, "train_loss": self.loss, "held_out_loss": self.held_out_loss,
            "memoriser_loss": self.memoriser_loss, "nearest_posterior": self.nearest,
        }  # fmt: skip
        means = {name: values.mean(1) for name, values in losses.items()}
        means |= {"copying": self.copying, "copying_held_out": self.copying_held_out}
        if self.subsample is not None:
            means["empirical_excess_loss_subsample"] = (self.subsample[0] / self.subsample[1]).sqrt()
        return means

    @property
    def verdict(self) -> str:
        """Return in words whether the network copies, and at which times; of a part of the rows, how much hangs on it."""
        least, copied = self.quotient.min(), (self.quotient <= COPIES).nonzero()[:, 0].tolist()
        moved = self.subsample_error
        part = "" if moved is None else f"; half of the rows looked at move v_emp by {moved:.0%}"
        if not copied:
            return f"the network does not copy its training data ({least:.2f}; copying is {COPIES:g} or less{part})"
        first, last = self.t[copied[0]], self.t[copied[-1]]
        when = f"t >= {first:.2f}" if copied[-1] == TIMES - 1 else f"t from {first:.2f} to {last:.2f}"
        return f"the network copies its training data at {when} ({least:.2f}; copying is {COPIES:g} or less{part})"


def median_ratio(near: Tensor, far: Tensor) -> Tensor:
    """Return the median of sqrt(near / far) (8, n) at each time: (8,). 1 where both are 0."""
    return ((near + 1e-30) / (far + 1e-30)).sqrt().median(1).values


def training_flow(objective: FlowObjective, dataset: FlowDataset, source: Source) -> EmpiricalFlow | str:
    """Return the flow that the objective has least training loss at, of standardised states, or why there is none."""
    part, conditional = training_rows(objective, dataset), objective.network.is_conditional
    if isinstance(part, str):
        return part
    if objective.network.condition_shape is not None:
        return "each row has a condition of its own, and is all that the training data say of it"
    if dataset.altered and not dataset.views:
        return f"training changes rows at random ({dataset.altered}), so that they are no finite set"
    reason = why_unknown(objective, source, isinstance(objective.network, Guidance))
    if reason is not None or source.gaussian_std is None:
        return str(reason)
    states, stds, labels, _ = part
    shares = None
    if labels is not None and isinstance(dataset, TensorDataset) and dataset.balanced:
        counts = labels.bincount()
        shares = len(labels) / ((counts > 0).sum() * counts[labels]).double()
    given = (states, source.gaussian_std, objective.path, labels if conditional else None, dataset.mirrored, shares)
    views = max(1, dataset.views)
    return EmpiricalFlow(*given, views) if stds is None else DrawnFlow(*given, views, stds)


def training_rows(objective: FlowObjective, dataset: FlowDataset) -> Moments | str:
    """Return training rows as the objective has them, or why there are none."""
    if dataset.views:
        return in_its_units(objective, dataset, moments_of(objective, dataset)[0])
    part = stored_rows(dataset, POINTS)
    if isinstance(part, str):
        return part
    return in_its_units(objective, dataset, Moments(part[0], None, part[1], not is_part(dataset, len(part[0]))))


def held_out_rows(objective: FlowObjective, dataset: FlowDataset) -> Moments:
    """Return rows never trained on, as the objective has them."""
    if dataset.views:
        return in_its_units(objective, dataset, moments_of(objective, dataset)[1])
    device = next(objective.network.parameters()).device
    states, labels = dataset.held_out(POINTS, generator_for(0, "oracle/unseen", 0, device))
    return in_its_units(objective, dataset, Moments(states.to(device), None, labels, True))


def moments_of(objective: FlowObjective, dataset: FlowDataset) -> tuple[Moments, Moments]:
    return dataset.moments(most_rows(dataset, POINTS), objective.network.is_conditional)


def in_its_units(objective: FlowObjective, dataset: FlowDataset, rows: Moments) -> Moments:
    """Return rows standardised as the objective's, their labels classes alone, where float64 is."""
    mean, std, label, whole = rows
    states = objective.standardised(mean)
    if std is not None:
        std = objective.standardised(std) - objective.standardised(torch.zeros_like(std[:1]))
    label, place = (
        classes_in(label, dataset.num_classes),
        torch.device("cpu") if states.device.type == "mps" else states.device,
    )
    std, label = (None if given is None else given.to(place) for given in (std, label))
    return Moments(states.to(place), std, label, whole)


@dataclass(frozen=True)
class States:
    """States on the path (B, ...), as many of each time: made of `row` (B,) of this mean, and std or None, t (B,), label
    (B,) or None. v_c, v: the conditional velocity there, and the network's.
    """

    row: Tensor
    mean: Tensor
    std: Tensor | None
    z: Tensor
    t: Tensor
    label: Tensor | None
    v_c: Tensor
    v: Tensor


def states_of(objective: FlowObjective, flow: EmpiricalFlow, rows: Moments, odds: Tensor, each: int, stream: str) -> States:
    """Return `each` states of each of the 8 times, made of rows drawn by the odds (N,); labels where the flow has them."""
    generator, device = generator_for(0, f"oracle/{stream}"), rows.mean.device
    row = torch.multinomial(odds.double().cpu(), TIMES * each, replacement=True, generator=generator).to(device)
    mean, label = rows.mean[row], None if flow.labels is None or rows.label is None else rows.label[row]
    if flow.mirrored:
        turned = torch.rand(len(mean), generator=generator) < 0.5
        mean = torch.where(expand_time(turned.to(device), mean).bool(), mean.flip(-1), mean)
    std = None if rows.std is None else rows.std[row]
    x1 = mean if std is None else torch.addcmul(mean, std, torch.randn(mean.shape, generator=generator).to(device))
    x0 = (flow.source_std * torch.randn(x1.shape, generator=generator)).to(device)
    t = (objective.path.last_time * (torch.arange(TIMES, device=device) + 0.5) / TIMES).repeat_interleave(each)
    wide = expand_time(t, x1)
    z, place = objective.path.state(x0, x1, wide), next(objective.network.parameters()).device
    own = None if label is None else label.to(place)
    v = in_chunks(objective.velocity, states_at_once(z.shape[1:]), z.to(place), t.to(place), own).to(z)
    return States(row, mean, std, z, t, label, objective.path.conditional_velocity(x0, x1, wide), v)


def squared_gaps(a: Tensor, b: Tensor) -> Tensor:
    """Return |a - b|^2 of velocities (8 n, ...), on the CPU: (8, n)."""
    return (a - b).flatten(1).double().square().sum(1).cpu().reshape(TIMES, -1)


@torch.no_grad()
@full_products()
def memorisation(objective: FlowObjective, dataset: FlowDataset, source: Source, draws: int) -> Memorisation | str:
    """Return the objective's distances to the flow of its training rows, or why there are none; the same draws each time.

    draws: states made of training rows, and of held-out rows as many; fewer where there are many rows.
    """
    flow = training_flow(objective, dataset, source)
    if isinstance(flow, str):
        return flow
    rows, unseen = training_rows(objective, dataset), held_out_rows(objective, dataset)
    assert isinstance(rows, Moments)
    labels, count = flow.labels, len(flow.rows) // flow.views
    odds, unseen_odds = (
        torch.ones(len(rows.mean)) if flow.shares is None else flow.shares.cpu(),
        torch.ones(len(unseen.mean)),
    )
    if labels is None:
        odds = odds * (count > 1)
    elif unseen.label is not None:
        counts = labels.cpu().bincount(minlength=objective.network.num_classes)
        odds, unseen_odds = odds * (counts[labels.cpu()] > flow.views), unseen_odds * (counts[unseen.label.cpu()] > 0)
    if not odds.any() or not unseen_odds.any():
        return "there are no two training rows" + " of one label" * (labels is not None)
    each = states_of_a_time(draws, flow.rows.numel() * (1 + flow.mirrored) * (1 + bool(dataset.views)))
    a = states_of(objective, flow, rows, odds, each, "training rows")
    b = states_of(objective, flow, unseen, unseen_odds, each, "held-out rows")
    times = flow.times(a.z, a.t)
    posterior = flow.posterior(a.z, times, a.label)
    exact, memoriser = flow.read(posterior.mean, a.z, times), flow(b.z, b.t, b.label)
    return Memorisation(
        t=a.t[::each].cpu(),
        excess=squared_gaps(a.v, exact),
        without=squared_gaps(a.v, flow.velocity(a.z, a.t, a.label, a.row)),
        loss=squared_gaps(a.v, a.v_c),
        least=squared_gaps(exact, a.v_c),
        held_out_loss=squared_gaps(b.v, b.v_c),
        memoriser_loss=squared_gaps(memoriser, b.v_c),
        of_memoriser=squared_gaps(b.v, memoriser),
        with_row=squared_gaps(b.v, flow.velocity_with(b.z, b.t, b.mean, b.label, b.std)),
        nearest=posterior.nearest.cpu().reshape(TIMES, -1),
        of=f"{TIMES * each:,} states of {TIMES} times, {words_of(rows, dataset, count, labels)}",
        subsample=None if rows.whole else change_by_half(flow, b, memoriser),
    )


def words_of(rows: Moments, dataset: FlowDataset, count: int, labels: Tensor | None) -> str:
    """Return which training rows are looked at."""
    words = f"{count_of(dataset, count)} training rows" + f", in {dataset.views} views each" * (dataset.views > 1)
    if not (rows.whole and is_part(dataset, count) and labels is not None):
        return words
    return f"{words}, all of {len(labels.unique()):,} of {dataset.num_classes:,} classes"


def states_of_a_time(draws: int, numbers: int) -> int:
    """Return how many states of each time are made, of so many drawn in all, beside rows of so many numbers."""
    return max(LEAST, min(draws, OPERATIONS // numbers) // TIMES)


def change_by_half(flow: EmpiricalFlow, at: States, whole: Tensor) -> Tensor:
    """Return the mean squares at each time of the distance of the flow of every second row from `whole`, that of all rows,
    and of `whole`, at these states: (2, 8).
    """
    kept = torch.arange(len(flow.rows)) % (len(flow.rows) // flow.views) % 2 == 0
    half = flow.of_rows(kept)
    squares = torch.stack([half(at.z, at.t, at.label) - whole, whole]).double().square().flatten(2)
    return squares.reshape(2, TIMES, -1).nanmean(2).cpu()


class Memorised(LongMetric):
    """Whether the network copies finite training data, by its velocity at states made of training and of held-out rows.

    oracle/empirical_excess_loss = E|v_c - v|^2 - E|v_c - v_emp|^2 = E|v - v_emp|^2 over 8 times at the middles of equal
    parts of the path's time: the loss minus the least possible one, which only a memoriser reaches; by time as ..._t0 to
    ..._t7, with oracle/train_loss_t<k>, the network's loss on training rows, oracle/held_out_loss_t<k> and
    oracle/memoriser_loss_t<k>, its and v_emp's on held-out rows. oracle/copying_t<k> and oracle/copying_held_out_t<k>: see
    Memorisation; oracle/copying: their least quotient. oracle/nearest_posterior_t<k>: mean of max_i w_i at states made of
    training rows, which from some time on know what they were made of.
    draws, final_draws: states of each kind, during the run (0: none before its end) / at its end. Losses are those of
    standardised states.
    """

    needs = "velocity"
    beside = ("oracle/train_loss_t", "oracle/held_out_loss_t", "oracle/memoriser_loss_t", "oracle/nearest_posterior_t")

    def __init__(self, draws: CountOr0 = 1024, final_draws: Count = 4096):
        self.draws, self.final_draws = draws, final_draws

    def names(self) -> list[str]:
        return [EXCESS, COPYING]

    def rows_ahead(self, objective: FlowObjective, dataset: FlowDataset, final: bool) -> int:
        network = objective.network
        changed = dataset.altered and not dataset.views
        unknown = why_other_pairs(objective) or isinstance(network, Guidance) or network.condition_shape or changed
        draws = self.final_draws if final else self.draws
        if unknown or not draws or not objective.learns_velocity or dataset.held_out_size == math.inf:
            return 0
        rows = len(dataset.train_states) if isinstance(dataset, TensorDataset) else min(POINTS, dataset.epoch_size)
        numbers = rows * math.prod(dataset.state_shape) * (1 + dataset.mirrored) * max(1, 2 * dataset.views)
        return 2 * TIMES * states_of_a_time(draws, numbers)

    def thinned(self, share: float) -> dict[str, int]:
        least = LEAST * TIMES
        draws, final = (min(count, int(share * count)) for count in (self.draws, self.final_draws))
        return {"draws": draws if draws >= least else 0, "final_draws": min(self.final_draws, max(least, final))}

    def compute(self, generation: Generation) -> list[Score | Absent]:
        draws = self.final_draws if generation.final else self.draws
        if not draws:
            return self.absent("it is looked at in the last evaluation alone")
        found = memorisation(generation.objective, generation.dataset, generation.source, draws)
        if not isinstance(found, str) and not found.loss.isfinite().all():
            found = "the network's velocities are not finite"
        if isinstance(found, str):
            return self.absent(found)
        excess = found.excess.flatten()
        extra = {f"oracle/{name}_t{k}": float(v) for name, values in found.by_time.items() for k, v in enumerate(values)}
        part = {} if found.subsample_error is None else {f"{EXCESS}_subsample": found.subsample_error}
        return [
            Score(EXCESS, excess.mean().item(), standard_error(excess), extra=part or None, note=found.of),
            Score(COPYING, found.quotient.min().item(), extra=extra, note=found.of, verdict=found.verdict),
        ]
