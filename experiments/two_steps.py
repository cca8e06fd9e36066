"""Tries a candidate for experiments/LOG.md: W^ in -2 ... 2, with a second step of the grid where |dW| > 2 omega.

    python experiments/two_steps.py --work WORK --bits 8 --results RESULTS.jsonl

WORK is the folder that runs/experiment.sh fills. For 8 bits it also needs a gptq/int8_32_base_task, made likewise. The
recipe `full` is trained in the task-specific setting with at most one step and with at most two, each at two values of
omega, and scored on the rows for choosing.

The script replaces LoTA.steps.ternary_step by a sum of two thresholds. Training, merge and verification all call that
function, so all three take second steps and no other code changes.
"""
import argparse
import itertools
from pathlib import Path

import torch
from plan import RANK, changed_centre
from run import add_line, commit, missing

from LoTA import UserError, run_script, steps, ternary

OMEGAS = 0.1, 0.15          # as shares of the rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with the models and the data")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--results", required=True, help="the file that gets a line of JSON for each run")
    args = parser.parse_args()
    work, results = Path(args.work).resolve(), Path(args.results).resolve()
    if torch.cuda.is_available():
        raise UserError("on a GPU the kernels step, not LoTA.ternary; hide the GPU: CUDA_VISIBLE_DEVICES=")
    (work / "logs").mkdir(parents=True, exist_ok=True)
    one_step = steps.ternary_step
    ternary._sparse_steps = lambda *_: None         # it knows one step only; without it every block is computed
    for bits, share, most in itertools.product(args.bits, OMEGAS, (1, 2)):
        steps.ternary_step = one_step if most == 1 else (
            lambda delta_w, omega: one_step(delta_w, omega) + one_step(delta_w, 2 * omega))
        run = changed_centre("full, 4 bits, task", work, f", at {bits} bits, omega / r {share}, at most {most} steps",
                             {"interval_point": share * RANK}, bits)
        if missing([run], results):
            add_line(run, work, results, commit())


if __name__ == "__main__":
    run_script(main)
