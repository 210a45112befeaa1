"""A run of your own objects, from Python: the same loop, files and names as a launched one.

experiment = Experiment(network=net, data=x, epochs=20)
experiment.fit()
samples = experiment.sample(1000)
"""

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from backends.submission import prepare, submit
from common.errors import UserError
from common.own_objects import TARGET, makers
from common.seeds import seeded
from configuration.compose import compose_config, resolved, typed_keys
from configuration.stored import stored_config
from dataloaders.array_dataset import OwnTensors
from dataloaders.array_header import MAX_CLASSES, MIN_ROWS
from dataloaders.base_dataloaders import FlowDataset
from dataloaders.torch_dataset import TorchDataset, TorchReader, described
from evaluation.sample import Label, TrainedModel, load, trained_objective
from helpers_cfg import around
from losses.objective import FlowObjective, Objective
from losses.plain_loss import PlainLoss
from models.own_network import OwnClassifier, OwnNetwork
from run_files.checkpoint import load_checkpoint
from run_files.result import RunResult, result_of
from solvers.base_solver import Sampler
from training.run import Callback

KEYS = {"network": "model", "data": "dataloaders", "loss": "loss", "solver": "solver"}  # of a configuration, by argument
ITEM, SAMPLED = {"x": "x", "label": "label"}, 16  # names in items that are dictionaries; items that a data set is known by
OF_DATA = {"epochs": 100, "batch_size": 128, "evaluation_samples": 2000, "final_evaluation_samples": 10000, "num_workers": 0}


class Experiment:
    """A run whose parts may be objects: what is not given is as on the command line, and words are its words.

    network: an nn.Module whose forward(unified_input, label=None) returns a velocity of the state's shape (VelocityModel
    says what it sees), or with loss="cross_entropy" one of images to logits. Copies of it are trained: it stays as it is.
    data: states (N, D) or (N, C, H, W) as tensor or array, uint8 being pixels, or a tuple of these and labels (N,);
    or a map-style torch Dataset of x, (x, label) or dictionaries with these, read as training goes on.
    loss: a class of FlowObjective or a functools.partial of one, an objective around your network, or a plain function
    (network, x0, x1) -> loss, see PlainLoss. solver: a Sampler. callbacks: they observe, see Callback. Each may be the name
    of a configuration's choice instead: network="mlp", data="digits".

    Objects stay in this process: a run goes on elsewhere where they are given again. UserError for what does not fit.
    """

    def __init__(
        self,
        *words: str,
        run_name: str | None = None,
        network: nn.Module | str | None = None,
        data: Any = None,
        loss: Objective | Callable[..., Any] | str | None = None,
        solver: Sampler | str | None = None,
        callbacks: Sequence[Callback] = (),
        epochs: int | None = None,
    ):
        """words: overrides, such as "optimizer.lr=1e-3". run_name: experiment_1, experiment_2, ... unless given."""
        network = loss.network if network is None and isinstance(loss, FlowObjective) else network
        given = {"network": network, "data": data, "loss": loss, "solver": solver}
        named = {"run_name": run_name, "epochs": epochs}
        named |= {KEYS[part]: name for part, name in given.items() if isinstance(name, str)}
        self.words = [*words, *(f"{key}={value}" for key, value in named.items() if value is not None)]
        cfg = compose_config(self.words)
        if "run_name" not in typed_keys(self.words):
            taken = {path.name for path in (Path(str(cfg.output_dir)) / "runs").glob("*")}
            self.words.append(f"run_name={next(name for n in count(1) if (name := f'experiment_{n}') not in taken)}")
        self.run_name, self.own, self.begun = str(compose_config(self.words).run_name), dict[str, Any](), False
        objects = {part: thing for part, thing in given.items() if thing is not None and not isinstance(thing, str)}
        for part, thing in objects.items():
            if KEYS[part] in typed_keys(self.words):
                raise UserError(f"{part}= and the word {KEYS[part]}= both say what it is; leave one of them out")
            name, make, node = FORMS[part](thing, cfg)
            self.add(part, KEYS[part], name, make, node)
        unfit = [it for it in callbacks if not isinstance(it, Callback)] if isinstance(callbacks, Sequence) else [callbacks]
        if unfit:
            kind = "training.run.Callback"
            raise UserError(f"callbacks takes a list of objects of subclasses of {kind}, not {called(unfit[0])}")
        for i, callback in enumerate(callbacks):
            self.add(f"callback {i}", f"callbacks.own_{i}", called(callback), lambda it=callback: it, {})

    def add(self, part: str, key: str, name: str, make: Callable[..., Any], node: dict[str, Any]) -> None:
        """Keep how an object becomes a part of the run, and the node that stands for it."""
        makers[self.run_name, part] = make
        own = {"_target_": TARGET, "run": self.run_name, "part": part, "name": name}
        self.own[key] = f"own-{name}", node | own

    def prepared(self, *words: str) -> dict[str, Any]:
        """Return the configuration of these words beside the experiment's own."""
        config = prepare([*self.words, *words], self.own)
        objects = (f"{key}={name}" for key, (name, _) in self.own.items())
        return config | {"command": f"Experiment({', '.join([*map(repr, config['overrides']), *objects])})"}

    def fit(self, *words: str) -> RunResult:
        """Train to the end, or go on where this experiment has stopped; one of an earlier session by "resume=true".

        words: more overrides, such as "epochs=40". As in a launched run, a first Ctrl-C (or interruption of a notebook)
        stops after a step and saves, with SystemExit.
        """
        config = self.prepared(*words, *(["resume=true"] if self.begun else []))
        try:
            return submit(config)
        finally:
            self.begun = (result_of(config).path / "config.yaml").is_file()

    def checkpoint(self) -> Path:
        """Return the newest save. UserError before there is one."""
        found = result_of(resolved(compose_config(self.words, self.own))).checkpoint
        if found is None:
            raise UserError(f"the run {self.run_name} has no save yet; fit() makes one")
        return found

    def evaluate(self, *words: str) -> dict[str, float]:
        """Return the scores of the newest save by name, as a run's last evaluation has them. words: more overrides."""
        return submit(self.prepared(*words, f"eval_checkpoint={self.checkpoint()}")).scores

    def model(self, device: str = "auto") -> TrainedModel:
        """Return the generator of the newest save: sample, velocity, flow_map, log_prob."""
        return load(self.checkpoint(), device)

    def sample(self, n: int, seed: int = 0, label: Label = None, **how: Any) -> Tensor:
        """Return n samples (n, *state_shape) on the CPU, see TrainedModel.sample."""
        return self.model().sample(n, seed, label, **how)

    def trained_network(self) -> nn.Module:
        """Return a copy of the network with the averaged weights of the newest save, on the CPU."""
        path = self.checkpoint()
        payload = load_checkpoint(path)
        return trained_objective(payload, stored_config(path, payload), path, torch.device("cpu")).network.named


Form = tuple[str, Callable[..., Any], dict[str, Any]]  # what a part is called, how it is made, what its node holds beside


def called(thing: Any) -> str:
    """Return the name of a class, a function, or the class of an object, fit for a file name."""
    thing = thing.func if isinstance(thing, partial) else thing
    name = thing.__name__ if inspect.isclass(thing) or inspect.isroutine(thing) else type(thing).__name__
    return "".join(c for c in name if c.isalnum() or c == "_") or "object"


def own_network(network: Any, cfg: Any) -> Form:
    """UserError for what is no nn.Module."""
    if not isinstance(network, nn.Module):
        raise UserError(f"network takes an nn.Module or the name of a model such as 'mlp', not {called(network)}")
    classifies = cfg.choices.loss == "cross_entropy"
    around: Callable[..., Any] = OwnClassifier if classifies else OwnNetwork
    classes = "${label_classes:${dataloaders.num_classes}}" if classifies else (
        "${conditional_classes:${conditional},${dataloaders.num_classes}}")  # fmt: skip
    node = {"num_classes": classes, "training": {"lr": "${oc.select:dataloaders.training.lr,1.0e-3}"}}
    return called(network), lambda num_classes: around(copy.deepcopy(network), num_classes), node


def own_data(data: Any, cfg: Any) -> Form:
    """UserError for data that cannot be served."""
    if isinstance(data, Dataset) and not isinstance(data, torch.utils.data.TensorDataset):
        facts, some = described(data, ITEM), TorchReader(data, ITEM)
        with seeded(0):
            sample = torch.stack([some.item(len(some) * k // SAMPLED).x for k in range(SAMPLED)])
        settings = {key: list(fact) if isinstance(fact, tuple) else fact for key, fact in facts.items()}
        return data_form(data, f"{len(some)}-{digest_of(sample)}", settings, partial(TorchDataset, data))
    states, labels = rows_of(data)
    pixels = states.dtype == torch.uint8 and states.ndim == 4
    states = states if pixels else states.float()
    check_rows(states, labels)
    settings = {
        "state_shape": states.shape[1:], "num_classes": 0 if labels is None else 1 + int(labels.max()),
        "value_range": [-1.0, 1.0] if pixels else None,
    }  # fmt: skip
    return data_form(data, digest_of(states, labels), settings, partial(OwnTensors, states, labels))


def data_form(data: Any, content: str, settings: dict[str, Any], build: Callable[..., FlowDataset]) -> Form:
    """Return the form of data with this content, which it must have wherever it is given again."""

    def make(digest: str, **chosen: Any) -> FlowDataset:
        if digest != content:
            raise UserError("the data given are others than the run was made with; give the same, or another run_name")
        return build(**chosen)

    own = {"digest": content, "state_shape": list(settings["state_shape"]), "training": OF_DATA, "epoch_size": None}
    return called(data), make, settings | own | {"held_out_fraction": 0.1, "standardize": False}


def rows_of(data: Any) -> tuple[Tensor, Tensor | None]:
    """Return states and labels or None, on the CPU. UserError for what no tensor can be made of."""
    data = data.tensors if isinstance(data, torch.utils.data.TensorDataset) else data
    parts = data if isinstance(data, tuple) else (data,)
    try:
        tensors = [torch.as_tensor(part).detach().cpu() for part in parts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"data takes states, (states, labels), or a data set's name, not {called(data)}") from error
    if len(tensors) not in (1, 2):
        raise UserError(f"data takes states, or (states, labels), not {len(tensors)} arrays")
    if tensors[0].is_complex():
        raise UserError("data takes real numbers; give complex ones as dimensions, torch.view_as_real(x).flatten(1)")
    return tensors[0], tensors[1] if len(tensors) == 2 else None


def check_rows(states: Tensor, labels: Tensor | None) -> None:
    """Raise UserError for states or labels that are no data to learn from."""
    shape, rows = list(states.shape), len(states) if states.ndim else 0
    if states.ndim not in (2, 4) or rows < MIN_ROWS or 0 in shape:
        raise UserError(f"data takes states of shape (N, D) or (N, C, H, W), N being {MIN_ROWS} or more, not {shape}")
    if bad := int((~states.flatten(1).isfinite().all(1)).sum()):
        raise UserError(f"{bad} of the {rows} rows of data are not finite in fp32; remove or rescale them")
    if labels is None:
        return
    if labels.shape != (rows,) or labels.is_floating_point() or not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise UserError(f"the labels of data take one whole number from 0 up for each of its {rows} rows")


def digest_of(*parts: Tensor | None) -> str:
    """Return a hash of the data's content: a run goes on with the same."""
    digest = hashlib.blake2s(digest_size=8)
    for part in parts:
        if part is not None:
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def own_loss(loss: Any, cfg: Any) -> Form:
    """UserError for a class of another kind, or what cannot be called."""
    plain: Any = OmegaConf.to_container(cfg.loss)
    base = {key: node for key, node in plain.items() if key not in ("second_time", "_target_")}
    kind = loss.func if isinstance(loss, partial) else loss if inspect.isclass(loss) else type(loss)
    if isinstance(kind, type) and issubclass(kind, FlowObjective):
        base["training"] = base["training"] | {"learns": kind.learns}
        if isinstance(loss, FlowObjective):
            return called(loss), lambda network, **_: around(copy.deepcopy(loss), network), {"training": base["training"]}
        return called(loss), lambda **parts: loss(**parts), base
    if not callable(loss) or isinstance(loss, Objective) or (isinstance(kind, type) and issubclass(kind, Objective)):
        raise UserError(
            "loss takes a FlowObjective, a function (network, x0, x1) -> loss, or a name such as 'meanflow' or "
            f"'cross_entropy', not {called(loss)}"
        )
    node = {"path": base["path"], "state_shape": "${dataloaders.state_shape}", "training": {}}
    return called(loss), lambda network, path, state_shape: PlainLoss(network, loss, False, path, state_shape), node


def own_solver(solver: Any, cfg: Any) -> Form:
    """UserError for what is no Sampler."""
    if not isinstance(solver, Sampler):
        raise UserError(f"solver takes a solvers.base_solver.Sampler or a name such as 'euler', not {called(solver)}")
    return called(solver), lambda: copy.deepcopy(solver), {}


FORMS: dict[str, Callable[[Any, Any], Form]] = {
    "network": own_network, "data": own_data, "loss": own_loss, "solver": own_solver,
}  # fmt: skip
