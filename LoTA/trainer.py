"""transformers' Trainer for ternary adapters, and callbacks of every training run.

Touches transformers, through the hooks that Trainer offers; writes lota_config.json into checkpoints.
"""
import signal
from pathlib import Path

from transformers import ProgressCallback, Trainer, TrainerCallback

from LoTA import UserError
from LoTA.monitor import Monitor, line_of


class LotaTrainer(Trainer):
    """Trainer whose optimizer is a tSignSGD, over the run's real number of steps, with a Monitor that looks inside.

    optimizer: the tSignSGD; omega: the threshold that the Monitor measures |dW| by; the rest is Trainer's.
    """

    def __init__(self, optimizer, omega, **kwargs):
        super().__init__(optimizers=(optimizer, None), **kwargs)
        self.ternary_optimizer, self.omega = optimizer, omega       # accelerate will wrap self.optimizer
        self.add_callback(LastStep)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ConsoleLine)

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.ternary_optimizer.raise_unless_finite()                # on a GPU, of the last step
        return result

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = self.ternary_optimizer.create_scheduler(num_training_steps)
        self.monitor = Monitor(self.model, self.ternary_optimizer, self.omega, num_training_steps)
        return self.lr_scheduler

    def log(self, logs, *args, **kwargs):
        if "learning_rate" in logs:
            logs.pop("learning_rate")                               # t-SignSGD has none
            logs |= self.monitor.look(self.state.global_step)
        super().log(logs, *args, **kwargs)


class LastStep(TrainerCallback):
    """The last step is logged too, whatever --logging_steps says."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True


class ConsoleLine(ProgressCallback):
    """Progress with one readable line for each log of a LoTA run."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "sigma" in logs:
            self.training_bar.write(line_of(logs, f"{state.global_step}/{state.max_steps}"))
        else:
            super().on_log(args, state, control, logs=logs, **kwargs)


class Checkpoints(TrainerCallback):
    """Writes `config`, a LotaConfig, last of all into every checkpoint, so that it marks a whole one; turns Ctrl-C into
    a checkpoint and an orderly end; and refuses to resume a run at its end.

    A context manager around train(): the handler of Ctrl-C before it is there again behind it.
    """

    def __init__(self, config):
        self.config, self.interrupted = config, False

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, *exception):
        signal.signal(signal.SIGINT, self.before)

    def interrupt(self, signum, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\ninterrupted: saving a checkpoint after this step; Ctrl-C again stops at once")

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:                    # Trainer would take one step more
            raise UserError(f"nothing to resume: the checkpoint is of step {state.global_step}, the run's last. It is "
                            "an adapter as it is (--load_adapter); more --max_steps would train it further")

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self.config.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
