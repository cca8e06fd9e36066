"""Writes the list of runs of the recovery experiment for runs/experiment.py.

    python runs/recovery_runs.py --work WORK --stage choose --output RUNS.json

Stage choose: one seed, settings side by side, scored on rows of the train split that nothing is trained on. Stage test:
the settings that were chosen, three seeds, scored on the test split.
"""
import argparse
import json
from pathlib import Path

SEEDS = (1, 2, 3)
COMMON = ["--training_data_name", "viggo", "--lora_r", 16, "--max_steps", 160, "--train_batch_size", 64,
          "--gradient_checkpointing", False, "--dtype", "float32", "--logging_steps", 10, "--save_strategy", "no"]
# omega is a share of the rank 16: 12 is the published 0.75 r.
LORA = {f"LoRA, learning rate {lr}": ["--method", "lora", "--learning_rate", lr] for lr in (1e-3, 3e-3)}
QALORA = {f"QA-LoRA, learning rate {lr}": ["--method", "qalora", "--learning_rate", lr] for lr in (3e-3, 1e-2)}
LOTA = {
    "LoTA, published": ["--interval_point", 12],
    "LoTA, omega 0.5 r": ["--interval_point", 8],
    "LoTA, omega 0.3 r, momentum, no offset": ["--interval_point", 5, "--momentum", 0.9, "--residual", False],
    "LoTA, learned offset alone, 0.03": ["--interval_point", 15.5, "--offset_scale", "learned", "--offset_lr", 0.03],
    "LoTA, omega 0.3 r, momentum, learned offset 0.01": [
        "--interval_point", 5, "--momentum", 0.9, "--offset_scale", "learned", "--offset_lr", 0.01],
    "LoTA, omega 0.3 r, momentum, learned offset 0.03": [
        "--interval_point", 5, "--momentum", 0.9, "--offset_scale", "learned", "--offset_lr", 0.03],
    "LoTA, learned offset alone, 0.1": ["--interval_point", 15.5, "--offset_scale", "learned", "--offset_lr", 0.1],
    "LoTA, omega 0.3 r, momentum, learned offset 0.03, sigma from 0.995": [
        "--interval_point", 5, "--momentum", 0.9, "--offset_scale", "learned", "--offset_lr", 0.03,
        "--filter_ratio", 0.995],
}
# What stage choose gave, at 2 bits; see experiments/LOG.md.
CHOSEN = ("LoTA, omega 0.3 r, momentum, learned offset 0.03, sigma from 0.995", "QA-LoRA, learning rate 0.003",
          "LoRA, learning rate 0.001", "LoTA, published")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, help="holds base/, gptq/ and data/tune")
    parser.add_argument("--stage", choices=["choose", "test"], required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--only", nargs="+", help="only settings whose names hold one of these texts")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    work = Path(args.work).resolve()
    settings = {**LORA, **QALORA, **{n: ["--method", "lota", *f] for n, f in LOTA.items()}}
    if args.stage == "test":
        settings = {name: settings[name] for name in CHOSEN}
    if args.only:
        settings = {n: f for n, f in settings.items() if any(text in n for text in args.only)}
    runs = [{"name": "16-bit base", "bits": 16, "setting": "16-bit base", "seed": 0, "gptq": str(work / "base"),
             "base": True}]
    for bits in args.bits:
        gptq = str(work / f"gptq/int{bits}_32_base")
        runs.append({"name": f"{bits} bits, GPTQ", "bits": bits, "setting": "GPTQ", "seed": 0, "gptq": gptq})
        runs += [{"name": f"{bits} bits, {name}".replace(" ", "_").replace(",", ""), "bits": bits, "setting": name,
                  "seed": seed, "gptq": gptq, "flags": [*COMMON, "--data_dir", str(work / "data/tune"), *flags]}
                 for seed in (SEEDS if args.stage == "test" else SEEDS[:1]) for name, flags in settings.items()]
    Path(args.output).write_text(json.dumps(runs, indent=1))
    print(f"{len(runs)} runs in {args.output}")


if __name__ == "__main__":
    main()
