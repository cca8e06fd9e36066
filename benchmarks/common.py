"""What the benchmarks share: timing side by side, peak memory, the machine's description, tables and JSON.

The scripts import LoTA, so Python must find the repository. `pip install -e .` arranges that, and `source
runs/environment.sh` sets PYTHONPATH. On a bare machine name it yourself: `PYTHONPATH=. python benchmarks/layer.py`.
"""
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from LoTA.storage import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def device_name() -> str:
    """The GPU's name, or else the CPU's with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
                 platform.processor())
    return f"{model}, {torch.get_num_threads()} threads"


def environment() -> dict[str, str]:
    """Device, versions and commit, for the JSON. gptqmodel: "stand-in" where benchmarks/stand_in/ takes its place."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {"device": device_name(), "python": platform.python_version(), "torch": torch.__version__,
            "gptqmodel": gptqmodel_version(), "commit": commit.stdout.strip()}


def gptqmodel_version() -> str | None:
    """GPTQModel's version, "stand-in", or None where neither is there."""
    try:
        found = version("gptqmodel")
    except PackageNotFoundError:
        return None
    return "stand-in" if found.endswith("stand.in") else found


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """{name: median seconds} of functions that run in turn, A B C A B C ..., after one round that does not count."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_extra_memory(function: Callable[[], object]) -> int:
    """The bytes that torch has allocated at the peak of a call, beyond those allocated before it."""
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = os.path.join(folder, "trace.json")
        profile.export_chrome_trace(trace)
        with open(trace) as f:
            events = json.load(f)["traceEvents"]
    level = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return peak


def print_table(title: str, rows: list[dict]) -> None:
    """Prints dicts with equal keys as a Markdown table."""
    print(f"\n{title}\n")
    cells = [[str(k) for k in rows[0]]] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()]
                                           for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for i, row in enumerate(cells):
        print("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
        if i == 0:
            print("|" + "|".join("-" * (w + 2) for w in widths) + "|")


def save(name: str, rows: list[dict], quick: bool) -> None:
    """Writes {name}_{cpu or the GPU's name}.json into the folder OUT of the environment, or benchmarks/results.

    A quick run writes nothing.
    """
    device = torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu"
    path = Path(os.environ.get("OUT") or RESULTS) / f"{name}_{device}.json"
    if quick:
        print(f"\na run that is not quick would write {path.name}")
        return
    write_json(path, {"benchmark": name, **environment(), "rows": rows})
    print(f"\nsaved to {path}")
