"""A candidate that was tried: W^ in -2 ... 2, a second step of the grid where |dW| > 2 omega. For experiments/LOG.md.

    python experiments/two_steps.py --work WORK --bits 4 --results RESULTS.jsonl

WORK holds what runs/experiment.sh makes, and gptq/int8_32_base_recovery for 8 bits. Each recipe runs with one step at
most and with two, on the rows for choosing. A second step needs no other code: the sum of two thresholds of Eq. 3 takes
the place of one, in training, merge and verification alike.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runs")]

import torch
from experiment import add_line, commit, missing
from experiment_runs import RANK, away_from

from LoTA import ternary

OMEGA = 0.2 * RANK          # at the recipes' 0.3 r next to no |dW| is beyond 2 omega


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--bits", type=int, nargs="+", required=True)
    parser.add_argument("--results", required=True)
    args = parser.parse_args()
    work, results = Path(args.work).resolve(), Path(args.results).resolve()
    if torch.cuda.is_available():
        sys.exit("error: this changes the CPU's road only; hide the GPU: CUDA_VISIBLE_DEVICES=")
    one_step = ternary.ternary_step
    ternary._few_steps = lambda *_: None            # that shortcut knows one step only
    for bits in args.bits:
        for recipe in ("steps", "learned"):
            for most in (1, 2):
                ternary.ternary_step = one_step if most == 1 else (
                    lambda aux, omega: one_step(aux, omega) + one_step(aux, 2 * omega))
                run = away_from(recipe, work, f", {bits} bits, at most {most} steps", {"interval_point": OMEGA}, bits)
                if missing([run], results):
                    add_line(run, work, results, commit())


if __name__ == "__main__":
    main()
