"""Compares four models: 16-bit, GPTQ, the adapter live and the adapter merged. Prints a table at the end of a script.

    python experiments/compare.py --results RESULTS --adapter ADAPTER --merged MERGED [--output FILE]

RESULTS holds the JSON files that mode 2 wrote for the four. The adapter's model is loaded live and merged, and the
logits of the two are compared on test prompts with their answers. FILE gets the figures as JSON, from which
experiments/tables.py makes a table of the pages.
"""
import argparse
import json
from pathlib import Path

import torch
from run import commit
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from LoTA import UserError, run_script
from LoTA.adapter import LTA, load_live
from LoTA.adapter_folder import AdapterFolder, LotaConfig
from LoTA.storage import write_json

KINDS = ("16bit", "gptq", "live", "merged")         # as mode 2 names them in its files' names


def read_results(folder: str | Path, adapter: str | Path) -> dict[str, dict]:
    """{kind: the content of the newest JSON file of this kind}; live and merged are those of this adapter.

    Raises UserError where a kind has no file.
    """
    found = {}
    for file in sorted(Path(folder).glob("*.json"), key=lambda f: f.stat().st_mtime):
        for kind in KINDS:
            if f"_{kind}_" in file.name and (kind in ("16bit", "gptq") or file.name.startswith(Path(adapter).name)):
                found[kind] = json.loads(file.read_text())
    missing = [kind for kind in KINDS if kind not in found]
    if missing:
        raise UserError(f"{folder} has no results of mode 2 for: {', '.join(missing)}")
    return found


@torch.inference_mode()
def compare_logits(live: PreTrainedModel, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                   items: list[dict]) -> tuple[float, float]:
    """(largest |live - merged| of all logits, largest |live logit|) on prompts followed by their labels."""
    difference = largest = 0.0
    for item in tqdm(items, desc="comparing logits", unit="row"):
        ids = tokenizer(item["prompt"] + item["label"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        a, b = live(input_ids=ids.to(live.device)).logits, merged(input_ids=ids.to(merged.device)).logits
        difference = max(difference, (a - b).abs().max().item())
        largest = max(largest, a.abs().max().item())
    return difference, largest


def names_of(config: LotaConfig) -> dict[str, str]:
    """{kind: the model's name in the table}."""
    method = config.method if config.omega is None else f"{config.method}, ω = {config.omega / config.rank:g} r"
    return {"16bit": "16-bit model", "gptq": f"GPTQ model, {config.bits} bits", "live": f"{method}, live",
            "merged": f"{method}, merged"}


def comparison(results: dict[str, dict], config: LotaConfig, difference: float, largest: float, logit_rows: int,
               commit: str) -> dict:
    """The figures of a comparison, as FILE holds them."""
    names = names_of(config)
    answers = [[item["prediction"] for item in results[kind]["predictions"]] for kind in ("live", "merged")]
    return {
        "bits": config.bits, "rank": config.rank, "omega": config.omega,
        "rows": [{"name": names[kind], **{key: results[kind][key] for key in
                                          ("accuracy", "interval_95", "correct", "rows", "loss")
                                          if key in results[kind]}} for kind in KINDS],
        "moved": results["merged"]["moved"]["all"],
        "largest_logit_difference": difference, "largest_logit": largest, "logit_rows": logit_rows,
        "answers_that_differ": sum(live != merged for live, merged in zip(*answers, strict=True)),
        "torch": torch.__version__.partition("+")[0], "commit": commit}


def print_comparison(figures: dict) -> None:
    """Prints the table and what is said beneath it."""
    width = max(len(row["name"]) for row in figures["rows"])
    loss = "loss" in figures["rows"][0]         # where mode 2 was asked for it
    print(f"\n| {'model':<{width}} | accuracy | 95 % interval     | correct     |" + (" loss   |" if loss else ""))
    print(f"|{'-' * (width + 2)}|{'-' * 10}|{'-' * 19}|{'-' * 13}|" + ("-" * 8 + "|" if loss else ""))
    for row in figures["rows"]:
        low, high = row["interval_95"]
        share, count = f"{row['accuracy']:8.1%}", f"{row['correct']:4} of {row['rows']:4}"
        print(f"| {row['name']:<{width}} | {share} | {low:6.1%} to {high:6.1%}  | {count}|"
              + (f" {row['loss']:6.3f} |" if loss else ""))
    print(f"\nshare of integer weights moved by the merge: {figures['moved']:.4%}")
    print(f"largest difference between live and merged logits: {figures['largest_logit_difference']:.2e} "
          f"(largest logit: {figures['largest_logit']:.1f})")
    print(f"predictions that differ between live and merged: {figures['answers_that_differ']} of "
          f"{figures['rows'][-1]['rows']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True, help="the folder with mode 2's JSON files")
    parser.add_argument("--adapter", required=True, help="the adapter's folder")
    parser.add_argument("--merged", required=True, help="the folder that mode 2 merged the adapter into")
    parser.add_argument("--rows", type=int, default=100, help="test rows whose logits are compared [100]")
    parser.add_argument("--output", help="a file that gets the figures as JSON [none]")
    parser.add_argument("--commit", help="the commit that made RESULTS, for FILE [this checkout's]")
    args = parser.parse_args()
    results, adapter = read_results(args.results, args.adapter), AdapterFolder(args.adapter)
    tokenizer = AutoTokenizer.from_pretrained(args.merged)
    merged = LTA(path=args.merged).load(dtype=torch.float32).model
    live = load_live(adapter, adapter.config.quantized_model_dir, dtype=torch.float32)
    items = results["merged"]["predictions"][:args.rows]
    figures = comparison(results, adapter.config, *compare_logits(live, merged, tokenizer, items), len(items),
                         args.commit or commit())
    print_comparison(figures)
    if args.output:
        write_json(args.output, figures)


if __name__ == "__main__":
    run_script(main)
