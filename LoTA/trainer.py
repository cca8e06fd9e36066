"""A training run around transformers' Trainer: its folder, its record, its arguments, its callbacks.

Touches transformers, through the hooks that Trainer offers, PEFT's names of tensors, and the run's folder.
"""
import errno
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch.utils.data import Sampler
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import LengthGroupedSampler

from LoTA import UserError, explain, processes
from LoTA.adapter_folder import ADAPTER_FILES, AdapterFolder, LotaConfig
from LoTA.answer_loss import answer_loss, has_plain_loss
from LoTA.distill import Distillation
from LoTA.export.card import write_adapter_card
from LoTA.folders import GPTQFolder
from LoTA.layer import adapter_state
from LoTA.lota_merge import print_moved
from LoTA.monitor import Monitor, console_line
from LoTA.own_rows import without_places
from LoTA.settings import IN_GRID, METHODS, baseConfig, split_names, trainingConfig
from LoTA.storage import write_json

# Not at run time, because LotaTrainer takes any sequence of rows, and then needs no datasets.
if TYPE_CHECKING:
    from datasets import Dataset

CLIMBS = 3          # logged losses in a row that show a divergence
SAME_CTRL_C = 5     # seconds in which another Ctrl-C is the same one, where a launcher passes it on


class Run:
    """A training run's folder: claimed for this run alone, renamed when the run has ended.

        with Run(parent, name) as run:
            ... train into run.folder ...
            final = run.finish(runtime, peak_mb)

    name: a function (when=, runtime=None, peak_mb=None) -> the folder's name. It is called without runtime and peak
    while the run goes on. when: the run's day and time, and a number behind it where another run has this name already.
    folder: where the run writes.
    writes: whether this process writes. Of several processes the first one does. It claims the folder, and tells the
    others.

    A run that fails before it has written anything leaves no folder.
    """

    def __init__(self, parent: str | Path, name: Callable[..., str]):
        self.parent, self.name, self.writes = Path(parent), name, processes.is_first()
        self._made_parents: list[Path] = []

    def __enter__(self) -> "Run":
        if self.writes:
            self._claim()
        self.folder = processes.shared_folder(self.folder if self.writes else None, "--adapter_path")
        return self

    def _claim(self) -> None:
        """Makes the folder, and whatever is missing above it."""
        self._made_parents = [path for path in (self.parent, *self.parent.parents) if not path.exists()]
        self.parent.mkdir(parents=True, exist_ok=True)
        started, number = datetime.now().strftime("%d_%H%M%S"), 1
        while True:
            self.when = started if number == 1 else f"{started}-{number}"
            self.folder = self.parent / self.name(when=self.when)
            try:
                self.folder.mkdir()             # fails where another run has claimed the name
                return
            except FileExistsError:
                number += 1

    def __exit__(self, *exception) -> None:
        if not self.writes:
            return
        with suppress(OSError):                 # raised where a folder is not empty or not there any more
            for folder in (self.folder, *self._made_parents):
                folder.rmdir()

    def finish(self, runtime: float, peak_mb: float) -> Path:
        """Renames the folder to its final name, which has the runtime in s and the peak memory in MiB. Returns
        it."""
        final = self.parent / self.name(when=self.when, runtime=runtime, peak_mb=peak_mb)
        os.rename(self.folder, final)
        return final


def training_arguments(base: baseConfig, training: trainingConfig, folder: Path,
                       some_idle: bool = False) -> TrainingArguments:
    """transformers' TrainingArguments for completed settings. Raises UserError where transformers refuses one.

    some_idle: whether a step may leave adapters without a gradient, as it does those of experts that no token chose.
    Several processes must look for them then.
    """
    report_to = [tracker for tracker in split_names(base.report_to) if tracker != "none"]
    missing = [tracker for tracker in report_to if tracker not in get_available_reporting_integrations()]
    if missing:
        raise UserError(f"--report_to {missing[0]} is not installed: pip install {missing[0]}")
    on_cpu = not torch.cuda.is_available() or base.device_map == "cpu"
    try:
        arguments = TrainingArguments(
            output_dir=str(folder), num_train_epochs=training.num_train_epochs or 1, max_steps=training.max_steps,
            per_device_train_batch_size=training.train_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            # LotaTrainer brings its own optimizer, but Trainer wants a name that it knows.
            optim="adamw_torch" if base.lota_qaf else training.optimizer_type, learning_rate=training.learning_rate,
            weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm,
            warmup_steps=training.warmup_ratio,         # transformers reads a number below 1 as a share of the steps
            lr_scheduler_type=training.lr_scheduler_type,
            activation_checkpointing=training.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
            train_sampling_strategy="group_by_length", logging_steps=training.logging_steps,
            save_strategy=training.save_strategy,
            # A share of the run's steps. Trainer saves the last step in any case, so one checkpoint needs no interval.
            save_steps=1 / training.save_number if training.save_number > 1 else 10**9,
            use_cpu=on_cpu, report_to=report_to or "none", dataloader_pin_memory=not on_cpu, seed=base.seed,
            data_seed=base.seed, ddp_backend="gloo" if on_cpu and processes.count() > 1 else None,
            # A GPTQ model's integers are buffers. torch would send all of them in every forward.
            ddp_broadcast_buffers=False, ddp_find_unused_parameters=some_idle,
            log_level_replica="error")
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from None
    # The model stays where GPTQModel put it, on one GPU or spread over several. Trainer must not copy it to all GPUs.
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1
    return arguments


def config_of_run(base: baseConfig, training: trainingConfig, folder: GPTQFolder,
                  data: "Dataset | None" = None) -> LotaConfig:
    """The LotaConfig of a run with these completed settings. It goes into the adapter folder. data: tokenized rows."""
    fingerprint, fingerprint_all = folder.fingerprints()
    return LotaConfig(
        method=METHODS[base.method], omega=training.interval_point if base.lota_qaf else None,
        residual=base.residual or base.method == "qalora",      # QA-LoRA merges as offsets
        offset_scale=base.offset_scale, learned_scales=base.method in IN_GRID and base.learned_scales,
        dither=base.dither if base.method == "lrqat" else "none", bits=base.w_bits,
        group_size=base.group_size, rank=base.lora_r, pretrained=_absolute(base.pretrained),
        quantized_model_dir=_absolute(folder.path), fingerprint=fingerprint, fingerprint_all=fingerprint_all,
        data_set=without_places(training.training_data_name), seed=base.seed, settings={**vars(base), **vars(training)},
        versions={package: version(package) for package in ("torch", "transformers", "peft", "gptqmodel")},
        base_files=folder.file_checksums(),
        training={"processes": processes.count(), **({} if data is None else {"data": data_fingerprint(data)})})


def _absolute(name: str | Path | None) -> str | None:
    """A local folder as an absolute path. A hub name, or None, stays as it is."""
    return str(Path(name).resolve()) if name is not None and Path(name).is_dir() else name


def data_fingerprint(data: "Dataset") -> str:
    """xxh3-128 over the tokens and labels of all rows, in their order. data: columns input_ids and labels."""
    digest = xxhash.xxh3_128()
    for rows in data.select_columns(["input_ids", "labels"]).iter(1000):
        for pair in zip(rows["input_ids"], rows["labels"], strict=True):
            for numbers in pair:
                digest.update(np.asarray([len(numbers), *numbers], dtype="<i8").tobytes())
    return digest.hexdigest()


def trained_groups(model: PeftModel, base: baseConfig, training: trainingConfig) -> tuple[list, list[dict]]:
    """([(name, parameter)] of A and B, an optimizer's groups of mu and of the scales, where these are learned)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rates = {"lora_offset": training.offset_lr * (2**base.w_bits - 1), "lora_scale": training.scale_lr}
    real = [{"params": [(name, p) for name, p in trained if part in name], "lr": rate, "weight_decay": 0.0}
            for part, rate in rates.items()]
    return ([(name, p) for name, p in trained if "lora_A" in name or "lora_B" in name],
            [group for group in real if group["params"]])


def real_optimizer(model: PeftModel, base: baseConfig, training: trainingConfig,
                   arguments: TrainingArguments) -> torch.optim.Optimizer:
    """LR-QAT's: --optimizer_type over A and B, and over mu and the scales at rates of their own."""
    matrices, real = trained_groups(model, base, training)
    optimizer, settings_of_it = Trainer.get_optimizer_cls_and_kwargs(arguments)
    made = optimizer([{"params": matrices, "weight_decay": training.weight_decay}, *real], **settings_of_it)
    made.register_step_pre_hook(raise_unless_finite)
    return made


def raise_unless_finite(optimizer: torch.optim.Optimizer, *args) -> None:
    """Raises FloatingPointError where a gradient is not finite. AdamW would make its parameters so too."""
    named = [(name, p) for group in optimizer.param_groups
             for name, p in zip(group["param_names"], group["params"], strict=True) if p.grad is not None]
    norms = torch._foreach_norm([p.grad for _, p in named], 2, torch.float32)
    finite = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().tolist()
    wrong = [name for (name, _), one in zip(named, finite, strict=True) if not one]
    if wrong:
        raise FloatingPointError(f"the gradient of {wrong[0]} is not finite; lower --learning_rate")


class RunTrainer(Trainer):
    """Trainer for a run that can be interrupted at any moment and resumed exactly. All methods train with it.

    config: the LotaConfig that goes into every checkpoint. distillation: the teacher and its share of the loss; None:
    no teacher. The rest is Trainer's.
    interrupted: whether Ctrl-C has ended train().
    Raises UserError for a teacher where the loss of the model has more terms than the cross entropy of the answers.
    """

    def __init__(self, config: LotaConfig, distillation: Distillation | None = None, **kwargs):
        super().__init__(**kwargs)
        self.config, self.distillation, self.num_distilled = config, distillation, None
        self.only_answers = has_plain_loss(self.model) and self.label_smoother is None
        if distillation:
            if not self.only_answers:
                raise UserError("--distill needs a model whose loss is the cross entropy alone, and this one's has "
                                "more terms: look at output_router_logits in its config.json")
            self.config = replace(config, training={**config.training, "teacher": distillation.fingerprint()})
        self.before: dict = {}              # LotaConfig.training of the checkpoint that is resumed
        self.checkpoints = Checkpoints(self)
        self.add_callback(self.checkpoints)
        if config.settings.get("loss_guard", True):
            self.add_callback(LossGuard(remedy_for(config)))

    @property
    def interrupted(self) -> bool:
        return bool(self.checkpoints.interrupted)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Trainer's. Raises UserError where the checkpoint has other tensors than the model trains."""
        self.started = time.time()
        if resume_from_checkpoint:
            self.before = LotaConfig.load(resume_from_checkpoint).training
            self._check_teacher(resume_from_checkpoint)
            self._check_tensors(AdapterFolder(resume_from_checkpoint))
        with self.checkpoints:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with unpickling(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with unpickling(checkpoint):
            super()._load_rng_state(checkpoint)

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Trainer's. It calls answer_loss() for the model, because the prompts' logits are most of the memory.

        With a teacher it calls the loss of the Distillation.
        """
        if self.only_answers and not return_outputs:
            model = (partial(self.distillation.loss, model, num_distilled=self.num_distilled) if self.distillation
                     else partial(answer_loss, model))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | int | None]:
        """Trainer's: the batches of an optimizer step, and how many answer tokens they have.

        It also counts the tokens that are compared with the teacher, because both means are over the whole step. None:
        the model takes no number of tokens, so that each batch has its own means.
        """
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if self.distillation and num_items_in_batch is not None:
            self.num_distilled = sum(processes.gather(int(self.distillation.count(batches))))
        return batches, num_items_in_batch

    def _check_teacher(self, checkpoint: str) -> None:
        """Another teacher would train something else."""
        before, now = self.before.get("teacher"), self.config.training.get("teacher")
        if before is not None and now != before:
            raise UserError(f"--adapter_ckpt {checkpoint} cannot be resumed with this teacher: its weights are others "
                            f"than those that taught it (fingerprint {before}, not {now}); give the same "
                            "--distill_model")

    def _check_tensors(self, adapter: AdapterFolder) -> None:
        """PEFT only warns about a missing tensor. The layer would silently start anew."""
        with safe_open(adapter.file, "pt") as tensors:
            there = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}    # noqa: SIM118
        wanted = {name: tuple(p.shape) for name, p in get_peft_model_state_dict(self.model).items()}
        for name in sorted(there.keys() | wanted.keys()):
            if there.get(name) != wanted.get(name):
                raise UserError(f"{adapter.file} does not fit this run: {name} has the shape {there.get(name)} there, "
                                f"{wanted.get(name)} here (None: it is not there); take another checkpoint")

    def runtime_and_peak(self) -> tuple[float, float]:
        """(seconds, peak memory in MiB) of the run so far, with the parts before it was resumed.

        The memory is that of the process that took most. All processes must call this, and record() and
        save_finished(), which do.
        """
        return (self.before.get("runtime_s", 0) + time.time() - self.started,
                max(self.before.get("peak_mb", 0), *processes.gather(peak_memory_mb())))

    def record(self) -> LotaConfig:
        """The LotaConfig of a checkpoint: with what a resumed run needs to count on from here."""
        runtime, peak = self.runtime_and_peak()
        return replace(self.config, training={
            **self.config.training, "steps": self.state.global_step, "runtime_s": runtime, "peak_mb": peak,
            "loss_sum": self._total_loss_scalar, "loss_unlogged": processes.gather(self._tr_loss.item()),
            "last_logged": self._globalstep_last_logged})

    def restore(self) -> None:
        """Goes on with the sums of the checkpoint, where it has them. Trainer begins them anew."""
        if "loss_sum" in self.before:
            self._total_loss_scalar = self.before["loss_sum"]
            unlogged = self.before["loss_unlogged"]         # of each process; older versions had one, and its number
            self._tr_loss.fill_(unlogged[processes.rank()] if isinstance(unlogged, list) else unlogged)
            self._globalstep_last_logged = self.before["last_logged"]
            self._initial_global_step = 0               # Trainer divides the sum by the steps since this one

    def save_finished(self, run: Run) -> Path:
        """Writes the adapter of a run that has ended into the run's folder, and renames it. Returns the folder."""
        runtime, peak = self.runtime_and_peak()
        return processes.agree(self._save_finished(run, runtime, peak) if run.writes else None)

    def _save_finished(self, run: Run, runtime: float, peak: float) -> Path:
        self.config.save(run.folder, complete=False)    # a run that is killed from here on leaves no half adapter
        self.model.save_pretrained(str(run.folder), state_dict=adapter_state(self.model, finished=True),
                                   save_embedding_layers=False)
        write_json(run.folder / "log_history.json", self.state.log_history)
        record = replace(self.config, training={
            **self.config.training, "runtime_s": round(runtime, 1), "peak_mb": round(peak),
            "steps": self.state.global_step, "loss": self.state.log_history[-1].get("train_loss")})
        record.save_adapter(run.folder)
        record = self.report(run.folder, record)        # the adapter is on disk already, whatever becomes of its report
        final = run.finish(runtime, peak)
        write_adapter_card(final, record)
        return final

    def report(self, folder: Path, record: LotaConfig) -> LotaConfig:
        """Writes what the run did into its folder. Returns the record with what the report adds to it."""
        return record

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:           # before any other file; Checkpoints says after the last that all are there
            self.config.save(output_dir or self.args.output_dir, complete=False)
        super().save_model(output_dir, _internal_call)

    def log(self, logs: dict, *args, **kwargs) -> None:
        if "train_runtime" in logs and "loss_sum" in self.before:
            part, whole = logs["train_runtime"], logs["train_runtime"] + self.before["runtime_s"]
            rates = {name: round(rate * part / whole, 3) for name, rate in logs.items() if name.endswith("_per_second")}
            logs |= {"train_runtime": whole, **rates}
        processes.require_same({name: p for name, p in self.model.named_parameters() if p.requires_grad},
                               self.state.global_step)
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        grouped = super()._get_train_sampler(train_dataset)
        return EpochSampler(grouped.batch_size * processes.count(), grouped.lengths, self.args.data_seed,
                            lambda: int(self.state.epoch or 0))


@contextmanager
def unpickling(checkpoint: str | None) -> Iterator[None]:
    """While Trainer reads a checkpoint's *.pt and *.pth, the only pickles that are read, their faults are a UserError.

    Trainer reads them with torch's weights_only, which builds tensors and plain values and runs no code.
    """
    try:
        yield
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        # torch looks for the end of a cut file before its beginning, and Linux calls that an invalid argument.
        if explain(error) is not None and getattr(error, "errno", None) != errno.EINVAL:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the optimizer.pt, scheduler.pt or rng_state.pth of {checkpoint} is damaged, or holds more "
                        f"than tensors and plain values; take another checkpoint ({reason})") from error


class EpochSampler(LengthGroupedSampler):
    """LengthGroupedSampler whose order depends on the seed and the epoch only, so that a resumed run draws the same.

    epoch: a function -> the number of the epoch that begins, from 0. The first epoch draws from torch's own generator,
    which a resumed run also seeds anew.

    batch_size: the rows of an optimizer step. Several processes take turns in the batches that it is cut into, so the
    rows of a step are those that one process with larger batches has.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self):
        epoch = self.epoch()
        self.generator = torch.Generator().manual_seed(self.seed + epoch) if epoch else None
        order = list(super().__iter__())
        processes.require_equal({"order of rows": xxhash.xxh3_128(np.asarray(order).tobytes()).hexdigest()})
        return iter(order)


class GridTrainer(RunTrainer):
    """RunTrainer that monitors the layers whose adapters are steps on the grid.

    optimizer: a torch optimizer over their parameters. The rest is RunTrainer's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, **kwargs):
        super().__init__(optimizers=(optimizer, None), **kwargs)
        self.own_optimizer = optimizer          # kept here, because accelerate wraps self.optimizer
        self.add_callback(LogLastStep)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ConsoleLines)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, adapter_state(self.model) if state_dict is None else state_dict)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.monitor = Monitor(self.model, self.own_optimizer, self.config.omega, num_training_steps,
                               self.state.log_history)
        return scheduler

    def report(self, folder: Path, record: LotaConfig) -> LotaConfig:
        moved = self.monitor.moved.shares()
        print_moved(moved)
        record = replace(record, training={**record.training, "moved": moved})
        record.save_adapter(folder)
        self.monitor.write(folder, self.state.log_history)
        return record

    def log(self, logs: dict, *args, **kwargs) -> None:
        if "learning_rate" in logs:
            logs |= self.monitor.metrics(self.state.global_step)
            if "sigma" in logs:
                logs.pop("learning_rate")       # t-SignSGD has none
        super().log(logs, *args, **kwargs)


class LotaTrainer(GridTrainer):
    """GridTrainer that tells a tSignSGD, its optimizer, the actual number of steps."""

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        self.own_optimizer.raise_unless_finite()                    # on a GPU the last step is judged only now
        return result

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        self.lr_scheduler = self.own_optimizer.create_scheduler(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)      # it makes none where one is there


class LossGuard(TrainerCallback):
    """Ends a run whose loss climbs, because a diverged adapter is worse than none and the hours go on.

    A run has diverged where CLIMBS logged losses in a row are beyond twice the first one, and beyond it by a nat.
    remedy: what the user may do. It reads Trainer's log, so a resumed run is judged by the first loss of the whole run.
    """

    def __init__(self, remedy: str):
        self.remedy = remedy

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:          # the summary at the end
            return
        history = state.log_history
        first = history[0]["loss"]
        limit = max(2 * first, first + 1)
        if len(history) > CLIMBS and all(row.get("loss", 0) > limit for row in history[-CLIMBS:]):
            raise UserError(f"the loss climbed from {first:.3g} to {logs['loss']:.3g} at step {state.global_step}: "
                            f"{self.remedy}, or go on with --loss_guard False")


def remedy_for(config: LotaConfig) -> str:
    """What to do where a run of these settings diverged."""
    if not config.in_grid:
        return "lower --learning_rate"
    if config.method == "LR-QAT":
        learned = config.learned_scales or config.learned_offset
        return "lower --learning_rate" + (", --offset_lr and --scale_lr" if learned else "")
    if config.learned_offset or config.learned_scales:
        return "lower --offset_lr, --scale_lr and --flip_limit, or take --recipe published"
    return "raise --sigma_start or --interval_point"


class LogLastStep(TrainerCallback):
    """Logs the last step too, whatever --logging_steps says."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True


class ConsoleLines(ProgressCallback):
    """Trainer's progress bar, with one readable line for each log of a run on the grid."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "train_runtime" not in logs:
            self.training_bar.write(console_line(logs, f"{state.global_step}/{state.max_steps}"))
        else:
            super().on_log(args, state, control, logs=logs, **kwargs)


class Checkpoints(TrainerCallback):
    """Marks whole checkpoints, removes old ones, turns Ctrl-C into a checkpoint, refuses to resume a run at its end.

    It is a context manager around train(): while the block runs, it handles Ctrl-C. trainer: the RunTrainer whose
    record() it writes into every checkpoint, last of all files. interrupted: when Ctrl-C came, in seconds; 0: never.
    """

    def __init__(self, trainer: "RunTrainer"):
        self.trainer, self.interrupted = trainer, 0.0

    def __enter__(self) -> "Checkpoints":
        self.handler_before = signal.signal(signal.SIGINT, self.interrupt)
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGINT, self.handler_before)

    def interrupt(self, signum, frame) -> None:
        if self.interrupted:
            if processes.count() > 1 and time.time() - self.interrupted < SAME_CTRL_C:
                return                      # the terminal sends Ctrl-C to all processes, and torchrun sends it on
            raise KeyboardInterrupt
        self.interrupted = time.time()
        print("\ninterrupted: saving a checkpoint after this step; Ctrl-C again stops at once")

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:                    # Trainer would take one step more
            raise UserError(f"nothing to resume: the checkpoint is of step {state.global_step}, the run's last. Use it "
                            "with --load_adapter as it is, or train it further with more --max_steps")
        state.compute_steps(args, state.max_steps)      # a resumed run logs and saves as its own flags say
        self.trainer.restore()

    def on_step_end(self, args, state, control, **kwargs):
        # Ctrl-C may reach one process in this step and another in the next one. All must stop in the same.
        self.interrupted = max(processes.gather(self.interrupted))
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        record = self.trainer.record()          # here all processes meet, so the random states of all are written
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_adapter_card(checkpoint, record)
            record.save_adapter(checkpoint)
            remove_checkpoints(checkpoint.parent, record.settings.get("save_total_limit"))


def remove_checkpoints(folder: Path, keep: int | None) -> None:
    """Removes all but the `keep` checkpoints of the most steps in a run's folder. None keeps all.

    Trainer would do it before the newest checkpoint is whole. A process that is killed then could leave none. The
    matrices go first, because what is left without them is refused.
    """
    checkpoints = sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    for old in checkpoints[:-keep] if keep else []:
        (old / ADAPTER_FILES[1]).unlink(missing_ok=True)
        shutil.rmtree(old)


def forget_peak_memory() -> None:
    """What the GPUs took until now no longer counts for peak_memory_mb()."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb() -> float:
    """Peak memory in MiB: of the run on the GPUs where it took any, else of this process since it began."""
    on_gpus = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return on_gpus / 2**20 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
