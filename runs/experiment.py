"""One line of JSON for each run of an experiment: trains what is missing, scores it, goes on where it was interrupted.

    python runs/experiment.py --runs RUNS.json --data_dir DIR --work WORK --results RESULTS.jsonl --jobs 2

RUNS.json is a list of {"name": ..., "gptq": GPTQ folder, "seed": ..., "flags": [flags of mode 1]}, with anything else
that shall stand in the results. A run without "flags" scores the GPTQ model itself, one with "base": true the 16-bit
model. A run whose name and seed are in RESULTS already is left out. Each is scored on DIR's test.csv: exact match, and
the mean loss of the answers' tokens; LoTA and QA-LoRA merged, with how many answers differ live, LoRA live.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MAX_NEW_TOKENS = 160


def train(run, work, log):
    """Trains a run's adapter in a process of its own; returns (its folder, seconds)."""
    into = work / "adapters" / f"{run['name']}_seed{run['seed']}"
    shutil.rmtree(into, ignore_errors=True)         # what an interrupted run left
    start = time.time()
    command = [sys.executable, "LoTA_QAF_main.py", "--mode", "1", "--quantized_model_dir", run["gptq"], "--seed",
               run["seed"], "--adapter_path", into, *run["flags"]]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, stdout=log, stderr=log)
    if done.returncode:
        sys.exit(f"error: {run['name']} failed; see {log.name}")
    return next(f for f in into.iterdir() if "MB_" in f.name), time.time() - start


def score(model, tokenizer, rows):
    """{"accuracy", "correct", "rows", "loss"} of a model on rows of ViGGO, and its answers."""
    import torch

    from data_print_save import encode_prompt, read_messages, render_prompt
    from evalGSV import generate, is_correct
    pairs = [read_messages("viggo", row) for row in rows]
    prompts = [render_prompt(tokenizer, messages) for messages, _ in pairs]
    texts = generate(model, tokenizer, prompts, 64, MAX_NEW_TOKENS)
    correct = sum(is_correct(text, label, "viggo") for text, (_, label) in zip(texts, pairs, strict=True))
    total = tokens = 0
    items = sorted(((encode_prompt(tokenizer, p), tokenizer(label, add_special_tokens=False)["input_ids"]
                     + [tokenizer.eos_token_id]) for p, (_, label) in zip(prompts, pairs, strict=True)),
                   key=lambda item: len(item[0]) + len(item[1]))
    for start in range(0, len(items), 64):
        batch = items[start:start + 64]
        width = max(len(p) + len(a) for p, a in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        labels = torch.full((len(batch), width), -100)
        for i, (prompt, answer) in enumerate(batch):        # padded on the right: nothing attends to it
            ids[i, :len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt):len(prompt) + len(answer)] = torch.tensor(answer)
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100,
                                                   reduction="sum").item()
        tokens += int((labels[:, 1:] != -100).sum())
    return {"accuracy": correct / len(rows), "correct": correct, "rows": len(rows), "loss": total / tokens}, texts


def evaluate(run, adapter, data_dir, limit):
    """The figures of one run."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from data_print_save import load_rows, prepare_tokenizer
    from LoTA.adapter import LTA, load_gptq, load_live
    from LoTA.folders import LotaConfig
    rows = list(load_rows("viggo", "test", data_dir))[:limit]
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(run["gptq"]))
    if adapter is None:
        model = (AutoModelForCausalLM.from_pretrained(run["gptq"], dtype=torch.float32) if run.get("base")
                 else load_gptq(run["gptq"], torch.float32).model)
        return score(model, tokenizer, rows)[0]
    config = LotaConfig.load(adapter)
    figures = {"training_loss": config.training["loss"], "moved": (config.training.get("moved") or {}).get("all"),
               "adapter_mb": (adapter / "adapter_model.safetensors").stat().st_size / 1e6}
    if config.method == "LoRA":
        return {**figures, **score(load_live(adapter, run["gptq"], dtype=torch.float32), tokenizer, rows)[0]}
    merged, texts = score(LTA(path=str(adapter)).load(dtype=torch.float32).model, tokenizer, rows)
    live, live_texts = score(load_live(adapter, run["gptq"], dtype=torch.float32), tokenizer, rows)
    differ = sum(a != b for a, b in zip(texts, live_texts, strict=True))
    return {**figures, **merged, "live_accuracy": live["accuracy"], "differ_from_live": differ}


def name_only(value):
    """The last part of an absolute path, which belongs to one machine; anything else as it is."""
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--results", required=True)
    parser.add_argument("--limit", type=int, help="score only the first so many rows [all]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread if more than one [1]")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work, results = Path(args.work), Path(args.results)
    runs = json.loads(Path(args.runs).read_text())
    if args.one is not None:
        run = runs[int(args.one)]
        (work / "logs").mkdir(parents=True, exist_ok=True)
        with open(work / "logs" / f"{run['name']}_seed{run['seed']}.log", "w") as log:
            adapter, seconds = train(run, work, log) if "flags" in run else (None, None)
        figures = evaluate(run, adapter, args.data_dir, args.limit)
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        names = {**run, "gptq": name_only(run["gptq"])} | (
            {"flags": [name_only(flag) for flag in run["flags"]]} if "flags" in run else {})
        line = {**names, "train_s": seconds, "commit": commit.stdout.strip(), **figures}
        with open(results, "a") as f:
            f.write(json.dumps(line) + "\n")
        print(f"{run['name']} seed {run['seed']}: {figures['accuracy']:.1%}, loss {figures['loss']:.4f}")
        return
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(line["name"], line["seed"]) for line in map(json.loads, lines)}
    missing = [i for i, run in enumerate(runs) if (run["name"], run["seed"]) not in done]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if args.jobs > 1 else None

    def start(i):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", str(i)], check=True, env=environment,
                       stderr=subprocess.DEVNULL)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(start, missing))


if __name__ == "__main__":
    main()
