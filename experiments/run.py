"""Trains and scores the runs of an experiment and writes a line of JSON for each. It goes on where it was interrupted.

    python experiments/run.py --runs RUNS.json --work WORK --results RESULTS.jsonl --jobs 2

RUNS.json comes from experiments/plan.py. It is a list of runs:

    name, seed   which run it is
    gptq         the GPTQ folder that is trained on
    base         in its place the 16-bit model that LoRA is trained on, and merged into
    train        flags of mode 1; absent where nothing is trained
    evaluate     flags of mode 2
    requantize   true: LoRA's adapter is merged into 16-bit weights, and these are quantized anew and scored
    adapter_of   the name of another run with the same training, whose adapter is taken
    live_rows    how many rows a merging method answers live too; absent: all, 0: none
    also         {name: flags of mode 2} that measure the same model on something else; see "other" in the line
    ...          whatever else the line of results shall say

A LoRA adapter is scored live. All other adapters are scored merged and live, and the answers that differ are
counted. A run without "train" is scored by its "evaluate" flags alone. A run is left out where RESULTS has a line with
the same name, seed and flags. Adapters stay in WORK/adapters, and the output of every run in WORK/logs.
"""
import argparse
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import tune_16bit

import LoTA_QAF_main

ROOT = Path(__file__).resolve().parent.parent


def parse(mode: int, flags: list) -> tuple:
    """The settings that LoTA_QAF_main.py's command line has with these flags: (base, training, evaluation)."""
    return LoTA_QAF_main.parse_args(["--mode", str(mode), *map(str, flags)])


def file_name(run: dict) -> str:
    """A file name that tells a run from all others.

    It has a hash of the training flags, so that a run with changed flags does not take the adapter of the run before.
    """
    name = f"{run['name']}_seed{run['seed']}".replace(" ", "_").replace(",", "").replace("/", "")
    flags = json.dumps([run.get("gptq") or run.get("base"), run.get("train")])
    return f"{name}_{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def train(run: dict, work: Path) -> Path:
    """Runs mode 1. Returns the adapter's folder, which is left as it is where an earlier start finished it."""
    output = work / "adapters" / file_name({**run, "name": run.get("adapter_of", run["name"])})
    for folder in output.glob("*MB_*"):         # only a finished adapter has its peak memory in its name
        return folder
    base, training, _ = parse(1, ["--quantized_model_dir", run["gptq"], "--seed", run["seed"], "--adapter_path", output,
                                  *run["train"]])
    return LoTA_QAF_main.train(base, training)


def score(flags: list, output: Path) -> tuple[dict, list[str]]:
    """Runs mode 2. Returns (the figures, the generated answers).

    The figures have an "accuracy" where answers were generated. Of lm-eval's tasks it is the mean of their accuracies,
    and there are no answers.
    """
    base, _, evaluation = parse(2, [*flags, "--output_path", output])
    results = LoTA_QAF_main.evaluate(base, evaluation)
    gc.collect()
    if evaluation.ft_dataset_name != "none":
        found = results[evaluation.ft_dataset_name]
        return ({key: found[key] for key in ("accuracy", "correct", "rows", "loss") if key in found},
                [item["prediction"] for item in found.get("predictions", [])])
    found = results["lm_eval"]["results"]
    accuracies = [found[task]["acc,none"] for task in evaluation.tasks.split(",") if "acc,none" in found[task]]
    return {**({"accuracy": sum(accuracies) / len(accuracies)} if accuracies else {}), "lm_eval": found}, []


def megabytes(folder: str | Path) -> float:
    """The size of all safetensors files in a folder and its subfolders, in MB."""
    return round(sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 1e6, 3)


def perform(run: dict, work: Path) -> dict:
    """Trains and scores one run. Returns its figures."""
    import torch

    from LoTA.adapter_folder import AdapterFolder, LotaConfig
    from LoTA.folders import MergedFolder
    output = work / "predictions"
    if "base" in run:
        return tuned_16bit(run, work, output)
    if "train" not in run:
        return {**score(run["evaluate"], output)[0], **score_also(run, run["evaluate"], output)}
    adapter = train(run, work)
    gc.collect()
    config = LotaConfig.load(adapter)
    figures = {"training_loss": config.training["loss"], "train_s": config.training["runtime_s"],
               "moved": (config.training.get("moved") or {}).get("all"),
               "adapter_mb": megabytes(adapter), "gptq_mb": megabytes(run["gptq"]),
               "fingerprint": config.fingerprint}           # of the GPTQ weights, so that a line says its base
    if torch.cuda.is_available():       # on a CPU the peak is the process's, so it counts the runs before this one too
        figures["train_mb"] = config.training["peak_mb"]
    flags = ["--load_adapter", adapter, "--quantized_model_dir", run["gptq"], *run["evaluate"]]
    if run.get("requantize"):
        from requantize import requantize
        folder = requantize(AdapterFolder(adapter), Path(run["gptq"]), work / "requantized" / file_name(run), [])
        flags = [*run["evaluate"], "--quantized_model_dir", folder]
        figures |= {"merged_mb": megabytes(folder), "offsets": False}
    if config.method == "LoRA":
        return {**figures, **score(flags, output)[0], **score_also(run, flags, output)}
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        merged, answers = score([*flags, "--merged_path", f"{temporary}/merged"], output)
        figures["merged_mb"] = megabytes(f"{temporary}/merged")
        figures["offsets"] = bool(MergedFolder(f"{temporary}/merged").offset_modules())
        figures |= score_also(run, [*run["evaluate"], "--load_adapter", f"{temporary}/merged"], output)
    if run.get("live_rows") != 0:
        some = ["--limit", run["live_rows"]] if "live_rows" in run else []
        live, live_answers = score([*flags, *some, "--merge", False], output)
        if some:        # once more merged, because in 16 bits an answer depends on the batch that its row is in
            _, answers = score([*flags, *some], output)
        if answers:                     # lm-eval returns none
            figures["differ_from_live"] = sum(a != b for a, b in zip(answers, live_answers, strict=True))
        if "accuracy" in live:
            figures["live_accuracy"] = live["accuracy"]
    return {**figures, **merged}


def tuned_16bit(run: dict, work: Path, output: Path) -> dict:
    """The figures of a run that tunes a 16-bit model."""
    base, training, _ = parse(1, [*run["train"], "--seed", run["seed"], "--pretrained", run["base"]])
    folder = tune_16bit.tune(base, training, work / "adapters" / file_name(run))
    gc.collect()
    flags = [*run["evaluate"], "--auto_gptq", "none", "--pretrained", folder]
    return {**json.loads((folder / tune_16bit.PROVENANCE).read_text()), **score(flags, output)[0],
            **score_also(run, flags, output)}


def score_also(run: dict, flags: list, output: Path) -> dict:
    """{"other": {name: figures}} of what "also" measures of the model that `flags` name; {} where a run has none."""
    found = {name: score([*flags, *its_flags], output)[0] for name, its_flags in run.get("also", {}).items()}
    return {"other": found} if found else {}


def name_only(value):
    """The last part of an absolute path, because the rest belongs to one machine; other values as they are.

    Of a list it is the list of its values' names, and of a dictionary the same.
    """
    if isinstance(value, dict):
        return {key: name_only(one) for key, one in value.items()}
    if isinstance(value, list):
        return [name_only(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def without_paths(run: dict) -> dict:
    """A run with name_only() of every value, as its line of results says it."""
    return {key: name_only(value) for key, value in run.items()}


def missing(runs: list[dict], results: Path) -> list[dict]:
    """The runs that have no line in the file `results`. A run's line agrees with every entry of the run."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return [run for run in runs if not any(without_paths(run).items() <= line.items() for line in lines)]


def add_line(run: dict, work: Path, results: Path, commit: str) -> bool:
    """Performs one run and appends its line to the file `results`. Returns whether the run succeeded."""
    name = f"{run['name']}, seed {run['seed']}"
    with open(work / "logs" / f"{file_name(run)}.log", "w") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        try:
            figures = perform(run, work)
        except (Exception, SystemExit):         # argparse exits where a flag's value is wrong
            traceback.print_exc()
            figures = None
    if figures is None:
        print(f"failed: {name}; see {log.name}", flush=True)
        return False
    line = {**without_paths(run), "commit": commit, **figures}
    with open(results, "a") as f:
        f.write(json.dumps(line) + "\n")
    score_of = f"{figures['accuracy']:.1%}" if "accuracy" in figures else f"loss {figures['loss']:.4f}"
    print(f"{name}: {score_of}", flush=True)
    return True


def commit() -> str:
    """The commit of this checkout, with "-dirty" where files differ from it; "" outside of git."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                          text=True).stdout.strip()


def end_with_parent() -> None:
    """Ends this worker as soon as the process that started it has ended, for whatever reason."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, help="the list of runs, a JSON file")
    parser.add_argument("--work", required=True, help="the folder for adapters, predictions and logs")
    parser.add_argument("--results", required=True, help="the file that gets a line of JSON for each run")
    parser.add_argument("--jobs", type=int, default=1,
                        help="runs at the same time; if more than one, each has one thread [1]")
    args = parser.parse_args()
    work, results = Path(args.work).resolve(), Path(args.results).resolve()
    runs = json.loads(Path(args.runs).read_text())
    (work / "logs").mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    # A shell that starts this with & makes it ignore Ctrl-C. The runs stop at Ctrl-C anyway, because mode 1 asks for
    # the signal itself, so this process must stop too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"         # before the workers import torch
    # The workers serve many runs each, because importing everything takes ten seconds and a small run a minute or two.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        try:
            succeeded = list(pool.map(partial(add_line, work=work, results=results, commit=commit()),
                                      missing(runs, results)))
        except KeyboardInterrupt:       # exits without waiting for the workers, because they end with this process
            print("stopped; the same command goes on with what is missing", flush=True)
            os._exit(130)
    sys.exit(f"error: {succeeded.count(False)} runs failed" if False in succeeded else 0)


if __name__ == "__main__":
    main()
