"""What a training step sends between processes, and how its time falls with their number. On random GPTQ integers.

    python benchmarks/processes.py                  4 M weights on a CPU; 1, 2 and 4 processes
    python benchmarks/processes.py --processes 1 2 4 8 --shape 8B --length 512           on a machine with 8 GPUs
    python benchmarks/processes.py --quick          under a minute; prints only

A step has the same rows whatever the number of processes is, and each process has its part of them. On a CPU every
process has one thread. The bytes are what the loopback interface of the machine counts, so on GPUs, which talk without
it, they are missing. "buffers" runs with torch's default, which sends the integers of the model in every forward.

The formula: of n processes each sends 2 (n - 1) / n times the gradients, 4 bytes a number, as a ring does. memory.py
has it for models of 1 to 70 billion weights.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, print_table, save

RANK, GROUP, BITS = 64, 64, 4


def loopback_bytes() -> int | None:
    """What the loopback interface has sent since the machine started. None: the system does not say."""
    try:
        line = next(line for line in open("/proc/net/dev") if line.strip().startswith("lo:"))
    except (OSError, StopIteration):
        return None
    return int(line.split(":")[1].split()[8])


def work(folder: str, rows: int, length: int, steps: int, method: str, buffers: bool, output: str) -> None:
    """One of the processes: trains some steps and writes the seconds and bytes of each. It runs under torchrun."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.parallel import DistributedDataParallel

    from LoTA import processes
    from LoTA.adapter import load_gptq
    from LoTA.answer_loss import answer_loss
    from LoTA.layer import register
    from LoTA.settings import TARGET_MODULES
    from LoTA.steps import Threshold
    from LoTA.ternary import ternarize_
    from t_signSGD import tSignSGD
    processes.connect("auto")
    torch.manual_seed(0)
    learned = method == "full"
    model = load_gptq(folder, dtype=torch.bfloat16, backend="gptq_torch").model
    model.config.use_cache = False
    config = register(LoraConfig(r=RANK, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM"), Threshold(
        0.75 * RANK, None if learned else 0.75 * RANK), learned, learned)
    model = get_peft_model(model, config).train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if "lora_A" in name or "lora_B" in name]
    others = [p for name, p in named if "lora_offset" in name or "lora_scale" in name]
    for p in matrices:
        ternarize_(torch.nn.init.normal_(p.data))
    optimizer = tSignSGD(matrices, real_optimizer=torch.optim.AdamW(others) if others else None)
    if processes.count() > 1:
        model = DistributedDataParallel(model, broadcast_buffers=buffers)
    own = rows // processes.count()
    ids = torch.randint(10, 1000, (rows, length))[processes.rank() * own:][:own].to(next(iter(matrices)).device)
    times, counts = [], []
    for _ in range(steps + 1):
        processes.wait()
        before, start = loopback_bytes(), time.perf_counter()
        answer_loss(model, ids, input_ids=ids)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if ids.is_cuda:
            torch.cuda.synchronize()
        processes.wait()
        times.append(time.perf_counter() - start)
        counts.append(None if before is None else loopback_bytes() - before)
    if processes.is_first():
        trained = sum(p.numel() for _, p in named)
        Path(output).write_text(json.dumps({
            "trained numbers": trained, "step_s": statistics.median(times[1:]),
            "sent_mb": None if ids.is_cuda or counts[0] is None else statistics.median(counts[1:]) / 1e6,
            "gradients_mb": 4 * trained / 1e6}))
    processes.leave()


def measure(folder: Path, processes: int, method: str, buffers: bool, args: argparse.Namespace) -> dict:
    """A row of the results: torchrun with so many processes."""
    output = folder.parent / "row.json"
    settings = [str(folder), args.rows, args.length, args.steps, method, int(buffers), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), __file__,
                    "--worker", *map(str, settings)], check=True, env=environment)
    found = json.loads(output.read_text())
    return {"shape": args.shape, "method": method, "processes": processes, "buffers sent": buffers,
            "rows": args.rows, "length": args.length, **found,
            "formula_mb": 2 * (processes - 1) * found["gradients_mb"]}     # of all processes together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rows, two steps; prints only")
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=32, help="of a step, over all processes [32]")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="that count [5]")
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, rows, length, steps, method, buffers, output = args.worker
        work(folder, int(rows), int(length), int(steps), method, bool(int(buffers)), output)
        return
    from random_model import SHAPES, write_gptq_llama
    if args.quick:
        args.rows, args.length, args.steps, args.processes = 4, 32, 2, [1, 2]
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_gptq_llama(Path(temporary) / "model", SHAPES[args.shape], BITS, GROUP)
        rows = [measure(folder, count, method, buffers, args) for method in ("published", "full")
                for count in (args.processes if method == "published" else args.processes[:2])
                for buffers in ((False, True) if count == 2 and method == "published" else (False,))]
    one = {row["method"]: row["step_s"] for row in rows if row["processes"] == 1}
    rows = [{**row, "times as fast": one[row["method"]] / row["step_s"]} for row in rows if row["method"] in one]
    print_table("a training step by the number of processes", rows)
    save("processes", rows, args.quick)


if __name__ == "__main__":
    main()
