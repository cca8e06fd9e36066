"""What test_processes.py has torchrun start in two processes: a list of tasks, one after the other.

    torchrun --nproc_per_node 2 tests/processes_driver.py TASKS.json

TASKS.json is a list of [task, command line, arguments of the task]. Process r writes NUMBER.r.json beside it for each
task: what it returned, or the error. `drift` and `interrupt` do to one process alone what must not happen, or seldom
does.
"""
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from transformers import TrainerCallback

import LoTA_QAF_main
from LoTA import processes
from LoTA.trainer import RunTrainer


class AtStep(TrainerCallback):
    """Calls a function once, at the end of one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def train(argv, at_step=None):
    base, training, _ = LoTA_QAF_main.parse_args(argv)
    start = RunTrainer.__init__

    def with_callback(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if at_step:
            self.add_callback(at_step)
    RunTrainer.__init__ = with_callback
    try:
        return str(LoTA_QAF_main.train(base, training))
    finally:
        RunTrainer.__init__ = start


def drift(argv, step):
    """Process 1 changes one entry of one matrix after a step."""
    def change(model):
        if processes.rank() == 1:
            with torch.no_grad():
                next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] += 1
    return train(argv, AtStep(step, change))


def interrupt(argv, step):
    """Process 1 alone gets a Ctrl-C, and the same one a second time. Both then stop after the next step."""
    def press(model):
        if processes.rank() == 1:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
    return train(argv, AtStep(step, press))


def evaluate(argv):
    base, _, evaluation = LoTA_QAF_main.parse_args(argv)
    results = LoTA_QAF_main.evaluate(base, evaluation)
    return {name: {key: found[key] for key in ("accuracy", "loss", "predictions", "results") if key in found}
            for name, found in results.items()}


def other_rows(argv):
    """Process 1 reads one row fewer."""
    return train([*argv, "--debug_number", str(32 - processes.rank())])


def main():
    tasks = json.loads(Path(sys.argv[1]).read_text())
    for number, (task, argv, arguments) in enumerate(tasks):
        try:
            found = {"returned": globals()[task](argv, *arguments)}
        except Exception as error:
            traceback.print_exc()
            found = {"error": str(error)}
        Path(sys.argv[1]).with_name(f"{number}.{processes.rank()}.json").write_text(json.dumps(found))
    processes.leave()


if __name__ == "__main__":
    main()
