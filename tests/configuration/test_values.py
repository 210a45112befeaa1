"""What a value may be, read off the constructors of parts and the table of keys."""

import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
import yaml
from hydra import compose, initialize_config_dir

from common.errors import UserError
from common.ranges import EpochSize, Positive, Range, Share, Size
from configuration.build import build
from configuration.compose import CONFIG_DIR, compose_config, resolved
from configuration.nodes import named_in_configs
from configuration.signatures import Part, parameters
from configuration.values import AROUND, SETTINGS, Setting, as_typed, check_value


def test_every_key_of_train_yaml_has_its_line_in_the_table():
    keys = {key for key in yaml.safe_load((CONFIG_DIR / "train.yaml").read_text()) if key not in ("defaults", "hydra")}
    assert {key for key in SETTINGS if "." not in key} == keys - {*AROUND, "run_name"}


def test_types_are_read_from_the_source_of_a_class_its_bases_and_torch():
    expected: dict[str, dict[str, Any]] = {
        "dataloaders.synthetic.KMeans": {"centroids": list[list[float]], "epoch_size": EpochSize},
        "dataloaders.synthetic.Gaussian": {"mean": float | list[float], "std": Positive},
        "losses.meanflow_loss.ImprovedMeanFlowLoss": {"label_dropout": Share, "guidance": Part | None},
        "models.unet.unet.UNet": {"width": Size, "multipliers": list[Size]},
        "losses.weightings.AdaptiveWeighting": {"p": Annotated[float, Range(0, 2)]},
        "dataloaders.image_folder.ImageNet": {"flip": bool, "crop": Literal["resized", "whole", "random"]},
        "torch.optim.SGD": {"momentum": float, "fused": bool | None},
    }
    for target, kinds in expected.items():
        assert kinds.items() <= parameters(target).items()
    assert parameters("nowhere.Thing") == parameters("Thing") == {}


@pytest.mark.process
def test_reading_them_imports_nothing_of_them():
    program = (
        "import sys; from configuration.nodes import named_in_configs; from configuration.signatures import parameters\n"
        "assert sum(map(bool, map(parameters, named_in_configs('_target_')))) > 60; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=CONFIG_DIR.parent).returncode == 0
    assert named_in_configs("_target_")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [(int | None, [1, None], ["1", 1.5, True, [1], 0, 2**63]),
     (float, [1, 0.5], [True, "x", float("nan"), float("inf"), 1e39, 10**40]),
     (float | list[float], [1, [1, 0.5]], [[], [0], ["x"], [[1]], None]),
     (list[list[float]], [[[1.0], [2, 3]]], [[1], [["x"]], [[-1]]]),
     (tuple[float, float], [[1, 2]], [[1], [1, 2, 3], 1]),
     (Literal[True, False, "force"], [True, False, "force"], [1, 0, "true", None]),
     (dict[str, float], [{}, {"a": 1}], [[1], {"a": "b"}, None]),
     (str | None, ["x", None], [1, ["x"]])],
)  # fmt: skip
def test_what_fits_a_kind(kind: Any, good: list[Any], bad: list[Any]) -> None:
    setting = Setting(Annotated[kind, Range(0, above=True)])
    for value in good:
        check_value("key", value, setting)
    for value in bad:
        with pytest.raises(UserError, match="key takes "):
            check_value("key", value, setting)


def test_a_text_is_taken_as_typed():
    assert as_typed(1e-3, "1e-3", Setting(str | None)) == "1e-3"
    assert as_typed(None, "null", Setting(str | None)) is None
    assert as_typed(5, "5", Setting(int)) == 5
    assert resolved(compose_config(["run_name=007"]))["run_name"] == "007"


def test_each_component_of_a_mixture_has_its_own_width_from_the_command_line():
    config = resolved(compose_config(["run_name=x", "dataloaders.std=[.1,.2,.3,.4,.5]", "dataloaders.weights=[1,1,1,1,2]"]))
    assert config["dataloaders"]["std"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert resolved(compose_config(["run_name=x", "dataloaders=gaussian", "dataloaders.mean=[0.5,2]"]))


def test_a_part_that_is_built_alone_is_checked_as_its_constructor_declares():
    with pytest.raises(UserError, match=r"VariancePreservingPath\.beta_max takes a number above 0, not -1"):
        build({"_target_": "losses.paths.VariancePreservingPath", "beta_max": -1})


def test_what_one_composition_sets_is_not_in_the_next():
    """Hydra merges into what it has read, and the tests have it read each file once."""
    with initialize_config_dir(str(CONFIG_DIR), version_base=None):
        compose("train", ["run_name=x", "experiment=digits_classifier"])
        assert compose("train", ["run_name=x"]).log.expect is None
