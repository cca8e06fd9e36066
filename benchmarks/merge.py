"""A merge beside copying the folder: time, and the process's peak memory. Models are made at random.

    python benchmarks/merge.py            about 0.1, 0.5 and 2 billion weights, 4 bits, group 64, rank 64
    python benchmarks/merge.py --quick    0.02 billion; prints only

Every merge runs in a process of its own, so that its peak memory is its own. Medians of interleaved runs.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, print_table, save
from safetensors.torch import save_file

from LoTA.lota_merge import merge_folders

BITS, GROUP, RANK = 4, 64, 64
SHARD_BYTES = 1 << 30


def write_model(folder, layers, hidden, intermediate):
    """A GPTQ folder of random words, in shards; returns its layers, (name, in, out) each."""
    folder.mkdir()
    shapes = {f"model.layers.{i}.mlp.{n}": s for i in range(layers)
              for n, s in (("gate_proj", (hidden, intermediate)), ("up_proj", (hidden, intermediate)),
                           ("down_proj", (intermediate, hidden)))}
    weight_map, shard, size, files = {}, {}, 0, 0

    def flush():
        nonlocal shard, size, files
        files += 1
        save_file(shard, folder / f"model-{files:05}.safetensors")
        weight_map.update(dict.fromkeys(shard, f"model-{files:05}.safetensors"))
        shard, size = {}, 0
    for name, (rows, cols) in shapes.items():
        groups = rows // GROUP
        words = rows * BITS // 32
        shard |= {f"{name}.qweight": torch.randint(-2**31, 2**31 - 1, (words, cols), dtype=torch.int32),
                  f"{name}.qzeros": torch.full((groups, cols * BITS // 32), 0x77777777, dtype=torch.int32),
                  f"{name}.scales": torch.rand(groups, cols).half(),
                  f"{name}.g_idx": (torch.arange(rows) // GROUP).int()}
        size += 4 * words * cols
        if size > SHARD_BYTES:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "quantize_config.json").write_text(json.dumps(
        {"bits": BITS, "group_size": GROUP, "quant_method": "gptq", "checkpoint_format": "gptq", "sym": False}))
    return [(name, *shape) for name, shape in shapes.items()]


def merge_once(adapter, gptq, output, verify):
    """One merge, run by a process of its own; prints seconds and peak MB."""
    start = time.perf_counter()
    merge_folders(adapter, gptq, output, verify=verify)
    seconds = time.perf_counter() - start
    # Not getrusage's ru_maxrss: that outlives exec, and would be the peak of the process that made the models.
    peak_kb = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps([seconds, peak_kb / 1024]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model; prints only")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each [3]")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return merge_once(*args.one[:3], verify=args.one[3] == "verify")
    from random_model import write_lota_adapter  # not for the merging process, whose memory counts
    sizes = [(2, 1024, 4096)] if args.quick else [(4, 2048, 5632), (12, 2560, 6912), (14, 4096, 11008)]
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            layers = write_model(work / "gptq", *size)
            for share in (0.75, 0.5):       # of the rank: few weights can step, or every product is needed
                write_lota_adapter(work / f"omega {share} r", work / "gptq", layers, RANK, omega=share * RANK)
            weights = sum(r * c for _, r, c in layers)
            largest_mb = max(r * c for _, r, c in layers) * BITS / 8 / 1e6
            kinds = [f"omega {share} r, {what}" for share in (0.75, 0.5) for what in ("merge", "merge and verify")]
            seconds, peak = {name: [] for name in ("copy", *kinds)}, {}
            for turn in range(args.rounds + 1):
                for name in seconds:
                    if name == "copy":
                        start = time.perf_counter()
                        shutil.copytree(work / "gptq", work / "out")
                        value = time.perf_counter() - start
                    else:
                        out = subprocess.run(
                            [sys.executable, __file__, "--one", work / name.split(",")[0], work / "gptq", work / "out",
                             "verify" if "verify" in name else "no"], capture_output=True, text=True, check=True,
                            cwd=ROOT)
                        value, peak[name] = json.loads(out.stdout.splitlines()[-1])
                    shutil.rmtree(work / "out")
                    if turn:
                        seconds[name].append(value)
        copy = statistics.median(seconds["copy"])
        rows += [{"weights": weights, "largest qweight MB": largest_mb, "what": name, "s": statistics.median(s),
                  "/ copy": statistics.median(s) / copy, "peak MB": peak.get(name)} for name, s in seconds.items()]
    print_table("merging a folder, 4 bits, group 64, rank 64", rows)
    save("merge", rows, args.quick)


if __name__ == "__main__":
    main()
