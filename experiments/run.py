"""Trains and scores the runs of an experiment, a line of JSON for each; goes on where it was interrupted.

    python runs/experiment.py --runs RUNS.json --work WORK --results RESULTS.jsonl --jobs 2

RUNS.json (see runs/experiment_runs.py) is a list of {"name", "seed", "gptq", "train", "evaluate"}, and whatever else
shall stand in the results. "train" holds flags of mode 1; what it trains on the GPTQ folder "gptq" is scored by mode 2
with the flags "evaluate": a LoRA adapter live, LoTA and QA-LoRA merged and live, and the answers that differ between
the two are counted. Without "train", "evaluate" says by itself what is scored. A run that is in RESULTS, with the same
flags, is left out. Adapters stay in WORK/adapters, what the runs print in WORK/logs.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def parse(mode, flags):
    """The settings of LoTA_QAF_main.py's command line with these flags."""
    from LoTA_QAF_main import parse_args
    sys.argv = ["LoTA_QAF_main.py", "--mode", str(mode), *(str(flag) for flag in flags)]
    return parse_args()


def file_name(run):
    """Says which run it is, down to its flags: a changed run takes no adapter of its old self."""
    name = f"{run['name']}_seed{run['seed']}".replace(" ", "_").replace(",", "").replace("/", "")
    flags = json.dumps([run.get("gptq"), run.get("train")])
    return f"{name}_{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def train(run, work):
    """Mode 1; returns the adapter's folder. One that an interrupted run finished is taken as it is."""
    from LoTA_QAF_main import train
    into = work / "adapters" / file_name(run)
    for folder in into.glob("*MB_*"):
        return folder
    base, training, _ = parse(1, ["--quantized_model_dir", run["gptq"], "--seed", run["seed"], "--adapter_path", into,
                                  *run["train"]])
    return train(base, training)


def score(flags, output):
    """Mode 2: ({"accuracy", ...}, the answers): of generation, or of lm-eval's tasks, whose accuracy is their mean."""
    from LoTA_QAF_main import evaluate
    base, _, evaluation = parse(2, [*flags, "--output_path", output])
    results = evaluate(base, evaluation)
    gc.collect()
    if evaluation.ft_dataset_name != "none":
        found = results[evaluation.ft_dataset_name]
        return ({key: found[key] for key in ("accuracy", "correct", "rows", "loss") if key in found},
                [item["prediction"] for item in found["predictions"]])
    found = results["lm_eval"]["results"]
    accuracies = [found[task]["acc,none"] for task in evaluation.tasks.split(",")]
    return {"accuracy": sum(accuracies) / len(accuracies), "lm_eval": found}, []


def megabytes(folder):
    return round(sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) / 1e6, 3)


def perform(run, work):
    """The figures of one run."""
    import torch

    from LoTA.folders import LotaConfig
    output = work / "predictions"
    if "train" not in run:
        return score(run["evaluate"], output)[0]
    adapter = train(run, work)
    gc.collect()
    config = LotaConfig.load(adapter)
    figures = {"training_loss": config.training["loss"], "train_s": config.training["runtime_s"],
               "moved": (config.training.get("moved") or {}).get("all"),
               "adapter_mb": megabytes(adapter), "gptq_mb": megabytes(run["gptq"]),
               "fingerprint": config.fingerprint}           # of the GPTQ weights: which base a line is of
    if torch.cuda.is_available():       # on a CPU it is that of the process, and so of all runs before
        figures["train_mb"] = config.training["peak_mb"]
    flags = ["--load_adapter", adapter, "--quantized_model_dir", run["gptq"], *run["evaluate"]]
    if config.method == "LoRA":
        return {**figures, **score(flags, output)[0]}
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        merged, answers = score([*flags, "--merged_path", f"{temporary}/merged"], output)
        figures["merged_mb"] = megabytes(f"{temporary}/merged")
    live, live_answers = score([*flags, "--merge", False], output)
    if answers:                         # lm-eval hands out none
        figures["differ_from_live"] = sum(a != b for a, b in zip(answers, live_answers, strict=True))
    return {**figures, **merged, "live_accuracy": live["accuracy"]}


def name_only(value):
    """The last part of an absolute path, which belongs to one machine; lists of values one by one."""
    if isinstance(value, list):
        return [name_only(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def without_places(run):
    return {key: name_only(value) for key, value in run.items()}


def missing(runs, results):
    """Those of `runs` that have no line in the file `results` with the same name, seed, flags and all else."""
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return [run for run in runs if not any(without_places(run).items() <= line.items() for line in lines)]


def add_line(run, work, results, commit):
    """Performs one run and adds its line to `results`; returns whether it went well."""
    name = f"{run['name']}, seed {run['seed']}"
    with open(work / "logs" / f"{file_name(run)}.log", "w") as log, contextlib.redirect_stdout(log), \
            contextlib.redirect_stderr(log):
        try:
            figures = perform(run, work)
        except (Exception, SystemExit):         # argparse exits where it does not know a flag's value
            traceback.print_exc()
            figures = None
    if figures is None:
        print(f"failed: {name}; see {log.name}", flush=True)
        return False
    line = {**without_places(run), "commit": commit, **figures}
    with open(results, "a") as f:
        f.write(json.dumps(line) + "\n")
    print(f"{name}: {figures['accuracy']:.1%}", flush=True)
    return True


def commit():
    """The commit that runs, with "-dirty" where files differ from it."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                          text=True).stdout.strip()


def end_with_parent():
    """Ends this worker when the process that started it is gone, however it went."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--results", required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread if more than one [1]")
    args = parser.parse_args()
    work, results = Path(args.work).resolve(), Path(args.results).resolve()
    runs = json.loads(Path(args.runs).read_text())
    (work / "logs").mkdir(parents=True, exist_ok=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    # A script that starts this with & has had Ctrl-C ignored for it; the runs take it all the same, and so must this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"         # before the workers import torch
    # Processes that stay: importing everything takes ten seconds, a small run a minute or two.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        try:
            went_well = list(pool.map(partial(add_line, work=work, results=results, commit=commit()),
                                      missing(runs, results)))
        except KeyboardInterrupt:       # without waiting for the runs in the pool: the workers end with this process
            print("stopped; the same command goes on with what is missing", flush=True)
            os._exit(130)
    sys.exit(f"error: {went_well.count(False)} runs failed" if False in went_well else 0)


if __name__ == "__main__":
    main()
