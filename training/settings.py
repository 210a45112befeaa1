"""What each part of a run is given of its configuration: `assemble` makes these, and nothing later reads the dict by key."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from omegaconf import OmegaConf

from configuration.compose import CONFIG_DIR, twice_as_long

T = TypeVar("T")


@dataclass(frozen=True)
class LoopSettings:
    """How the loop trains and judges; the names are those of the keys in configs/train.yaml."""

    seed: int
    batch_size: int
    gradient_accumulation_steps: int
    epochs: int
    max_steps: int | None
    precision: str
    grad_clip: float | None
    on_nan: str
    loss_weights: dict[str, float]
    overfit: bool
    eval_every: int
    save_every: int
    log_every: int
    monitor: str
    monitor_mode: str
    patience: int | None


@dataclass(frozen=True)
class SaveSettings:
    """Which run it is, whether it goes on, and what it does when the disk refuses a file."""

    run_name: str
    output_dir: str
    resume: bool | str
    overwrite: bool
    wait: bool
    on_save_error: str


@dataclass(frozen=True)
class LogSettings:
    """What the experiment log says of a run. changed: settings of a resumed run, (old, new) by key."""

    run_name: str
    command: str
    choices: dict[str, str]
    changed: dict[str, tuple[Any, Any]]
    seed: int
    file: str
    expect: str | None = None
    source: str | None = None
    reason: str | None = None
    targets: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SummarySettings:
    """What is printed of a run and known to no part of it. recipe: rows of a step in the recipe of its data; project: the
    tracker's, None without one; longer: the override with which it goes on to twice its length.
    """

    compile: bool
    time_frequencies: list[float] | None
    standardize: bool | None
    recipe: int | None
    project: str | None
    longer: str
    show: bool = False


def settings_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a dataclass whose fields are the values of the same names."""
    return kind(**{one.name: values[one.name] for one in fields(kind) if one.name in values})  # type: ignore[arg-type]


def summary_settings(config: dict[str, Any]) -> SummarySettings:
    return SummarySettings(
        config["compile"], config["model"].get("time_frequencies"), config["dataloaders"].get("standardize"),
        recipe_batch(config), config["trackio"]["project"] if config["trackio"]["enabled"] else None,
        twice_as_long(config), bool(config.get("show")),
    )  # fmt: skip


def recipe_batch(config: dict[str, Any]) -> int | None:
    """Return rows of an optimizer step in the chosen experiment's recipe, or the data's own; None for debugging."""
    if config["choices"].get("debug"):
        return None
    experiment = config["choices"].get("experiment")
    recipe: Any = OmegaConf.load(CONFIG_DIR / "experiment" / f"{experiment}.yaml") if experiment else {}
    rows = recipe.get("batch_size") or config["dataloaders"].get("training", {}).get("batch_size")
    return rows and int(rows) * int(recipe.get("gradient_accumulation_steps") or 1)
