"""Writes the list of runs of an experiment for runs/experiment.py.

    python runs/experiment_runs.py --work WORK --stage choose --output RUNS.json

WORK holds what runs/experiment.sh makes: base_SETTING, gptq/ and data/. Stage choose: candidates side by side, one
seed, scored on rows of the train split that nothing is trained on. Stage ablation: one setting at a time away from the
published recipe and from the best ones, the same rows. Stage test: what was chosen, three seeds, on the test split.
Stage confirm: the same on the turned cut of runs/experiment_data.py, in a WORK of its own, with stronger baselines.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from LoTA_QAF_main import RECIPES, STEPS

SEEDS = (1, 2, 3)
RANK = 16
TRAIN = {"training_data_name": "viggo", "lora_r": RANK, "max_steps": 160, "train_batch_size": 32,
         "gradient_checkpointing": False, "dtype": "float32", "logging_steps": 10, "save_strategy": "no"}
EVALUATE = {"ft_dataset_name": "viggo", "max_new_tokens": 160, "eval_batch_size": 128, "dtype": "float32",
            "answer_loss": True}


def recipe(name, bits):
    """The flags of --recipe, written out, so that one can be changed at a time."""
    omega, sigma = STEPS[name][bits]
    return {"method": "lota", **RECIPES[name], "interval_point": RANK * omega, "filter_ratio": sigma}


LORA, QALORA = {"method": "lora"}, {"method": "qalora"}


# (omega / r, sigma at first) that the recipes' own were chosen from.
PAIRS = (0.3, 0.995), (0.3, 0.99), (0.2, 0.98), (0.15, 0.98), (0.1, 0.98), (0.1, 0.95), (0.1, 0.9)


def candidates(bits):
    """{name: flags} of stage choose."""
    grid, learned = recipe("grid", bits), recipe("learned", bits)
    return {
        **{f"{name}, {rate}{fall}": {**own, "learning_rate": rate, **schedule}
           for fall, schedule in (("", {}), (", linear", {"lr_scheduler_type": "linear"}))
           for name, own, rates in (("LoRA", LORA, (5e-4, 1e-3, 3e-3)), ("QA-LoRA", QALORA, (1e-3, 3e-3, 1e-2)))
           for rate in rates},
        "LoTA, published": recipe("published", bits), "LoTA, steps": recipe("steps", bits),
        **{f"LoTA, grid, {rate}": {**grid, "scale_lr": rate} for rate in (0.015, 0.03, 0.06)},
        **{f"LoTA, learned, {rate}": {**learned, "offset_lr": rate} for rate in (0.003, 0.007, 0.015)},
        **{f"LoTA, {name}, {omega} r, {sigma}": {**own, "interval_point": omega * RANK, "filter_ratio": sigma}
           for name, own in (("steps", recipe("steps", bits)), ("grid", grid), ("learned", learned))
           for omega, sigma in PAIRS}}


# What was chosen by losses on the rows for choosing: experiments/LOG.md. Stage test has the baselines at a constant
# rate, as the paper; stage confirm at one that falls to 0, as the recipes' rates do, and that is better.
RECIPES_CHOSEN = "LoTA, published", "LoTA, steps", "LoTA, grid, 0.03", "LoTA, learned, 0.007"
CHOSEN = {"test": ("LoRA, 0.001", "QA-LoRA, 0.003", *RECIPES_CHOSEN),
          "confirm": ("LoRA, 0.003, linear", "QA-LoRA, 0.003, linear", *RECIPES_CHOSEN)}

# Stage ablation. What is varied away from: {name: (recipe, bits, setting)}.
CENTRES = {"published": ("published", 2, "recovery"), "learned": ("learned", 2, "recovery"),
           "steps, 4 bits, task": ("steps", 4, "task"), "learned, 4 bits, task": ("learned", 4, "task")}
ALONE = 0.97                                        # beyond every |dW|: no integer moves
# {what is varied: (flags of a value, {name of a centre: the values})}; and each centre's own value.
VARIED = {
    "omega / r": (lambda share: {"interval_point": share * RANK},
                  {"published": (0.3, 0.5, 0.75), "learned": (0.3, ALONE),
                   "steps, 4 bits, task": (0.1, 0.15, 0.2, 0.3), "learned, 4 bits, task": (0.1, 0.15, 0.3, ALONE)}),
    "sigma at first": (lambda sigma: {"filter_ratio": sigma},
                       {"published": (0.9, 0.95, 0.99), "steps, 4 bits, task": (0.95, 0.98, 0.995),
                        "learned, 4 bits, task": (0.95, 0.98)}),
    "kappa": (lambda kappa: {"offset_scale": kappa}, {"published": ("omega", "paper")}),
    "trained beside A, B": (lambda what: {"nothing": {"residual": False}, "mu": {"learned_scales": False}}[what],
                            {"published": ("Eq. 4", "nothing"), "learned": ("mu", "mu, s")}),
    "momentum": (lambda momentum: {"momentum": momentum}, {"published": (0.0, 0.9), "steps, 4 bits, task": (0.0, 0.9)}),
    "rank": (lambda rank: {"lora_r": rank}, {"learned": (8, 16, 32), "steps, 4 bits, task": (8, 16, 32)}),
    "group size": (lambda size: {"group": size}, {"published": (16, 32, 64), "learned": (16, 32, 64)}),
    "steps": (lambda steps: {"max_steps": steps}, {"published": (80, 160, 320), "learned": (80, 160, 320)}),
    "batches a step, equal data": (lambda count: {"gradient_accumulation_steps": count,
                                                  "max_steps": TRAIN["max_steps"] // count},
                                   {"published": (1, 4), "steps, 4 bits, task": (1, 2, 4)})}
CENTRE = {"omega / r": {"published": 0.75, "learned": 0.3, "steps, 4 bits, task": 0.1, "learned, 4 bits, task": 0.15},
          "sigma at first": {"published": 0.95, "steps, 4 bits, task": 0.98, "learned, 4 bits, task": 0.98},
          "kappa": {"published": "omega"}, "trained beside A, B": {"published": "Eq. 4", "learned": "mu, s"},
          "momentum": {"published": 0.0, "steps, 4 bits, task": 0.9},
          "rank": {"learned": RANK, "steps, 4 bits, task": RANK}, "group size": {"published": 32, "learned": 32},
          "steps": {"published": 160, "learned": 160},
          "batches a step, equal data": {"published": 1, "steps, 4 bits, task": 1}}

# The paper's settings for 8B: section 4 and appendix; QA-LoRA and LoRA alike. 64 rows a step, in pieces of 16. The
# baselines' AdamW is torch's here; the paper's, paged, needs bitsandbytes: --optimizer_type paged_adamw_32bit.
TABLE1 = {
    "alpaca": {"train": {"training_data_name": "alpaca", "max_steps": 300, "learning_rate": 1e-5},
               "evaluate": {"tasks": "mmlu", "num_fewshot": 5}},
    **{name: {"train": {"training_data_name": name, "num_train_epochs": 1, "learning_rate": 5e-4},
              "evaluate": {"ft_dataset_name": name, "answer_loss": True}} for name in ("gsm8k", "sql", "viggo")}}
TABLE1_TRAIN = {"lora_r": 64, "train_batch_size": 16, "gradient_accumulation_steps": 4, "save_strategy": "no"}
TABLE1_METHODS = {"LoRA": LORA, "QA-LoRA": QALORA, "LoTA, published": {"method": "lota"},
                  **{f"LoTA, {name}": {"method": "lota", "recipe": name} for name in ("steps", "learned")}}
VIGGO_OMEGA = 0.875 * TABLE1_TRAIN["lora_r"]        # the others: 0.75 r, the default


def flags(settings):
    """{"name": value} as flags of the command line."""
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def table1(args):
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


def named(method, only):
    """Whether one of the words in `only` is a part of the method's name: "LoRA" is no part of "QA-LoRA"."""
    return not only or any(word in method.split(", ") for word in only)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--stage", choices=["choose", "ablation", "test", "confirm", "table1"], required=True)
    parser.add_argument("--settings", nargs="+", choices=["recovery", "task"], default=["recovery"])
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--seeds", type=int, nargs="+", help="[1; of stages test and confirm 1 2 3]")
    parser.add_argument("--only", nargs="+", help="only methods with one of these words: LoRA, LoTA, published ...")
    parser.add_argument("--output", required=True)
    only = parser.add_argument_group("stage table1")
    only.add_argument("--model", help="the 16-bit model, folder or hub name")
    only.add_argument("--sets", nargs="+", choices=list(TABLE1), default=list(TABLE1))
    only.add_argument("--data", help="a folder with the data sets in folders of their own [the hub]")
    only.add_argument("--train", default="", help="more flags of mode 1, in one text")
    only.add_argument("--evaluate", default="", help="more flags of mode 2, in one text")
    args = parser.parse_args()
    runs = {"table1": table1, "ablation": ablation}.get(args.stage, small)(args)
    Path(args.output).write_text(json.dumps(runs, indent=1))
    print(f"{len(runs)} runs in {args.output}")


def ablation(args):
    """One setting at a time away from each centre, one seed, on the rows for choosing."""
    return [*(away_from(centre, args.work) for centre in CENTRES),
            *(away_from(centre, args.work, f", {varied} {value}", change(value), varied=varied, value=value)
              for varied, (change, values) in VARIED.items() for centre, some in values.items() for value in some
              if value != CENTRE[varied][centre])]


def away_from(centre, work, name="", changed=(), bits=None, **note):
    """A run of one of CENTRES with some flags `changed`, or with its recipe at other `bits`; `note` goes into its
    line."""
    (of, own_bits, setting), work, changed = CENTRES[centre], Path(work).resolve(), dict(changed)
    bits = bits or own_bits
    settings = {**TRAIN, **recipe(of, bits), **changed}
    group = settings.pop("group", 32)
    if "lora_r" in changed:                         # omega stays the same share of the rank
        settings["interval_point"] *= settings["lora_r"] / RANK
    return {"name": f"ablation, {centre}{name}", "centre": centre, **note, "method": f"LoTA, {of}", "bits": bits,
            "setting": setting, "seed": 1, "gptq": str(work / f"gptq/int{bits}_{group}_base_{setting}"),
            "train": flags({**settings, "data_dir": str(work / "data/tune")}),
            "evaluate": flags({**EVALUATE, "data_dir": str(work / "data/choose")})}


def small(args):
    """The runs of runs/experiment.sh."""
    work = Path(args.work).resolve()
    final = args.stage in CHOSEN
    seeds = args.seeds or (SEEDS if final else SEEDS[:1])
    rows = str(work / "data" / ("tune" if final else "choose"))
    evaluate = flags({**EVALUATE, "data_dir": rows})
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
    return sorted(runs, key=lambda run: run["seed"])        # an experiment cut short has all cells of the first seeds


if __name__ == "__main__":
    main()
