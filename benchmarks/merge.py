"""The time and the peak memory of a merge, beside the time of copying the folder. Models are made at random.

    python benchmarks/merge.py            about 0.1, 0.6 and 1.9 billion weights, 4 bits, group 64, rank 64
    python benchmarks/merge.py --quick    0.03 billion; prints only

Every merge runs in a process of its own, so that its peak memory is its own. Each run begins with the files out of the
page cache, as the first one of a user does. Times are medians of runs that alternate.
"""
import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, print_table, save
from random_gptq import write_gptq, write_lota_adapter

from LoTA.adapter_folder import AdapterFolder
from LoTA.folders import GPTQFolder
from LoTA.lota_merge import merge_folders

BITS, GROUP, RANK = 4, 64, 64
SHARD_BYTES = 1 << 30


def write_model(folder: Path, blocks: int, hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """Writes the MLP layers of a model, in shards of about SHARD_BYTES. Returns its layers, {name: (in, out)}."""
    layers = {f"model.layers.{i}.mlp.{name}": size for i in range(blocks)
              for name, size in (("gate_proj", (hidden, intermediate)), ("up_proj", (hidden, intermediate)),
                                 ("down_proj", (intermediate, hidden)))}
    packed_bytes = sum(math.prod(size) for size in layers.values()) * BITS // 8
    write_gptq(folder, layers, BITS, GROUP, shards=-(-packed_bytes // SHARD_BYTES))
    return layers


def forget(*folders: Path) -> None:
    """Takes the files of folders out of the page cache."""
    for file in (file for folder in folders for file in folder.rglob("*") if file.is_file()):
        with open(file, "rb") as f:
            os.fsync(f.fileno())                # pages that are still to be written stay
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def merge_once(adapter: str, gptq: str, output: str, verify: bool) -> None:
    """One merge, in a process of its own. Prints its seconds and its peak memory in MB."""
    start = time.perf_counter()
    merge_folders(AdapterFolder(adapter), GPTQFolder(gptq), output, verify=verify)
    seconds = time.perf_counter() - start
    # Not getrusage's ru_maxrss, because a process starts with that of its parent, which made the models.
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
    sizes = [(2, 1024, 4096)] if args.quick else [(4, 2048, 5632), (12, 2560, 6912), (14, 4096, 11008)]
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            layers = write_model(work / "gptq", *size)
            # Omega as a share of the rank. At 0.75 few weights can step; at 0.5 the merge needs every product.
            for share in (0.75, 0.5):
                write_lota_adapter(work / f"omega {share} r", work / "gptq", rank=RANK, omega=share * RANK)
            counts = [math.prod(size) for size in layers.values()]
            weights, largest_mb = sum(counts), max(counts) * BITS / 8 / 1e6
            kinds = [f"omega {share} r, {what}" for share in (0.75, 0.5) for what in ("merge", "merge and verify")]
            seconds, peak = {name: [] for name in ("copy", *kinds)}, {}
            for turn in range(args.rounds + 1):
                for name in seconds:
                    forget(*work.iterdir())
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
