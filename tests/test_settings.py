"""The command line, recipes, completed settings and refusals; what --help costs; which modules may import which."""
import ast
import copy
import math
import re
import subprocess
import sys
import time
from dataclasses import MISSING, FrozenInstanceError, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LAYERS, ROOT, parse
from random_gptq import write_gptq, write_lota_adapter

import LoTA_QAF_main
from data_print_save import TASKS, find_measured
from LoTA import UserError, run_script
from LoTA.export import FORMATS
from LoTA.folders import GPTQFolder
from LoTA.settings import (
    GROUPS,
    METHODS,
    OMEGA_AND_SIGMA,
    READ_BY,
    RECIPES,
    baseConfig,
    check_evaluation,
    check_method,
    check_training,
    complete_base,
    complete_training,
    evalConfig,
    omega_and_sigma,
    trainingConfig,
)

CONFIGS = (baseConfig, trainingConfig, evalConfig)


# --- --help -------------------------------------------------------------------------------------------------------

def helps():
    """What --help shows: {flag as --a_b: (heading of its group, its text)}."""
    out = subprocess.run([sys.executable, ROOT / "LoTA_QAF_main.py", "--help"], capture_output=True, text=True,
                         check=True).stdout
    blocks, heading, names = {}, None, []
    for line in out.splitlines():
        if line and not line.startswith(" "):
            heading, names = line.rstrip(":"), []
        elif line.startswith("  --"):
            invocation, _, text = line.strip().partition("  ")
            names = [word.rstrip(",") for word in invocation.split() if word.startswith("--")]
            blocks |= {name: (heading, text.strip()) for name in names}
        elif line.startswith("   ") and names:
            blocks |= {name: (heading, f"{blocks[name][1]} {line.strip()}".strip()) for name in names}
    return blocks


@pytest.fixture(scope="module")
def shown():
    return helps()


@pytest.mark.parametrize("config", CONFIGS)
def test_help_explains_every_flag_with_its_default(shown, config):
    """The default stands in brackets. Where it is a rule, the rule stands there."""
    for f in fields(config):
        heading, text = shown[f"--{f.name}"]
        explanation, _, default = text.removesuffix("]").rpartition(" [")
        value = f.default_factory() if f.default is MISSING else f.default
        value = " ".join(value) if isinstance(value, list) else value
        assert text.endswith("]") and len(explanation) > 5 and default == str(f.metadata["shown"]) != "None", f.name
        assert value is None or default == str(value) or f.name in ("flash_attn", "sym"), f.name
        assert all(shown[f"--{alias}"] == (heading, text) for alias in f.metadata["aliases"])


def test_help_is_grouped_by_mode(shown):
    headings = list(dict.fromkeys(heading for heading, _ in shown.values()))
    assert headings == [title for title, _ in GROUPS.values()]
    assert all(shown[f"--{f.name}"][0].startswith("mode 1") for f in fields(trainingConfig))
    assert all(shown[f"--{f.name}"][0].startswith("mode 2") for f in fields(evalConfig))
    assert not any(shown[f"--{f.name}"][0].startswith("mode 2") for f in fields(baseConfig))
    assert [f.name for f in fields(baseConfig)][0] == "mode" and shown["--mode"][0] == "both modes"


def test_each_no_flag_says_what_it_does(shown):
    """Every flag that is True by default has one, with a text of its own."""
    on = {f"--no_{f.name}" for config in CONFIGS for f in fields(config) if f.default is True}
    assert {flag for flag in shown if flag.startswith("--no_")} == on != set()
    texts = [shown[flag][1] for flag in on] + [shown[flag.replace("no_", "")][1].rpartition(" [")[0] for flag in on]
    assert len(set(texts)) == 2 * len(on) and all(len(text) > 10 for text in texts)


def test_help_derives_its_choices(shown):
    """Data sets come from TASKS and export formats from FORMATS. The symbols are the paper's."""
    own = "chat, text, OWNER/NAME"
    assert shown["--training_data_name"][1].endswith(f"The names: {', '.join(TASKS)}, {own} [alpaca]")
    out = " ".join(text for _, text in shown.values())
    for symbol in ("omega", "sigma", "mu", "Eq. 4", "the rank r", "kappa"):
        assert symbol in out
    scored = [name for name, task in TASKS.items() if task.score]
    assert shown["--ft_dataset_name"][1].endswith(f"The names: {', '.join(scored)}, {own} [none]")
    with pytest.raises(UserError, match=f"'alpaca' is for training only; choose from {', '.join(scored)}, {own}$"):
        find_measured("alpaca")
    for name in FORMATS:
        assert parse("--export", name)[2].export == name
    for flags in (("--export", "zip"), ("--recipe", "secret"), ("--mode", 3)):
        with pytest.raises(SystemExit) as stopped:
            parse(*flags)
        assert stopped.value.code == 2


HEAVY = ("torch", "transformers", "datasets", "gptqmodel", "peft", "numpy")
COMMANDS = ("LoTA_QAF_main.py", "gptq_quantize.py", "LoTA.export", "LoTA.lota_merge", "LoTA.check")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_help_imports(command):
    run = f"run_path({str(ROOT / command)!r}" if command.endswith(".py") else f"run_module({command!r}"
    code = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["command", "--help"]
try:
    runpy.{run}, run_name="__main__")
except SystemExit as end:
    print(end.code, *sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0" and "usage:" in done.stdout, done.stdout[-300:] + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_less_than_two_seconds(command):
    """The best of three, because the machine may be busy."""
    what = [ROOT / command] if command.endswith(".py") else ["-m", command]
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *what, "--help"], cwd=ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - begin)
    assert min(times) < 2


# --- the command line ---------------------------------------------------------------------------------------------

def test_settings_are_frozen():
    for settings in parse():
        for f in fields(settings):
            with pytest.raises(FrozenInstanceError):
                setattr(settings, f.name, getattr(settings, f.name))
            with pytest.raises(FrozenInstanceError):
                delattr(settings, f.name)
        with pytest.raises(FrozenInstanceError):
            settings.new = 1


def test_without_flags_everything_is_the_default():
    assert parse() == tuple(config() for config in CONFIGS)


def test_every_flag_reaches_its_field():
    """Each flag by itself, with underscores and with hyphens, sets its field and no other."""
    other = {int: 7, float: 0.25, str: "text", bool: None}
    for number, config in enumerate(CONFIGS):
        for f in fields(config):
            if f.name in ("mode", "recipe"):
                continue
            derived = {"export": list(FORMATS)}
            choices = f.metadata["choices"] or derived.get(f.name)
            kind = next(k for k in (bool, int, float, str) if k.__name__ in str(f.type))
            value = ["a_proj", "b_proj"] if f.name == "lora_target_modules" else (
                choices[-1] if choices else not f.default if kind is bool else other[kind])
            given = value if isinstance(value, list) else [value]
            for flag in (f"--{f.name}", f"--{f.name.replace('_', '-')}"):
                got = parse(flag, *given)
                assert got[number] == replace(config(), **{f.name: value}), flag
                assert all(got[i] == other_config() for i, other_config in enumerate(CONFIGS) if i != number)


@pytest.mark.parametrize("flags, name, value", [
    (("--lota_qaf",), "lota_qaf", True), (("--lota_qaf", "yes"), "lota_qaf", True),
    (("--lota_qaf", "FALSE"), "lota_qaf", False), (("--no_residual",), "residual", False),
    (("--no-residual",), "residual", False), (("--residual", "n"), "residual", False),
    (("--lora_target_modules", "q_proj,v_proj"), "lora_target_modules", ["q_proj", "v_proj"]),
    (("--lora_target_modules", "q_proj", "v_proj"), "lora_target_modules", ["q_proj", "v_proj"])])
def test_spellings_of_values(flags, name, value):
    assert getattr(parse(*flags)[0], name) == value


@pytest.mark.parametrize("alias, name", [("sigma_start", "filter_ratio"), ("sigma_turn", "min_grad"),
                                         ("sigma_end", "filter_upper")])
def test_aliases_of_sigma(alias, name):
    for flag in (f"--{alias}", f"--{alias.replace('_', '-')}"):
        assert parse(flag, 0.5)[1] == replace(trainingConfig(), **{name: 0.5})


def test_two_command_lines_share_nothing():
    """The list of projections is the only setting that could be changed in place."""
    one, other = parse()[0], parse()[0]
    one.lora_target_modules.clear()
    assert other == baseConfig() == parse()[0] != one


@pytest.mark.parametrize("flag", ["--lora_rank", "--lota-rank", "--no_lota_qaf"])
def test_a_flag_that_does_not_exist_is_named(flag):
    with pytest.raises(UserError, match=f"there is no flag {flag}; --help lists all"):
        parse("--mode", 1, flag, "8")


# --- recipes and completed settings -------------------------------------------------------------------------------

def of_recipe(*flags):
    base, training, _ = parse(*flags)
    return (training.interval_point, training.momentum, training.filter_ratio, base.offset_scale, base.residual,
            base.learned_scales, training.offset_lr, training.scale_lr, training.flip_limit,
            training.warm_up)


def test_recipes_fill_in_what_is_not_given():
    """A flag that is given counts, also where it says the default."""
    assert of_recipe("--recipe", "published") == of_recipe() == (
        None, 0.0, None, "omega", True, False, None, None, None, 0.0)
    assert of_recipe("--recipe", "full") == (
        None, 0.9, None, "learned", True, True, None, None, 1.0, 0.1)
    assert of_recipe("--recipe", "ternary") == (
        None, 0.9, None, "omega", False, False, None, None, 1.0, 0.0)
    assert of_recipe("--recipe", "scales") == (
        None, 0.9, None, "omega", False, True, None, None, 1.0, 0.1)
    assert of_recipe("--recipe", "full", "--momentum", 0.0, "--filter_ratio", 0.95, "--learned_scales", False,
                     "--interval_point", 3.0, "--scale_lr", 0.5, "--flip_limit", "inf",
                     "--warm_up", 0) == (3.0, 0.0, 0.95, "learned", True, False, None, 0.5, math.inf, 0.0)
    assert of_recipe("--residual", True, "--recipe", "ternary")[4] is True


@pytest.mark.parametrize("old, new", [("steps", "ternary"), ("grid", "scales"), ("learned", "full")])
def test_old_names_of_recipes(old, new):
    assert parse("--recipe", old) == parse("--recipe", new) and parse("--recipe", old)[1].recipe == new


def model(bits=4, group_size=32, parameters=8e9, **config):
    """What complete_training() asks of a GPTQ folder."""
    return SimpleNamespace(bits=bits, group_size=group_size, path=Path("gptq"), config=config, modules=list(LAYERS),
                           model_size=lambda name=None: ("", parameters))


@pytest.mark.parametrize("recipe, bits, omega, sigma", [
    ("published", 2, 6.0, 0.95), ("published", 3, 6.0, 0.95), ("published", 4, 6.0, 0.95), ("published", 8, 6.0, 0.95),
    ("ternary", 2, 2.4, 0.99), ("ternary", 3, 1.2, 0.98), ("ternary", 4, 0.8, 0.98), ("ternary", 5, 0.8, 0.98),
    ("scales", 2, 2.4, 0.995), ("scales", 3, 1.6, 0.98), ("scales", 4, 1.2, 0.98), ("scales", 8, 1.2, 0.98),
    ("full", 2, 2.4, 0.995), ("full", 3, 1.6, 0.98), ("full", 4, 1.2, 0.98), ("full", 6, 1.2, 0.98)])
def test_omega_and_sigma_go_by_the_bits(recipe, bits, omega, sigma):
    """Omega is a share of the rank. More bits than were tried take the row of 4."""
    base, training, _ = parse("--method", "lota", "--recipe", recipe, "--lora_r", 8)
    base, training = complete_training(base, training, model(bits))
    assert (training.interval_point, training.filter_ratio) == pytest.approx((omega, sigma))
    assert base.w_bits == bits


@pytest.mark.parametrize("parameters, offset_lr, scale_lr", [
    (1e6, 0.007, 0.03), (2.1e6, 0.007, 0.03), ((2.1e6 * 135e6)**0.5, (0.007 * 0.0002)**0.5, (0.03 * 0.001)**0.5),
    (135e6, 0.0002, 0.001), (13.5e9, 0.00002, 0.0001)])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_learning_rates_fall_with_the_size(recipe, parameters, offset_lr, scale_lr):
    """They meet the rates of both models that were tried, go as a power between them, and as the root beyond them.

    A flag that is given counts at every size. A rate that no parameter has stays as it was.
    """
    base, training, _ = parse("--method", "lota", "--recipe", recipe)
    offset_lr, scale_lr = offset_lr if recipe == "full" else 0.007, scale_lr if base.learned_scales else 0.03
    _, completed = complete_training(base, training, model(parameters=parameters))
    assert (completed.offset_lr, completed.scale_lr) == pytest.approx((offset_lr, scale_lr), rel=1e-12)
    _, given = complete_training(base, replace(training, offset_lr=0.1, scale_lr=0.2), model(parameters=parameters))
    assert (given.offset_lr, given.scale_lr) == (0.1, 0.2)


def test_every_recipe_has_omega_and_sigma_at_all_bits():
    assert all(set(row) == set(RECIPES) for row in OMEGA_AND_SIGMA.values())
    for recipe in RECIPES:
        assert omega_and_sigma(recipe, 1) == omega_and_sigma(recipe, 2) == OMEGA_AND_SIGMA[2][recipe]
        assert omega_and_sigma(recipe, 8) == omega_and_sigma(recipe, 4)


@pytest.mark.parametrize("flags, at_2_bits", [
    ((), "noise"), (("--recipe", "scales"), "none"), (("--recipe", "mean"), "none"), (("--recipe", "full"), "none"),
    (("--recipe", "full", "--dither", "fraction"), "fraction"), (("--dither", "none"), "none")])
def test_at_2_bits_only_integers_alone_are_dithered(flags, at_2_bits):
    """At more bits noise is the default of every recipe. A flag that is given wins."""
    base, training, _ = parse("--method", "lrqat", *flags)
    dither = {bits: complete_training(base, training, model(bits))[0].dither for bits in (2, 3, 4, 8)}
    assert dither == {2: at_2_bits, **dict.fromkeys((3, 4, 8), base.dither or "noise")}


@pytest.mark.parametrize("flags, parameters, want", [
    ((), 8e9, {"method": "lora", "lota_qaf": False, "lora_r": 64, "lora_alpha": 128}),
    (("--lota_qaf",), 8e9, {"method": "lota", "lota_qaf": True, "lora_r": 64, "lora_alpha": 128}),
    (("--method", "lota"), 30e9, {"method": "lota", "lota_qaf": True, "lora_r": 32, "lora_alpha": 64}),
    (("--method", "qalora", "--lora_r", 5), 70e9, {"method": "qalora", "lota_qaf": False, "lora_r": 5,
                                                   "lora_alpha": 10}),
    (("--lora_alpha", 7), 1e6, {"method": "lora", "lora_r": 64, "lora_alpha": 7})])
def test_complete_training_leaves_nothing_open(flags, parameters, want):
    base, training, _ = parse(*flags)
    done, complete = complete_training(base, training, model(3, 64, parameters, sym=True))
    assert {name: getattr(done, name) for name in want} == want
    assert (done.w_bits, done.group_size, done.sym, done.quantized_model_dir) == (3, 64, True, "gptq")
    if done.method == "lota":
        assert (complete.optimizer_type, complete.max_grad_norm) == ("int_sign_sgd", 0.0)
        assert (complete.interval_point, complete.filter_ratio) == (0.75 * done.lora_r, 0.95)
    else:
        assert complete == replace(training, recipe="published", offset_lr=0.007, scale_lr=0.03)


@pytest.mark.parametrize("flags, said", [
    (("--method", "lrqat", "--warm-up", 0.1, "--learning_rate", 1), "with --method lrqat: --warm_up"),
    (("--lota_qaf", "--sigma_start", 0.9, "--learning_rate", 1e-5, "--max_grad_norm", 0.3),
     "with --method lota: --learning_rate, --max_grad_norm"),
    (("--method", "qalora", "--no_residual", "--dither", "none"), "with --method qalora: --residual, --dither"),
    (("--mode", 2, "--residual", False), None), (("--method", "lota", "--residual", False), None), ((), None)])
def test_a_flag_without_effect_is_named(capsys, flags, said):
    parse(*flags)
    assert capsys.readouterr().out == (f"without effect {said}\n" if said else "")


def test_what_a_method_reads_is_a_flag():
    names = {f.name for config in (baseConfig, trainingConfig) for f in fields(config)}
    assert set(READ_BY) <= names and all(set(methods) < set(METHODS) for methods in READ_BY.values())


def test_flags_that_are_given_stay():
    base, training, _ = parse("--method", "lota", "--lora_r", 16, "--interval_point", 2, "--filter_ratio", 0.5,
                              "--w_bits", 3, "--group_size", 64)
    base, training = complete_training(base, training, model(3, 64))
    assert (training.interval_point, training.filter_ratio, base.lora_r) == (2.0, 0.5, 16)


# --- refusals -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    """A random GPTQ model of 2 bits."""
    return write_gptq(tmp_path_factory.mktemp("random") / "gptq", LAYERS, 2)


TRAIN = ("--mode", 1, "--lota_qaf", True, "--lora_r", 8, "--max_steps", 2, "--dtype", "float32")


@pytest.mark.parametrize("flags", [TRAIN, (*TRAIN, "--recipe", "scales"), (*TRAIN, "--lota_qaf", False),
                                   ("--mode", 2, "--tasks", "mmlu")])
def test_checks_change_nothing(gptq, flags):
    """Not the settings that they get, and not those that complete_...() get."""
    folder, given = GPTQFolder(gptq), parse(*flags)
    base, training, evaluation = copy.deepcopy(given)
    check_method(base, training)
    complete_base(base, folder)
    done = complete_training(base, training, folder)
    assert (base, training, evaluation) == given
    before = copy.deepcopy(done)
    if flags[1] == 1:
        check_training(*done, folder)
    else:
        check_evaluation(evaluation)
    assert done == before and (base, training, evaluation) == given
    assert complete_training(*done, folder) == done         # nothing is left open


def test_nothing_to_measure_without_answers_and_loss():
    """--no_generate leaves the loss alone, so it wants --answer_loss."""
    flags = ("--mode", 2, "--ft_dataset_name", "viggo", "--no_generate")
    with pytest.raises(UserError, match="--no_generate leaves the loss alone to measure: give --answer_loss too"):
        check_evaluation(parse(*flags)[2])
    check_evaluation(parse(*flags, "--answer_loss")[2])


class SafetensorError(Exception):
    """As safetensors has it: a subclass of Exception only."""


def wrapped(cause):
    """A library's error that was raised from another."""
    error = ValueError("the model could not be loaded")
    error.__cause__ = cause
    return error


def raised(call):
    """What a call raises."""
    with pytest.raises(Exception) as caught:        # noqa: PT011
        call()
    return caught.value


# Most of the disk's wordings were met on a full tmpfs with the pinned versions. Those of the quota, of
# PytorchStreamWriter and of CUDA were not met here.
MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    raised(lambda: torch.empty(10**15)),            # DefaultCPUAllocator: can't allocate memory
    raised(lambda: bytearray(10**15)),              # MemoryError without a text
    MemoryError("Unable to allocate 7.11 PiB for an array with shape (1000000000000000,) and data type float64"),
    OSError(12, "Cannot allocate memory"), SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
    wrapped(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))]
DISK = [
    OSError(28, "No space left on device", "model.safetensors"), OSError(122, "Disk quota exceeded"),
    OSError("1000000 requested and 25584 written"),                     # numpy
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),                 # tokenizers
    RuntimeError("write(): fd 3 failed with No space left on device"),  # torch.save in the old format
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),      # torch.save
    RuntimeError("basic_ios::clear: iostream error"),
    RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0: file "
                 "write failed")]
OTHERS = [
    (UserError("no such flag\nsecond line"), "no such flag"), (FileNotFoundError(2, "No such file", "a"),
                                                               "[Errno 2] No such file: 'a'"),
    (Exception("Permission denied (os error 13)"), "Permission denied (os error 13)"),
    (SafetensorError("Error while deserializing header"), "Error while deserializing header"),
    (FloatingPointError("a gradient is nan"), "a gradient is nan")]
DEFECTS = [KeyError("out of memory"), ValueError("no space left on device"), RuntimeError("shapes differ"),
           Exception("anything"), wrapped(UserError("a mistake")),
           wrapped(FileNotFoundError(2, "no file")), RuntimeError("PytorchStreamReader failed reading zip archive")]


def line_of(error, *memory_help):
    """What run_script() prints for an error."""
    def main():
        raise error
    with pytest.raises(SystemExit) as stopped:
        run_script(main, *memory_help)
    line = stopped.value.code
    assert "\n" not in line
    return line


@pytest.mark.parametrize("error", MEMORY, ids=lambda e: f"{type(e).__name__}: {str(e)[:30]}")
def test_out_of_memory_says_what_to_lower(error):
    assert line_of(error, "lower --train_batch_size").startswith("error: out of memory: lower --train_batch_size (")
    assert line_of(error).startswith("error: out of memory: free some, or take a machine with more (")


@pytest.mark.parametrize("error", DISK, ids=lambda e: f"{type(e).__name__}: {str(e)[:50]}")
def test_a_full_disk_is_one_line(error):
    line, said = line_of(error), str(error)
    sure = any(word in said for word in ("space", "quota", "requested"))
    start = ("the disk is full, or a quota is reached: free space, or write to another disk" if sure
             else "a checkpoint could not be written: look whether the disk is full")
    assert line == f"error: {start} ({said})"


@pytest.mark.parametrize("error, line", OTHERS, ids=lambda e: type(e).__name__)
def test_other_mistakes_are_one_line(error, line):
    assert line_of(error, "lower it") == f"error: {line}"


@pytest.mark.parametrize("error", DEFECTS, ids=lambda e: f"{type(e).__name__}: {e}")
def test_a_defect_keeps_its_traceback(error):
    def main():
        raise error
    with pytest.raises(type(error)) as caught:
        run_script(main)
    assert caught.value is error


def test_the_main_script_names_its_own_flags(monkeypatch):
    monkeypatch.setattr("LoTA_QAF_main.main", lambda: bytearray(10**15))
    with pytest.raises(SystemExit) as stopped:
        LoTA_QAF_main.cli()
    named = set(re.findall(r"--(\w+)", stopped.value.code))
    assert {"train_batch_size", "source_max_len", "gradient_checkpointing", "eval_batch_size"} <= named
    assert named <= {f.name for config in CONFIGS for f in fields(config)}


REFUSED = [
    (("--quantized_model_dir", "no_such_folder"), "no_such_folder is not a folder"),
    ((), "--quantized_model_dir is missing"),
    (("--quantized_model_dir", "{plain}"), "not a GPTQ model"),
    (("--quantized_model_dir", "{gptq}", "--w_bits", 4), "--w_bits 4 contradicts"),
    (("--quantized_model_dir", "{gptq}", "--group_size", 64), "--group_size 64 contradicts"),
    (("--quantized_model_dir", "{gptq}", "--interval_point", 8), "must lie in"),
    (("--quantized_model_dir", "{gptq}", "--interval_point", -1), "must lie in"),
    (("--quantized_model_dir", "{gptq}", "--interval_point", 0), "must lie in"),
    (("--quantized_model_dir", "{gptq}", "--filter_ratio", 1.5), "--filter_ratio must lie in"),
    (("--quantized_model_dir", "{gptq}", "--sigma_turn", 0), "--min_grad must lie in"),
    (("--quantized_model_dir", "{gptq}", "--sigma_end", 1), "--filter_upper must lie in"),
    (("--quantized_model_dir", "{gptq}", "--momentum", 1), "--momentum must lie in"),
    (("--quantized_model_dir", "{gptq}", "--flip_limit", 0), "--flip_limit must be positive, not 0.0; inf sets no"),
    (("--quantized_model_dir", "{gptq}", "--warm_up", 1), "--warm_up must lie in"),
    (("--quantized_model_dir", "{gptq}", "--lora_r", 0), "--lora_r must be"),
    (("--quantized_model_dir", "{gptq}", "--lora_r", 2**20), "too large"),
    (("--quantized_model_dir", "{gptq}", "--train_batch_size", 0), "--train_batch_size must be"),
    (("--quantized_model_dir", "{gptq}", "--gradient_accumulation_steps", 0), "--gradient_accumulation_steps must be"),
    (("--quantized_model_dir", "{gptq}", "--source_max_len", 0), "--source_max_len must be"),
    (("--quantized_model_dir", "{gptq}", "--target_max_len", 0), "--target_max_len must be"),
    (("--quantized_model_dir", "{gptq}", "--save_number", 0), "--save_number must be"),
    (("--quantized_model_dir", "{gptq}", "--save_total_limit", 0), "--save_total_limit must be at least 1, not 0"),
    (("--quantized_model_dir", "{gptq}", "--dtype", "float16"), "float16 is not supported"),
    (("--quantized_model_dir", "{gptq}", "--lora_dropout", 0.1), "--lora_dropout must be 0"),
    (("--quantized_model_dir", "{gptq}", "--max_steps", -1), "nothing to train"),
    (("--quantized_model_dir", "{gptq}", "--lora_target_modules", "c_attn"), "--lora_target_modules c_attn"),
    (("--quantized_model_dir", "{gptq}", "--adapter_ckpt", "nowhere"), "nowhere is not a folder"),
    (("--quantized_model_dir", "{gptq}", "--offset_scale", "learned", "--residual", False), "leaves out"),
    (("--quantized_model_dir", "{gptq}", "--lota_qaf", False, "--optimizer_type", "int_sign_sgd"), "ternary adapters"),
    (("--quantized_model_dir", "{gptq}", "--lota_qaf", False, "--learned_scales", True), "beside steps on the grid"),
    (("--quantized_model_dir", "{one_group}", "--lota_qaf", False, "--method", "qalora"),
     "needs a GPTQ model with groups"),
    (("--quantized_model_dir", "{one_group}", "--lota_qaf", False, "--method", "lrqat", "--recipe", "full"),
     "has none: give --recipe integers or scales"),
    (("--quantized_model_dir", "{gptq}", "--method", "lora"), "--lota_qaf True contradicts --method lora"),
    (("--quantized_model_dir", "{gptq}", "--lota_qaf", False, "--recipe", "full"), "--recipe full is for steps"),
    (("--lota_qaf", False, "--method", "qalora", "--recipe", "learned"), "--recipe full is for steps"),
    (("--mode", 2), "nothing to evaluate"),
    (("--mode", 2, "--export", "gguf"), "go together"),
    (("--mode", 2, "--export", "gguf", "--export_path", "out"), "--load_adapter"),
    (("--mode", 2, "--tasks", "mmlu", "--eval_batch_size", 0), "must be at least 1"),
    (("--mode", 2, "--tasks", "mmlu", "--text_window", 1), "--text_window must be at least 2, not 1"),
    (("--mode", 2, "--ft_dataset_name", "alpaca"), "'alpaca' is for training only; choose from gsm8k"),
    (("--mode", 2, "--ft_dataset_name", "squad"), "unknown data set 'squad'; choose from alpaca"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--score", "bleu"), "--score bleu is none of exact, number"),
    (("--quantized_model_dir", "{gptq}", "--data_columns", "question=q"), "--data_columns question=q: write OURS"),
    (("--mode", 2, "--tasks", "mmlu", "--max_new_tokens", 0), "must be at least 1"),
    (("--mode", 2, "--tasks", "mmlu", "--include_path", "nowhere"), "--include_path nowhere is not a folder"),
    (("--mode", 2, "--ft_dataset_name", "viggo"), "--quantized_model_dir is missing"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--auto_gptq", "none"), "name it with --pretrained"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--auto_gptq", "none", "--pretrained", "./nowhere"), "does not exist"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--load_adapter", "nowhere"), "nowhere is not a folder"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--load_adapter", "{plain}"), "not an adapter folder"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--load_adapter", "{adapter}", "--w_bits", 3), "--w_bits 3"),
    (("--mode", 2, "--merged_path", "{plain}", "--load_adapter", "{adapter}"), "not made by this project")]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_refusals(flags, message, gptq, tmp_path, monkeypatch):
    """A UserError that names what is wrong, before anything is written or a model is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/config.json").write_text("{}")
    places = {"gptq": gptq, "plain": tmp_path / "plain"}
    if "{adapter}" in flags:
        places["adapter"] = write_lota_adapter(tmp_path / "adapter", gptq)
    if "{one_group}" in flags:
        places["one_group"] = write_gptq(tmp_path / "one_group", LAYERS, 2, -1)
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("mr,ref\na,b\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        base, training, evaluation = parse(*TRAIN, "--data_dir", tmp_path, "--adapter_path", "a", "--output_path", "r",
                                           *(str(flag).format(**places) for flag in flags))
        if base.mode == 1:
            LoTA_QAF_main.train(base, training)
        else:
            LoTA_QAF_main.evaluate(base, evaluation)
    assert sorted(tmp_path.rglob("*")) == before


def test_scales_that_are_not_float16_cannot_be_learned(gptq):
    folder = GPTQFolder(gptq)
    folder.tensor = lambda name: torch.zeros(2, 2, dtype=torch.bfloat16)
    done = complete_training(*parse(*TRAIN, "--learned_scales")[:2], folder)
    with pytest.raises(UserError, match="--learned_scales writes float16 scales"):
        check_training(*done, folder)


def test_paged_adamw_needs_bitsandbytes(gptq, monkeypatch):
    monkeypatch.setattr("LoTA.settings.find_spec", lambda name: None)
    folder = GPTQFolder(gptq)
    done = complete_training(*parse(*TRAIN, "--lota_qaf", False, "--optimizer_type", "paged_adamw_32bit")[:2], folder)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        check_training(*done, folder)


# --- which modules import which -----------------------------------------------------------------------------------

# From the bottom to the top. A module may import those that stand before it, and no others of this project.
ROOMS = {
    "names and mistakes": ["LoTA", "LoTA.export"],                  # LoTA.export itself is only the list of formats
    "files and processes": ["LoTA.processes", "LoTA.storage", "LoTA.row_files", "LoTA.own_rows", "LoTA.splits",
                            "LoTA.scores"],
    "the method": ["LoTA.packing", "LoTA.packed", "LoTA.steps", "LoTA.ternary", "LoTA.kernels"],
    "folders": ["LoTA.adapter_folder", "LoTA.folders", "LoTA.settings", "LoTA.export.card", "LoTA.regroup",
                "LoTA.lota_merge"],
    "prompts": ["LoTA.prompts"],
    "models in memory": ["LoTA.layer", "LoTA.adapter", "LoTA.answer_loss", "LoTA.distill", "LoTA.sequences",
                         "LoTA.monitor", "LoTA.trainer"],
    "other engines": ["LoTA.export.shared", "LoTA.export.gptq", "LoTA.export.peft_adapter", "LoTA.export.dense",
                      "LoTA.export.gguf", "LoTA.export.run", "LoTA.export.__main__", "LoTA.check"],
    "scripts": ["t_signSGD", "data_print_save", "evalGSV", "gptq_quantize", "LoTA_QAF_main"],
    "the way in from Python": ["lota_qaf"]}
ORDER = [module for room in ROOMS.values() for module in room]


def files_of_modules():
    """{module: its file} of the package and the top-level scripts."""
    files = {file.stem: file for file in ROOT.glob("*.py")}
    for file in (ROOT / "LoTA").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = file
    return files


def imported_by(file, modules):
    """The modules that a file imports anywhere: at its top, in functions, under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & set(modules)) or {node.module}
    return found & set(modules)


def test_imports_run_down_only():
    """So there is no circle, and nothing in LoTA/ imports a top-level script."""
    files = files_of_modules()
    assert set(files) == set(ORDER), "a module has no place in ROOMS"
    up = [(module, other) for module, file in files.items() for other in imported_by(file, files)
          if ORDER.index(other) >= ORDER.index(module)]
    assert not up
    # The rule finds what it looks for.
    assert imported_by(files["LoTA_QAF_main"], files) >= {"LoTA.folders", "LoTA.trainer", "t_signSGD", "LoTA.settings"}
    assert imported_by(files["LoTA.settings"], files) == {"LoTA", "LoTA.adapter_folder", "LoTA.export", "LoTA.folders",
                                                          "LoTA.own_rows", "LoTA.steps"}


def test_the_main_script_is_short():
    assert len((ROOT / "LoTA_QAF_main.py").read_text().splitlines()) <= 300
