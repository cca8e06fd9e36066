"""LoTA-QAF: lossless ternary adaptation for quantization-aware fine-tuning. https://arxiv.org/abs/2505.18724

--mode 1 trains an adapter on a GPTQ model; --mode 2 merges it into the integer grid and evaluates.

    python LoTA_QAF_main.py --mode 1 --lota_qaf True --quantized_model_dir GPTQ --pretrained MODEL \\
        --training_data_name viggo --num_train_epochs 1
    python LoTA_QAF_main.py --mode 2 --load_adapter ADAPTER --ft_dataset_name viggo
"""
import argparse
import math
import os
import re
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from LoTA import UserError, run_script
from LoTA.folders import (
    LAYER_TENSORS,
    LOTA_CONFIG,
    AdapterTensors,
    GPTQFolder,
    LotaConfig,
    MergedFolder,
    check_model_name,
    is_merged,
    make_threshold,
    read_adapter,
    write_json,
)
from LoTA.lota_merge import check_match, merge_folders, print_moved
from LoTA.ternary import check_settings

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = {"lota": "LoTA", "lora": "LoRA", "qalora": "QA-LoRA"}
# Opt-in settings for LoTA, found on a small model (experiments/LOG.md); and for each recipe and number of bits omega,
# as a share of the rank, and sigma at the first step. The finer the grid, the more of its steps are worth taking. 8
# bits were not tried: they are as 4.
RECIPES = {
    "published": {},
    "steps": {"momentum": 0.9, "residual": False},
    "grid": {"momentum": 0.9, "residual": False, "learned_scales": True},
    "learned": {"momentum": 0.9, "offset_scale": "learned", "learned_scales": True}}
BESIDE_SCALES = {2: (0.3, 0.995), 3: (0.2, 0.98), 4: (0.15, 0.98), 8: (0.15, 0.98)}
STEPS = {
    "published": dict.fromkeys((2, 3, 4, 8), (0.75, 0.95)),
    "steps": {2: (0.3, 0.99), 3: (0.15, 0.98), 4: (0.1, 0.98), 8: (0.1, 0.98)},
    "grid": BESIDE_SCALES, "learned": BESIDE_SCALES}
LARGE_MODEL = 30e9          # from here on the paper uses rank 32 instead of 64
SPLIT_TARGETS = re.compile(r"[,\s]+")


def setting(default, help, **kwargs):
    """A dataclass field with its help; the default is shown behind it."""
    shown = kwargs.pop("shown", default)
    return field(default=default, metadata={"help": f"{help} [{shown}]", **kwargs})


@dataclass
class baseConfig:
    mode: int = setting(1, "1 trains an adapter; 2 merges it and evaluates", choices=[1, 2])
    lota_qaf: bool = setting(False, "True: ternary adapters with t-SignSGD (--method lota). Mode 2 reads it from the "
                                    "adapter")
    method: str | None = setting(None, "what to train: lota, or a baseline with a 16-bit adapter: lora, or qalora that "
                                       "merges into the zero points", choices=["lota", "lora", "qalora"],
                                 shown="lota with --lota_qaf True, else lora")
    residual: bool = setting(True, "use the offset factor (mu, Eq. 4); without it the merged model is a plain GPTQ "
                                   "checkpoint")
    offset_scale: str = setting("omega", "what mu is divided by (kappa): omega, as the published scripts do, or paper "
                                         "(1, Eq. 4 as printed); learned: mu is a parameter of its own",
                                choices=["omega", "paper", "learned"])
    learned_scales: bool = setting(False, "LoTA: train the scales of the groups too; merged, they are the GPTQ model's "
                                          "own scales, float16 as always")
    quantized_model_dir: str | None = setting(None, "the GPTQ model's folder", shown="mode 2: the adapter's own")
    pretrained: str | None = setting(None, "the 16-bit model, folder or hub name: the tokenizer where the GPTQ folder "
                                           "has none, and the model of --auto_gptq none", shown="the GPTQ folder")
    w_bits: int | None = setting(None, "bits (2, 3, 4, 8); checked against the GPTQ folder", shown="the folder's")
    group_size: int | None = setting(None, "rows of a group; checked against the GPTQ folder", shown="the folder's")
    sym: bool = setting(False, "the GPTQ grid is symmetric; recorded only, as the GPTQ folder says it")
    lora_target_modules: list[str] = field(default_factory=lambda: list(TARGET_MODULES), metadata={
        "help": f"the projections that get an adapter [{' '.join(TARGET_MODULES)}]"})
    lora_r: int | None = setting(None, "rank (r)", shown="64 below 30B parameters, else 32")
    lora_alpha: int | None = setting(None, "LoRA's alpha; recorded only, with LoTA", shown="2 r")
    lora_dropout: float = setting(0.0, "dropout of the LoRA baseline; LoTA has none")
    device_map: str = setting("auto", "where the model goes: auto (the GPU if there is one, else the CPU) or a device")
    dtype: str = setting("bfloat16", "of the computation: bfloat16, float16 or float32",
                         choices=["bfloat16", "float16", "float32"])
    flash_attn: str = setting("auto", "attention implementation: sdpa, eager, flash_attention_2 ...",
                              shown="flash_attention_2 where installed, else sdpa", choices=[
                                  "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"])
    trust_remote_code: bool = setting(False, "run code that comes with a model")
    data_dir: str | None = setting(None, "data on disk: a save_to_disk folder, or csv, json, jsonl files named after "
                                         "their split", shown="the hub")
    seed: int = setting(42, "of everything random")
    report_to: str = setting("none", "where training metrics go besides the console: none, tensorboard, wandb ...")


@dataclass
class trainingConfig:
    training_data_name: str = setting("alpaca", "what to train on: alpaca, gsm8k, sql or viggo")
    train_ratio: float = setting(1.0, "the share of the training rows to use, in (0, 1]")
    debug_number: int = setting(-1, "use only so many training rows; -1: all")
    num_train_epochs: float = setting(0, "epochs; or give --max_steps")
    max_steps: int = setting(-1, "optimizer steps (S); overrides the epochs; -1: by epochs")
    train_batch_size: int = setting(64, "rows of a batch and device")
    gradient_accumulation_steps: int = setting(1, "batches of an optimizer step")
    source_max_len: int = setting(1024, "tokens of a prompt at most")
    target_max_len: int = setting(256, "tokens of an answer at most, its end token counted in")
    recipe: str = setting("published", "LoTA: settings that go together, for flags not given. steps: ternary steps "
                                       "alone, many of them; grid: the scales are trained beside them; both leave a "
                                       "plain GPTQ model. learned: mu is trained too", choices=list(RECIPES))
    interval_point: float | None = setting(None, "LoTA: the threshold omega, in (0, r)",
                                           shown="0.75 r: 48 at r = 64; other recipes by the bits")
    filter_ratio: float | None = setting(None, "LoTA: sigma at the first step; 0.95 moves the top 5 %% of the "
                                               "gradients", shown="0.95; other recipes by the bits")
    min_grad: float = setting(0.999, "LoTA: sigma after 80 %% of the steps")
    filter_upper: float = setting(0.9999, "LoTA: sigma at the last step")
    momentum: float = setting(0.0, "LoTA: the weight of the past in the average of gradients that moves the entries; "
                                   "0, the published way, takes each step's own")
    offset_lr: float = setting(0.007, "LoTA with --offset_scale learned: AdamW's learning rate for mu, in widths of "
                                      "the grid, 2**bits - 1 steps; it falls to 0")
    scale_lr: float = setting(0.03, "LoTA with --learned_scales: AdamW's learning rate for the relative change of the "
                                    "scales; it falls to 0")
    optimizer_type: str = setting("adamw_torch", "the LoRA baseline's optimizer; LoTA takes int_sign_sgd by itself",
                                  choices=["adamw_torch", "paged_adamw_32bit", "int_sign_sgd"])
    learning_rate: float = setting(1e-5, "LoRA baseline: learning rate")
    weight_decay: float = setting(0.0, "LoRA baseline: weight decay")
    max_grad_norm: float = setting(0.3, "LoRA baseline: gradients are clipped to this norm; LoTA never clips")
    warmup_ratio: float = setting(0.03, "LoRA baseline: share of the steps in which the learning rate rises; none "
                                        "with the constant schedule")
    lr_scheduler_type: str = setting("constant", "LoRA baseline: learning rate schedule")
    gradient_checkpointing: bool = setting(True, "recompute activations in the backward pass: less memory, more time")
    logging_steps: int = setting(1, "steps between two lines of metrics; about 100 of them at most also say which "
                                   "integers a merge would move")
    save_strategy: str = setting("steps", "when to save checkpoints: steps (see --save_number), epoch or no",
                                 choices=["steps", "epoch", "no"])
    save_number: int = setting(10, "with --save_strategy steps: how many checkpoints a run writes")
    adapter_path: str = setting("./adapter", "where adapter folders are written")
    adapter_ckpt: str | None = setting(None, "a checkpoint folder to resume from", shown="start anew")


@dataclass
class evalConfig:
    load_adapter: str = setting("none", "the adapter's folder, or a merged folder; none: the model without adapter")
    auto_gptq: str = setting("gptq", "without adapter: gptq evaluates --quantized_model_dir, none the 16-bit "
                                     "--pretrained", choices=["gptq", "none"])
    merge: bool = setting(True, "LoTA, QA-LoRA: merge the adapter into the grid first; False evaluates the layers as "
                                "they were trained")
    merged_path: str | None = setting(None, "where the merged model is kept", shown="a temporary folder")
    export: str | None = setting(None, "write the merged model in another format too: gptq, peft, gguf or dense (see "
                                       "python -m LoTA.export --help)", choices=["gptq", "peft", "gguf", "dense"],
                                 shown="none")
    export_path: str | None = setting(None, "the folder that --export writes")
    load_ada_interval: float | None = setting(None, "omega of an adapter that says it neither in lota_config.json nor "
                                                    "in its name, nor in its parent's", shown="0.75 r: 48 at r = 64")
    backend: str = setting("auto", "GPTQModel's kernel for evaluation, by the name of its BACKEND")
    ft_dataset_name: str = setting("none", "generate and score on gsm8k, sql or viggo",
                                   choices=["none", "gsm8k", "sql", "viggo"])
    max_new_tokens: int = setting(512, "tokens of a generated answer at most")
    answer_loss: bool = setting(False, "with --ft_dataset_name: measure the mean loss of the right answers' tokens too")
    tasks: str | None = setting(None, "lm-eval tasks, comma-separated, such as mmlu", shown="none")
    num_fewshot: int = setting(5, "lm-eval: examples before a question")
    include_path: str | None = setting(None, "lm-eval: a folder of local task files", shown="none")
    limit: int | None = setting(None, "evaluate only the first so many rows", shown="all")
    eval_batch_size: int = setting(16, "rows at a time")
    output_path: str = setting("./eval_results", "where results are written as JSON")
    device: str | None = setting(None, "device of the evaluation", shown="--device_map's")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The examples as they stand, the options in a narrow column."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=118)


# --- what the settings say ----------------------------------------------------------------------------------------

def parse_args():
    """(baseConfig, trainingConfig, evalConfig) from the command line, checked."""
    from transformers import HfArgumentParser
    parser = HfArgumentParser((baseConfig, trainingConfig, evalConfig), description=__doc__, prog="LoTA_QAF_main.py",
                              formatter_class=HelpFormatter)

    def parse():
        *settings, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            raise UserError(f"there is no flag {unknown[0]}; --help lists all")
        return settings

    parser.set_defaults(**RECIPES[parse()[1].recipe])
    base, training, evaluation = parse()
    base.lora_target_modules = [m for name in base.lora_target_modules for m in SPLIT_TARGETS.split(name) if m]
    return base, training, evaluation


def resolve_gptq(base):
    """The GPTQFolder of --quantized_model_dir; fills in w_bits, group_size and sym, or refuses what contradicts."""
    if base.quantized_model_dir is None:
        raise UserError("--quantized_model_dir is missing; gptq_quantize.py makes a GPTQ model")
    folder = GPTQFolder(base.quantized_model_dir)
    for flag, mine, theirs in (("--w_bits", base.w_bits, folder.bits),
                               ("--group_size", base.group_size, folder.group_size)):
        if mine is not None and mine != theirs:
            raise UserError(f"{flag} {mine} contradicts {folder.path}, which has {theirs}")
    base.w_bits, base.group_size, base.sym = folder.bits, folder.group_size, bool(folder.config.get("sym"))
    return folder


def model_size(name, folder):
    """("8B", 8e9): from the name where it says so, else counted from the shapes on disk."""
    named = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", Path(name or folder.path).name)
    if named:
        return f"{named[1]}B", float(named[1]) * 1e9
    count = 0
    for tensor in folder.file_of:
        kind = tensor.rsplit(".", 1)[-1]
        shape = folder.shape(tensor)
        if kind == "qweight":
            count += shape[0] * 32 // folder.bits * shape[1]
        elif kind not in LAYER_TENSORS:
            count += math.prod(shape)
    return (f"{count / 1e9:.0f}B" if count >= 1e9 else f"{max(1, round(count / 1e6))}M"), count


def load_tokenizer(base):
    from transformers import AutoTokenizer

    from data_print_save import prepare_tokenizer
    for place in (base.quantized_model_dir, base.pretrained):
        if place and ((Path(place) / "tokenizer_config.json").exists() or not Path(place).is_dir()):
            return prepare_tokenizer(AutoTokenizer.from_pretrained(place, trust_remote_code=base.trust_remote_code))
    raise UserError(f"no tokenizer in {base.quantized_model_dir}; name the 16-bit model with --pretrained")


def attention(base):
    """The attention implementation to ask for; None leaves it to the model."""
    if base.flash_attn != "auto":
        return base.flash_attn
    import torch
    can_flash = torch.cuda.is_available() and find_spec("flash_attn") and base.dtype != "float32"
    return "flash_attention_2" if can_flash else "sdpa"


# --- mode 1 -------------------------------------------------------------------------------------------------------

def train(base, training):
    """Trains an adapter; returns its folder."""
    if base.lota_qaf and base.method not in (None, "lota"):
        raise UserError(f"--lota_qaf True contradicts --method {base.method}")
    base.method = base.method or ("lota" if base.lota_qaf else "lora")
    base.lota_qaf = base.method == "lota"
    if training.recipe != "published" and not base.lota_qaf:
        raise UserError(f"--recipe {training.recipe} is for ternary adapters: give --method lota too")
    folder = resolve_gptq(base)
    size, parameters = model_size(base.pretrained, folder)
    if base.lora_r is None:
        base.lora_r = 64 if parameters < LARGE_MODEL else 32
    if base.lora_alpha is None:
        base.lora_alpha = 2 * base.lora_r
    check_training(base, training, folder)
    threshold = make_threshold(training.interval_point, base.residual, base.offset_scale) if base.lota_qaf else None

    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer

    from data_print_save import check_cuda, get_Ada_path, params_print, prepare_dataset, set_seed
    method = METHODS[base.method]
    numbers = ((training.interval_point, training.filter_ratio, training.min_grad) if base.lota_qaf
               else (training.learning_rate, base.lora_r, base.lora_alpha))
    started = datetime.now().strftime("%d_%H%M%S")

    def folder_name(**ended):
        return get_Ada_path(size, base.w_bits, method, *numbers, training.training_data_name, when=started, **ended)

    running = Path(training.adapter_path) / folder_name()
    arguments = trainer_arguments(base, training, running)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    check_cuda()
    set_seed(base.seed)
    tokenizer = load_tokenizer(base)
    data = prepare_dataset(training.training_data_name, tokenizer, training.train_ratio, training.source_max_len,
                           training.target_max_len, training.debug_number, base.data_dir)
    params_print(base, training)
    config = LotaConfig(
        method=method, omega=training.interval_point if base.lota_qaf else None,
        residual=base.residual or base.method == "qalora",      # QA-LoRA is nothing but offsets
        offset_scale=base.offset_scale, learned_scales=base.lota_qaf and base.learned_scales, bits=base.w_bits,
        group_size=base.group_size, rank=base.lora_r,
        pretrained=absolute(base.pretrained), quantized_model_dir=absolute(folder.path),
        fingerprint=folder.fingerprint(), data_set=training.training_data_name, seed=base.seed,
        settings={**vars(base), **vars(training)},
        versions={p: version(p) for p in ("torch", "transformers", "peft", "gptqmodel")})
    if training.adapter_ckpt:
        check_checkpoint(training.adapter_ckpt, config)

    from LoTA.adapter import load_gptq
    from LoTA.trainer import Checkpoints, LotaTrainer
    model = load_gptq(base.quantized_model_dir, getattr(torch, base.dtype), base.device_map, "gptq_torch",
                      attention(base), base.trust_remote_code).model
    model.config.use_cache = False
    pooling = {"use_qalora": True, "qalora_group_size": folder.group_size} if base.method == "qalora" else {}
    lora_config = LoraConfig(r=base.lora_r, lora_alpha=base.lora_alpha, lora_dropout=base.lora_dropout,
                             target_modules=base.lora_target_modules, task_type=TaskType.CAUSAL_LM, **pooling)
    if base.lota_qaf:
        from LoTA.layer import register
        register(lora_config, threshold, config.learned_offset, config.learned_scales)
    model = get_peft_model(model, lora_config)
    model.print_trainable_parameters()

    checkpoints = Checkpoints(config)
    common = {"model": model, "train_dataset": data, "args": arguments, "callbacks": [checkpoints],
              "data_collator": DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)}
    if base.lota_qaf:
        trainer = LotaTrainer(ternary_optimizer(model, training, base.w_bits), training.interval_point, **common)
    else:
        trainer = Trainer(**common)
    start = time.time()
    with checkpoints:
        trainer.train(resume_from_checkpoint=training.adapter_ckpt)
    if checkpoints.interrupted:
        raise UserError(f"interrupted at step {trainer.state.global_step}; resume with --adapter_ckpt "
                        f"{running / f'checkpoint-{trainer.state.global_step}'}")

    runtime, peak = time.time() - start, peak_memory_mb()
    config.training = {"runtime_s": round(runtime, 1), "peak_mb": round(peak), "steps": trainer.state.global_step,
                       "loss": trainer.state.log_history[-1].get("train_loss")}
    model.save_pretrained(str(running), save_embedding_layers=False)
    write_json(running / "log_history.json", trainer.state.log_history)
    config.save(running)
    if base.lota_qaf:               # the adapter is safe whatever becomes of its report
        config.training["moved"] = trainer.monitor.shares_moved()
        print_moved(config.training["moved"])
        config.save(running)
        trainer.monitor.write(running, trainer.state.log_history)
    final = running.parent / folder_name(runtime=runtime, peak_mb=peak)
    os.rename(running, final)
    print(f"adapter saved to {final}")
    return final


def ternary_optimizer(model, training, bits):
    """The tSignSGD of a model's ternary matrices, with AdamW along for what is learned as real numbers."""
    import torch

    from t_signSGD import tSignSGD
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    rates = {"lora_offset": training.offset_lr * (2**bits - 1), "lora_scale": training.scale_lr}
    real = [{"params": [(n, p) for n, p in trained if kind in n], "lr": rate} for kind, rate in rates.items()]
    real = [group for group in real if group["params"]]
    return tSignSGD(
        [(n, p) for n, p in trained if "lora_A" in n or "lora_B" in n], threshold_ratio=training.filter_ratio,
        min_grad=training.min_grad, filter_upper=training.filter_upper, momentum=training.momentum,
        real_optimizer=torch.optim.AdamW(real, weight_decay=0.0) if real else None)


def check_training(base, training, folder):
    """Fills in what LoTA fixes by itself; raises UserError where the settings cannot be trained with."""
    import torch
    if training.num_train_epochs <= 0 and training.max_steps <= 0:
        raise UserError("nothing to train: give --num_train_epochs or --max_steps")
    for flag in ("train_batch_size", "gradient_accumulation_steps", "source_max_len", "target_max_len", "save_number"):
        if getattr(training, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, not {getattr(training, flag)}")
    if training.adapter_ckpt and not Path(training.adapter_ckpt).is_dir():
        raise UserError(f"--adapter_ckpt {training.adapter_ckpt} is not a folder")
    if not any(name.rsplit(".", 1)[-1] in base.lora_target_modules for name in folder.modules):
        raise UserError(f"--lora_target_modules {' '.join(base.lora_target_modules)}: the model has no such layer")
    if base.lora_r < 1:
        raise UserError(f"--lora_r must be at least 1, not {base.lora_r}")
    if base.dtype == "float16":
        raise UserError("training in float16 is not supported, its gradients overflow: use bfloat16 or float32")
    if training.optimizer_type == "paged_adamw_32bit" and not base.lota_qaf and not find_spec("bitsandbytes"):
        raise UserError("--optimizer_type paged_adamw_32bit needs bitsandbytes: pip install bitsandbytes")
    if base.method == "qalora" and folder.group_size < 1:
        raise UserError(f"--method qalora pools the inputs of a group, and {folder.path} has no groups")
    if not base.lota_qaf:
        if base.learned_scales:
            raise UserError("--learned_scales trains beside ternary adapters: give --method lota")
        if training.optimizer_type == "int_sign_sgd":
            raise UserError("--optimizer_type int_sign_sgd trains ternary adapters only: give --lota_qaf True")
        return
    if base.lora_dropout:
        raise UserError("--lora_dropout must be 0 with LoTA: what is dropped could not be merged")
    omega, sigma = STEPS[training.recipe][base.w_bits]
    if training.interval_point is None:
        training.interval_point = omega * base.lora_r
    if training.filter_ratio is None:
        training.filter_ratio = sigma
    for flag in ("filter_ratio", "min_grad", "filter_upper"):
        if not 0 < getattr(training, flag) < 1:
            raise UserError(f"--{flag} must lie in (0, 1), not {getattr(training, flag)}")
    if not 0 <= training.momentum < 1:
        raise UserError(f"--momentum must lie in [0, 1), not {training.momentum}")
    if base.learned_scales and folder.tensor(f"{folder.modules[0]}.scales").dtype != torch.float16:
        raise UserError(f"--learned_scales writes float16 scales, and those of {folder.path} are none")
    if base.offset_scale == "learned" and not base.residual:
        raise UserError("--offset_scale learned trains the offset that --residual False leaves out")
    training.optimizer_type, training.max_grad_norm = "int_sign_sgd", 0.0
    check_settings(base.lora_r, training.interval_point, max(1, folder.group_size))


def trainer_arguments(base, training, output_dir):
    """transformers' TrainingArguments. Raises UserError where transformers refuses a setting."""
    import torch
    from transformers import TrainingArguments
    from transformers.integrations import get_available_reporting_integrations
    report_to = [r for r in SPLIT_TARGETS.split(base.report_to) if r and r != "none"]
    missing = [r for r in report_to if r not in get_available_reporting_integrations()]
    if missing:
        raise UserError(f"--report_to {missing[0]} is not installed: pip install {missing[0]}")
    on_cpu = not torch.cuda.is_available() or base.device_map == "cpu"
    try:
        arguments = TrainingArguments(
            output_dir=str(output_dir), num_train_epochs=training.num_train_epochs or 1, max_steps=training.max_steps,
            per_device_train_batch_size=training.train_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            optim="adamw_torch" if base.lota_qaf else training.optimizer_type, learning_rate=training.learning_rate,
            weight_decay=training.weight_decay, max_grad_norm=training.max_grad_norm,
            warmup_steps=training.warmup_ratio, lr_scheduler_type=training.lr_scheduler_type,
            activation_checkpointing=training.gradient_checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
            train_sampling_strategy="group_by_length", logging_steps=training.logging_steps,
            save_strategy=training.save_strategy,
            # A share of the run's steps; a last checkpoint at its end comes by itself.
            save_steps=1 / training.save_number if training.save_number > 1 else 10**9,
            use_cpu=on_cpu, report_to=report_to or "none", dataloader_pin_memory=not on_cpu, seed=base.seed,
            data_seed=base.seed)
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from None
    # The model is where GPTQModel put it, on one GPU or spread over several: never copied to all of them.
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1
    return arguments


def absolute(name):
    """A local folder as an absolute path; a name on the hub, or None, as it is."""
    return str(Path(name).resolve()) if name is not None and Path(name).is_dir() else name


def check_checkpoint(path, config):
    """Raises UserError unless `path` is a whole checkpoint of a run with these settings."""
    path = Path(path)
    if not (path / LOTA_CONFIG).exists():
        raise UserError(f"--adapter_ckpt {path} is not whole (it has no {LOTA_CONFIG}, which is written last); take "
                        "an earlier checkpoint")
    saved = LotaConfig.load(path)
    for what in ("method", "rank", "omega", "residual", "offset_scale", "learned_scales", "bits", "fingerprint"):
        if getattr(saved, what) != getattr(config, what):
            raise UserError(f"--adapter_ckpt {path} cannot be resumed with these settings: its {what} is "
                            f"{getattr(saved, what)}, not {getattr(config, what)}")


def peak_memory_mb():
    """Peak memory in MB: of the run on the GPUs where it took any, else of this process since it began."""
    import resource

    import torch
    on_gpus = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return on_gpus / 2**20 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- mode 2 -------------------------------------------------------------------------------------------------------

def evaluate(base, evaluation):
    """Merges where there is something to merge, evaluates, and returns {task: results}."""
    only_merge = evaluation.tasks is None and evaluation.ft_dataset_name == "none"
    if only_merge and evaluation.merged_path is None and evaluation.export is None:
        raise UserError("nothing to evaluate: give --tasks, --ft_dataset_name, or --merged_path to only merge")
    if (evaluation.export is None) != (evaluation.export_path is None):
        raise UserError("--export FORMAT and --export_path FOLDER go together")
    if evaluation.export and evaluation.load_adapter == "none":
        raise UserError("--export writes a merged model: name it, or its adapter, with --load_adapter")
    if evaluation.eval_batch_size < 1 or evaluation.max_new_tokens < 1:
        raise UserError("--eval_batch_size and --max_new_tokens must be at least 1")
    # What can be wrong is looked at before anything is merged or loaded.
    if evaluation.ft_dataset_name != "none":
        from data_print_save import load_rows
        load_rows(evaluation.ft_dataset_name, "test", base.data_dir)
    tasks, manager = lm_eval_tasks(evaluation)
    with tempfile.TemporaryDirectory() as temporary:
        load, name, extra = choose_model(base, evaluation, temporary)
        if only_merge:
            export_merged(evaluation)
            return {}
        from data_print_save import check_cuda, params_print, set_seed
        check_cuda()
        set_seed(base.seed)
        tokenizer = load_tokenizer(base)
        params_print(base, evaluation)
        model = load()
    results, when = {}, datetime.now().strftime("%d_%H%M%S")
    if evaluation.ft_dataset_name != "none":
        from evalGSV import evalgsv
        results[evaluation.ft_dataset_name] = evalgsv(
            model, tokenizer, base, evaluation, subsample=evaluation.limit,
            name=f"{name}_{evaluation.ft_dataset_name}_{when}", extra=extra)
    if tasks:
        results["lm_eval"] = run_lm_eval(model, tokenizer, tasks, manager, base, evaluation, name, when, extra)
    del model
    export_merged(evaluation, results.get(evaluation.ft_dataset_name))
    return results


def export_merged(evaluation, results=None):
    """What --export asks for, with the results of the evaluation in its model card."""
    if evaluation.export is None:
        return
    from LoTA.export import export
    source = evaluation.load_adapter
    if evaluation.merged_path and is_merged(evaluation.merged_path):        # merged a moment ago
        source = evaluation.merged_path
    export(source, evaluation.export, evaluation.export_path, evaluation=results, verify=True)
    print(f"exported and verified: {evaluation.export_path}")


def choose_model(base, evaluation, temporary):
    """What the settings ask for: (a function that loads it, the name of its results, what to save with them).

    Merges here, so that what is refused is refused before anything is loaded.
    """
    import torch
    device = evaluation.device or base.device_map
    common = {"dtype": getattr(torch, base.dtype), "attn_implementation": attention(base),
              "trust_remote_code": base.trust_remote_code}
    kernel = {"device": device, "backend": evaluation.backend, **common}

    def lota(path):
        from LoTA.adapter import LTA
        return LTA(path=str(path)).load(**kernel).model

    adapter = evaluation.load_adapter
    if adapter == "none" and evaluation.auto_gptq == "none":
        if base.pretrained is None:
            raise UserError("--auto_gptq none evaluates the 16-bit model: name it with --pretrained")
        check_model_name("--pretrained", base.pretrained)
        base.quantized_model_dir = None

        def load_dense():
            from transformers import AutoModelForCausalLM
            place = device if device != "auto" else ("auto" if torch.cuda.is_available() else "cpu")
            return AutoModelForCausalLM.from_pretrained(base.pretrained, device_map=place, **common)
        return load_dense, f"{Path(base.pretrained).name}_16bit", {}
    if adapter == "none":
        folder = resolve_gptq(base)

        def load_bare():
            from LoTA.adapter import load_gptq
            return load_gptq(folder.path, **kernel).model
        return load_bare, f"{folder.path.name}_gptq", {}

    if not Path(adapter).is_dir():
        raise UserError(f"--load_adapter {adapter} is not a folder")
    if is_merged(adapter):
        merged = MergedFolder(adapter)
        base.quantized_model_dir = str(adapter)
        return lambda: lota(adapter), f"{Path(adapter).name}_merged", {"moved": merged.lota.training.get("moved")}

    config = read_adapter(adapter, evaluation.load_ada_interval, base.residual)
    base.lota_qaf, base.lora_r, base.residual = config.method == "LoTA", config.rank, config.residual
    base.method = {name: flag for flag, name in METHODS.items()}[config.method]
    base.offset_scale, base.learned_scales = config.offset_scale, config.learned_scales
    base.pretrained = base.pretrained or config.pretrained
    base.quantized_model_dir = base.quantized_model_dir or config.quantized_model_dir
    folder = resolve_gptq(base)
    name = Path(adapter).resolve().name
    if config.method == "LoRA" or not evaluation.merge:
        check_match(adapter, config, AdapterTensors(adapter), folder)

        def load_unmerged():
            from LoTA.adapter import load_live
            return load_live(adapter, folder.path, evaluation.load_ada_interval, base.residual, **kernel)
        return load_unmerged, f"{name}_live", {}

    output = evaluation.merged_path or Path(temporary) / "merged"
    moved = merge_folders(adapter, folder.path, output, evaluation.load_ada_interval, base.residual)
    print_moved(moved)
    if evaluation.merged_path:
        print(f"merged and verified: {output}")
    return lambda: lota(output), f"{name}_merged", {"moved": moved}


def lm_eval_tasks(evaluation):
    """(the names in --tasks, lm-eval's TaskManager, which takes seconds to make), or ([], None).

    Raises UserError where lm-eval does not know a name.
    """
    tasks = [t for t in SPLIT_TARGETS.split(evaluation.tasks or "") if t]
    if evaluation.include_path and not Path(evaluation.include_path).is_dir():
        raise UserError(f"--include_path {evaluation.include_path} is not a folder")
    if not tasks:
        return [], None
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=evaluation.include_path)
    unknown = [t for t in tasks if t not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-eval knows no task named {', '.join(unknown)}; local tasks come in with --include_path")
    return tasks, manager


def run_lm_eval(model, tokenizer, tasks, manager, base, evaluation, name, when, extra):
    """lm-eval on `tasks`: prints its table, saves and returns its results."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    from data_print_save import save_results
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=evaluation.eval_batch_size), tasks=tasks,
        num_fewshot=evaluation.num_fewshot, task_manager=manager, limit=evaluation.limit, random_seed=base.seed,
        numpy_random_seed=base.seed, torch_random_seed=base.seed, fewshot_random_seed=base.seed)
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    kept = {k: results[k] for k in ("results", "groups", "versions", "n-shot", "n-samples") if k in results}
    save_results(evaluation.output_path, f"{name}_{'_'.join(tasks)[:80]}_{when}", {**extra, **kept}, base, evaluation)
    return results


def main():
    base, training, evaluation = parse_args()
    if base.mode == 1:
        train(base, training)
    else:
        evaluate(base, evaluation)


if __name__ == "__main__":
    run_script(main)
