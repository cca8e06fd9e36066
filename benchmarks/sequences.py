"""Tokens a second with and without --packing, on the rows of GSM8K and ViGGO and a Llama of random GPTQ integers.

    python benchmarks/sequences.py --data_dir DATA            60 M weights on a CPU, 8 B on a GPU
    python benchmarks/sequences.py --data_dir DATA --quick    the tiny shape; prints only

DATA is a folder with the folders gsm8k and viggo. A step is a forward, a backward with gradient checkpointing, and a
step of t-SignSGD, with LoTA's loss. A byte-level BPE tokenizer of the training rows counts the tokens, because a random
model has none.

Rows come in two orders. "grouped" is that of training: transformers sorts random rows by their length, 50 batches at a
time. "random" is without it. The batches that are timed are spread evenly over an epoch. Each of them is timed padded
and packed, in turn. Tokens are those of rows, not of padding. The padding of the whole epoch is counted, not timed.
"""
import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from common import print_table, save, synchronize
from datasets import Dataset
from random_model import SHAPES, write_gptq_llama
from train_step import GROUP, make_model, take_step, train_tokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler

from data_print_save import prepare_dataset
from LoTA.answer_loss import answer_loss
from LoTA.sequences import make_collator

SETS = ("gsm8k", "viggo")
WAYS = ("padded", "packed")


def batches_of(data: Dataset, batch: int, order: str) -> list[list[int]]:
    """The rows of each batch of an epoch, by their numbers, without a last batch that is not full."""
    generator = torch.Generator().manual_seed(1)
    rows = (list(LengthGroupedSampler(batch, lengths=data["length"], generator=generator)) if order == "grouped"
            else torch.randperm(len(data), generator=generator).tolist())
    return [rows[i:i + batch] for i in range(0, len(rows) - batch + 1, batch)]


def padding(batches: list[dict], data: Dataset, epoch: list[list[int]]) -> float:
    """The share of padding in the tokens of an epoch's batches, in %."""
    tokens = sum(data["length"][row] for rows in epoch for row in rows)
    return 100 * (1 - tokens / sum(batch["input_ids"].numel() for batch in batches))


def measure(name: str, args: argparse.Namespace, dtype: str, folder: Path, device: str) -> list[dict]:
    """The lines of a data set: one for each order of rows and way to make a batch."""
    data_dir, shape = Path(args.data_dir) / name, SHAPES[args.shape]
    tokenizer = train_tokenizer(name, shape.vocabulary, data_dir)
    data = prepare_dataset(name, tokenizer, data_dir=str(data_dir))
    model, optimizer = make_model(folder, "LoTA", getattr(torch, dtype), True)
    model.config.use_cache = False
    collators = {way: make_collator(way == "packed", tokenizer, model) for way in WAYS}
    columns = [{key: row[key] for key in ("input_ids", "labels")} for row in data]
    step = partial(take_step, partial(answer_loss, model), optimizer, autocast=dtype == "bfloat16")
    lines = []
    for order in ("grouped", "random"):
        epoch = batches_of(data, args.batch, order)
        made = {way: [collators[way]([columns[row] for row in rows]) for rows in epoch] for way in WAYS}
        timed = [round((number + 0.5) * len(epoch) / args.rounds) for number in range(args.rounds)]
        seconds = {way: [] for way in WAYS}
        for turn, number in enumerate([timed[0], *timed]):          # the first one warms up
            for way in WAYS if turn % 2 else WAYS[::-1]:
                batch = {key: tensor.to(device) for key, tensor in made[way][number].items()}
                synchronize()
                start = time.perf_counter()
                step(batch)
                synchronize()
                if turn:
                    seconds[way].append(time.perf_counter() - start)
        tokens = [sum(data["length"][row] for row in epoch[number]) for number in timed]
        ratios = [a / b for a, b in zip(seconds["padded"], seconds["packed"], strict=True)]
        for way in WAYS:
            shapes = [made[way][number]["input_ids"].shape for number in timed]
            lines.append({
                "data": name, "dtype": dtype, "shape": args.shape, "batch": args.batch, "order": order, "way": way,
                "rows": len(data), "tokens of a row": statistics.mean(data["length"]),
                "padding, %": padding(made[way], data, epoch),
                "sequences": statistics.mean(shape[0] for shape in shapes),
                "width": statistics.mean(shape[1] for shape in shapes),
                "tokens / s": statistics.median(n / s for n, s in zip(tokens, seconds[way], strict=True)),
                "speed / padded": statistics.median(ratios) if way == "packed" else 1.0,
                "lowest": min(ratios) if way == "packed" else 1.0,
                "highest": max(ratios) if way == "packed" else 1.0, "timed batches": len(timed)})
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--data_dir", required=True, help="a folder with the folders gsm8k and viggo")
    parser.add_argument("--quick", action="store_true", help="the tiny shape, two batches, float32; prints only")
    parser.add_argument("--shape", default="8B" if on_gpu else "60M", choices=SHAPES)
    parser.add_argument("--data", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 8, help="rows of a batch")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=6, help="timed batches of each order [6]")
    parser.add_argument("--output", default="sequences", help="name of the JSON file [sequences]")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.rounds, args.dtypes = "tiny", 2, ["float32"]
    lines = []
    with tempfile.TemporaryDirectory() as work:
        folder = write_gptq_llama(Path(work) / "gptq", SHAPES[args.shape], 4, GROUP)
        for dtype in args.dtypes:
            for name in args.data:
                lines += measure(name, args, dtype, folder, "cuda" if on_gpu else "cpu")
    print_table("training on padded and on packed rows", lines)
    save(args.output, lines, args.quick)


if __name__ == "__main__":
    main()
