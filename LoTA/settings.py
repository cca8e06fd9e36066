"""Settings: what a user may say, how the rest is filled in, and what is refused.

A run has three frozen groups of settings, named as in the published scripts. parse_args() reads them from the command
line, from_given() takes them from Python. complete_...() return new groups with the defaults that depend on the model.
check_...() only check, and raise UserError. Importing this file loads no library, because --help must not wait for
torch.
"""
import argparse
import math
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from types import NoneType

from LoTA import OLD_RECIPE_NAMES, UserError
from LoTA.export import FORMATS
from LoTA.own_rows import RowForm, row_form

if typing.TYPE_CHECKING:
    from LoTA.folders import GPTQFolder

# The usual names of layers, in the order in which they are printed and recorded.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LAYERS = "all"          # the value of --lora_target_modules that means every quantized layer but lm_head
PROMPT_LAYOUTS = ("published", "system")
METHODS = {"lota": "LoTA", "lrqat": "LR-QAT", "lora": "LoRA", "qalora": "QA-LoRA"}      # {as a flag: as a name}
IN_GRID = ("lota", "lrqat")             # those whose adapters are steps on the grid
TEXT_WINDOW = 2048          # tokens in which a perplexity is measured, as papers on GPTQ do
MAX_NEW_TOKENS = 512        # of an answer, where --max_new_tokens is not given and the model has room for them
LARGE_MODEL = 30e9          # from here on the paper uses rank 32 instead of 64

# --recipe: settings that go together, for the flags that are not given.
RECIPES = {
    "published": {},
    "ternary": {"momentum": 0.9, "flip_limit": 1.0, "residual": False},
    "scales": {"momentum": 0.9, "flip_limit": 1.0, "warm_up": 0.1, "residual": False, "learned_scales": True},
    "full": {"momentum": 0.9, "flip_limit": 1.0, "warm_up": 0.1, "offset_scale": "learned", "learned_scales": True}}
# The same for --method lrqat.
LRQAT_RECIPES = {
    "integers": {"residual": False},
    "scales": {"residual": False, "learned_scales": True},
    "mean": {"offset_scale": "mean"},
    "full": {"offset_scale": "mean", "learned_scales": True}}
# Defaults of --method lrqat for the flags that are not given: see experiments/LOG.md.
LRQAT_DEFAULTS = {"learning_rate": 1e-3, "lr_scheduler_type": "linear"}
# For each bit width a recipe's omega, as a share of the rank, and its sigma at the start, chosen in experiments/LOG.md.
# A finer grid gets a smaller omega, because more ternary steps are worth taking there. 8 bits take the row of 4.
OMEGA_AND_SIGMA = {
    2: {"published": (0.75, 0.95), "ternary": (0.3, 0.99), "scales": (0.3, 0.995), "full": (0.3, 0.995)},
    3: {"published": (0.75, 0.95), "ternary": (0.15, 0.98), "scales": (0.2, 0.98), "full": (0.2, 0.98)},
    4: {"published": (0.75, 0.95), "ternary": (0.1, 0.98), "scales": (0.15, 0.98), "full": (0.15, 0.98)}}

# Learning rates of a learned mu and of learned scales, and the parameters of the models on which they were chosen
# (experiments/LOG.md). A larger one has more entries that step together, and gets lower rates: see rate_by_size().
TRIED_PARAMETERS, OFFSET_LR, SCALE_LR = (2.1e6, 135e6), (0.007, 0.0002), (0.03, 0.001)

# {flag of mode 1: the methods that read it}, for the flags that not all methods read.
READ_BY = {
    **dict.fromkeys(("interval_point", "filter_ratio", "min_grad", "filter_upper", "momentum", "flip_limit", "warm_up"),
                    ("lota",)),
    **dict.fromkeys(("learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm"),
                    ("lrqat", "lora", "qalora")),
    **dict.fromkeys(("residual", "offset_scale", "offset_lr", "scale_lr"), IN_GRID), "dither": ("lrqat",)}

# --help shows the flags in these groups, in this order.
GROUPS = {
    "both": ("both modes", None),
    "method": ("mode 1: what is trained", None),
    "data": ("mode 1: the data and the length of the run", None),
    "lota": ("mode 1: LoTA's optimizer, and the rates of learned mu and scales",
             "omega is the threshold on |dW| in Eq. 3. sigma is the quantile of |gradient| above which an entry of A "
             "or B flips (Eq. 6)."),
    "baseline": ("mode 1: the optimizer of LR-QAT, LoRA and QA-LoRA", None),
    "distill": ("mode 1: a teacher, for every method", None),
    "run": ("mode 1: the run itself", None),
    "model": ("mode 2: which model", None),
    "measure": ("mode 2: what is measured", None),
    "export": ("mode 2: the merged model for other engines", None)}


def _shown_by_size(rates: tuple[float, float]) -> str:
    """rate_by_size() as --help says it."""
    (small, large), (first, second) = TRIED_PARAMETERS, rates
    return (f"{first} up to {small / 1e6:g}M parameters, {second} at {large / 1e6:g}M, and beyond it by the inverse "
            "root of the model's size")


def setting(group: str, default, help: str, *, shown=None, choices: Sequence | None = None, off: str | None = None,
            aliases: Sequence[str] = (), several: bool = False):
    """A field of a settings group.

    group: one of GROUPS. shown: what --help shows as the default, where that is not `default` itself.
    off: what --no_NAME does, for a flag that is True by default. aliases: other names of the flag.
    several: the flag takes several names, "a,b" or "a b". The field is a text with commas between them.
    """
    metadata = {"group": group, "help": help, "shown": default if shown is None else shown, "choices": choices,
                "off": off, "aliases": aliases, "several": several}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class baseConfig:
    """Settings of the model and of the adapter."""
    mode: int = setting("both", 1, "1 trains an adapter; 2 merges it and evaluates", choices=[1, 2])
    quantized_model_dir: str | None = setting(
        "both", None, "the folder of the GPTQ model, or of a merged model; required in mode 1, and in mode 2 for one "
        "without adapter",
        shown="mode 2: the one that the adapter names")
    pretrained: str | None = setting(
        "both", None, "the 16-bit model, a folder or a hub name: its tokenizer serves where the GPTQ folder has none, "
        "its name says the model's size, and --auto_gptq none evaluates it",
        shown="mode 2: the one that the adapter names")
    data_dir: str | None = setting(
        "both", None, "the data on disk: a save_to_disk folder, one file (csv, tsv, json, jsonl, parquet, or one of "
        "these with .gz), or a folder with such files named after their split", shown="the hub")
    data_columns: str | None = setting(
        "both", None, "own rows: OURS=THEIRS for columns of other names, such as prompt=question,completion=answer",
        shown="the columns as they are")
    data_split: str | None = setting(
        "both", None, "OWNER/NAME: the split on the hub, such as train[:10%]; it is taken whole",
        shown="mode 1: train; mode 2: test, or else validation; a single split is cut")
    data_config: str | None = setting("both", None, "OWNER/NAME: the configuration on the hub", shown="its default")
    prompt_template: str | None = setting(
        "both", None, "own rows: a text file that makes the user's turn, with the columns of a row in it as {question}",
        shown="the prompt of the row")
    chat_template: str | None = setting(
        "both", None, "a Jinja file that writes the turns, in place of the tokenizer's chat template",
        shown="that of the checkpoint or adapter, else the tokenizer's")
    prompt_layout: str | None = setting(
        "both", None, "where the instruction of gsm8k and viggo is. published: as in the published scripts, at the "
        "head of viggo's user turn and nowhere in gsm8k's. system: in a system turn, as this project once had it",
        choices=PROMPT_LAYOUTS, shown="that of the checkpoint or adapter, else published")
    dtype: str = setting(
        "both", "bfloat16", "the dtype of the computation; mode 1 refuses float16",
        choices=["bfloat16", "float16", "float32"])
    device_map: str = setting(
        "both", "auto", "the device of the model; auto takes the GPU, or all GPUs, or else the CPU")
    flash_attn: str = setting(
        "both", "auto", "attention implementation", shown="auto: flash_attention_2 where it is installed and the model "
        "allows it, else the model's default",
        choices=["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"])
    trust_remote_code: bool = setting("both", False, "run code that comes with a model")
    seed: int = setting("both", 42, "random seed; how a single file is cut into train and test does not depend on it")
    w_bits: int | None = setting(
        "both", None, "bits of an integer weight; a GPTQ folder that has others is refused", shown="the folder's")
    group_size: int | None = setting(
        "both", None, "inputs of a group; a GPTQ folder that has others is refused", shown="the folder's")
    sym: bool = setting(
        "both", False, "without effect, because the GPTQ folder says it; kept for the published scripts",
        shown="the folder's")
    lota_qaf: bool = setting("method", False, "True is the same as --method lota; the published scripts use this flag")
    method: str | None = setting(
        "method", None, "lota: ternary adapters and t-SignSGD. lrqat: a product in fixed point is rounded to steps of "
        "any size on the grid. lora: a baseline that does not merge. qalora: a baseline that merges into an offset per "
        "group and output", choices=list(METHODS),
        shown="lota with --lota_qaf True, else lora")
    lora_target_modules: list[str] = setting(
        "method", (ALL_LAYERS,), "the quantized layers that get an adapter, each by its name or the end of its name; "
        "all: every quantized layer but lm_head", shown=ALL_LAYERS)
    lora_r: int | None = setting("method", None, "the rank r", shown="64 below 30B parameters, else 32")
    lora_alpha: int | None = setting("method", None, "alpha: LR-QAT and the baselines multiply A B by alpha / r; LoTA "
                                     "only records it", shown="2 r")
    lora_dropout: float = setting("method", 0.0, "dropout of LoRA and QA-LoRA; LoTA and LR-QAT have none")
    dither: str | None = setting(
        "method", None, "LR-QAT: what is added below the rounding. noise: fixed pseudo-random numbers in "
        "(-1/2, 1/2), so that steps begin with the first update. fraction: what GPTQ rounded away, from the 16-bit "
        "--pretrained; the adapter then has a byte a weight. none: nothing", choices=["none", "noise", "fraction"],
        shown="noise; none at 2 bits, unless A and B train alone and say no mu")
    residual: bool = setting(
        "method", True, "LoTA, LR-QAT: keep the offset factor mu (Eq. 4); mode 2 uses this flag for adapters without "
        "lota_config.json only", off="leave the offset factor out; the merged model is then a plain GPTQ checkpoint")
    offset_scale: str = setting(
        "method", "omega", "kappa, the divisor in Eq. 4. omega: kappa = omega, as in the published scripts. "
        "paper: kappa = 1, as printed. learned: mu is a parameter, and Eq. 4 is not used. mean: LR-QAT, the mean "
        "of dW / s over a group, so that only what the rows of a group do not have in common is rounded",
        choices=["omega", "paper", "learned", "mean"])
    learned_scales: bool = setting(
        "method", False, "LoTA, LR-QAT: also train the scales of the groups; the merged model has them as its own "
        "scales")
    report_to: str = setting("run", "none", "trackers that get the metrics, such as tensorboard or wandb", several=True)


@dataclass(frozen=True)
class trainingConfig:
    """Settings of mode 1."""
    training_data_name: str = setting(
        "data", "alpaca", "the data set, NAME or NAME:PLACE; several with commas are a mixture, of all their rows or, "
        "with NAME:PLACE=WEIGHT, in these shares. The names")
    train_turns: str = setting(
        "data", "all", "own dialogues: train all answers, or the last one, as in published sets",
        choices=["all", "last"])
    train_ratio: float = setting("data", 1.0, "the share of the training rows to use, in (0, 1]")
    debug_number: int = setting("data", -1, "use at most so many training rows; -1 uses all")
    num_train_epochs: float = setting("data", 0, "epochs; or give --max_steps")
    max_steps: int = setting("data", -1, "optimizer steps; they override the epochs")
    train_batch_size: int = setting("data", 64, "rows of one forward pass on one device")
    gradient_accumulation_steps: int = setting("data", 1, "forward passes whose gradients make one optimizer step")
    packing: bool = setting(
        "data", False, "let the rows of a forward pass share sequences, none of which sees another, so that there is "
        "less padding; losses and gradients stay the same to rounding")
    source_max_len: int = setting(
        "data", 1024, "tokens of a prompt at most; a longer one loses the beginning of its question")
    target_max_len: int = setting(
        "data", 256, "tokens of an answer at most; a longer one loses its end and its end token")
    recipe: str | None = setting(
        "method", None, "LoTA, LR-QAT: defaults for the flags that are not given. published: the paper's. ternary: an "
        "average of gradients decides, and there is no mu. integers: LR-QAT's A and B alone. mean: the mean of their "
        "product over a group is mu. scales: as ternary or integers, and the scales are trained. full: as scales, and "
        "mu is trained, with LR-QAT as in mean. ternary, integers and scales merge into a plain GPTQ model",
        choices=list(RECIPES | LRQAT_RECIPES),
        shown="published; with --method lrqat integers")
    interval_point: float | None = setting(
        "lota", None, "the threshold omega, in (0, r)",
        shown="0.75 r, so 48 at r = 64; other recipes choose by the bits")
    filter_ratio: float | None = setting(
        "lota", None, "sigma at the start; 0.95 lets the largest 5 % of each matrix's gradients flip their entries",
        shown="0.95; other recipes choose by the bits", aliases=["sigma_start"])
    min_grad: float = setting("lota", 0.999, "sigma after 80 % of the steps", aliases=["sigma_turn"])
    filter_upper: float = setting("lota", 0.9999, "sigma at the last step", aliases=["sigma_end"])
    momentum: float = setting(
        "lota", 0.0, "the weight of the past in the running mean of gradients that selects the flips; 0, as published, "
        "takes the gradient of the step alone")
    flip_limit: float | None = setting(
        "lota", None, "how far the flips of one step may lower the loss, in nats a token, by what their gradients "
        "promise; beyond it the share that flips is halved until they keep to it, and sigma is so much higher",
        shown="no limit; other recipes 1")
    offset_lr: float | None = setting(
        "lota", None, "the largest learning rate of a learned mu, as a share of the grid's range 2**bits - 1",
        shown=_shown_by_size(OFFSET_LR))
    scale_lr: float | None = setting(
        "lota", None, "the largest learning rate of the relative change of learned scales",
        shown=_shown_by_size(SCALE_LR))
    warm_up: float = setting(
        "lota", 0.0, "LoTA: the share of the steps in which the rates of mu and of the scales rise; then they fall "
        "linearly towards 0; the recipes scales and full have 0.1")
    optimizer_type: str = setting(
        "baseline", "adamw_torch", "the optimizer; LoTA always takes int_sign_sgd, which is t-SignSGD",
        choices=["adamw_torch", "paged_adamw_32bit", "int_sign_sgd"])
    learning_rate: float = setting("baseline", 1e-5, "learning rate; 0.001 where --method is lrqat")
    lr_scheduler_type: str = setting(
        "baseline", "constant", "learning rate schedule; linear, towards 0, where --method is lrqat")
    warmup_ratio: float = setting(
        "baseline", 0.03, "share of the steps in which the learning rate rises; the constant schedule has none")
    weight_decay: float = setting("baseline", 0.0, "weight decay")
    max_grad_norm: float = setting(
        "baseline", 0.3, "gradients are clipped to this norm; LoTA never clips")
    distill: str = setting(
        "distill", "none", "learn from the distributions of the 16-bit model too. answers: at the tokens of the "
        "answers. all: at those of the prompts as well", choices=["none", "answers", "all"])
    distill_weight: float = setting(
        "distill", 0.5, "share of the Kullback-Leibler divergence from the teacher in the loss, in [0, 1]; the cross "
        "entropy of the answers has the rest. Up to 0.5 a reference token outweighs any other choice of the teacher")
    distill_model: str | None = setting(
        "distill", None, "the teacher, a 16-bit model with the vocabulary of the GPTQ model: a folder or a hub name. "
        "It stays in memory beside the model that is trained", shown="--pretrained")
    gradient_checkpointing: bool = setting(
        "run", True, "recompute activations in the backward pass: less memory, more time",
        off="keep all activations for the backward pass: more memory, less time")
    logging_steps: int = setting(
        "run", 1, "optimizer steps between two lines of metrics; about 100 lines of a long run, and 10 of a run of "
        "100 steps, also have the share of integers that a merge would move")
    save_strategy: str = setting(
        "run", "steps", "when to save checkpoints: steps (see --save_number), epoch or no",
        choices=["steps", "epoch", "no"])
    save_number: int = setting("run", 10, "with --save_strategy steps: how many checkpoints a run writes at most")
    loss_guard: bool = setting(
        "run", True, "end a run whose logged loss is three times in a row beyond twice the first one, and beyond it by "
        "a nat", off="let a run go on whose loss climbs")
    save_total_limit: int = setting(
        "run", 3, "how many checkpoints stay; older ones are removed when a newer one is whole, because all of a long "
        "run may fill the disk")
    adapter_path: str = setting("run", "./adapter", "where adapter folders are written")
    adapter_ckpt: str | None = setting("run", None, "a checkpoint folder to resume from", shown="start anew")


@dataclass(frozen=True)
class evalConfig:
    """Settings of mode 2."""
    load_adapter: str = setting("model", "none", "an adapter folder or a merged folder; none: a model without adapter")
    auto_gptq: str = setting(
        "model", "gptq", "with --load_adapter none: gptq evaluates --quantized_model_dir, none evaluates the 16-bit "
        "--pretrained", choices=["gptq", "none"])
    merge: bool = setting(
        "model", True, "merge an adapter before it is evaluated, unless it is LoRA",
        off="evaluate the adapter live: unmerged, as it was trained")
    merged_path: str | None = setting("model", None, "where the merged model is kept", shown="a temporary folder")
    load_ada_interval: float | None = setting(
        "model", None, "omega of an adapter that says it neither in lota_config.json nor in a folder's name",
        shown="0.75 r, so 48 at r = 64")
    backend: str = setting(
        "model", "auto", "GPTQModel's kernel, a value of its BACKEND such as gptq_torch; float32 and live adapters of "
        "LoTA and LR-QAT always take gptq_torch")
    device: str | None = setting("model", None, "device of the evaluation", shown="--device_map's")
    ft_dataset_name: str = setting(
        "measure", "none", "generate and score on this data set, NAME or NAME:PLACE; of texts, measure the perplexity. "
        "The names")
    score: str | None = setting(
        "measure", None, "when an answer is right. exact: it is the reference. number: its last number is. "
        "MODULE:FUNCTION: a function of yours (prediction, reference) -> bool",
        shown="that of the data set; of own rows exact")
    text_window: int | None = setting(
        "measure", None, "texts: tokens of a window at most", shown=f"{TEXT_WINDOW}, or the model's length")
    generate: bool = setting(
        "measure", True, "with --ft_dataset_name: generate answers and score them",
        off="measure --answer_loss alone, because generating takes most of the time")
    max_new_tokens: int | None = setting(
        "measure", None, "tokens of a generated answer at most; refused where the longest prompt leaves less room",
        shown=f"{MAX_NEW_TOKENS}, or the room that the longest prompt leaves")
    answer_loss: bool = setting(
        "measure", False, "with --ft_dataset_name: also the mean cross entropy of the reference answers, in nats a "
        "token")
    tasks: str | None = setting("measure", None, "lm-eval tasks, such as mmlu", shown="none", several=True)
    num_fewshot: int = setting("measure", 5, "lm-eval: solved examples before each question")
    include_path: str | None = setting("measure", None, "lm-eval: a folder of local task files", shown="none")
    limit: int | None = setting("measure", None, "evaluate only the first so many rows", shown="all")
    eval_batch_size: int = setting("measure", 16, "rows evaluated at a time")
    output_path: str = setting("measure", "./eval_results", "where results are written as JSON")
    export: str | None = setting(
        "export", None, "also write the merged model in this format, verified (python -m LoTA.export --help explains "
        "them)", shown="none")
    export_path: str | None = setting("export", None, "the folder that --export writes", shown="none")


# --- the command line ---------------------------------------------------------------------------------------------

def parse_args(description: str, training_sets: Sequence[str], scored_sets: Sequence[str],
               argv: Sequence[str] | None = None) -> tuple[baseConfig, trainingConfig, evalConfig]:
    """The settings that a command line asks for.

    training_sets, scored_sets: the names of the data sets there are. argv: the arguments; None takes sys.argv's.
    Raises UserError for a flag that does not exist. For a bad value argparse ends the process with status 2.
    """
    known, unknown = _build_parser(description, training_sets, scored_sets).parse_known_args(argv)
    if unknown:
        raise UserError(f"there is no flag {unknown[0]}; --help lists all")
    return from_given(vars(known))


def from_given(given: Mapping[str, object]) -> tuple[baseConfig, trainingConfig, evalConfig]:
    """The settings of a run, from those that are given by the names of the flags.

    All others get their defaults. Settings that go together, those of a recipe and a method, are defaults too, so what
    is given wins. Prints what is given and not read by the method of mode 1.
    Raises UserError for a name that does not exist, and for a value of another type or none of the choices.
    """
    configs = (baseConfig, trainingConfig, evalConfig)
    known = {f.name: f for config in configs for f in fields(config)}
    given = {**given, **({"recipe": _recipe_name(given["recipe"])} if given.get("recipe") else {})}
    types = {name: hint for config in configs for name, hint in typing.get_type_hints(config).items()}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"there is no setting {name}; python LoTA_QAF_main.py --help lists all, as flags")
        _check_value(known[name], types[name], value)
    method = given.get("method") or ("lota" if given.get("lota_qaf") else "lora")
    idle = [f"--{name}" for name in given if name in READ_BY and method not in READ_BY[name]]
    if given.get("mode", 1) == 1 and idle:
        print(f"without effect with --method {method}: {', '.join(idle)}")
    recipe = given.get("recipe") or default_recipe(method)
    values = {**{name: default_of(f) for name, f in known.items()}, **(LRQAT_DEFAULTS if method == "lrqat" else {}),
              **recipes_of(method).get(recipe, {}), **given}
    for name, f in known.items():
        if isinstance(values[name], os.PathLike):
            values[name] = os.fspath(values[name])
        if name == "lora_target_modules":
            values[name] = [part for names in values[name] for part in split_names(names)]
        elif f.metadata["several"] and not isinstance(values[name], str | None):
            values[name] = ",".join(split_names(" ".join(filter(None, values[name])))) or None
    return tuple(config(**{f.name: values[f.name] for f in fields(config)}) for config in configs)


def default_of(f: Field) -> object:
    """The default of a dataclass's field. It must have one."""
    return f.default if f.default is not MISSING else f.default_factory()


def _value_type(hint: object) -> type:
    """The type of a setting's value, or of its names where it takes several, from its annotation."""
    return next(t for t in (*typing.get_args(hint), hint) if t is not NoneType)


def _check_value(f: Field, hint: object, value: object) -> None:
    """Raises UserError unless a value fits its setting: its type, and its choices where it has any."""
    wanted = _value_type(hint)
    several = f.metadata["several"] or typing.get_origin(hint) is list
    accepted = {float: (float, int), int: int, bool: bool, str: (str, os.PathLike)}.get(wanted, ())
    fits = (value is None and NoneType in typing.get_args(hint) or several and isinstance(value, str | list | tuple)
            or isinstance(value, accepted) and (wanted is bool or not isinstance(value, bool)))
    if not fits:
        raise UserError(f"--{f.name} must be {'names' if several else wanted.__name__}, not {value!r}")
    if f.metadata["choices"] and value is not None and value not in f.metadata["choices"]:
        raise UserError(f"--{f.name} must be one of {', '.join(map(str, f.metadata['choices']))}, not {value!r}")


def recipes_of(method: str | None) -> dict[str, dict]:
    """{name of a recipe: its settings} of one method. None has LoTA's, because --lota_qaf True names no method."""
    return LRQAT_RECIPES if method == "lrqat" else RECIPES


def default_recipe(method: str | None) -> str:
    return next(iter(recipes_of(method)))


def own_row_form(base: baseConfig) -> RowForm:
    """How own rows are read. Raises UserError where the flags say it wrongly."""
    return row_form(base.data_columns, base.prompt_template, base.data_split, base.data_config)


def split_names(text: str | None) -> list[str]:
    """The names in "a,b" or "a b"."""
    return [name for name in re.split(r"[,\s]+", text or "") if name]


def _build_parser(description: str, training_sets: Sequence[str],
                  scored_sets: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, prog="LoTA_QAF_main.py", formatter_class=_HelpFormatter,
                                     usage="LoTA_QAF_main.py --mode {1,2} [flags]")
    groups = {name: parser.add_argument_group(*titles) for name, titles in GROUPS.items()}
    choices = {"export": list(FORMATS)}
    more_help = {"training_data_name": f": {', '.join(training_sets)}",
                 "ft_dataset_name": f": {', '.join(scored_sets)}"}
    for config in (baseConfig, trainingConfig, evalConfig):
        types = typing.get_type_hints(config)
        for f in fields(config):
            text = f"{f.metadata['help']}{more_help.get(f.name, '')} [{f.metadata['shown']}]"
            options = {"default": argparse.SUPPRESS, "dest": f.name,
                       "help": text.replace("%", "%%"),
                       "choices": choices.get(f.name, f.metadata["choices"])}
            value_type = _value_type(types[f.name])
            if value_type is bool:
                options |= {"type": _true_or_false, "nargs": "?", "const": True, "metavar": "True|False"}
            elif typing.get_origin(types[f.name]) is list:
                options |= {"nargs": "+", "metavar": "NAME"}
            else:
                optional = value_type is str and NoneType in typing.get_args(types[f.name]) and not options["choices"]
                options |= {"type": _recipe_name if f.name == "recipe" else _text_or_none if optional else value_type,
                            "metavar": None if options["choices"] else value_type.__name__.upper()}
                if f.metadata["several"]:
                    options |= {"nargs": "+", "metavar": "NAME"}
            groups[f.metadata["group"]].add_argument(*_spellings(f.name, *f.metadata["aliases"]), **options)
            if f.metadata["off"]:
                groups[f.metadata["group"]].add_argument(
                    *_spellings(f"no_{f.name}"), dest=f.name, action="store_const", const=False,
                    default=argparse.SUPPRESS, help=f.metadata["off"])
    return parser


def _spellings(*names: str) -> list[str]:
    """--a_b and --a-b of every name."""
    return list(dict.fromkeys(f"--{spelled}" for name in names for spelled in (name, name.replace("_", "-"))))


def _true_or_false(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "t": True, "y": True,
              "false": False, "no": False, "0": False, "f": False, "n": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"True or False is wanted, not '{text}'")
    return values[text.lower()]


def _text_or_none(text: str) -> str | None:
    """None for "none", because scripts give a flag that has no default so."""
    return None if text.lower() == "none" else text


def _recipe_name(text: str) -> str:
    return OLD_RECIPE_NAMES.get(text, text)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The description as it stands, the flags in a narrow column, and of --a_b, --a-b the first only."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=118)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if name == "-h" or "-" not in name[2:]]
        value = self._format_args(action, self._get_default_metavar_for_optional(action)) if action.nargs != 0 else ""
        return f"{', '.join(names)} {value}".strip()


# --- mode 1 -------------------------------------------------------------------------------------------------------

def check_method(base: baseConfig, training: trainingConfig) -> None:
    """Raises UserError where --lota_qaf, --method and --recipe contradict each other."""
    if base.lota_qaf and base.method not in (None, "lota"):
        raise UserError(f"--lota_qaf True contradicts --method {base.method}")
    method = base.method or ("lota" if base.lota_qaf else "lora")
    recipe = training.recipe or default_recipe(method)
    if method in IN_GRID and recipe not in recipes_of(method):
        raise UserError(f"--recipe {recipe} is none of --method {method}'s: {', '.join(recipes_of(method))}")
    if method not in IN_GRID and recipe != default_recipe(method):
        raise UserError(f"--recipe {recipe} is for steps on the grid: give --method lota or lrqat too")


def complete_base(base: baseConfig, folder: "GPTQFolder") -> baseConfig:
    """`base` with the bits, the group size and the symmetry of the GPTQ folder.

    Raises UserError where a flag contradicts the folder.
    """
    for flag, given, there in (("--w_bits", base.w_bits, folder.bits),
                               ("--group_size", base.group_size, folder.group_size)):
        if given is not None and given != there:
            raise UserError(f"{flag} {given} contradicts {folder.path}, which has {there}")
    return replace(base, quantized_model_dir=str(folder.path), w_bits=folder.bits, group_size=folder.group_size,
                   sym=bool(folder.config.get("sym")))


def complete_training(base: baseConfig, training: trainingConfig,
                      folder: "GPTQFolder") -> tuple[baseConfig, trainingConfig]:
    """The settings of a training run with method, targets, rank, alpha, the layout of prompts and the teacher, and for
    LoTA omega, sigma and the learning rates, filled in.

    Raises UserError where a flag contradicts the folder.
    """
    from LoTA.adapter_folder import config_of_checkpoint
    base = complete_base(base, folder)
    method = base.method or ("lota" if base.lota_qaf else "lora")
    _, parameters = folder.model_size(base.pretrained)
    rank = base.lora_r if base.lora_r is not None else 64 if parameters < LARGE_MODEL else 32
    alpha = base.lora_alpha if base.lora_alpha is not None else 2 * rank
    targets = base.lora_target_modules
    if ALL_LAYERS in targets:
        targets = [name for name in layer_names(folder.modules) if name != "lm_head"]
    layout = base.prompt_layout or config_of_checkpoint(training.adapter_ckpt).prompt_layout
    base = replace(base, method=method, lota_qaf=method == "lota", lora_target_modules=targets, lora_r=rank,
                   lora_alpha=alpha, prompt_layout=layout,
                   dither=base.dither or default_dither(method, base, folder.bits))
    training = replace(training, recipe=training.recipe or default_recipe(method))
    if training.distill != "none":
        training = replace(training, distill_model=training.distill_model or base.pretrained)
    if method == "lota":
        omega_share, sigma = omega_and_sigma(training.recipe, folder.bits)
        training = replace(
            training, optimizer_type="int_sign_sgd", max_grad_norm=0.0,
            interval_point=omega_share * rank if training.interval_point is None else training.interval_point,
            filter_ratio=sigma if training.filter_ratio is None else training.filter_ratio)
    # A rate that no parameter has stays as older checkpoints record it, so that they can be resumed.
    rates = {"offset_lr": (OFFSET_LR, base.offset_scale == "learned"), "scale_lr": (SCALE_LR, base.learned_scales)}
    return base, replace(training, **{
        name: rate_by_size(rate, parameters) if used else rate[0] for name, (rate, used) in rates.items()
        if getattr(training, name) is None})


def default_dither(method: str, base: baseConfig, bits: int) -> str:
    """What --dither is where it is not given. LR-QAT alone reads it.

    At 2 bits a step is so large that its noise costs more than steps gain. Integers alone need the noise there too,
    because without it no integer moves for long (experiments/LOG.md).
    """
    return "none" if method == "lrqat" and bits == 2 and (base.residual or base.learned_scales) else "noise"


def omega_and_sigma(recipe: str, bits: int) -> tuple[float, float]:
    """(omega as a share of the rank, sigma at the first step) of a recipe at so many bits."""
    row = max((tried for tried in OMEGA_AND_SIGMA if tried <= bits), default=min(OMEGA_AND_SIGMA))
    return OMEGA_AND_SIGMA[row][recipe]


def rate_by_size(rates: tuple[float, float], parameters: float) -> float:
    """The learning rate for a model with so many parameters, where `rates` suit those of TRIED_PARAMETERS.

    Between the two models that were tried it is a power of the size, so that it meets both. Beyond the larger one it
    falls with the root. AdamW's first steps move every entry by the rate, whatever its gradient. By its gradients such
    a step changes the loss by the rate times the sum of |gradient|. That sum grows with the root of the number of
    entries, where the norm of the gradient stays.
    """
    (small, large), (first, second) = TRIED_PARAMETERS, rates
    if parameters >= large:
        return second * (large / parameters) ** 0.5
    between = max(0.0, math.log(parameters / small) / math.log(large / small))
    return first * (second / first) ** between


def layer_names(modules: Sequence[str]) -> list[str]:
    """The last parts of the names of layers, each once. The usual ones come first, in their usual order."""
    names = {module.rsplit(".", 1)[-1] for module in modules}
    return [name for name in TARGET_MODULES if name in names] + sorted(names.difference(TARGET_MODULES))


def target_layers(targets: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Those of `modules` whose name is one of `targets`, or ends with a dot and one of them."""
    ends = tuple(f".{target}" for target in targets)
    return [module for module in modules if f".{module}".endswith(ends)]


def check_training(base: baseConfig, training: trainingConfig, folder: "GPTQFolder") -> None:
    """Raises UserError where a run with these completed settings cannot start."""
    if training.num_train_epochs <= 0 and training.max_steps <= 0:
        raise UserError("nothing to train: give --num_train_epochs or --max_steps")
    for flag in ("train_batch_size", "gradient_accumulation_steps", "source_max_len", "target_max_len", "save_number",
                 "save_total_limit"):
        if getattr(training, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, not {getattr(training, flag)}")
    if training.adapter_ckpt and not Path(training.adapter_ckpt).is_dir():
        raise UserError(f"--adapter_ckpt {training.adapter_ckpt} is not a folder")
    unknown = [target for target in base.lora_target_modules if not target_layers([target], folder.modules)]
    if unknown or not base.lora_target_modules:
        raise UserError(f"--lora_target_modules {' '.join(unknown)}: {folder.path} has no such quantized layer; it has "
                        f"{', '.join(layer_names(folder.modules))}")
    if base.lora_r < 1:
        raise UserError(f"--lora_r must be at least 1, not {base.lora_r}")
    if base.dtype == "float16":
        raise UserError("training in float16 is not supported, its gradients overflow: use bfloat16 or float32")
    if training.optimizer_type == "paged_adamw_32bit" and not find_spec("bitsandbytes"):
        raise UserError("--optimizer_type paged_adamw_32bit needs bitsandbytes: pip install bitsandbytes")
    own_row_form(base)
    _check_distillation(training)
    if base.method == "qalora" and folder.group_size < 1:
        raise UserError(f"--method qalora needs a GPTQ model with groups, and {folder.path} has none")
    if base.method in IN_GRID:
        _check_steps(base, folder)
    elif base.learned_scales:
        raise UserError("--learned_scales trains beside steps on the grid: give --method lota or lrqat")
    if base.method == "lota":
        _check_lota(base, training, folder)
    elif training.optimizer_type == "int_sign_sgd":
        raise UserError("--optimizer_type int_sign_sgd trains ternary adapters only: give --lota_qaf True")
    if base.method == "lrqat":
        _check_lrqat(base, folder)


def _check_steps(base: baseConfig, folder: "GPTQFolder") -> None:
    if base.lora_dropout:
        raise UserError(f"--lora_dropout must be 0 with {METHODS[base.method]}: what is dropped could not be merged")
    if base.offset_scale == "learned" and not base.residual:
        raise UserError("--offset_scale learned trains the offset that --residual False leaves out")
    scales = folder.tensor(f"{folder.modules[0]}.scales")
    if base.learned_scales and str(scales.dtype) != "torch.float16":
        raise UserError(f"--learned_scales writes float16 scales, and those of {folder.path} are {scales.dtype}")


def _check_lrqat(base: baseConfig, folder: "GPTQFolder") -> None:
    from LoTA.steps import Rounding
    if base.residual and base.offset_scale not in ("learned", "mean"):
        raise UserError(f"--offset_scale {base.offset_scale} is a mu of --method lota: give learned or mean with "
                        "lrqat, or --residual False")
    if base.residual and base.offset_scale == "mean" and folder.group_size < 1:
        raise UserError(f"--offset_scale mean needs a GPTQ model with groups, and {folder.path} has none: give "
                        "--recipe integers or scales")
    if base.dither == "fraction" and base.pretrained is None:
        raise UserError("--dither fraction is what GPTQ rounded away: name the 16-bit model with --pretrained")
    if base.dither == "fraction" and folder.history():
        raise UserError(f"--dither fraction is what GPTQ rounded away, and {folder.path} was tuned after that: give "
                        "--dither noise or none")
    Rounding(base.lora_alpha / base.lora_r).check(base.lora_r, max(1, folder.group_size))


def _check_distillation(training: trainingConfig) -> None:
    from LoTA.folders import check_model_name
    if not 0 <= training.distill_weight <= 1:
        raise UserError(f"--distill_weight must lie in [0, 1], not {training.distill_weight}")
    if training.distill == "none":
        if training.distill_model is not None:
            raise UserError(f"--distill_model {training.distill_model} teaches nothing: give --distill answers or all")
    elif training.distill_model is None:
        raise UserError(f"--distill {training.distill} needs the 16-bit model: name it with --pretrained or "
                        "--distill_model")
    else:
        check_model_name("--distill_model", training.distill_model)


def _check_lota(base: baseConfig, training: trainingConfig, folder: "GPTQFolder") -> None:
    from LoTA.steps import Threshold
    if base.residual and base.offset_scale == "mean":
        raise UserError("--offset_scale mean is a mu of --method lrqat: give omega, paper or learned with lota")
    for flag in ("filter_ratio", "min_grad", "filter_upper"):
        if not 0 < getattr(training, flag) < 1:
            raise UserError(f"--{flag} must lie in (0, 1), not {getattr(training, flag)}")
    if not 0 <= training.warm_up < 1:
        raise UserError(f"--warm_up must lie in [0, 1), not {training.warm_up}")
    if training.flip_limit is not None and not training.flip_limit > 0:
        raise UserError(f"--flip_limit must be positive, not {training.flip_limit}; inf sets no limit")
    if not 0 <= training.momentum < 1:
        raise UserError(f"--momentum must lie in [0, 1), not {training.momentum}")
    Threshold(training.interval_point, None).check(base.lora_r, max(1, folder.group_size))


# --- mode 2 -------------------------------------------------------------------------------------------------------

def check_evaluation(evaluation: evalConfig) -> None:
    """Raises UserError where the settings of mode 2 ask for nothing, or contradict each other."""
    if only_merges(evaluation) and evaluation.merged_path is None and evaluation.export is None:
        raise UserError("nothing to evaluate: give --tasks, --ft_dataset_name, or --merged_path to only merge")
    if (evaluation.export is None) != (evaluation.export_path is None):
        raise UserError("--export FORMAT and --export_path FOLDER go together")
    if evaluation.export and evaluation.load_adapter == "none":
        raise UserError("--export writes a merged model: name it, or its adapter, with --load_adapter")
    if not evaluation.generate and not evaluation.answer_loss:
        raise UserError("--no_generate leaves the loss alone to measure: give --answer_loss too")
    if evaluation.text_window is not None and evaluation.text_window < 2:
        raise UserError(f"--text_window must be at least 2, not {evaluation.text_window}: the first token of a text is "
                        "predicted from nothing")
    if evaluation.include_path and not Path(evaluation.include_path).is_dir():
        raise UserError(f"--include_path {evaluation.include_path} is not a folder")
    new_tokens, limit = evaluation.max_new_tokens, evaluation.limit
    if evaluation.eval_batch_size < 1 or (new_tokens is not None and new_tokens < 1):
        raise UserError("--eval_batch_size and --max_new_tokens must be at least 1")
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}; leave it out to evaluate all rows")


def only_merges(evaluation: evalConfig) -> bool:
    """Whether mode 2 measures nothing."""
    return not split_names(evaluation.tasks) and evaluation.ft_dataset_name == "none"
