#!/usr/bin/env python
"""A trained flow of points as one .npz that NumPy samples without torch; or the weights of any model, as a file of arrays.

    python scripts/export.py ckpt=outputs/ckpts/mlp/first_flow_last.pt out=flow.npz
    python -m minigrad.sample flow.npz n=1000 out=samples.npy
    python scripts/export.py ckpt=outputs/ckpts/cnn/digits_last.pt form=weights out=digits.npz        # or .safetensors
    python scripts/export.py ckpt=digits.npz form=weights weights=trained_elsewhere.npz out=new.npz   # see below

Keys: ckpt (required), out (required), form (flow), n (1000: samples there is noise for), seed (0), label (a class, or all),
device (auto), trust (modules, as a,b.c, that the checkpoint may build parts from), and any solver setting. The file holds
the EMA weights of model=mlp, the noise, the time grid and the method's tableau; the samples are those of scripts/sample.py
with the same settings.

form=weights writes the EMA weights of any model, each an array under torch's name for it and in its layout, and beside them
the configuration. What reads checkpoints reads such a file: init_from=, eval_checkpoint=, scripts/sample.py. weights= takes
the numbers from another file with the same names and shapes, .npz or .safetensors, or from a network that minigrad saved
(model=mlp), and all else from ckpt.
"""

import re
import sys
import zipfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import minigrad
from common.command_line import check_ends, front
from common.errors import UserError, numpy_fault
from common.files import replacing
from common.ranges import Count, Seed
from configuration.settings import read_settings
from evaluation import parts
from evaluation.generate import fixed_noise
from evaluation.sample import TrainedModel, load
from models.flow_matching.mlp import MLP
from models.network import Network
from run_files.checkpoint import BROKEN, METADATA, arrays_of, load_checkpoint, write_export
from solvers.base_solver import Sampler
from solvers.flow_map import FlowMapSolver
from solvers.runge_kutta import RungeKutta, Tableau

OF_WEIGHTS = ("ckpt", "out", "form", "weights")  # the keys that form=weights knows


@dataclass(frozen=True)
class Settings:
    """The command line."""

    ckpt: Path = field(metadata={"example": "ckpt=outputs/ckpts/mlp/last.pt"})
    out: Path = field(metadata={"example": "out=flow.npz"})
    form: Literal["flow", "weights"] = "flow"
    weights: Path | None = None
    n: Count = 1000
    seed: Seed = 0
    label: Seed | Literal["all"] | None = None
    device: str = "auto"
    trust: str | None = None


def read_words(words: list[str]) -> tuple[Settings, list[str]]:
    """Return own settings and solver overrides of a command line. UserError for anything else."""
    settings, overrides = read_settings(words, Settings, ("solver",))
    of_weights, typed = settings.form == "weights", (word.partition("=")[0] for word in words)
    unused = next((key for key in typed if of_weights and key not in OF_WEIGHTS), None)
    if unused or (settings.weights and not of_weights):
        key, form = unused or "weights", settings.form
        raise UserError(
            f"{key}= says nothing of form={form}; leave it out, or use form={'flow' if of_weights else 'weights'}"
        )
    check_ends("out", settings.out, *((".npz", ".safetensors") if of_weights else (".npz",)))
    return settings, overrides


def export(words: list[str]) -> str:
    """Carry out the command; the line to print. UserError for a model, solver or path that has no such form."""
    settings, overrides = read_words(words)
    return export_weights(settings) if settings.form == "weights" else export_flow(settings, overrides)


def export_weights(settings: Settings) -> str:
    """Write the EMA weights of the checkpoint, or those of another file in their place; the line to print."""
    payload = load_checkpoint(settings.ckpt)
    if settings.weights:
        given = weights_of(settings.weights, payload)
        parts.check_weights(payload["ema"], given, settings.weights)
        payload["ema"] = {name: given[name].to(own.dtype) for name, own in payload["ema"].items()}
    write_export(settings.out, payload)
    numbers = sum(tensor.numel() for tensor in payload["ema"].values())
    return (
        f"{settings.out}: {len(payload['ema'])} arrays, {numbers:,} numbers; a run starts there by init_from={settings.out}"
    )


def weights_of(path: Path, payload: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file by name, a network of minigrad's as the MLP of a checkpoint. UserError for others."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        check_size(path, sum(weight.nbytes for weight in payload["ema"].values()))
        arrays = arrays_of(path)
        if "activations" in arrays:
            return payload["ema"] | torch_names(minigrad.MLP.of_arrays(arrays, str(path)), payload)
        return {name: torch.from_numpy(array) for name, array in arrays.items() if name != METADATA}
    except BROKEN as error:
        raise UserError(
            f"{path} cannot be read as weights ({numpy_fault(error)}); give a .npz or .safetensors of them"
        ) from None


def check_size(path: Path, most: int) -> None:
    """Raise ValueError where the arrays of a .npz take more than twice so many bytes."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > 2 * most + 2**20:
        raise ValueError(f"it holds {size:,} bytes, and the weights of this model take {most:,}")


def torch_names(network: minigrad.MLP, payload: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a network of minigrad's under torch's names. ValueError unless it computes as the MLP does."""
    places = sorted(int(name.split(".")[1]) for name in payload["ema"] if re.fullmatch(r"layers\.\d+\.weight", name))
    if not places:
        raise ValueError("a network of minigrad's is one of model=mlp, and the checkpoint holds another")
    bend = payload["config"]["model"].get("activation", "silu")
    expected, found = [bend] * (len(places) - 1) + ["linear"], [layer.activation for layer in network.layers]
    if found != expected:
        raise ValueError(f"its layers are {', '.join(found)}, those of the checkpoint {', '.join(expected)}")
    named = dict[str, Any]()
    for place, layer in zip(places, network.layers, strict=True):
        named |= {f"layers.{place}.weight": layer.weight.data.T, f"layers.{place}.bias": layer.bias.data}
    return {name: torch.from_numpy(array) for name, array in named.items()}


def export_flow(settings: Settings, overrides: list[str]) -> str:
    """Write the flow as minigrad.sample takes it; the line to print."""
    model = load(settings.ckpt, settings.device, overrides, settings.trust or "")
    arrays = network_arrays(model.objective.network) | plan(model) | start(model, settings)
    with replacing(settings.out) as file:
        np.savez_compressed(file, **arrays)
    return f"{settings.out}: {settings.n:,} samples by python -m minigrad.sample {settings.out}"


def network_arrays(network: Network) -> dict[str, Any]:
    """Return the layers of an MLP, as minigrad.MLP reads them, and its angular frequencies. UserError for another model."""
    if not isinstance(network, MLP):
        raise UserError(
            f"only model=mlp can be exported as a flow, and this checkpoint holds {type(network).__name__}; "
            "form=weights writes the weights of any model"
        )
    layers = [part for part in network.layers if isinstance(part, nn.Linear)]
    sizes = [layers[0].in_features, *(layer.out_features for layer in layers)]
    arrays = {
        "sizes": np.array(sizes), "activations": np.array(["silu"] * (len(layers) - 1) + ["linear"]),
        "frequencies": network.time_features.frequencies.double().cpu().numpy(),
    }  # fmt: skip
    for k, layer in enumerate(layers):
        arrays |= {f"weight_{k}": layer.weight.detach().T.cpu().numpy(), f"bias_{k}": layer.bias.detach().cpu().numpy()}
    return arrays


def start(model: TrainedModel, settings: Settings) -> dict[str, Any]:
    """Return the noise (n, D), each sample's row of the class embedding (n, W), W = 0 without one, and the data's units."""
    noise, labels = fixed_noise(model.source, settings.n, settings.seed), model.labels(settings.n, settings.label)
    assert isinstance(model.objective.network, MLP)
    embedding = model.objective.network.class_embedding
    rows = torch.zeros(settings.n, 0) if embedding is None else embedding.rows(labels, settings.n)
    zero = model.objective.in_data_units(torch.zeros(1, noise.shape[1], device=model.device))
    one = model.objective.in_data_units(torch.ones(1, noise.shape[1], device=model.device))
    named = {"noise": noise, "class_rows": rows, "mean": zero, "std": one - zero}
    return {name: value.cpu().numpy() for name, value in named.items()}


def plan(model: TrainedModel) -> dict[str, Any]:
    """Return grid, matrix, weights and readings as minigrad.sample takes them. UserError for a solver of another kind."""
    solver, guided = parts.build_solver(model.config), model.config.get("guidance")
    solver.check(model.objective)
    if guided:
        raise UserError("a guided run has two velocities a step, which an exported flow has not; train without guidance")
    maps = takes_maps(solver)
    tableau = solver.tableau if isinstance(solver, RungeKutta) else Tableau((0.0,), ((),), (1.0,))
    stages, grid = len(tableau.nodes), solver.times(torch.zeros(()))
    matrix = torch.tensor([[*row, *[0.0] * (stages - len(row))] for row in tableau.matrix])
    steps = [[(torch.lerp(r, t, node), t) for node in tableau.nodes] for r, t in pairwise(grid)]
    rows = [[reading(model, time, t if maps else time) for time, t in stage] for stage in steps]
    named = {"grid": grid, "matrix": matrix, "weights": torch.tensor(tableau.weights), "readings": torch.tensor(rows)}
    return {name: value.double().numpy() for name, value in named.items()}


def takes_maps(solver: Sampler) -> bool:
    """Return whether the sampler walks by the learned map. UserError for one whose steps are not known ahead."""
    if isinstance(solver, FlowMapSolver) and not solver.renoise:
        return True
    if isinstance(solver, RungeKutta):
        return False
    name = type(solver).__name__ + (" with renoise=true" if solver.renoises else "")
    raise UserError(f"{name} cannot be exported; add solver=midpoint, euler, heun, rk4, or flow_map without renoise")


def reading(model: TrainedModel, r: Tensor, t: Tensor) -> list[float]:
    """Return (time of the state, time it is headed to, a, b): a z + b output is the velocity at times r."""
    flow, one, zero = model.objective, torch.ones(1, 1), torch.zeros(1, 1)
    times = flow.unified(zero.to(model.device), r, t)[0, -2:].tolist()
    a, b = (flow.prediction.velocity(output, z, r, flow.path).item() for output, z in ((zero, one), (one, zero)))
    return [*times, a, b]


def main(words: list[str]) -> int:
    return front(words or ["--help"], __doc__, export)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
