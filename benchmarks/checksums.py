"""The time of the SHA-256 of a model's files, which merging, loading and exporting compare first.

    python benchmarks/checksums.py                  5 GB of random safetensors in TMPDIR
    python benchmarks/checksums.py --gigabytes 0.5 --quick      prints only

The files are read from the page cache and from the disk, in turn. Before a reading from the disk the kernel is
asked to forget the files' pages. What a hypervisor or the disk itself has cached stays. Times are medians.
"""
import argparse
import os
import tempfile
from pathlib import Path

import torch
from common import print_table, save, time_interleaved

from LoTA import storage

SHARD_BYTES = 10**9
PIECE = 10**8           # bytes that are random at a time


def write_model(folder: Path, size: int) -> list[str]:
    """Writes safetensors files of `size` random bytes in all, and returns their names."""
    names = []
    for start in range(0, size, SHARD_BYTES):
        names.append(f"model-{len(names) + 1:05}.safetensors")
        count = min(SHARD_BYTES, size - start)
        pieces = [(f"tensor_{i}", min(PIECE, count - i)) for i in range(0, count, PIECE)]
        storage.create_safetensors(folder / names[-1], {name: (torch.uint8, (n,)) for name, n in pieces})
        for name, n in pieces:
            storage.overwrite_tensor(folder / names[-1], name, torch.randint(0, 256, (n,), dtype=torch.uint8))
    return names


def forget(file: Path) -> None:
    """Has the kernel drop a file's pages, after they are on the disk."""
    with open(file, "r+b") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5, help="the size of the files, in 10^9 bytes [5]")
    parser.add_argument("--rounds", type=int, default=3, help="timed readings of each kind [3]")
    parser.add_argument("--quick", action="store_true", help="print only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        names = write_model(Path(work), int(args.gigabytes * 1e9))

        def read():
            storage._known.clear()          # it would spare the second reading
            storage.checksums(work, names)

        # What one reading leaves in the page cache serves the next one, so the order counts: forget, disk, page cache.
        seconds = time_interleaved({"forget": lambda: [forget(Path(work) / name) for name in names], "disk": read,
                                    "page cache": read}, args.rounds)
    rows = [{"files": len(names), "GB": args.gigabytes, "read from": kind, "s": seconds[kind],
             "GB / s": args.gigabytes / seconds[kind]} for kind in ("page cache", "disk")]
    print_table("SHA-256 of a model's files", rows)
    save("checksums", rows, args.quick)


if __name__ == "__main__":
    main()
