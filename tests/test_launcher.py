"""The front door: every mistake is one sentence, exit status 1, and nothing written."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import launcher
from backends.sweep import Sweep
from common.errors import UserError
from run_files.checkpoint import load_checkpoint
from run_files.result import OF_ANOTHER
from run_files.run_folder import RunFolder
from tests import forked
from tests.conftest import SMALL
from train import carry_out

ROOT = Path(__file__).resolve().parents[1]

MISTAKES = [
    ([], "run_name is missing"),
    (["run_name=a/b"], "cannot name files"),
    (["run_name=.."], "cannot name files"),
    (["run_name=..."], "cannot name files"),
    (["run_name='a b'"], "cannot name files"),
    (["run_name=" + "x" * 300], "cannot name files"),
    (["run_name=20261126"], "run_name=20261126 is read as a whole number; let a name have a letter, as in run_20261126"),
    (["run_name=x", "modle=mlp"], "did you mean model?"),
    (["run_name=x", "model=mpl"], "did you mean mlp?"),
    (["run_name=x", "loss/path=cosin"], "did you mean cosine?"),
    (["run_name=x", "solver=rk5"], "did you mean rk4?"),
    (["run_name=x", "epoch=3"], "did you mean epochs?"),
    (["run_name=x", "epochs=abc"], "epochs takes a whole number"),
    (["run_name=x", "epochs=1.5"], "epochs takes a whole number"),
    (["run_name=x", "epochs=true"], "epochs takes a whole number"),
    (["run_name=x", "epochs="], "epochs takes a whole number"),
    (["run_name=x", "epochs=0"], "at least 1"),
    (["run_name=x", "epochs=-1"], "at least 1"),
    (["run_name=x", "batch_size=0"], "at least 1"),
    (["run_name=x", "batch_size=[1,2]"], "batch_size takes a whole number"),
    (["run_name=x", "max_steps=0"], "at least 1"),
    (["run_name=x", "seed=-1"], "seed takes"),
    (["run_name=x", "seed=99999999999999999999"], "seed takes"),
    (["run_name=x", "optimizer.lr=-1"], "optimizer.lr takes a number above 0"),
    (["run_name=x", "optimizer.lr=nan"], "optimizer.lr takes a number above 0"),
    (["run_name=x", "optimizer.lr=fast"], "optimizer.lr takes a number"),
    (["run_name=x", "grad_clip=0"], "grad_clip takes"),
    (["run_name=x", "compile=yess"], "compile takes true or false"),
    (["run_name=x", "precision=fp8"], "precision takes"),
    (["run_name=x", "compile_mode=fast"], "compile_mode takes"),
    (["run_name=x", "device=tpu"], "device takes"),
    (["run_name=x", "--device"], "--device needs a value"),
    (["run_name=x", "--backend", "lokal"], "did you mean local?"),
    (["run_name=x", "--foo"], "there is no flag --foo"),
    (["run_name=x", "model=cnn"], "takes images"),
    (["run_name=x", "dataloaders=digits"], "takes vectors"),
    (["run_name=x", "dataloaders=array"], "dataloaders.path is missing"),
    (["run_name=x", "dataloaders=array", "dataloaders.path=/nowhere.npy"], "/nowhere.npy"),
    (["run_name=x", "--dry-run", "dataloaders=gaussian", "dataloaders.mean=[1,2,3]"],
     "has state_shape=[3], not [2] as dataloaders.state_shape says; set dataloaders.state_shape=[3]"),
    (["run_name=x", "--dry-run", "dataloaders=eight_gaussians", "dataloaders.std=[1,2]"], "dataloaders.std takes 8 numbers"),
    (["run_name=x", "-m", "dataloaders=gaussian", "dataloaders.mean=1,[1,2,3]"], "has state_shape=[3], not [2]"),
    (["run_name=x", "seed=1,2"], "add -m"),
    (["run_name=x", "=3"], "cannot read '=3'"),
    (["run_name=x", "epochs"], "cannot read 'epochs'"),
    (["run_name=x", "epochs=${nothing}"], "cannot be worked out"),
    (["run_name=x", "dataloaders.training=null"], "inside dataloaders.training, which has none; leave it"),
    (["run_name=x", "--dry-run", "monitor=eval/los"], "(did you mean eval/loss?)"),
    (["run_name=x", "resume=true"], "there is no run x"),
    (["run_name=x", "resume=maybe"], "resume takes true, false or force"),
    (["run_name=x", "eval_checkpoint=/nowhere.pt"], "eval_checkpoint=/nowhere.pt is not a file"),
    (["run_name=x", "init_from=/nowhere.pt"], "init_from=/nowhere.pt is not a file"),
    (["run_name=x", "ema.decay=1"], "ema.decay takes"),
    (["run_name=x", "loss.label_dropout=2"], "loss.label_dropout takes"),
    (["run_name=x", "solver.steps=0"], "solver.steps takes"),
    (["run_name=x", "model.width=abc"], "model.width takes a whole number"),
    (["-m", "run_name=x", "seed=1,two"], "seed takes a whole number"),
    (["-m", "run_name=x", "optimizer.lr=interval(1e-4,1e-2)"], "lists no values"),
    (["-m", "run_name=x", "model=glob(*)"], "lists no values"),
    (["-m", "run_name=x", "optimizer.lr=1e-3,0.001"], "two jobs of the sweep would be called x_lr=0.001"),
    (["-m", "run_name=x,X"], "two jobs of the sweep would be called x_run_name=x"),
    (["run_name=übung"], "cannot name files"),
    (["run_name=x", "tracker.enabled=false"], "trackio.enabled"),
    (["run_name=x", "epochs=null"], "epochs takes a whole number of at least 1, not null"),
    (["run_name=x", "max_steps=10000000000"], "at most 1,000,000,000"),
    (["run_name=x", "evaluation.batch_size=0"], "evaluation.batch_size takes a whole number of at least 1"),
    (["run_name=x", "dataloaders.state_shape=[0]"], "a list of whole numbers of at least 1, not [0]"),
    (["run_name=x", "dataloaders.state_shape=[]"], "a list of whole numbers of at least 1, not []"),
    (["run_name=x", "source.std=-1"], "source.std takes a number above 0"),
    (["run_name=x", "schedule.final=-1"], "schedule.final takes a number from 0 to 1"),
    (["run_name=x", "solver=dopri5", "solver.rtol=1e-300"], "solver.rtol takes a number of at least 1e-12"),
    (["run_name=x", "optimizer.lr=1e300"], "at most 3.4e+38"),
    (["run_name=x", "+optimizer.eps=-1"], "optimizer.eps takes a number above 0"),
    (["run_name=x", "optimizer=sgd", "optimizer.momentum=-5"], "optimizer.momentum takes"),
    (["run_name=x", "model.time_frequencies=[abc]"], "model.time_frequencies takes a list of numbers, or null"),
    (["run_name=x", "dataloaders=gaussian", "dataloaders.mean=[a]"], "takes a number or a list of numbers"),
    (["run_name=x", "dataloaders.std=[.1,.2]"], "dataloaders.std takes 5 numbers above 0"),
    (["run_name=x", "dataloaders.weights=[1,2]"], "dataloaders.weights takes 5 numbers above 0"),
    (["run_name=x", "optimizer=sgd", "optimizer.momentum=0"], "torch.optim.SGD does not take these settings: Nesterov"),
    (["run_name=x", "model.width=90000", "model.depth=50"], "weights of this model need at least"),
    (["run_name=x", "log.targets={eval/loss: abc}"], "log.targets takes a group of numbers by name"),
    (["run_name=x", "optimizer=5", "loss.path.x=1"], "optimizer=5 does not exist"),
    (["run_name=x", "loss.coupling=minibatch_ot"], "is chosen with a slash: write loss/coupling=minibatch_ot; "),
    (["run_name=x", "loss.path=cosin"], "write loss/path=cosine; the choices are cosine, linear"),
    (["run_name=x", "+evaluation.metrics.w2={_target_: losses.paths.LinearPath}"], "is no class of a metric; give one"),
    (["run_name=x", "log=null"], "log takes a group of settings"),
    (["run_name=x", "trackio=null"], "trackio takes a group of settings"),
    (["run_name=x", "dataloaders.training=5"], "dataloaders.training takes a group of settings"),
    (["run_name=x", "output_dir='out\udcff'"], "holds bytes that are no text in utf-8; rename the file or folder"),
]  # fmt: skip


def files_below(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_a_mistake_is_one_sentence_and_writes_nothing(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = launcher.main([f"output_dir={tmp_path / 'outputs'}", *words])
    said = capsys.readouterr().err
    assert status == 1
    assert sentence in said and said.count("\n") == 1 and "Traceback" not in said
    assert files_below(tmp_path) == []


@pytest.mark.process
def test_mistakes_are_found_before_torch_is_imported():
    code = (
        "import sys, launcher; from scripts import report\n"
        "wrong = ['run_name=x', 'epochs=0'], ['--prove', 'loss=mse', 'x=3'], ['--prove', 'nowhere.py:f']\n"
        "print([*map(launcher.main, wrong), report.main(['nobody'])], 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout == "[1, 1, 1, 1] False\n", result.stderr


@pytest.mark.process
def test_help_names_every_group_and_choice_without_importing_hydra_or_torch():
    code = (
        "import sys, launcher; launcher.main(['--help']); "
        "sys.exit(10 if {'torch', 'hydra', 'omegaconf'} & set(sys.modules) else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for file in (ROOT / "configs").rglob("*.yaml"):
        if file.parent.name != "configs":
            line = next(row for row in result.stdout.splitlines() if f" {file.stem} " in f"{row} ".replace("|", " "))
            assert line


@pytest.mark.process
def test_importing_train_leaves_out_what_only_some_runs_need():
    code = (
        "import sys, train, training.assemble, backends.local, scripts.modal_app, models.vae.stable_diffusion_vae\n"
        "late = {'diffusers', 'modal', 'cleanfid', 'matplotlib', 'trackio', 'sklearn', 'torchdiffeq', 'scipy.optimize'}\n"
        "print(sorted(late & set(sys.modules)))\n"
        "from backends.submission import prepare; prepare(['run_name=x']); print('modal' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["[]", "False"]


@pytest.mark.process
def test_cfg_job_prints_the_composed_configuration():
    command = [sys.executable, "launcher.py", "--cfg", "job", "run_name=x", "--device", "cpu", "epochs=3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "epochs: 3" in result.stdout and "device: cpu" in result.stdout and "learning" not in result.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--cfg", "--cfg takes job, hydra, all, not ''"), ("--cfg nope", "--cfg takes job, hydra, all, not 'nope'"),
        ("--info=no epochs=3", "--info takes all, config, defaults"), ("-p optimizer", "-p says how something is shown"),
        ("-r run_name=x epochs=0", "-r says how something is shown; add --cfg job"), ("-sc", "-sc takes install=bash"),
        ("-m run_name=x --cfg job seed=1,2", "--cfg shows something and trains nothing; leave -m out"),
    ],
)  # fmt: skip
def test_hydras_flags_are_refused_in_our_words(words, sentence, capsys):
    assert launcher.main(words.split()) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_hydras_flags_may_stand_anywhere():
    words = launcher.in_hydras_order(["a=1", "--cfg", "job", "b=2", "--resolve"])
    assert words == ["--cfg", "job", "--resolve", "a=1", "b=2"]
    assert launcher.in_hydras_order(["b=1,2", "-m", "a=1"]) == ["-m", "b=1,2", "a=1"]
    assert launcher.in_hydras_order(["run_name=x", "--hydra-help"]) == ["--hydra-help"]
    assert launcher.in_hydras_order(["--info", "epochs=3"]) == ["--info", "all", "epochs=3"]
    assert launcher.in_hydras_order(["a=1", "-i", "defaults"]) == ["-i", "defaults", "a=1"]


def test_flags_become_overrides_in_their_places_so_the_later_one_wins():
    words = launcher.with_flags_as_overrides(["--device", "cpu", "run_name=x", "device=cuda", "--device=mps"])
    assert words == ["device=cpu", "run_name=x", "device=cuda", "device=mps"]


def test_a_name_that_exists_is_refused_with_what_to_do(small_run, tmp_path, capsys):
    folder = small_run("x")
    before = {path: path.read_bytes() for path in files_below(folder) if path.is_file()}
    assert launcher.main(["run_name=x", f"output_dir={folder}"]) == 1
    said = capsys.readouterr().err
    assert "resume=true" in said and "overwrite=true" in said
    assert before == {path: path.read_bytes() for path in files_below(folder) if path.is_file()}


def test_overwrite_moves_the_old_run_aside(small_run):
    folder = small_run("x")
    old_metrics = (folder / "runs/x/metrics.jsonl").read_text()
    small_run("x", "overwrite=true", "seed=1")
    moved = [path for path in (folder / "runs").iterdir() if path.name.startswith("x.old-")]
    assert len(moved) == 1 and (moved[0] / "metrics.jsonl").read_text() == old_metrics
    assert len(list((folder / "ckpts/mlp").glob("x.old-*_last.pt"))) == 1
    assert (folder / "runs/x/metrics.jsonl").read_text() != old_metrics


def test_runs_moved_aside_in_one_second_lose_nothing(small_run, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20300101-000000")
    for seed in range(4):
        folder = small_run("x", "overwrite=true", "max_steps=2", f"seed={seed}")
    names = ["x", *(f"x.old-20300101-000000{n}" for n in ("", ".2", ".3"))]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == names
    seeds = [load_checkpoint(folder / f"ckpts/mlp/{name}_last.pt")["config"]["seed"] for name in names]
    assert seeds == [3, 0, 1, 2] and len(list(folder.rglob("x.old-*.pt"))) == 9


@pytest.mark.process
def test_a_sweep_names_each_job_and_skips_what_has_finished(tmp_path):
    small = (
        "trackio.enabled=false evaluation.samples=16 evaluation.final_samples=16 max_steps=2 model.width=8 callbacks=none"
        " evaluation=loss_only"
    )
    command = ["launcher.py", "run_name=s", "-m", "seed=0,1", f"output_dir={tmp_path}", *small.split()]
    first = forked.run(*command, cwd=ROOT)
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["s_seed=0", "s_seed=1"]
    status = tmp_path / "runs/s_seed=1/status.json"
    status.write_text(status.read_text().replace('"finished"', '"running"').replace('"step": 2', '"step": 1'))
    resumed = forked.run(*command, cwd=ROOT)  # of the one that was killed
    assert resumed.stdout.count("has finished") == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("status.json")}
    again = forked.run(*command, cwd=ROOT)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("status.json")}
    assert again.stdout.count("has finished") == 2
    tables = [said.stdout.partition("sweep: 2 jobs")[2].splitlines()[1:3] for said in (first, again)]
    scores = [json.loads((tmp_path / f"runs/{name}/status.json").read_text())["scores"]["eval/loss"] for name in names]
    assert tables[0] == tables[1] and tables[0][0].split()[:3] == ["run", "seeds", "state"]
    mean = sum(scores) / 2
    assert tables[0][1].split()[:7] == ["*", "s_seed=*", "0,", "1", "finished", f"{mean:.4g}", "±"]
    assert "best: python launcher.py run_name=s_best output_dir" in again.stdout


def test_two_sweeps_of_one_name_share_their_jobs(small_run, tmp_path, capsys):
    """The second finds a job trained right now, one finished meanwhile and one killed before its first save."""
    words = [f"output_dir={tmp_path}", "run_name=s", *SMALL, "max_steps=2", "seed=0,1,2"]
    first, second = Sweep(words), Sweep(words)
    trained, finished, killed = first.prepared
    held = RunFolder(tmp_path / "runs/s_seed=0")
    held.lock.acquire()
    first.run(finished)
    first.run(killed)
    status = RunFolder(tmp_path / "runs/s_seed=2").status
    status.write("running", 0, 0, 0.0)
    for save in (tmp_path / "ckpts").rglob("s_seed=2*"):
        save.unlink()
    before = {path: path.read_bytes() for path in files_below(tmp_path) if path.is_file() and "seed=1" in str(path)}
    assert [second.run(job).state for job in first.prepared] == [OF_ANOTHER, "finished", "finished"]
    assert before == {path: path.read_bytes() for path in before} and len(list((tmp_path / "runs").glob("*.old-*"))) == 1
    said = capsys.readouterr().out
    assert "s_seed=0: is trained by another process, skipped" in said and "s_seed=1: has finished, skipped" in said
    assert OF_ANOTHER in second.closing_table() and OF_ANOTHER in Sweep(words).describe()
    held.release()
    assert second.run(trained).state == "finished"


def test_what_another_process_saves_at_the_last_moment_is_not_moved_aside(small_run, tmp_path):
    folder = small_run("x", "max_steps=2")
    with pytest.raises(UserError, match="exists already"):
        small_run("x", "max_steps=2", "overwrite=unsaved")
    run = RunFolder(folder / "runs/x")
    config = run.read_config() | {"overwrite": "unsaved", "resume": False}
    with pytest.raises(UserError, match="exists already"):
        carry_out(config)
    assert [path.name for path in (folder / "runs").iterdir()] == ["x"] and not run.lock.is_held()


@pytest.mark.parametrize("backend", sorted(path.stem for path in (ROOT / "configs/backend").glob("*.yaml")))
def test_a_dry_run_says_what_would_run_where_and_writes_nothing(backend, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"backend={backend}", "run_name=x", "seed=0,1", "-m", "--dry-run", "dataloaders=moons"]
    assert launcher.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("mlp learns moons by mse") == 2 and f"backend      {backend}" in said and "where " in said
    assert "outputs/runs/x_seed=0" in said and "outputs/runs/x_seed=1" in said
    assert launcher.main(["run_name=x", "--dry-run", "epochs=0"]) == 1
    assert files_below(tmp_path) == []


def test_a_bug_is_a_short_traceback_that_ends_with_its_file_and_line(monkeypatch, capsys) -> None:
    """Twenty calls deep, through a library: what is shown are the last lines of the caller's own code."""

    def deep(levels: int) -> int:
        return max(range(3), key=lambda _: deep(levels - 1) if levels else textwrap.fill(None))  # type: ignore[arg-type]

    monkeypatch.setattr(launcher, "launch", lambda _: deep(20))
    assert launcher.main(["run_name=x"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback, without the lines of libraries") and len(lines) <= 22
    assert not any("textwrap.py" in line for line in lines)
    assert re.fullmatch(rf"AttributeError in {re.escape(__file__)}, line \d+", lines[-1])
