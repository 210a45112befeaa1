"""Runs are sent to Slurm, without Slurm: what is submitted, what is listed, and what is refused."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import launcher
from backends import checkout, slurm, slurm_queue
from backends.submission import prepare
from backends.sweep import Sweep
from common.errors import UserError
from run_files.run_folder import RunFolder
from scripts import runs

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = ["--backend", "slurm", "backend.gpus_per_node=0", "backend.cpus_per_node=1"]
JOBS = ("7_0|RUNNING|0|s   ", "7_1|PENDING|1|s   ", "7_2|PENDING|0|s", "9|RUNNING|0|another", "11|PENDING|0|alone")
SQUEUE = "".join(f"{job}|(null)|/elsewhere/%j.log   \n" for job in JOBS)

Submitted = list[tuple[list[str], str, dict[str, str]]]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Submitted:
    """A Slurm that notes what sbatch is given, in the working folder tmp_path; it answers as a cluster of two nodes."""
    submitted: Submitted = []

    def asked(command: list[str], given: str | None = None, environment: dict[str, str] | None = None) -> str:
        if command[0] == "sbatch" and "--parsable" in command:
            submitted.append((command, given or "", environment or {}))
            return f"{6 + len(submitted)};cluster\n"
        year = 6109 if "--nodes=4" in (given or "") else 2026
        answers = {"sinfo": "main\ngpu\n", "squeue": SQUEUE, "sbatch": f"sbatch: Job 8 to start at {year}-11-26T03:14:24\n"}
        return answers[command[0]]

    monkeypatch.chdir(tmp_path)
    for module in (slurm, slurm_queue):
        monkeypatch.setattr(module, "lacking_slurm", lambda: None)
        monkeypatch.setattr(module, "asked", asked)
    few = {"launcher.py": ROOT / "launcher.py", "configs/x.yaml": ROOT / "configs/train.yaml"}
    for module in (checkout, slurm):
        monkeypatch.setattr(module, "code", lambda: few)
    return submitted


def run_lines(script: str) -> list[str]:
    return [line for line in script.splitlines() if ") run=(" in line]


def test_a_run_is_submitted_as_the_dry_run_printed_it(cluster, tmp_path, capsys):
    words = [*ON_CPU, "run_name=alone2", "backend.partition=gpu", "backend.account=me", "backend.time_minutes=90",
             "backend.memory_gb=1.5", "backend.constraint='a100&nvlink'",
             "backend.setup=['module load cuda','export A=\"b c\"']",
             "log.source='it\\'s $HOME; `ls`'"]  # fmt: skip
    assert launcher.main([*words, "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert launcher.main(words) == 0
    ((command, script, _),) = cluster
    assert printed.endswith(f"checkpoints  outputs/ckpts/mlp\n{script}\n") and command == ["sbatch", "--parsable"]
    options = ["job-name=alone2", "partition=gpu", "account=me", "time=90", "nodes=1", "ntasks-per-node=1",
               "cpus-per-task=1", "mem=1536M", "constraint='a100&nvlink'", "signal=B:USR1@120", "open-mode=append",
               f"output={tmp_path}/outputs/submitted/%j.log"]  # fmt: skip
    lines = script.splitlines()
    assert {f"#SBATCH --{option}" for option in options} <= set(lines) and "gpus" not in script and "array" not in script
    assert lines.index("module load cuda") + 1 == lines.index('export A="b c"') < lines.index("esac")
    place = tmp_path / "outputs/submitted" / checkout.digest(checkout.code())[:16]
    assert f"code={place}" in lines and (place / "launcher.py").read_bytes() == (ROOT / "launcher.py").read_bytes()
    command = f'{run_lines(script)[0][3:-3]}; printf "%s\\n" "${{run[@]}}"'
    shell = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert shell.stdout.splitlines() == ["run_name=alone2", "log.source='it\\'s $HOME; `ls`'", "devices=1"]
    note = json.loads((tmp_path / "outputs/submitted/jobs/7.json").read_text())
    assert note["runs"] == {"alone2": prepare(note["runs"]["alone2"])["overrides"]} and not note["array"]
    said = capsys.readouterr().out
    assert (
        "as job 7\n" in said
        and "runs.py list" in said
        and "tail -F outputs/submitted/7.log" in said
        and "scancel 7\n" in said
    )


def test_variables_of_sbatch_do_not_reach_it(cluster, monkeypatch):
    for name in ("SBATCH_PARTITION", "SLURM_JOB_ID", "SLURM_CONF", "HOME"):
        monkeypatch.setenv(name, "/here")
    assert launcher.main([*ON_CPU, "run_name=x"]) == 0
    assert {name for name in cluster[0][2] if name.startswith(("SBATCH", "SLURM"))} == {"SLURM_CONF"} and "HOME" in cluster[
        0
    ][2]


def test_a_sweep_is_one_array_of_what_is_left_to_do(cluster, tmp_path, capsys):
    slurm_queue.note_submission(tmp_path / "outputs", "7", "s", {"s_seed=0": [], "s_seed=5": [], "s_seed=9": []})
    words = [*ON_CPU, "-m", "run_name=s", "seed=0,1,2,3"]
    finished = RunFolder(tmp_path / "outputs/runs/s_seed=1")
    overrides = Sweep(["backend=slurm", *words[2:4], *words[5:]]).left()[1]["overrides"]
    finished.write_config(yaml.safe_dump({"overrides": overrides}), [])
    finished.status.write("finished", 5, 1, 1.0)
    cluster_before = (tmp_path / "outputs/submitted/jobs/7.json").rename(tmp_path / "outputs/submitted/jobs/1.json")
    assert launcher.main(words) == 0
    ((_, script, _),) = cluster
    assert "#SBATCH --array=0-1" in script and "%A_%a.log" in script and cluster_before.is_file()
    given = [shlex.split(line[line.index("(") + 1 : line.rindex(")")]) for line in run_lines(script)]
    assert [words[-3:] for words in given] == [[f"seed={n}", f"run_name='s_seed={n}'", "devices=1"] for n in (2, 3)]
    said = capsys.readouterr().out
    assert "s_seed=1: has finished, skipped" in said and "s_seed=0: is running (job 7_0), skipped" in said
    assert "an array of 2 runs" in said and "jobs, *" not in said


def test_an_array_whose_submitter_was_killed_before_it_noted_the_job_is_found(cluster, tmp_path, monkeypatch, capsys):
    words, note, asked = [*ON_CPU, "-m", "run_name=s", "seed=5,6"], slurm.note_submission, slurm.asked

    def killed(output_dir: Path, number: str, *rest: object) -> None:
        if number == "7":
            raise KeyboardInterrupt
        note(output_dir, number, *rest)

    def queue(command: list[str], *rest: object) -> str:
        comment = cluster[0][1].partition("#SBATCH --comment=")[2].splitlines()[0] if cluster else ""
        rows = [f"21_{task}|PENDING|0|s |{comment} |/elsewhere/x.log\n" for task in range(2)]
        return "".join(rows) if command[0] == "squeue" and cluster else asked(command, *rest)

    monkeypatch.setattr(slurm, "note_submission", killed)
    with pytest.raises(KeyboardInterrupt):
        launcher.main(words)
    monkeypatch.setattr(slurm, "note_submission", note)
    monkeypatch.setattr(slurm_queue, "asked", queue)
    assert launcher.main(words) == 0 and len(cluster) == 1
    said = capsys.readouterr().out
    assert "s_seed=5: is pending (job 21_0), skipped" in said and "s_seed=6: is pending (job 21_1), skipped" in said


def test_code_that_is_cleared_while_a_run_is_submitted_leaves_no_job(cluster, tmp_path, monkeypatch, capsys):
    note, calls = slurm.note_submission, []

    def cleared(*given: object) -> None:
        note(*given)
        shutil.rmtree(tmp_path / "outputs/submitted" / checkout.digest(checkout.code())[:16], ignore_errors=True)

    monkeypatch.setattr(slurm, "note_submission", cleared)
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, **_: calls.append(command))
    assert launcher.main([*ON_CPU, "run_name=y"]) == 1 and calls == [["scancel", "7"]]
    assert "was cleared or changed while runs were being submitted" in capsys.readouterr().err


def test_runs_list_shows_what_waits_and_runs(cluster, tmp_path, capsys, monkeypatch):
    note = slurm_queue.note_submission
    note(tmp_path / "outputs", "7", "s", {"s_a": [], "s_b": [], "s_c": []})
    note(tmp_path / "outputs", "9", "mine", {"mine": []})  # a number that Slurm has given again
    note(tmp_path / "outputs", "11", "alone", {"alone": []})
    RunFolder(tmp_path / "outputs/runs/s_b").status.write("interrupted", 5, 1, 1.0)
    assert runs.main(["list"]) == 0
    states = {line.split()[0]: " ".join(line.split()[1:4]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert states == {
        "s_b": "requeued (job 7_1)",
        "s_a": "running (job 7_0)",
        "s_c": "pending (job 7_2)",
        "alone": "pending (job 11)",
    }
    assert launcher.main([*ON_CPU, "run_name=alone"]) == 1
    assert "run alone is pending (job 11) already; wait, or end it by `scancel 11`" in capsys.readouterr().err

    def refuse(*_: object) -> str:
        raise UserError("Slurm's controller does not answer")

    monkeypatch.setattr(slurm_queue, "asked", refuse)
    assert runs.main(["list"]) == 0
    said = capsys.readouterr()
    assert (
        "jobs are not shown: Slurm's controller" in said.err and "s_b  interrupted" in said.out and "alone" not in said.out
    )


@pytest.mark.parametrize("kind", ["pipe", "link", "no object", "runs a number", "no job"])
def test_notes_of_jobs_may_be_anything(kind, cluster, tmp_path, capsys):
    slurm_queue.note_submission(tmp_path / "outputs", "11", "alone", {"alone": []})
    other = tmp_path / "outputs/submitted/jobs/12.json"
    if kind == "pipe":
        os.mkfifo(other)
    elif kind == "link":
        (tmp_path / "note").write_text('{"runs": {"secret": []}, "job": "9", "name": "another", "array": false}')
        other.symlink_to(tmp_path / "note")
    else:
        other.write_text({"no object": "[", "runs a number": '{"runs": 3}', "no job": '{"runs": {"x": []}}'}[kind])
    assert runs.main(["list"]) == 0
    said = capsys.readouterr()
    refused = kind in ("pipe", "link")
    assert "secret" not in said.out and ("jobs are not shown" in said.err) == refused
    assert ("alone  pending (job 11)" in said.out) == (not refused)


MISTAKES = [
    (["backend.time_minutes=2:00:00"], "backend.time_minutes takes a whole number from 1 to 525600"),
    (["backend.time_minutes=1.5"], "backend.time_minutes takes a whole number"),
    (["backend.time_minutes=0"], "backend.time_minutes takes a whole number from 1"),
    (["backend.time_minutes=3"], "use at least 4"),
    (["backend.save_seconds=3"], "backend.save_seconds takes a whole number from 15"),
    (["backend.nodes=0"], "backend.nodes takes a whole number from 1"),
    (["backend.nodes=two"], "backend.nodes takes a whole number"),
    (["backend.gpus_per_node=-1"], "backend.gpus_per_node takes a whole number from 0"),
    (["backend.cpus_per_node=0"], "backend.cpus_per_node takes a whole number from 1"),
    (["backend.memory_gb=0"], "backend.memory_gb takes a number above 0"),
    (["backend.memory_gb=4G"], "backend.memory_gb takes a number above 0"),
    (["backend.partition=nope"], "backend.partition=nope does not exist; Slurm has main, gpu"),
    (["backend.partition=gpus"], "did you mean gpu"),
    (["backend.partition='a b'"], "backend.partition takes a name as `sinfo` shows, no spaces"),
    (["backend.account='me\n#SBATCH --uid=0'"], "backend.account takes a name"),
    (["backend.constraint='$(id)'"], "backend.constraint takes a name"),
    (["backend.setup=module"], "backend.setup takes a list of words"),
    (["backend.setup=['#SBATCH --exclusive']"], "no option of sbatch, not '#SBATCH --exclusive'"),
    (["backend.container='apptainer \"exec']"], "cannot read"),
    (["backend.container='apptainer \"exec'"], "close its quotes"),
    (["backend.container=''"], "the words before python"),
    (["devices=1", "backend.nodes=2"], "leave devices out, or use devices=2"),
    (["devices=2", "backend.gpus_per_node=4"], "leave devices out, or use devices=4"),
    (["backend.gpus_per_node=1", "device=cpu"], "would leave the node's GPUs idle"),
    (["device=cuda"], "is not in a job without GPUs"),
    (["backend.nodes=3", "batch_size=1024"], "batch_size=1023"),
    (["backend.gpu=H100"], "backend.gpu is a setting of backend=modal"),
    (["--backend", "slrum"], "did you mean slurm"),
    (["-m", "backend.nodes=1,2", "seed=0"], "backend.nodes varies; submit a sweep for each value"),
    (["-m", "output_dir=a,b"], "output_dir varies"),
    (["backend.nodes=2", "loss=reflow", "teacher='loss=mse'", "loss.coupling.teacher=x_teacher"], "say backend.nodes=1"),
    (["backend.nodes=4"], "no nodes of the default partition can ever start this job"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_wrong_settings_are_refused_in_a_sentence_before_anything_is_written(cluster, words, sentence, tmp_path, capsys):
    for more in ([], ["--dry-run"]):
        assert launcher.main([*ON_CPU, "run_name=x", *words, *more]) == 1
        said = capsys.readouterr().err
        assert sentence in said.replace("\n#", "#") and said.count("\n") == 1 and list(tmp_path.iterdir()) == []
    assert cluster == []


SAID = [
    ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
     "backend.account"),
    ("sbatch: error: Batch job submission failed: Invalid feature specification", "see backend.constraint"),
    ("sbatch: error: Memory specification can not be satisfied\nsbatch: error: Batch job submission failed: Requested node "
     "configuration is not available", "backend.nodes, gpus_per_node"),
    ("sbatch: error: Invalid generic resource (gres) specification", "0 asks for none"),
    ("sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
     "backend.time_minutes"),
    ("sbatch: error: If munged is up, restart with --num-threads=10\nsbatch: error: Munge encode failed: Failed to access "
     '"/run/munge/munge.socket.2": No such file or directory\nsbatch: error: Batch job submission failed: Protocol '
     "authentication error", "munge does not answer, so Slurm cannot tell who you are (Protocol authentication error)"),
    ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
     "controller does not answer"),
    ("sinfo: fatal: Could not establish a configuration source", "controller does not answer"),
    ("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy", "sbatch refuses: Job violates"),
    ("", "no reason given"),
]  # fmt: skip


@pytest.mark.parametrize(("said", "sentence"), SAID, ids=[sentence for _, sentence in SAID])
def test_what_slurm_refuses_becomes_one_sentence(said, sentence, monkeypatch):
    done = subprocess.CompletedProcess(["sbatch"], 1, "", said)
    monkeypatch.setattr(slurm_queue.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError) as refused:
        slurm_queue.asked(["sbatch"])
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_without_slurm_one_sentence_and_a_dry_run_that_prints_the_script_all_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert launcher.main([*ON_CPU, "run_name=x"]) == 1
    said = capsys.readouterr().err
    assert "there is no Slurm here" in said and said.count("\n") == 1
    assert launcher.main([*ON_CPU, "run_name=x", "--dry-run"]) == 0 and list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    assert "slurm        there is no Slurm here" in said and "#SBATCH --job-name=x" in said


def test_a_controller_that_does_not_answer_refuses_the_run_and_not_the_dry_run(cluster, tmp_path, capsys, monkeypatch):
    def refuse(*_: object) -> str:
        raise UserError("Slurm's controller does not answer")

    monkeypatch.setattr(slurm, "asked", refuse)
    assert launcher.main([*ON_CPU, "run_name=x"]) == 1 and launcher.main([*ON_CPU, "run_name=x", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.err == "launcher.py: Slurm's controller does not answer\n" and list(tmp_path.iterdir()) == []
    assert "slurm        Slurm's controller does not answer" in said.out and "#SBATCH --job-name=x" in said.out


def test_frozen_code_is_whole_and_its_change_is_seen(tmp_path, monkeypatch):
    place, digest = checkout.freeze(tmp_path)
    assert checkout.freeze(tmp_path) == (place, digest) and list(place.parent.iterdir()) == [place]
    assert (
        (place / "configs/train.yaml").is_file() and not list(place.rglob("__pycache__")) and not (place / "tests").exists()
    )

    def by_shell() -> str:
        return subprocess.run(["bash", "-c", checkout.DIGEST_COMMAND], cwd=place, capture_output=True, text=True).stdout[:64]

    (place / "losses/__pycache__").mkdir()
    (place / "losses/__pycache__/x.pyc").write_text("")
    assert by_shell() == digest and not (place / "losses/__pycache__").exists()
    (place / "torch").symlink_to(tmp_path)
    assert by_shell() != digest
    (place / "torch").unlink()
    assert by_shell() == digest
    (place / "losses/flow_matching_loss.py").write_text("changed")
    assert by_shell() != digest
    with pytest.raises(UserError, match="was changed since the code was frozen"):
        checkout.freeze(tmp_path)


def test_a_container_is_handed_to_the_job(cluster):
    assert launcher.main([*ON_CPU, "run_name=x", "backend.container='apptainer exec --bind \"/a b\" t.sif'"]) == 0
    (line,) = [line for line in cluster[0][1].splitlines() if line.startswith("exec ")]
    words = shlex.split(line.replace('"${run[@]}"', ""))
    assert shlex.split(words[words.index("--container") + 1]) == ["apptainer", "exec", "--bind", "/a b", "t.sif"]
