"""What the tests of runs compare: the rows of metrics without timings, and the weights of the last save."""

import json
from pathlib import Path

import torch

from configuration.nodes import CONFIG_DIR
from run_files.checkpoint import load_checkpoint

ONE_STEP = [path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml") if "learns: generator" in path.read_text()]
TIMING = ("second", "elapsed")


def metric_rows(folder: Path, name: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMING)} for row in rows]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    payload = load_checkpoint(folder / f"ckpts/mlp/{name}_last.pt")
    return {f"{kind}.{k}": v for kind in ("network", "ema") for k, v in payload[kind].items()}


def assert_equal_runs(first: Path, second: Path, name: str) -> None:
    one, two = weights(first, name), weights(second, name)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert metric_rows(first, name) == metric_rows(second, name)
