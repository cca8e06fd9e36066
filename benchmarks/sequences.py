"""Tokens a second with and without --packing, on the rows of GSM8K and ViGGO and a Llama of random GPTQ integers.

    python benchmarks/sequences.py --data_dir DATA            15 M weights on a CPU, 8 B on a GPU
    python benchmarks/sequences.py --data_dir DATA --quick    the tiny shape; prints only

DATA is a folder with the folders gsm8k and viggo. A step is a forward, a backward with gradient checkpointing, and a
step of t-SignSGD, with LoTA's loss. A byte-level BPE tokenizer of the training rows counts the tokens, because a random
model has none.

Rows come in two orders. "grouped" is that of training: transformers sorts random rows by their length, 50 batches at a
time. "random" is without it. The batches that are timed are spread evenly over an epoch. Each of them is timed padded
and packed, in turn. Tokens are those of rows, not of padding. On a CPU the time is that of the process. The padding of
a whole epoch is counted, for hidden states of 512 and of 4,096 entries, which decide how rows are shared out.
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
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from data_print_save import prepare_dataset
from LoTA.answer_loss import answer_loss
from LoTA.sequences import make_collator, round_up, share_out, work

SETS = ("gsm8k", "viggo")
ORDERS = ("grouped", "random")
WAYS = ("padded", "packed")


def clock() -> float:
    """Seconds: of the process on a CPU, because other work does not count then, and of the wall on a GPU."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def batches_of(data: Dataset, batch: int, order: str) -> list[list[int]]:
    """The rows of each batch of an epoch, by their numbers, without a last batch that is not full."""
    generator = torch.Generator().manual_seed(1)
    rows = (list(LengthGroupedSampler(batch, lengths=data["length"], generator=generator)) if order == "grouped"
            else torch.randperm(len(data), generator=generator).tolist())
    return [rows[i:i + batch] for i in range(0, len(rows) - batch + 1, batch)]


def counted(name: str, data: Dataset, batch: int, order: str, hidden: int) -> dict:
    """The padding of an epoch, and the speed of packing that follows from the estimate of the work, for a width."""
    tokens = {"rows": 0, "padded": 0, "packed": 0}
    effort = {"padded": 0, "packed": 0}
    for rows in batches_of(data, batch, order):
        lengths = [data["length"][row] for row in rows]
        groups = share_out(lengths, hidden)
        tokens["rows"] += sum(lengths)
        for way, count, width in (("padded", len(rows), max(lengths)),
                                  ("packed", len(groups), max(sum(lengths[row] for row in group) for group in groups))):
            tokens[way] += count * round_up(width)
            effort[way] += work(count, width, hidden)
    return {"what": "counted", "data": name, "batch": batch, "order": order, "hidden": hidden,
            **{f"padding {way}, %": 100 * (1 - tokens["rows"] / tokens[way]) for way in WAYS},
            "estimated speed / padded": effort["padded"] / effort["packed"]}


def timed(name: str, data: Dataset, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, dtype: str,
          folder: Path) -> list[dict]:
    """The times of some batches: a line for each order of rows and way to make a batch."""
    model, optimizer = make_model(folder, "LoTA", getattr(torch, dtype), True)
    model.config.use_cache = False
    collators = {way: make_collator(way == "packed", tokenizer, model) for way in WAYS}
    step = partial(take_step, partial(answer_loss, model), optimizer, autocast=False)       # as mode 1 trains
    lines = []
    for order in ORDERS:
        epoch = batches_of(data, args.batch, order)
        some = [epoch[round((number + 0.5) * len(epoch) / args.rounds)] for number in range(args.rounds)]
        seconds, shapes = {way: [] for way in WAYS}, {way: [] for way in WAYS}
        for turn, rows in enumerate([some[0], *some]):              # the first one warms up
            for way in WAYS if turn % 2 else WAYS[::-1]:
                made = collators[way]([{key: data[row][key] for key in ("input_ids", "labels")} for row in rows])
                batch = {key: tensor.to(model.device) for key, tensor in made.items()}
                synchronize()
                start = clock()
                step(batch)
                synchronize()
                if turn:
                    seconds[way].append(clock() - start)
                    shapes[way].append(made["input_ids"].shape)
        tokens = [sum(data["length"][row] for row in rows) for rows in some]
        ratios = [a / b for a, b in zip(seconds["padded"], seconds["packed"], strict=True)]
        for way in WAYS:
            lines.append({
                "what": "timed", "data": name, "shape": args.shape, "batch": args.batch, "order": order, "dtype": dtype,
                "way": way, "sequences": statistics.mean(shape[0] for shape in shapes[way]),
                "width": statistics.mean(shape[1] for shape in shapes[way]),
                "tokens / s": statistics.median(n / s for n, s in zip(tokens, seconds[way], strict=True)),
                **({"speed / padded": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
                   if way == "packed" else {"speed / padded": 1.0, "lowest": 1.0, "highest": 1.0}),
                "batches": len(some), "rows": len(data), "tokens of a row": statistics.mean(data["length"])})
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--data_dir", required=True, help="a folder with the folders gsm8k and viggo")
    parser.add_argument("--quick", action="store_true", help="the tiny shape, two batches, float32; prints only")
    parser.add_argument("--shape", default="8B" if on_gpu else "15M", choices=SHAPES)
    parser.add_argument("--data", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 8, help="rows of a batch")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5, help="timed batches of each order [5]")
    parser.add_argument("--output", default="sequences", help="name of the JSON file [sequences]")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.rounds, args.dtypes = "tiny", 2, ["float32"]
    times, counts = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_gptq_llama(Path(temporary) / "gptq", SHAPES[args.shape], 4, GROUP)
        for name in args.data:
            data_dir = Path(args.data_dir) / name
            tokenizer = train_tokenizer(name, SHAPES[args.shape].vocabulary, data_dir)
            data = prepare_dataset(name, tokenizer, data_dir=str(data_dir))
            for dtype in args.dtypes:
                times += timed(name, data, tokenizer, args, dtype, folder)
            counts += [counted(name, data, batch, order, hidden) for hidden in (512, 4096) for order in ORDERS
                       for batch in ((8,) if args.quick else (8, 64))]
    print_table("training on padded and on packed rows", times)
    print_table("the padding of an epoch", counts)
    save(args.output, times + counts, args.quick)


if __name__ == "__main__":
    main()
