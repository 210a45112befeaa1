"""Runs on a real Slurm, a controller and two nodes on this machine: requeued, cancelled, out of time, on two nodes."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends import checkout, slurm_queue
from dev.kill_test import same
from run_files.checkpoint import load_checkpoint
from run_files.run_folder import RunFolder

NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
LACKING = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(LACKING), reason=f"no {', '.join(LACKING)}: apt-get install slurm-wlm munge brings them"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons are started as root"),
]
SCRIPT = Path(__file__).with_name("two_node_slurm.sh")
SMALL = [
    "trackio.enabled=false", "device=cpu", "evaluation=loss_only", "evaluation.samples=64", "evaluation.final_samples=64",
    "model.width=16", "model.depth=2", "dataloaders.epoch_size=1000", "batch_size=128", "log_every=2", "solver.steps=4",
    "num_workers=0", "callbacks=none",
]  # fmt: skip
SLURM = ["backend=slurm", "backend.gpus_per_node=0", "backend.cpus_per_node=1", "backend.time_minutes=10"]
SLOW_LOSS = """
import time
from losses.flow_matching_loss import FlowMatchingLoss

class SlowLoss(FlowMatchingLoss):
    def forward(self, *arguments, **settings):
        time.sleep(0.1)
        return super().forward(*arguments, **settings)
"""
LONGEST = 900  # seconds that anything here may take, on a busy machine


class Cluster:
    """A copy of this checkout, a working folder, and commands on both."""

    def __init__(self, place: Path) -> None:
        self.code, self.work = place / "checkout", place / "work"
        self.work.mkdir()
        for name, path in checkout.code().items():
            (self.code / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self.code / name)
        shutil.copyfile(checkout.ROOT / "pyproject.toml", self.code / "pyproject.toml")
        (self.code / "losses/slow_loss.py").write_text(SLOW_LOSS)
        mse = (self.code / "configs/loss/mse.yaml").read_text()
        (self.code / "configs/loss/slow.yaml").write_text(
            mse.replace("losses.flow_matching_loss.FlowMatchingLoss", "losses.slow_loss.SlowLoss")
        )

    def launch(self, *words: str, script: str = "launcher.py") -> str:
        done = subprocess.run(
            [sys.executable, str(self.code / script), *words], cwd=self.work, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *words: str) -> str:
        """Return the number of the job."""
        found = re.search(r"as job (\d+)", said := self.launch(*SLURM, *SMALL, *words))
        assert found, said
        return found[1]

    def status(self, name: str) -> dict[str, Any]:
        return RunFolder(self.work / "outputs/runs" / name).status.read()

    def wait(self, what: Callable[[], Any]) -> None:
        end = time.monotonic() + LONGEST
        while not what():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.2)

    def drained(self) -> bool:
        return not call("squeue", "--noheader")

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in (self.work / "outputs/submitted").glob("*.log"))


def call(*command: str) -> str:
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if "slurm" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes; pytest -m slurm asks for it")
    place = tmp_path_factory.mktemp("slurm")
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    try:
        subprocess.run([SCRIPT, "start", place / "daemons", port], check=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(place / "daemons/slurm.conf"))
            yield Cluster(place)
            subprocess.run(["scancel", "--user=root"], check=False)
    finally:
        subprocess.run([SCRIPT, "stop", place / "daemons"], check=True)


def test_a_disturbed_sweep_ends_as_one_left_alone(cluster: Cluster) -> None:
    words, chance = ["-m", "run_name=s", "seed=0,1,2,3,4,5", "epochs=80"], random.Random(0)
    job = cluster.submit(*words)
    listed = cluster.launch("list", script="scripts/runs.py")
    assert all(f"(job {job}_{task})" in listed for task in range(6)) and "pending" in listed
    disturbed = chance.sample(range(6), 4)
    left = list(disturbed)

    def disturb() -> bool:
        for task in list(left):
            if cluster.status(f"s_seed={task}").get("step", 0) > chance.randrange(300):
                call(
                    "scancel" if task == disturbed[0] else "scontrol", *["requeue"] * (task != disturbed[0]), f"{job}_{task}"
                )
                left.remove(task)
        return not left or cluster.drained()

    cluster.wait(disturb)
    cluster.wait(lambda: "requeued" in cluster.launch("list", script="scripts/runs.py") or cluster.drained())
    cluster.wait(cluster.drained)
    assert left == [] and cluster.logs().count("interrupted (stopped by SIGTERM)") == 4
    assert [cluster.status(f"s_seed={task}")["state"] for task in disturbed] == ["interrupted", *["finished"] * 3]
    again = cluster.launch(*SLURM, *SMALL, *words)
    assert again.count("has finished, skipped") == 5 and "an array" not in again
    cluster.wait(cluster.drained)
    cluster.launch(*SMALL, *words, "output_dir=alone")
    for task in range(6):
        theirs, mine = (
            load_checkpoint(cluster.work / f"{place}/ckpts/mlp/s_seed={task}_last.pt") for place in ("alone", "outputs")
        )
        assert mine["step"] == 640 and all(
            same(mine[key], theirs[key]) for key in ("network", "ema", "optimizer", "schedule")
        )


def test_a_later_edit_of_the_checkout_changes_nothing_and_one_of_the_frozen_code_is_refused(cluster: Cluster) -> None:
    waits = f"backend.setup=['PATH={Path(sys.executable).parent}:$PATH','while [ ! -e go ]; do sleep 0.2; done']"
    job = cluster.submit("run_name=edited", "max_steps=40", waits, "backend.container='env IN_CONTAINER=1'")
    loss = cluster.code / "losses/flow_matching_loss.py"
    before = loss.read_text()
    cluster.wait(lambda: "RUNNING" in call("squeue", "--noheader", "--format=%T", f"--jobs={job}"))
    time.sleep(1)
    loss.write_text("raise RuntimeError('edited')")
    (cluster.work / "go").touch()
    cluster.wait(cluster.drained)
    assert cluster.status("edited")["state"] == "finished"
    loss.write_text(before)
    (frozen,) = [path for path in (cluster.work / "outputs/submitted").iterdir() if (path / "launcher.py").is_file()]
    job = cluster.submit("run_name=tampered", "max_steps=40", "loss=slow")
    cluster.wait(lambda: cluster.status("tampered"))
    (frozen / "losses/flow_matching_loss.py").write_text("raise RuntimeError('edited')")
    call("scontrol", "requeue", job)
    cluster.wait(cluster.drained)
    assert (
        "is not what was submitted; submit again" in cluster.logs() and cluster.status("tampered")["state"] == "interrupted"
    )
    shutil.rmtree(frozen)


def test_two_nodes_train_one_run_which_goes_on_alone(cluster: Cluster) -> None:
    job = cluster.submit("run_name=two", "backend.nodes=2", "max_steps=200", "loss=slow")
    cluster.wait(lambda: cluster.status("two").get("step", 0) > 5)
    call("scontrol", "requeue", job)
    cluster.wait(cluster.drained)
    status = cluster.status("two")
    assert (status["state"], status["step"]) == ("finished", 200)
    assert "64 on each device" in cluster.logs() and "two interrupted (stopped by SIGTERM)" in cluster.logs()
    cluster.launch(*SLURM, "run_name=two", "resume=true", "max_steps=220")
    cluster.wait(cluster.drained)
    assert cluster.status("two")["step"] == 220 and "goes on with 1 devices instead of 2" in cluster.logs()


def test_at_the_time_limit_runs_are_saved_requeued_and_finished(cluster: Cluster) -> None:
    words = ["loss=slow", "max_steps=1100", "backend.time_minutes=2", "backend.save_seconds=15"]
    jobs = [cluster.submit(f"run_name=long{nodes}", f"backend.nodes={nodes}", *words) for nodes in (1, 2)]
    cluster.wait(cluster.drained)
    for name, job in zip(("long1", "long2"), jobs, strict=True):
        log = (cluster.work / f"outputs/submitted/{job}.log").read_text()
        steps = [int(step) for step in re.findall(rf"{name} interrupted \(stopped by SIGTERM\) at step (\d+)", log)]
        assert steps and steps == sorted(set(steps)) and log.count("goes back to the queue") == len(steps), log
        assert (cluster.status(name)["state"], cluster.status(name)["step"]) == ("finished", 1100)


def test_a_search_whose_launcher_is_killed_and_a_job_requeued_ends_as_one_here(cluster: Cluster) -> None:
    words = ["--search", "optuna", "run_name=t", "n=6", "sampler=random", "metric=eval/loss", "epochs=20", "loss=slow",
             *SMALL, "optimizer.lr=interval(1e-4,1e-2)", "model.dropout=interval(0,0.5)"]  # fmt: skip
    queued = [*words, "jobs=2", *SLURM, "backend.setup=['export OMP_NUM_THREADS=1']"]
    search = subprocess.Popen([sys.executable, str(cluster.code / "launcher.py"), *queued], cwd=cluster.work)
    cluster.wait(lambda: cluster.status("t_0001").get("step", 0) > 20)
    search.kill()
    search.wait()
    jobs = slurm_queue.queued_runs(cluster.work / "outputs")
    assert sorted(jobs) == ["t_0000", "t_0001"]
    call("scontrol", "requeue", jobs["t_0001"].number)
    said = cluster.launch(*queued)
    assert said.count("submitted as job") == said.count("begins") == 4 and "t_0001 interrupted" in cluster.logs()
    assert cluster.launch(*queued).count("begins") == 0
    cluster.launch(*words, f"jobs={os.cpu_count()}", "output_dir=alone")
    mine, theirs = ((cluster.work / place / "searches/t/trials.csv").read_text() for place in ("outputs", "alone"))
    assert mine == theirs and mine.count("finished") == 6
    for trial in range(6):
        name = f"ckpts/mlp/t_{trial:04d}_last.pt"
        one, other = (load_checkpoint(cluster.work / place / name) for place in ("outputs", "alone"))
        assert one["step"] == 160 and all(same(one[key], other[key]) for key in ("network", "ema", "optimizer", "schedule"))
