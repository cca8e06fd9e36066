"""The size of an adapter on disk, and the time of saving it, with A and B as int8 and as float32.

    python benchmarks/save.py            the adapter of an 8B model, rank 64: 168 M entries
    python benchmarks/save.py --quick    one block of 32; prints only

A save converts the matrices, writes them, waits for the disk, and takes the file's SHA-256, as a checkpoint does.
TMPDIR says which disk. Times are medians of saves that alternate.
"""
import argparse
import os
import tempfile
from pathlib import Path

import torch
from common import print_table, save, time_interleaved
from memory import MODELS
from safetensors.torch import save_file

from LoTA.storage import sha256

RANK, SHAPE = 64, MODELS["8B"]


def write(file: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file)
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    sha256(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one block of 32; prints only")
    parser.add_argument("--rounds", type=int, default=5, help="timed saves of each dtype [5]")
    args = parser.parse_args()
    layers = list(SHAPE.quantized().items())
    tensors = {}
    for name, (rows, cols) in layers[:len(layers) // SHAPE.layers] if args.quick else layers:
        tensors[f"{name}.lora_A.weight"] = torch.randint(-1, 2, (RANK, rows)).float()
        tensors[f"{name}.lora_B.weight"] = torch.randint(-1, 2, (cols, RANK)).float()
    with tempfile.TemporaryDirectory() as work:
        files = {dtype: Path(work) / f"{dtype}.safetensors" for dtype in (torch.float32, torch.int8)}
        seconds = time_interleaved({dtype: lambda file=file, dtype=dtype: write(file, tensors, dtype)
                                    for dtype, file in files.items()}, args.rounds)
        rows = [{"dtype": str(dtype).removeprefix("torch."), "entries": sum(t.numel() for t in tensors.values()),
                 "MB": file.stat().st_size / 1e6, "save_s": seconds[dtype]} for dtype, file in files.items()]
    print_table("saving the ternary matrices of an 8B model", rows)
    save("save", rows, args.quick)


if __name__ == "__main__":
    main()
