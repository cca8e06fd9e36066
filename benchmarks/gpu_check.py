"""Runs the tests of the kernels, of the GPU roads and of the optimizer on this machine's GPU, without pytest.

    python benchmarks/gpu_check.py            test_kernels.py, test_steps.py, test_cuda.py, and what only a GPU shows
    python benchmarks/gpu_check.py --quick    the first case of each test; prints only

With --seconds no case begins after so many seconds, and the results say how many were left out.
Without a GPU the kernels run under Triton's interpreter, and the tests that need a GPU are left out. A row of the
results has the number of cases and of failures of one test. The exit status is 1 where a case failed.
"""
import argparse
import importlib
import itertools
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when the kernels are defined, at import
from common import ROOT, print_table, save

from LoTA import kernels
from LoTA.packed import PackedLayer
from LoTA.steps import Rounding, Threshold
from LoTA.ternary import GridLinear
from t_signSGD import tSignSGD

sys.path.append(str(ROOT / "tests"))
# Only a compiler runs it, and on a GPU all other tests need the compiler.
LEFT_OUT = ("test_the_kernels_compile_for_gpus",)


def cases(function: Callable) -> Iterator[dict]:
    """The arguments of every case of a test, as pytest's marks describe them."""
    lists = []
    for mark in getattr(function, "pytestmark", []):
        names = [name.strip() for name in mark.args[0].split(",")]
        plain = (lambda value: value) if len(names) > 1 else (lambda value: (value,))
        lists.append([dict(zip(names, getattr(value, "values", None) or plain(value), strict=True))
                      for value in mark.args[1]])
    for chosen in itertools.product(*lists):
        yield {name: value for part in chosen for name, value in part.items()}


def check_indices_beyond_int32():
    """A layer of more than 2**31 weights: its last group is what a layer of this group alone gives."""
    rows, cols, bits, rank = 2**16, 2**15 + 64, 2, 16
    torch.manual_seed(0)
    qweight = torch.randint(-2**31, 2**31 - 1, (rows * bits // 32, cols), dtype=torch.int32, device="cuda")
    qzeros = torch.randint(0, 2**31 - 1, (rows // 64, cols * bits // 32), dtype=torch.int32, device="cuda")
    scales = torch.rand(rows // 64, cols, device="cuda").half()
    A, B = (torch.randint(-1, 2, size, device="cuda").float() for size in ((rows, rank), (rank, cols)))
    g_idx = torch.arange(rows, device="cuda") // 64
    whole = PackedLayer(qweight, qzeros, scales, g_idx, bits, "gptq_v2")
    last = PackedLayer(qweight[-64 * bits // 32:], qzeros[-1:], scales[-1:], g_idx[:64], bits, "gptq_v2")
    assert kernels._is_wide(whole) and not kernels._is_wide(last)
    (weight, mu), (want, want_mu) = (kernels.adapted_weight(a, B, layer, Threshold(3.0, 3.0), torch.bfloat16)
                                     for a, layer in ((A, whole), (A[-64:], last)))
    assert torch.equal(weight[-64:], want) and torch.equal(mu[-1:], want_mu)
    del weight, want
    x, grad = (torch.randn(4, n, device="cuda").bfloat16() for n in (rows, cols))
    got, want = (kernels.step_gradients(x_, grad, a, B, layer.scales.float(), layer.groups)[0]
                 for x_, a, layer in ((x, A, whole), (x[:, -64:].contiguous(), A[-64:], last)))
    assert (got[-64:] - want).abs().max() <= 2e-2 * want.abs().max()


def check_that_nothing_waits():
    """A forward and a backward by both rules, and steps of the optimizer in every phase: the CPU waits nowhere."""
    case = importlib.import_module("test_kernels").Case(4)
    A, B = (torch.nn.Parameter(m.t().contiguous().cuda()) for m in (case.A, case.B))
    optimizer = tSignSGD([A, B])
    optimizer.create_scheduler(10)
    x, grad = (torch.randn(6, n, device="cuda", dtype=torch.bfloat16) for n in case.packed.shape)

    def step():
        for rule in (Rounding(2.0, 7), Threshold(2.0, 2.0)):
            A.grad = B.grad = None
            y = GridLinear.apply(x, A.t(), B.t(), lambda: case.packed, rule, kernels)
            y.backward(grad)
        optimizer.step()
        optimizer.zero_grad()
    step()                                      # compiles, and takes memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(9):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    optimizer.raise_unless_finite()


def run(name: str, function: Callable, quick: bool = False, end: float = math.inf) -> dict:
    """The row of one test. Prints the traceback of every failure. end: when no case begins any more."""
    start, count, left_out, failures = time.perf_counter(), 0, 0, []
    for arguments in itertools.islice(cases(function), 1 if quick else None):
        if time.perf_counter() > end:
            left_out += 1
            continue
        count += 1
        try:
            function(**arguments)
        except Exception as error:
            traceback.print_exc()
            failures.append(f"{arguments}: {type(error).__name__} {str(error)[:300]}")
    row = {"test": name, "cases": count, "failed": len(failures), "left out": left_out,
           "seconds": time.perf_counter() - start}
    print(f"{name}: {count - len(failures)} of {count} passed, {row['seconds']:.1f} s", flush=True)
    return {**row, "failures": failures}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first case of each test; prints only")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no case begins after so many [no limit]")
    args = parser.parse_args()
    rows, end = [], time.perf_counter() + args.seconds
    if torch.cuda.is_available():               # first, because nothing else can show this
        rows += [run(check.__name__, check) for check in (check_that_nothing_waits, check_indices_beyond_int32)]
    for module in map(importlib.import_module, ("test_kernels", "test_steps", "test_cuda")):
        skip = getattr(module, "pytestmark", None)
        if skip is None or not skip.args[0]:
            rows += [run(name, test, args.quick, end) for name, test in vars(module).items()
                     if name.startswith("test_") and name not in LEFT_OUT]
    print_table("tests of the kernels", [{k: v for k, v in row.items() if k != "failures"} for row in rows])
    save("gpu_check", rows, args.quick)
    sys.exit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main()
