"""Writes the list of runs of one stage of an experiment, for experiments/run.py.

    python experiments/plan.py --work WORK --stage choose --output RUNS.json

WORK is the folder that runs/experiment.sh fills: base_SETTING/, gptq/ and data/. The stages:

    choose     many candidates, one seed, scored on rows of the train split that nothing is trained on
    ablation   one setting is changed at a time, from four starting points; one seed, the same rows
    test       the candidates that were chosen, three seeds, scored on the test split
    confirm    the same with stronger baselines, on the rows of experiments/data.py --turned; needs a WORK of its own
    table1     the paper's Table 1, for runs/table1_8b.sh
"""
import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from LoTA.settings import LRQAT_DEFAULTS, LRQAT_RECIPES, OLD_RECIPE_NAMES, RECIPES, omega_and_sigma

SEEDS = (1, 2, 3)
RANK = 16
TRAIN = {"training_data_name": "viggo", "lora_r": RANK, "max_steps": 160, "train_batch_size": 32,
         "gradient_checkpointing": False, "dtype": "float32", "logging_steps": 10, "save_strategy": "no"}
EVALUATE = {"ft_dataset_name": "viggo", "max_new_tokens": 160, "eval_batch_size": 128, "dtype": "float32",
            "answer_loss": True}
LORA, QALORA = {"method": "lora"}, {"method": "qalora"}


def recipe(name: str, bits: int) -> dict:
    """The settings that --recipe stands for at so many bits. They are written out, so that a run can change one."""
    omega, sigma = omega_and_sigma(name, bits)
    return {"method": "lota", **RECIPES[name], "interval_point": RANK * omega, "filter_ratio": sigma}


# --- stages choose, test and confirm --------------------------------------------------------------------------------

# (omega / r, sigma at the first step): the recipes' own values were chosen among these.
PAIRS = (0.3, 0.995), (0.3, 0.99), (0.2, 0.98), (0.15, 0.98), (0.1, 0.98), (0.1, 0.95), (0.1, 0.9)


def candidates(bits: int) -> dict[str, dict]:
    """Stage choose: {name of a method: its settings}."""
    scales, full = recipe("scales", bits), recipe("full", bits)
    return {
        **{f"{name}, {rate}{fall}": {**own, "learning_rate": rate, **schedule}
           for fall, schedule in (("", {}), (", linear", {"lr_scheduler_type": "linear"}))
           for name, own, rates in (("LoRA", LORA, (5e-4, 1e-3, 3e-3)), ("QA-LoRA", QALORA, (1e-3, 3e-3, 1e-2)))
           for rate in rates},
        "LoTA, published": recipe("published", bits), "LoTA, ternary": recipe("ternary", bits),
        **{f"LR-QAT, {name}, {rate}": {"method": "lrqat", "recipe": name, **LRQAT_RECIPES[name], **LRQAT_DEFAULTS,
                                       "learning_rate": rate, "offset_lr": 0.007, "scale_lr": 0.03}
           for name in ("integers", "full") for rate in (1e-3, 3e-3, 1e-2)},
        **{f"LoTA, scales, {rate}": {**scales, "scale_lr": rate} for rate in (0.015, 0.03, 0.06)},
        **{f"LoTA, full, {rate}": {**full, "offset_lr": rate} for rate in (0.003, 0.007, 0.015)},
        **{f"LoTA, {name}, {omega} r, {sigma}": {**own, "interval_point": omega * RANK, "filter_ratio": sigma}
           for name, own in (("ternary", recipe("ternary", bits)), ("scales", scales), ("full", full))
           for omega, sigma in PAIRS}}


# The candidates with the lowest losses on the rows for choosing: see experiments/LOG.md. In stage test the baselines
# have a constant rate, because the paper's have. In stage confirm their rate falls to 0, because that is better and the
# recipes' rates fall too.
# LR-QAT's rate is the one of a throwaway script that ran on the rows for choosing.
CHOSEN_RECIPES = "LoTA, published", "LoTA, ternary", "LoTA, scales, 0.03", "LoTA, full, 0.007"
CHOSEN = {"test": ("LoRA, 0.001", "QA-LoRA, 0.003", *CHOSEN_RECIPES),
          "confirm": ("LoRA, 0.003, linear", "QA-LoRA, 0.003, linear", *CHOSEN_RECIPES, "LR-QAT, integers, 0.003",
                      "LR-QAT, full, 0.003")}


def small(args: argparse.Namespace) -> list[dict]:
    """The runs of the stages choose, test and confirm."""
    work = Path(args.work).resolve()
    final = args.stage in CHOSEN
    seeds = args.seeds or (SEEDS if final else SEEDS[:1])
    scored = str(work / "data" / ("tune" if final else "choose"))
    evaluate = flags({**EVALUATE, "data_dir": scored})
    runs = []
    for setting in args.settings:
        base = str(work / f"base_{setting}")
        runs.append({"name": f"{setting}, 16-bit base", "setting": setting, "method": "16-bit base", "bits": 16,
                     "seed": 0, "evaluate": [*evaluate, "--auto_gptq", "none", "--pretrained", base]})
        for bits in args.bits:
            gptq = str(work / f"gptq/int{bits}_32_base_{setting}")
            common = {"setting": setting, "bits": bits, "gptq": gptq}
            methods = {name: own for name, own in candidates(bits).items() if not final or name in CHOSEN[args.stage]}
            runs.append({"name": f"{setting}, {bits} bits, GPTQ", **common, "method": "GPTQ", "seed": 0,
                         "evaluate": [*evaluate, "--quantized_model_dir", gptq]})
            runs += [{"name": f"{setting}, {bits} bits, {method}", **common, "method": method, "seed": seed,
                      "train": flags({**TRAIN, **own, "data_dir": str(work / "data/tune")}), "evaluate": evaluate}
                     for seed in seeds for method, own in methods.items() if named(method, args.only)]
    # Seed by seed, so that an experiment that is cut short has every cell of the table for its first seeds.
    return sorted(runs, key=lambda run: run["seed"])


def named(method: str, only: Iterable[str] | None) -> bool:
    """Whether one of the words `only` is a part of the method's name. Parts stand between commas.

    So "LoRA" names "LoRA, 0.001" and not "QA-LoRA". Without words every method is named. Old names of recipes count.
    """
    words = [OLD_RECIPE_NAMES.get(word, word) for word in only or ()]
    return not words or any(word in method.split(", ") for word in words)


# --- stage ablation -------------------------------------------------------------------------------------------------

# The starting points. Every run of the stage changes one setting of one of them.
CENTRES = {                 # {name: (recipe, bits, setting)}
    "published": ("published", 2, "recovery"), "full": ("full", 2, "recovery"),
    "ternary, 4 bits, task": ("ternary", 4, "task"), "full, 4 bits, task": ("full", 4, "task")}
NOTHING_MOVES = 0.97        # as omega / r: no |dW| is larger, so no integer moves


# {what is changed: (a value -> the settings that it stands for, {centre: (the centre's own value, other values)})}
VARIED: dict[str, tuple[Callable[..., dict], dict[str, tuple]]] = {
    "omega / r": (lambda share: {"interval_point": share * RANK}, {
        "published": (0.75, 0.3, 0.5), "full": (0.3, NOTHING_MOVES), "ternary, 4 bits, task": (0.1, 0.15, 0.2, 0.3),
        "full, 4 bits, task": (0.15, 0.1, 0.3, NOTHING_MOVES)}),
    "sigma at first": (lambda sigma: {"filter_ratio": sigma}, {
        "published": (0.95, 0.9, 0.99), "ternary, 4 bits, task": (0.98, 0.95, 0.995),
        "full, 4 bits, task": (0.98, 0.95)}),
    "kappa": (lambda kappa: {"offset_scale": kappa}, {"published": ("omega", "paper")}),
    "trained beside A, B": (lambda what: {"nothing": {"residual": False}, "mu": {"learned_scales": False}}[what], {
        "published": ("Eq. 4", "nothing"), "full": ("mu, s", "mu")}),
    "momentum": (lambda momentum: {"momentum": momentum}, {
        "published": (0.0, 0.9), "ternary, 4 bits, task": (0.9, 0.0)}),
    "rank": (lambda rank: {"lora_r": rank}, {"full": (RANK, 8, 32), "ternary, 4 bits, task": (RANK, 8, 32)}),
    "group size": (lambda size: {"group": size}, {"published": (32, 16, 64), "full": (32, 16, 64)}),
    "steps": (lambda steps: {"max_steps": steps}, {"published": (160, 80, 320), "full": (160, 80, 320)}),
    # With more batches a step a run has fewer steps, so that it sees the same rows.
    "batches a step, equal data": (
        lambda count: {"gradient_accumulation_steps": count, "max_steps": TRAIN["max_steps"] // count}, {
            "published": (1, 4), "ternary, 4 bits, task": (1, 2, 4)})}


def ablation(args: argparse.Namespace) -> list[dict]:
    """The runs of stage ablation: the centres, then each centre with one setting changed."""
    return [*(changed_centre(centre, args.work) for centre in CENTRES),
            *(changed_centre(centre, args.work, f", {varied} {value}", settings_of(value), varied=varied, value=value)
              for varied, (settings_of, centres) in VARIED.items() for centre, (_, *values) in centres.items()
              for value in values)]


def changed_centre(centre: str, work: str | Path, suffix: str = "", changes: dict | None = None,
                   bits: int | None = None, **note) -> dict:
    """A run of a centre with some settings changed.

    suffix: what the run's name says after the centre. changes: {setting: value}; "group" is the GPTQ folder's group
    size. bits: other bits than the centre's; the recipe's omega and sigma then go by them. note: more entries for the
    run's line of results.
    """
    (recipe_name, own_bits, setting), work, changes = CENTRES[centre], Path(work).resolve(), dict(changes or {})
    bits = bits or own_bits
    settings = {**TRAIN, **recipe(recipe_name, bits), **changes}
    group = settings.pop("group", 32)
    if "lora_r" in changes:                         # omega stays the same share of the rank
        settings["interval_point"] *= settings["lora_r"] / RANK
    return {"name": f"ablation, {centre}{suffix}", "centre": centre, **note, "method": f"LoTA, {recipe_name}",
            "bits": bits, "setting": setting, "seed": 1, "gptq": str(work / f"gptq/int{bits}_{group}_base_{setting}"),
            "train": flags({**settings, "data_dir": str(work / "data/tune")}),
            "evaluate": flags({**EVALUATE, "data_dir": str(work / "data/choose")})}


# --- stage table1 ---------------------------------------------------------------------------------------------------

# The paper's settings for 8B, from its section 4 and its appendix. They are the same for LoRA and QA-LoRA. A step takes
# 64 rows, in 4 batches of 16. The baselines' AdamW is torch's, because the paper's paged one needs bitsandbytes:
# --train "--optimizer_type paged_adamw_32bit" takes that one.
TABLE1 = {
    "alpaca": {"train": {"training_data_name": "alpaca", "max_steps": 300, "learning_rate": 1e-5},
               "evaluate": {"tasks": "mmlu", "num_fewshot": 5}},
    **{name: {"train": {"training_data_name": name, "num_train_epochs": 1, "learning_rate": 5e-4},
              "evaluate": {"ft_dataset_name": name, "answer_loss": True}} for name in ("gsm8k", "sql", "viggo")}}
TABLE1_TRAIN = {"lora_r": 64, "train_batch_size": 16, "gradient_accumulation_steps": 4, "save_strategy": "no"}
TABLE1_METHODS = {"LoRA": LORA, "QA-LoRA": QALORA, "LoTA, published": {"method": "lota"},
                  **{f"LoTA, {name}": {"method": "lota", "recipe": name} for name in ("ternary", "full")}}
VIGGO_OMEGA = 0.875 * TABLE1_TRAIN["lora_r"]        # the paper's for ViGGO; the other sets take the default, 0.75 r


def table1(args: argparse.Namespace) -> list[dict]:
    """The runs of runs/table1_8b.sh."""
    runs, work, name = [], Path(args.work).resolve(), Path(args.model).name
    for data in args.sets:
        place = {"data_dir": str(Path(args.data).resolve() / data)} if args.data else {}
        evaluate = [*flags({**TABLE1[data]["evaluate"], **place}), *args.evaluate.split()]
        common = {"setting": data, "seed": 0, "evaluate": evaluate}
        runs.append({"name": f"{data}, 16-bit base", **common, "method": "16-bit base", "bits": 16,
                     "evaluate": [*evaluate, "--auto_gptq", "none", "--pretrained", args.model]})
        for bits in args.bits:
            gptq = str(work / f"gptq/int{bits}_64_{name}")
            common |= {"bits": bits, "gptq": gptq}
            runs.append({"name": f"{data}, {bits} bits, GPTQ", **common, "method": "GPTQ",
                         "evaluate": [*evaluate, "--quantized_model_dir", gptq]})
            for seed in args.seeds or [1]:
                for method, own in TABLE1_METHODS.items():
                    omega = {"interval_point": VIGGO_OMEGA} if data == "viggo" and method == "LoTA, published" else {}
                    settings = {**TABLE1_TRAIN, **TABLE1[data]["train"], **own, **omega, **place,
                                "pretrained": args.model}
                    if named(method, args.only):
                        runs.append({"name": f"{data}, {bits} bits, {method}", **common, "method": method, "seed": seed,
                                     "train": [*flags(settings), *args.train.split()]})
    return runs


# --- all stages -----------------------------------------------------------------------------------------------------

STAGES = {"choose": small, "ablation": ablation, "test": small, "confirm": small, "table1": table1}


def flags(settings: dict) -> list:
    """{"name": value} as flags of the command line: ["--name", value, ...]."""
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with the models and the data")
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--settings", nargs="+", choices=["recovery", "task"], default=["recovery"])
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, nargs="+", help="[1; of stages test and confirm 1 2 3]")
    parser.add_argument("--only", nargs="+", metavar="WORD",
                        help="only methods that have one of these parts in their name, such as LoRA, LoTA, full [all]")
    parser.add_argument("--output", required=True, help="the file that gets the list")
    more = parser.add_argument_group("stage table1")
    more.add_argument("--model", help="the 16-bit model, a folder or a hub name")
    more.add_argument("--sets", nargs="+", choices=list(TABLE1), default=list(TABLE1))
    more.add_argument("--data", help="a folder with the data sets in folders of their own [the hub]")
    more.add_argument("--train", default="", help="more flags of mode 1, in one text")
    more.add_argument("--evaluate", default="", help="more flags of mode 2, in one text")
    args = parser.parse_args()
    runs = STAGES[args.stage](args)
    Path(args.output).write_text(json.dumps(runs, indent=1))
    print(f"{len(runs)} runs in {args.output}")


if __name__ == "__main__":
    main()
