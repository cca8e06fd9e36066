"""Writes the list of runs of one stage on SmolLM2-135M, for experiments/run.py. It says how many hours they take.

    python experiments/plan_smollm2.py --work WORK --stage choose --output RUNS.json [--dry_run]

WORK is the folder that runs/smollm2.sh fills: SmolLM2-135M/, stages/gptq/SET/ and stages/data/. The stages:

    choose    TRIES settings of every method, as many for one method as for another, one seed. The loss is measured on
              rows of the train split that nothing is tuned on, and nothing is generated.
    test      of each method the setting with the lowest loss in WORK/choose.jsonl, by bits; seeds 1, 2 and 3. Exact
              match and loss on the test rows. With the first seed also the perplexity of a text and the loss of GSM8K's
              answers, on neither of which anything is tuned.
"""
import argparse
import json
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from statistics import mean

from plan import LORA, QALORA, flags, named
from smollm2 import OTHER, TEXT_TASK

from LoTA import UserError, run_script

SEEDS, BITS = (1, 2, 3), (4, 3, 2)
SETS = {"sql": 8, "viggo": 8}       # {data set: rows of a step}
MODEL = "SmolLM2-135M"
RANK = 32
TRIES = 4
TRAIN = {"lora_r": RANK, "max_steps": 40, "dtype": "bfloat16", "logging_steps": 5,
         "save_strategy": "no", "gradient_checkpointing": False}
SCORE = {"eval_batch_size": 40, "dtype": "bfloat16", "answer_loss": True}
LOSS_ALONE = {"generate": False}
ANSWERS = {"max_new_tokens": 80}
LIVE_ROWS = 20          # of the test rows, so many are answered live too, because live answers take as long as merged
# Seconds on one core of an AMD EPYC with AVX-512, in bfloat16: of a step, and of scoring a model on the rows for
# choosing, on the test rows, and on what nothing is tuned on. A step of LoTA with 16 rows of sql took 12 s, as
# processor time while others used the machine: (84 s of 5 steps - 35 s of 1 step) / 4. The rest is scaled by tokens.
SECONDS = {"sql": {"step": 6, "choose": 25, "test": 270, "also": 130},
           "viggo": {"step": 12, "choose": 45, "test": 540, "also": 130}}
LOADING = 35            # seconds: a merge, a checksum, a model that is read


# --- methods --------------------------------------------------------------------------------------------------------

def rates(name: str, *values: float) -> list[dict]:
    return [{name: value} for value in values]


def recipe(name: str) -> dict:
    return {"method": "lota", "recipe": name}


def lrqat(name: str) -> dict:
    return {"method": "lrqat", "recipe": name}


BASELINE = {"lr_scheduler_type": "linear"}          # as the recipes' rates fall, too
RATES = rates("learning_rate", 3e-4, 1e-3, 2e-3, 4e-3)
# {method: (the settings that every try has, TRIES settings to choose from)}. The order is that of the table.
METHODS_TRIED: dict[str, tuple[dict, list[dict]]] = {
    "LoRA": ({**LORA, **BASELINE}, RATES),
    "QA-LoRA": ({**QALORA, **BASELINE}, RATES),
    "LoTA, published": (recipe("published"), rates("filter_ratio", 0.9, 0.95, 0.98, 0.99)),
    "LoTA, scales": (recipe("scales"), rates("scale_lr", 0.00025, 0.001, 0.004, 0.016)),
    "LoTA, full": (recipe("full"), [{"offset_lr": rate, "scale_lr": 4 * rate}
                                      for rate in (0.0001, 0.0003, 0.001, 0.003)]),
    "LR-QAT, integers": (lrqat("integers"), RATES),
    "LR-QAT, mean": (lrqat("mean"), RATES),
    "LR-QAT, full": (lrqat("full"), [{"learning_rate": rate, "scale_lr": scales} for rate, scales in (
        (3e-4, 0.001), (1e-3, 0.001), (2e-3, 0.001), (4e-3, 0.002))])}
REQUANTIZED = "LoRA, requantized"       # LoRA's chosen setting; nothing of it is chosen anew
TUNED_16 = "16-bit, tuned"              # LoRA on the 16-bit model
TUNED_16_TRIED = METHODS_TRIED["LoRA"]


def tries_of(method: str) -> dict[str, dict]:
    """{name of a try: all its settings}. A try is named by the settings that are its own."""
    own, tries = TUNED_16_TRIED if method == TUNED_16 else METHODS_TRIED[method]
    return {", ".join([method, *(f"{name} {value}" for name, value in one.items())]): {**own, **one} for one in tries}


def best_tries(lines: list[dict], sets: list[str]) -> dict[tuple[int, str], str]:
    """{(bits, method): the try with the lowest loss, as the mean over the sets}.

    Only a try that was run on every set counts, because the sets' losses differ. Where a method has none at some bits,
    it takes what was chosen at more bits. Where it has none there either, it is left out.
    """
    best = {}
    for method in (TUNED_16, *METHODS_TRIED):
        chosen = None
        for bits in (16, *BITS):
            losses = {}
            for name in tries_of(method):
                by_set = {line["setting"]: line["loss"] for line in lines
                          if (line["bits"], line["try"]) == (bits, name) and line["setting"] in sets}
                if len(by_set) == len(sets) and all(map(isfinite, by_set.values())):
                    losses[name] = mean(by_set.values())
            chosen = min(losses, key=losses.get) if losses else chosen
            if chosen:
                best[bits, method] = chosen
    return best


# --- runs -----------------------------------------------------------------------------------------------------------

def choose(args: argparse.Namespace, place: Path) -> Iterator[dict]:
    """The runs of stage choose, set by set."""
    for data_set in args.sets:
        evaluate = flags({"ft_dataset_name": data_set, **SCORE, **LOSS_ALONE,
                          "data_dir": str(place / "data" / data_set / "choose")})
        for bits in (16, *args.bits):
            for method in [TUNED_16] if bits == 16 else METHODS_TRIED:
                yield from (trained(args, place, data_set, bits, method, name, settings, 1,
                                    {"evaluate": evaluate, "live_rows": 0})
                            for name, settings in tries_of(method).items())


def test(args: argparse.Namespace, place: Path) -> Iterator[dict]:
    """The runs of stage test, seed by seed, so that one that is cut short has every cell for its first seeds."""
    file = Path(args.chosen or Path(args.work) / "choose.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    best = best_tries(lines, args.choose_sets or args.sets)
    untried = [f"{method} at {bits} bits" for bits in args.bits for method in METHODS_TRIED
               if (bits, method) not in best and named(method, args.only)]
    if untried:
        print(f"left out, because {file} has no loss of them on each of {', '.join(args.choose_sets or args.sets)}: "
              + "; ".join(untried))
    for seed in (0, *args.seeds):
        for data_set in args.sets:
            evaluate = flags({"ft_dataset_name": data_set, **SCORE, **ANSWERS,
                              "data_dir": str(place / "data" / data_set / "tune")})
            scored = {"evaluate": evaluate, "live_rows": LIVE_ROWS,
                      **({"also": also(place)} if seed in (0, args.seeds[0]) and not args.no_other else {})}
            if seed == 0:
                yield from untrained(args, place, data_set, scored)
                continue
            for bits in (16, *args.bits):
                for method in [TUNED_16] if bits == 16 else [*METHODS_TRIED, REQUANTIZED]:
                    name = best.get((bits, "LoRA" if method == REQUANTIZED else method))
                    if name:
                        settings = tries_of(TUNED_16 if bits == 16 else name.partition(", ")[0] if
                                            method == REQUANTIZED else method)[name]
                        tuned = trained(args, place, data_set, bits, method, name, settings, seed, scored)
                        yield tuned | ({"requantize": True, "adapter_of": f"{data_set}, {bits} bits, {name}"}
                                       if method == REQUANTIZED else {})


def untrained(args: argparse.Namespace, place: Path, data_set: str, scored: dict) -> Iterator[dict]:
    """The 16-bit model and the GPTQ models."""
    base = str(Path(args.work).resolve() / MODEL)
    common = {"setting": data_set, "seed": 0, **({"also": scored["also"]} if "also" in scored else {})}
    yield {"name": f"{data_set}, 16-bit base", **common, "method": "16-bit base", "bits": 16,
           "evaluate": [*scored["evaluate"], "--auto_gptq", "none", "--pretrained", base]}
    for bits in args.bits:
        gptq = gptq_folder(place, data_set, bits)
        yield {"name": f"{data_set}, {bits} bits, GPTQ", **common, "method": "GPTQ", "bits": bits, "gptq": gptq,
               "evaluate": [*scored["evaluate"], "--quantized_model_dir", gptq]}


def trained(args: argparse.Namespace, place: Path, data_set: str, bits: int, method: str, name: str, settings: dict,
            seed: int, scored: dict) -> dict:
    """A run that tunes. name: that of its try.

    Both stages train with the same flags, so stage test takes the adapter of stage choose where the seed is the same.
    A run that diverges goes on to its end, so that its loss has a line and it is not tried again.
    """
    settings = {"training_data_name": data_set, **TRAIN, "train_batch_size": SETS[data_set], "max_steps": args.steps,
                **settings, "loss_guard": False, "data_dir": str(place / "data" / data_set / "tune")}
    base = str(Path(args.work).resolve() / MODEL)
    model = {"base": base} if bits == 16 else {"gptq": gptq_folder(place, data_set, bits)}
    return {"name": f"{data_set}, {bits} bits, {name if method != REQUANTIZED else f'{REQUANTIZED}, {name}'}",
            "setting": data_set, "bits": bits, "method": method, "try": name, "seed": seed, **model,
            "train": flags({**settings, "pretrained": base}), **scored}


def gptq_folder(place: Path, data_set: str, bits: int) -> str:
    return str(place / f"gptq/{data_set}/int{bits}_64_{MODEL}")


def also(place: Path) -> dict[str, list]:
    """{what nothing is tuned on: the flags that measure it}. GSM8K is left out where DATA did not have it."""
    found = {TEXT_TASK: flags({"ft_dataset_name": "none", "tasks": TEXT_TASK, "num_fewshot": 0, "eval_batch_size": 4,
                               "include_path": str(place / "data/tasks")})}
    for name in OTHER:
        if (place / "data" / name / "test.jsonl").exists():
            found[name] = flags({"ft_dataset_name": name, **LOSS_ALONE, "eval_batch_size": 10,
                                 "data_dir": str(place / "data" / name)})
    return found


STAGES = {"choose": choose, "test": test}


def seconds(one: dict, stage: str, step: float | None = None) -> float:
    """About how long a run takes on one core. step: the seconds of a step, where they were measured elsewhere."""
    own = SECONDS[one["setting"]]
    steps = one["train"][one["train"].index("--max_steps") + 1] if "train" in one else 0
    live = own["test"] * one.get("live_rows", 0) / 200
    return LOADING + steps * (step or own["step"]) + own[stage] + live + (own["also"] if "also" in one else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="the folder with the model, the GPTQ models and the data")
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, help="[those that WORK has rows of]")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of stage test [1 2 3]")
    parser.add_argument("--steps", type=int, default=TRAIN["max_steps"], help="of every run [%(default)s]")
    parser.add_argument("--only", nargs="+", metavar="WORD",
                        help="only methods that have one of these parts in their name, such as LoRA, LoTA, full [all]")
    parser.add_argument("--chosen", help="stage test: the lines of stage choose [WORK/choose.jsonl]")
    parser.add_argument("--choose_sets", nargs="+", choices=SETS,
                        help="stage test: the sets whose losses choose, where stage choose had fewer [--sets]")
    parser.add_argument("--no_other", action="store_true", help="stage test: measure nothing but the set itself")
    parser.add_argument("--step_s", type=float, help="seconds of a step on your machine, for the estimate")
    parser.add_argument("--output", required=True, help="the file that gets the list")
    parser.add_argument("--dry_run", action="store_true", help="print every run, and write nothing")
    args = parser.parse_args()
    place = Path(args.work).resolve() / "stages"
    args.sets = args.sets or [name for name in SETS if (place / "data" / name).is_dir()] or list(SETS)
    runs = [one for one in STAGES[args.stage](args, place) if "train" not in one or named(one["method"], args.only)]
    if not runs:
        raise UserError("no run is left")
    if args.dry_run:
        print("".join(f"{seconds(one, args.stage, args.step_s) / 60:6.1f} min  {one['name']}, seed {one['seed']}\n"
                      for one in runs), end="")
    else:
        Path(args.output).write_text(json.dumps(runs, indent=1))
    hours = sum(seconds(one, args.stage, args.step_s) for one in runs) / 3600
    print(f"{len(runs)} runs{'' if args.dry_run else f' in {args.output}'}, about {hours:.1f} hours on one core")


if __name__ == "__main__":
    run_script(main)
