"""The peers preset of dev/benchmark.py: this project beside torchcfm, flow_matching and torchdiffeq, in one process.

All take turns within each round, on one thread of the CPU; figures are of its processor time, which other work on the
machine hardly changes. With --and device=cuda they are of the time until the device has done the work. The first row of a
table is what the others are compared with. Networks, batches and numbers of evaluations are the same on both sides.
"""

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from dataloaders.base_dataloaders import EpochPlan
from dev.contestant import Contestant, wait
from evaluation.threads import one_thread
from losses.couplings import MinibatchOTCoupling
from models.inputs import make_unified_flow_matching_input
from solvers.runge_kutta import Midpoint

# What each imports; torchcfm is installed by some without POT.
PEERS = {"torchcfm": ("torchcfm", "ot"), "flow_matching": ("flow_matching",), "torchdiffeq": ("torchdiffeq",)}
Work = Callable[[], Any]
Table = tuple[str, list[dict[str, Any]]]
POINTS, DIGITS = "batch_size=1024", "dataloaders=digits model=cnn batch_size=64"
PICTURES = "dataloaders=random_images model=unet_small batch_size=8 dataloaders.state_shape=[3,32,32]"
OT_ROWS, OT_STEP_ROWS = (256, 1024), 256
EVALUATIONS = 32


def peer_tables(rounds: int, steps: int, common: str) -> Iterator[Table]:
    """Yield each table, of so many rounds of steps, the words common to all runs; and a sentence for each peer missing."""
    there = {name: all(map(importlib.util.find_spec, needed)) for name, needed in PEERS.items()}
    for name in (name for name, found in there.items() if not found):
        yield f"{name} is not installed, its rows are left out: pip install 'denoising-zoo[peers]'", []
    common = f"device=cpu {common}"
    points = Contestant(f"{POINTS} {common}")
    steppers = there["torchcfm"] or there["flow_matching"]
    makers: list[tuple[bool, str, Callable[[], dict[str, Work]]]] = [
        (steppers, "a step of the default MLP, 1,024 rows", lambda: points_steps(points, there)),
        (there["torchcfm"], "a step with exact optimal transport, 256 rows", lambda: transport_steps(common)),
        *((there["torchcfm"], f"exact pairing of {n:,} rows", lambda n=n: pairings(points, n)) for n in OT_ROWS),
        (there["torchdiffeq"], f"midpoint, {EVALUATIONS} evaluations of 1,024 rows", lambda: samplers(points)),
        (True, "the batches of an epoch of digits", lambda: data_paths(common)),
    ]  # fmt: skip
    with one_thread():
        for _, title, make in (maker for maker in makers if maker[0]):
            yield title, rows_of(interleaved(make(), points.run.device, rounds, steps))
        if there["torchcfm"]:
            yield f"a step of U-Nets{', compiled' * ('compile=true' in common)}, by operations", unets(rounds, steps, common)


def clock(device: torch.device) -> float:
    """Return seconds: of the processor on a CPU, else of a clock once the device has done what was asked of it."""
    if device.type == "cpu":
        return time.process_time()
    wait(device)
    return time.perf_counter()


def interleaved(works: dict[str, Work], device: torch.device, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of one repeat of each, by round, but for a first one; the order turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun = clock(device)
            for _ in range(repeats):
                works[name]()
            seconds[name].append((clock(device) - begun) / repeats)
    return {name: measured[1:] for name, measured in seconds.items()}


def rows_of(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return for each its median in milliseconds, and the median, least and largest ratio to the first over the rounds."""
    first = next(iter(seconds.values()))
    return [{"row": name, "ms": 1e3 * statistics.median(own), **spread(own, first)} for name, own in seconds.items()]


def spread(own: list[float], first: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(own, first, strict=True)]
    return {"ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}


def our_step(contestant: Contestant, x1: Tensor) -> Work:
    """Return a whole step: noise, times and pairs, loss, gradient, clipping, optimizer, average and record."""
    from training.loop import after_step, train_step

    run = contestant.run
    generator = torch.Generator(run.device).manual_seed(0)
    run.clock.start(run.state.step)

    def step() -> None:
        batch = run.state.objective.batch(run.source, x1, None, generator, 0.0)
        after_step(run, train_step(run, [batch]))

    return step


def their_step(draw: Callable[[Tensor, Tensor], Any], network: nn.Module, x1: Tensor, optimizer: Any) -> Work:
    """Return the step that the examples of torchcfm and flow_matching show. draw(x0, x1) -> times, states, velocities."""

    def step() -> None:
        optimizer.zero_grad()
        t, state, velocity = draw(torch.randn_like(x1), x1)
        loss = torch.mean((network(t, state) - velocity) ** 2)
        loss.backward()
        optimizer.step()

    return step


class AsTheirs(nn.Module):
    """Our network, called as theirs are: network(t (B,), x (B, ...))."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.network(make_unified_flow_matching_input(x, torch.stack([t, torch.ones_like(t)], dim=1)))


def matcher(exact: bool = False) -> Callable[[Tensor, Tensor], Any]:
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher

    kind = ExactOptimalTransportConditionalFlowMatcher if exact else ConditionalFlowMatcher
    return kind(sigma=0.0).sample_location_and_conditional_flow


def flow_matching_draw(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from flow_matching.path import AffineProbPath
    from flow_matching.path.scheduler import CondOTScheduler

    t = torch.rand(len(x1), device=x1.device)
    drawn = AffineProbPath(scheduler=CondOTScheduler()).sample(t=t, x_0=x0, x_1=x1)
    return t, drawn.x_t, drawn.dx_t


def peers_of(ours: Contestant, draws: dict[str, Callable[[Tensor, Tensor], Any]], x1: Tensor) -> dict[str, Work]:
    """Return the step of each peer around a copy of our network, with Adam as published and with our optimizer, and ours."""
    state, works = ours.run.state, dict[str, Work]()
    (settings,) = state.optimizer.param_groups
    given = {key: settings[key] for key in ("lr", "betas", "weight_decay", "foreach", "fused")}
    for name, draw in draws.items():
        kinds: Any = (("Adam, as published", torch.optim.Adam, {}), ("our optimizer", torch.optim.AdamW, given))
        for title, kind, options in kinds:
            network = AsTheirs(copy.deepcopy(state.objective.network))
            works[f"{name}, {title}"] = their_step(draw, network, x1, kind(network.parameters(), **options))
    return works | {"this project": our_step(ours, x1)}


def points_steps(ours: Contestant, there: dict[str, bool]) -> dict[str, Work]:
    draws = {"torchcfm": matcher()} if there["torchcfm"] else {}
    draws |= {"flow_matching": flow_matching_draw} if there["flow_matching"] else {}
    return peers_of(ours, draws, ours.data())


def transport_steps(common: str) -> dict[str, Work]:
    ours = Contestant(f"loss/coupling=minibatch_ot batch_size={OT_STEP_ROWS} {common}")
    return peers_of(ours, {"torchcfm": matcher(exact=True)}, ours.data())


def pairings(ours: Contestant, count: int) -> dict[str, Work]:
    from torchcfm.optimal_transport import OTPlanSampler

    generator = torch.Generator(ours.run.device).manual_seed(0)
    theirs, coupling = OTPlanSampler(method="exact"), MinibatchOTCoupling()
    x1 = ours.data()[:count]
    x0 = ours.run.source.sample(count, generator)
    return {"torchcfm": lambda: theirs.sample_plan(x0, x1), "this project": lambda: coupling.pair(x0, x1, None, generator)}


def samplers(ours: Contestant) -> dict[str, Work]:
    from torchdiffeq import odeint

    flow: Any = ours.run.state.ema_objective
    noise = ours.run.source.sample(1024, torch.Generator(ours.run.device).manual_seed(0))
    times, solver = torch.linspace(0, 1, EVALUATIONS // 2 + 1, device=noise.device), Midpoint(steps=EVALUATIONS // 2)

    @torch.no_grad()
    def theirs() -> None:
        odeint(lambda t, x: flow.velocity(x, t), noise, times, method="midpoint")

    @torch.no_grad()
    def own() -> None:
        solver.solve(flow.velocity, noise)

    return {"torchdiffeq": theirs, "this project": own}


class Items(Dataset[Any]):
    """Rows served one at a time, as most data sets are."""

    def __init__(self, rows: Tensor, labels: Tensor):
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.rows[i], self.labels[i]


def data_paths(common: str) -> dict[str, Work]:
    ours = Contestant(f"{DIGITS} {common}").run.dataset
    stored: Any = ours.training_part(ours.epoch_size)
    loader = DataLoader(Items(*stored), batch_size=64, shuffle=True)
    plan = EpochPlan(64, torch.Generator().manual_seed(0), torch.Generator(stored[0].device).manual_seed(0))
    passed = lambda batches: [None for _ in batches]  # noqa: E731
    return {"a Dataset of items, collated": lambda: passed(loader), "this project": lambda: passed(ours.epoch(plan))}


def unets(rounds: int, steps: int, common: str) -> list[dict[str, Any]]:
    """Return milliseconds, operations and GFLOP/s of a whole step of both U-Nets; ratios are of GFLOP/s."""
    from torchcfm.models.unet.unet import UNetModelWrapper

    ours = Contestant(f"{PICTURES} {common}")
    x1 = ours.data()
    theirs = UNetModelWrapper((3, 32, 32), 32, 1, channel_mult=(1, 2, 2), attention_resolutions="4").to(x1.device)
    with FlopCounterMode(display=False) as counter:
        theirs(torch.rand(len(x1), device=x1.device), x1).sum().backward()
    network: Any = torch.compile(theirs) if "compile=true" in common else theirs
    step = their_step(matcher(), network, x1, torch.optim.Adam(theirs.parameters()))
    seconds = interleaved({"torchcfm": step, "this project": our_step(ours, x1)}, x1.device, rounds, steps)
    gflop = {"torchcfm": counter.get_total_flops() / 1e9, "this project": ours.gflop}
    pace = {name: [1 / gflop[name] * second for second in own] for name, own in seconds.items()}
    first = pace["torchcfm"]
    return [
        {
            "row": name, "ms": 1e3 * statistics.median(own), "gflop": gflop[name],
            "gflop_per_second": 1 / statistics.median(pace[name]), **spread(first, pace[name]),
        }
        for name, own in seconds.items()
    ]  # fmt: skip
