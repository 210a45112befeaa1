"""Every command that the README, docs and configs show is one that its program reads, and their Python runs."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from PIL import Image

import experiment
import launcher
from configuration.checks import check_contradictions, check_values
from configuration.compose import compose_config, groups, parse_overrides, resolved
from dataloaders.picture_files import MANIFEST
from evaluation.prove_command import prepared
from scripts import (
    cache_latents,
    ema,
    eval_fid,
    export,
    leaderboard,
    modal_app,
    runs,
    sample,
    trackio_delete,
    trackio_rebuild,
)
from searches.golden import search_of
from searches.plan import plan_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs/experiment").glob("*.yaml"))]
READERS: dict[str, Callable[[list[str]], Any]] = {
    "scripts/cache_latents.py": cache_latents.read_words,
    "scripts/ema.py": ema.read_words,
    "scripts/eval_fid.py": eval_fid.read_words,
    "scripts/export.py": export.read_words,
    "scripts/leaderboard.py": leaderboard.read_words,
    "scripts/modal_app.py": modal_app.parse,
    "scripts/runs.py": runs.parse,
    "scripts/sample.py": sample.read_words,
    "scripts/trackio_delete.py": trackio_delete.parse,
    "scripts/trackio_rebuild.py": trackio_rebuild.parse,
}
ALONE = {"--help", "--dashboard"}  # flags that compose no run


def shown() -> list[str]:
    """The commands in code blocks, in `code` and in comments that begin a file, without repetition."""
    found: list[str] = []
    for page in PAGES:
        text = re.sub(r" \\\n\s*", " ", page.read_text(encoding="utf-8"))  # lines that go on are one command
        found += re.findall(r"(?m)^(?:# )?(python (?:\w+/)?\w+\.py\b.*)$" if page.suffix == ".yaml" else
                            r"(?m)^(?:.*&& )?(?:uv run )?(python (?:\w+/)?\w+\.py\b.*)$", text)  # fmt: skip
        if page.suffix == ".md":
            found += [" ".join(code.split()) for code in re.findall(r"`(python (?:\w+/)?\w+\.py[^`]*)`", text)]
    return [command for command in dict.fromkeys(found) if "loss=late" not in command]  # which the README shows how to add


@cache
def check_run(words: tuple[str, ...]) -> None:
    config = resolved(compose_config(list(words)))
    check_values(config)
    check_contradictions(config)


def check_launch(arguments: list[str]) -> None:
    if ALONE & set(arguments):
        return
    if "--prove" in arguments:
        words = [word for word in arguments if word != "--prove"]
        assert any(".py:" in word for word in words) or prepared(words)
        return
    arguments, search = launcher.without_search(arguments)
    if search is not None:
        words = [word for word in launcher.with_flags_as_overrides(arguments) if word != "..."]
        (plan_of if search == "optuna" else search_of)(words)
        return
    words = [word for word in launcher.with_flags_as_overrides(arguments) if word not in ("--dry-run", "...")]
    assert all(word.split("=")[0] in launcher.HYDRA_FLAGS for word in words if word.startswith("-"))
    overrides = [word for word in words if not word.startswith("-") and word != "job"]
    (jobs,) = BasicSweeper.split_arguments(parse_overrides(overrides), max_batch_size=None)
    for job in jobs if "-m" in words else [overrides]:
        check_run(tuple(job) if "--cfg" not in words else ("run_name=x",))


@pytest.fixture(scope="module", autouse=True)
def files_of_the_examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A working folder with the few files that a configuration is composed from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("user"))
        np.save("my_points.npy", np.zeros((20, 2)))
        np.savez("pairs.npz", x=np.zeros((20, 2)), condition=np.zeros((20, 3)))
        Path("my_module.py").write_text("from tests.dataloaders.user_sets import Points as MyDataset\n")
        patch.syspath_prepend(Path.cwd())
        for latents in ("data/imagenet_latents", "data/mine", "bucket/latents"):
            Path(latents).mkdir(parents=True)
            facts = {"finished": True, "shape": [8, 32, 32], "num_classes": 1000, "shards": [], "made_from": {}}
            (Path(latents) / MANIFEST).write_text(json.dumps(facts))
        save = Path("bucket/folder/ckpts/mlp/x_last.pt")
        save.parent.mkdir(parents=True)
        save.touch()
        for folder in (Path("pictures/class"), Path("photos/colour/class")):
            folder.mkdir(parents=True)
            (folder / "one.png").touch()
        yield


def test_there_are_commands_to_check():
    assert len(shown()) > 60


@pytest.mark.parametrize("command", shown())
def test_a_shown_command_is_one_that_its_program_reads(command):
    """A bucket is a folder here: of the store's own package nothing hangs on it."""
    _, program, *words = shlex.split(command.replace("s3://bucket", f"file://{Path.cwd() / 'bucket'}"), comments=True)
    assert (ROOT / program).is_file()
    if program == "launcher.py":
        check_launch(words)
    elif program in READERS:
        READERS[program](words)


@pytest.mark.parametrize(("page", "heading"), [("README.md", "## Use from Python"), ("docs/cli.md", "## From Python")])
def test_the_python_shown_runs(page, heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    code = text.partition(f"\n{heading}\n")[2].partition("```python\n")[2].partition("```")[0]
    counts = ("max_steps=2", "solver.steps=2", "evaluation.samples=50", "evaluation.final_samples=50")
    small = (*counts, "trackio.enabled=false", "device=cpu")
    run, prepare = launcher.run, experiment.prepare
    monkeypatch.setattr(launcher, "run", lambda *words: run(*words, *small))
    monkeypatch.setattr(experiment, "prepare", lambda words, own: prepare([*words, *small], own))
    space: dict[str, Any] = {}
    exec(code, space)
    assert space["samples"].shape == torch.Size([1000, 2])


def test_the_python_shown_without_torch_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").partition("\n## Without torch\n")[2]
    exec(section.partition("```python\n")[2].partition("```")[0], {})
    assert (tmp_path / "moons.npz").is_file()


def test_the_folders_shown_are_made_and_a_recipe_draws_one_from_the_other(tmp_path, monkeypatch, small_run):
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("\nImage to image takes")[2]
    exec(section.partition("```python\n")[2].partition("```")[0], {})
    grey, colour = (sorted((tmp_path / "photos" / kind).rglob("*.png")) for kind in ("grey", "colour"))
    assert len(grey) == len(colour) == 520 and len({path.read_bytes() for path in colour}) > 500
    for one, other in zip(grey, colour, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other).convert("L")))
    words = ("experiment=photos_folders", "model=cnn", "model.width=8", "model.inner_width=8", "model.embedding=8")
    folder = small_run("x", *words, "dataloaders.epoch_size=null", "max_steps=2", "batch_size=16")
    assert json.loads((folder / "runs/x/status.json").read_text())["step"] == 2


def test_every_choice_that_is_named_exists():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.suffix == ".md")
    named = re.findall(r"(?<![\w.-])([a-z]+(?:/[a-z_]+)?)=([a-z][a-z0-9_]*)\b", text)
    known = {group: {*choices, "late", "huber", "null"} for group, choices in groups().items()}
    unknown = {(group, name) for group, name in named if group in known and name not in known[group]}
    assert not unknown
