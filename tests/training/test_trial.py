"""A part of the user's own that breaks its contract: one sentence naming its class, before training and before any file of
an older run is moved.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from configuration.build import build
from evaluation.classifier_evaluator import ClassifierEvaluator, confusion_matrix
from run_files.run_folder import RunFolder

MINE = """
import torch
from dataloaders.synthetic import SyntheticDataset
from evaluation.metrics.base_metric import Metric, Score
from evaluation.metrics.two_sample import TwoSampleMetric
from losses.couplings import Coupling
from losses.flow_matching_loss import FlowMatchingLoss
from losses.time_samplers import TimeSampler
from losses.weightings import Weighting
from models.flow_matching.mlp import MLP
from solvers.base_solver import BaseSolver

class Wide(MLP):
    def forward(self, z, label=None): return torch.cat([super().forward(z, label)] * 2, 1)
class Narrow(MLP):
    def forward(self, z, label=None): return super().forward(z, label)[:, :1]   # broadcasts: a loss is made of it
class Nothing(MLP):
    def forward(self, z, label=None): super().forward(z, label)
class Broken(MLP):
    def forward(self, z, label=None): return z @ torch.zeros(7, 7)
class Unlabelled(MLP):
    def forward(self, z): return super().forward(z)
class Classes(SyntheticDataset):
    def __init__(self, **common): super().__init__((2,), 5, **common)
    def draw(self, count, generator): return torch.zeros(count, 3), torch.zeros(count, dtype=torch.int64)
class Alone(Classes):
    def draw(self, count, generator): return torch.randn(count, 2, generator=generator)
class Double(Classes):
    def draw(self, count, generator): return torch.zeros(count, 2).double(), torch.zeros(count, dtype=torch.int64)
class Floats(Classes):
    def draw(self, count, generator): return torch.zeros(count, 2), torch.zeros(count)
class NoLoss(FlowMatchingLoss):
    def forward(self, batch, teacher=None): super().forward(batch, teacher)
class Detached(FlowMatchingLoss):
    def forward(self, batch, teacher=None): return super().forward(batch, teacher)["loss"].detach()
class Misspelt(FlowMatchingLoss):
    def forward(self, batch, teacher=None): return batch.nothing
class Flat(FlowMatchingLoss):
    def velocity(self, x, t, label=None): return super().velocity(x, t, label).sum(1)
class Two(Coupling):
    def pair(self, x0, x1, label, generator): return x0, x1
class One(TimeSampler):
    def sample(self, n, generator): return torch.rand(n), torch.rand(n, 1)
class Rows(Weighting):
    def __call__(self, squared_error, a=None): return squared_error
class Lost(BaseSolver):
    def solve(self, field, x0, times=None, callback=None): pass
class Shifted(BaseSolver):
    def solve(self, field, x0, times=None, callback=None): return self.evaluate(field, x0)
class Number(Metric):
    def compute(self, generation): return 1.0
class Strange(TwoSampleMetric):
    name = "eval/strange"
    def distance(self, x, y): return x - y
"""
SCORED = ["evaluation=generator", "evaluation.samples=50"]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "mine", None)
    del sys.modules["mine"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["model._target_=mine.Wide"], r"the model \(Wide\) returned a tensor of shape \[2, 4\]; .* shape \[2, 2\]$"),
     (["model._target_=mine.Narrow"], r"the model \(Narrow\) returned a tensor of shape \[2, 1\]"),
     (["model._target_=mine.Nothing"], r"the model \(Nothing\) returned None"),
     (["model._target_=mine.Broken"], r"\(Broken\) fails: RuntimeError.* in .*mine\.py, line \d+: .*zeros\(7, 7\)$"),
     (["model._target_=mine.Unlabelled"], r"\(Unlabelled\) fails: TypeError.*arguments.* defined in .*mine\.py$"),
     (["dataloaders._target_=mine.Classes"], r"the data \(Classes\) returned a tensor of shape \[2, 3\]"),
     (["dataloaders._target_=mine.Alone"], r"the data \(Alone\) returned "),
     (["dataloaders._target_=mine.Double"], r"the data \(Double\) gave states of torch\.float64"),
     (["dataloaders._target_=mine.Floats"], r"the data \(Floats\) gave .* as labels; num_classes=5 asks for"),
     (["loss._target_=mine.NoLoss"], r"forward returned None; it must return a dict"),
     (["loss._target_=mine.Detached"], r"the loss of Detached has no gradient"),
     (["loss._target_=mine.Misspelt"], r"the loss \(Misspelt\) fails: .*'nothing', in .*mine\.py"),
     (["loss._target_=mine.Flat"], r"the objective's velocity \(Flat\) returned a tensor of shape \[2\]"),
     (["loss.coupling._target_=mine.Two"], r"the coupling \(Two\) returned 2 values .* must return x0, x1, label$"),
     (["loss.time_sampler._target_=mine.One"], r"the time sampler \(One\) returned a tensor of shape \[2, 1\]"),
     (["loss.weighting._target_=mine.Rows"], r"the weighting \(Rows\) returned a tensor of shape \[2\]"),
     (["monitor=eval/los"], r"monitor=eval/los is not among .*metrics \(did you mean eval/loss\?\); use one of eval/loss, "),
     (["solver._target_=mine.Lost"], r"the solver \(Lost\) returned None"),
     (["solver._target_=mine.Shifted"], r"the solver \(Shifted\) fails: TypeError.* in .*mine\.py"),
     ([*SCORED, "+evaluation.metrics.mine={_target_:mine.Number}"], r"the metric mine \(Number\) gives 1\.0; compute"),
     ([*SCORED, "+evaluation.metrics.mine={_target_:mine.Strange}"], r"mine \(Strange\) gives a tensor of shape \[2, 2\]")],
)  # fmt: skip
def test_a_part_that_breaks_its_contract_is_named_before_any_file_is_moved(
    words: list[str], sentence: str, mine: None, small_run: Callable[..., Path], tmp_path: Path
) -> None:
    kept = tmp_path / "outputs/runs/x/config.yaml"
    kept.parent.mkdir(parents=True)
    kept.write_text("an older run")
    if words[0].startswith("dataloaders"):
        words = [*words, "~dataloaders.centroids", "~dataloaders.std", "~dataloaders.weights"]
    with pytest.raises(UserError, match=sentence) as raised:
        small_run("x", "overwrite=true", "max_steps=1", *words)
    assert "\n" not in str(raised.value)
    assert kept.read_text() == "an older run" and [path.name for path in (tmp_path / "outputs/runs").iterdir()] == ["x"]


@pytest.mark.slow
def test_every_number_of_an_evaluation_may_be_monitored(small_run: Callable[..., Path]) -> None:
    folder = RunFolder(small_run("x", "max_steps=2", "loss=meanflow", "evaluation=generator") / "runs/x")
    found = {name for row in folder.metrics.read() for name in row if name.startswith(("eval/", "oracle/"))}
    label, classifier = torch.arange(60) % 10, ClassifierEvaluator(60, 60)
    scores = classifier.scores(torch.randn(60, 10), label, confusion_matrix(label, label.flip(0), 10))
    of_classes = {name for score in scores for name in score.values()}
    for evaluator, names in ((build(folder.read_config()["evaluation"]), found), (classifier, of_classes)):
        assert len(names) > 15
        for name in names:
            evaluator.check_monitor(name)
        with pytest.raises(UserError, match="monitor=oracle/nothing is not among"):
            evaluator.check_monitor("oracle/nothing")


def test_the_trial_leaves_weights_and_random_numbers_as_they_are(small_run, monkeypatch) -> None:
    import torch

    from training.trial import RowSeconds

    digits = ["dataloaders=digits", "dataloaders.epoch_size=1438"]
    words = ["max_steps=2", *digits, "loss=cross_entropy", "evaluation=classifier"]
    words += ["model=small_cnn_classifier", "model.width=8", "model.dropout=0.3", "model.norm=batch"]
    with_trial = small_run("x", *words, output="with")
    monkeypatch.setattr("train.try_parts", lambda run: RowSeconds(1e-3, 1e-3))
    without = small_run("x", *words, output="without")
    from run_files.checkpoint import load_checkpoint

    one, two = (load_checkpoint(f / "ckpts/small_cnn_classifier/x_last.pt")["network"] for f in (with_trial, without))
    assert all(torch.equal(one[key], two[key]) for key in one)
