"""A candidate that was tried: W^ in -2 ... 2, a second step of the grid where |dW| > 2 omega. For experiments/LOG.md.

    python experiments/two_steps.py --work WORK --bits 8 --results RESULTS.jsonl

WORK holds what runs/experiment.sh makes, and for 8 bits a gptq/int8_32_base_task made likewise. `learned`,
task-specific, with one step at most and with two, at two thresholds, on the rows for choosing. A second step needs no
other code: the sum of two thresholds of Eq. 3 takes the place of one, in training, merge and verification alike.
"""
import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runs")]

import torch
from experiment import add_line, commit, missing
from experiment_runs import RANK, away_from

from LoTA import ternary

OMEGAS = 0.1, 0.15          # in r


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--results", required=True)
    args = parser.parse_args()
    work, results = Path(args.work).resolve(), Path(args.results).resolve()
    if torch.cuda.is_available():
        sys.exit("error: this changes the CPU's road only; hide the GPU: CUDA_VISIBLE_DEVICES=")
    one_step = ternary.ternary_step
    ternary._few_steps = lambda *_: None            # that shortcut knows one step only
    for bits, share, most in itertools.product(args.bits, OMEGAS, (1, 2)):
        ternary.ternary_step = one_step if most == 1 else (
            lambda aux, omega: one_step(aux, omega) + one_step(aux, 2 * omega))
        run = away_from("learned, 4 bits, task", work, f", at {bits} bits, omega / r {share}, at most {most} steps",
                        {"interval_point": share * RANK}, bits)
        if missing([run], results):
            add_line(run, work, results, commit())


if __name__ == "__main__":
    main()
