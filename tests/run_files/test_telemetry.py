"""Telemetry: units, the rolling window under a clock of our own, and the real subprocess with a stand-in for macmon."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from run_files import telemetry
from run_files.telemetry import AppleTelemetry, CudaTelemetry, Telemetry, parse_macmon, telemetry_for

ROOT = Path(__file__).resolve().parents[2]
OLD_LINE = (
    '{"timestamp":"2026-01-05T09:00:00.1+00:00","temp":{"cpu_temp_avg":51.5,"gpu_temp_avg":44.0},'
    '"memory":{"ram_total":17179869184,"ram_usage":9663676416,"swap_total":0,"swap_usage":0},'
    '"ecpu_usage":[1020,0.25],"pcpu_usage":[2400,0.5],"gpu_usage":[1200,0.4],"cpu_power":3.5,"gpu_power":9.0,'
    '"ane_power":0.0,"all_power":12.5,"sys_power":18.0,"ram_power":0.5,"gpu_ram_power":0.0}'
)
NEW_LINE = (
    '{"timestamp":"2026-09-05T09:00:00.1+00:00","temp":{"cpu_temp_avg":51.5,"gpu_temp_avg":48.0},'
    '"gpu_usage":[1300,0.45],"gpu_freq_mhz":1300,"gpu_scaled_ratio":0.45,"gpu_active_ratio":0.8,'
    '"cpu_power":3.5,"gpu_power":11.0,"fans":[{"name":"fan0","rpm":1200,"max_rpm":4900}]}'
)
OLD_FIGURES = {"gpu/util_pct": 40.0, "gpu/freq_mhz": 1200.0, "gpu/power_w": 9.0, "gpu/temp_c": 44.0}
NEW_FIGURES = {"gpu/util_pct": 80.0, "gpu/freq_mhz": 1300.0, "gpu/power_w": 11.0, "gpu/temp_c": 48.0}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(**changes: object) -> dict[str, object]:
    return {"gpu_usage": [1200, 0.4], "gpu_power": 9.0, "temp": {"gpu_temp_avg": 44.0}} | changes


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


@pytest.fixture
def macmon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script called macmon, alone on PATH, that notes its arguments and pid, writes a few lines and stays."""
    script = tmp_path / "bin" / "macmon"
    script.parent.mkdir()
    lines = ['{"torn": ', OLD_LINE, NEW_LINE]
    script.write_text(
        f"#!{sys.executable}\nimport os, sys, time\nfrom pathlib import Path\n"
        f"Path({str(tmp_path / 'called')!r}).write_text(' '.join([str(os.getpid()), *sys.argv[1:]]))\n"
        f"for line in {lines!r}:\n    print(line, flush=True)\ntime.sleep(600)\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    return tmp_path / "called"


@pytest.mark.parametrize(("line", "figures"), [(OLD_LINE, OLD_FIGURES), (NEW_LINE, NEW_FIGURES)])
def test_units_of_both_formats_of_macmon(line: str, figures: dict[str, float]) -> None:
    assert parse_macmon(telemetry.json.loads(line)) == pytest.approx(figures)


def test_sensor_that_did_not_answer_is_absent() -> None:
    assert "gpu/temp_c" not in parse_macmon(record(temp={"cpu_temp_avg": 0.0, "gpu_temp_avg": 0.0}))


def test_the_window_forgets_what_is_five_seconds_old_and_averages_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    clock = Clock()
    reader = AppleTelemetry(clock)
    reader.samples.append((0.0, {"gpu/temp_c": 40.0}))
    reader.samples.extend((half_seconds / 2, {"gpu/util_pct": float(half_seconds)}) for half_seconds in range(21))
    clock.now = 4.9
    assert reader.read()["gpu/temp_c"] == 40.0
    for now, mean in ((10.0, sum(range(11, 21)) / 10), (14.0, (19 + 20) / 2)):
        clock.now = now
        assert reader.read() == {"gpu/util_pct": mean}
    clock.now = 15.0
    assert reader.read() == {}


def test_stream_is_averaged_and_the_process_ended(macmon: Path) -> None:
    clock = Clock()
    reader = AppleTelemetry(clock)
    wait_until(lambda: len(reader.samples) == 2)
    means = {name: (OLD_FIGURES[name] + NEW_FIGURES[name]) / 2 for name in OLD_FIGURES}
    assert reader.read() == pytest.approx(means)
    clock.now = 5.0
    assert reader.read() == {}
    pid, *arguments = macmon.read_text().split()
    assert arguments == ["pipe", "-i", "500"]
    os.kill(int(pid), 0)
    reader.close()
    reader.close()
    assert not reader.reader.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_macmon_that_dies_leaves_the_run_alone(macmon: Path) -> None:
    reader = AppleTelemetry()
    wait_until(lambda: len(reader.samples) == 2)
    os.kill(int(macmon.read_text().split()[0]), 9)
    reader.reader.join(timeout=120)
    assert set(reader.read()) == set(OLD_FIGURES)
    reader.close()


def test_without_macmon_one_line_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    reader = telemetry_for("mps")
    assert reader.read() == {}
    reader.close()
    err = capsys.readouterr().err
    assert "brew install macmon" in err and err.count("\n") == 1


def test_apple_memory_is_in_mebibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 3 * 2**20)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * 2**20)
    assert telemetry.mps_memory() == {"mps/allocated_mb": 3.0, "mps/driver_mb": 5.0}


MEMORY = {"cuda/allocated_mb": 1.0, "cuda/reserved_mb": 2.0}
FUNCTIONS = {"utilization": 75, "clock_rate": 1980, "power_draw": 350_500, "temperature": 61}  # %, MHz, milliwatts, Celsius
LOAD = {"gpu/util_pct": 75.0, "gpu/freq_mhz": 1980.0, "gpu/power_w": 350.5, "gpu/temp_c": 61.0}


def refuse() -> float:
    raise RuntimeError("Not Supported")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch.cuda as it answers for one device."""
    for name, value in (FUNCTIONS | {"memory_allocated": 2**20, "memory_reserved": 2**21}).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    return monkeypatch


def test_units_of_a_cuda_device(cuda: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reader = CudaTelemetry()
    assert reader.read() == MEMORY | LOAD and capsys.readouterr().err == ""
    reader.readers["gpu/temp_c"] = refuse  # which it no longer offers
    assert reader.read().keys() == MEMORY.keys() | LOAD.keys() - {"gpu/temp_c"}
    reader.close()


def test_a_figure_that_the_device_does_not_offer_is_absent(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr(torch.cuda, "power_draw", refuse)
    assert set(telemetry_for("cuda").read()) == {*MEMORY, "gpu/util_pct", "gpu/freq_mhz", "gpu/temp_c"}


@pytest.mark.parametrize("error", [RuntimeError("Not Supported"), ModuleNotFoundError("nvidia-ml-py is missing")])
def test_where_nothing_can_be_read_memory_remains_and_one_line_says_why(
    cuda: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail() -> None:
        raise error

    for name in FUNCTIONS:
        cuda.setattr(torch.cuda, name, fail)
    assert telemetry_for("cuda").read() == MEMORY
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(error) in said and "uv sync --extra gpu" in said


@pytest.mark.gpu
def test_cuda_device_is_read() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reader = telemetry_for("cuda")
    figures = reader.read()
    reader.close()
    assert set(MEMORY) <= set(figures)
    assert 0 <= figures.get("gpu/util_pct", 0) <= 100 and 0 < figures.get("gpu/power_w", 1) < 2000


def test_cpu_has_none() -> None:
    assert type(telemetry_for("cpu")) is Telemetry
    assert telemetry_for("cpu").read() == {}
