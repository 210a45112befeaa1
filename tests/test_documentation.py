"""README.md and docs/: short enough to be read, whole, and true of the configuration and the code."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import launcher
from configuration.compose import CONFIG_DIR, compose_config, groups, resolved
from evaluation.leaderboard_table import START, STOP
from scripts.leaderboard import Options

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in [README, *PAGES])
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The fragments under which a page's headings can be linked, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def mentioned(word: str) -> bool:
    return re.search(rf"(?<![\w]){re.escape(word)}(?![\w])", TEXT) is not None


def test_the_readme_fits_two_screens():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_every_link_and_picture_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not fragment or fragment in anchors(file), target


def test_every_page_is_linked_from_the_readme_and_every_picture_shown():
    linked = set(re.findall(r"\]\(docs/([^)#]+)", README.read_text(encoding="utf-8")))
    assert {page.name for page in PAGES} <= linked
    assert [p.name for p in (ROOT / "docs").iterdir() if p.suffix in (".png", ".gif") and f"{p.name})" not in TEXT] == []


def test_every_key_and_choice_is_documented():
    keys = [key for key in OmegaConf.load(CONFIG_DIR / "train.yaml") if key not in ("defaults", "hydra")]
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [key for key in keys if not any(re.search(rf"`{key}[`.]", row) for row in rows)] == []
    assert [f"{group}={choice}" for group, choices in groups().items() for choice in choices if not mentioned(choice)] == []


def test_every_command_is_documented():
    scripts = [path for folder in ("scripts", "visualizers") for path in (ROOT / folder).glob("*.py")]
    commands = [path for path in scripts if path.read_text(encoding="utf-8").startswith("#!") and path.name != "vis_all.py"]
    assert [path.name for path in commands if f"{path.parent.name}/{path.name}" not in TEXT] == []


def test_the_leaderboard_has_its_place():
    assert all(Options().page.read_text(encoding="utf-8").count(marker) == 1 for marker in (START, STOP))


def test_the_settings_of_the_example_of_a_loss_name_it_and_choices_there_are():
    code, settings = (re.search(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL) for kind in ("python", "yaml"))
    assert code is not None and settings is not None
    node = yaml.safe_load(settings[1])
    assert f"class {node['_target_'].rpartition('.')[2]}(" in code[1]
    parts = [f"loss/{group}={choice}" for part in node["defaults"] if part != "_self_" for group, choice in part.items()]
    assert resolved(compose_config(["run_name=x", *parts]))["loss"].keys() >= node.keys() - {"defaults"}


def test_the_command_for_skypilot_is_one_that_would_run(tmp_path, monkeypatch, capsys):
    """Its dry run, in a folder of this machine; the keys are those of SkyPilot's task files."""
    found = re.search(r"```yaml\n(name: .*?)```", (ROOT / "docs/distributed.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    task = yaml.safe_load(found[1])
    assert task.keys() == {"name", "workdir", "resources", "file_mounts", "setup", "run"}
    (mount,) = task["file_mounts"]
    words = shlex.split(task["run"])
    assert words[:4] == ["uv", "run", "python", "launcher.py"] and f"output_dir={mount}/outputs" in words
    monkeypatch.chdir(tmp_path)
    assert launcher.main([*(word.replace(mount, "kept") for word in words[4:]), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(f"digits_seed={seed}: cnn learns digits by mse" in said for seed in range(3))
    assert not list(tmp_path.iterdir())
