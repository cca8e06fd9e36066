"""The table at the end of a run: accuracies, share of weights moved, and how far live and merged are apart.

    python runs/compare.py --results RESULTS --adapter ADAPTER --merged MERGED

Reads the JSON files of mode 2 (16-bit, GPTQ, live, merged), and loads the model twice, with the adapter live and
merged, to compare their logits on the test prompts with their answers.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from LoTA import run_script
from LoTA.adapter import LTA, load_live
from LoTA.folders import read_adapter

ROWS = ("16bit", "gptq", "live", "merged")
NAMES = {"16bit": "16-bit model", "gptq": "GPTQ model", "live": "GPTQ + adapter, live", "merged": "merged"}


def read_results(folder, adapter):
    """{kind: results} of the newest JSON file of each kind; live and merged of this adapter."""
    found = {}
    for file in sorted(Path(folder).glob("*.json"), key=lambda f: f.stat().st_mtime):
        for kind in ROWS:
            if f"_{kind}_" in file.name and (kind in ("16bit", "gptq") or file.name.startswith(Path(adapter).name)):
                found[kind] = json.loads(file.read_text())
    missing = [kind for kind in ROWS if kind not in found]
    if missing:
        sys.exit(f"error: {folder} has no results of mode 2 for: {', '.join(missing)}")
    return found


@torch.inference_mode()
def largest_logit_difference(live, merged, tokenizer, items):
    """(largest |live - merged| over all logits, largest |logit|) on prompts followed by their labels."""
    difference = size = 0.0
    for item in tqdm(items, desc="comparing logits", unit="row"):
        ids = tokenizer(item["prompt"] + item["label"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        a, b = live(input_ids=ids.to(live.device)).logits, merged(input_ids=ids.to(merged.device)).logits
        difference = max(difference, (a - b).abs().max().item())
        size = max(size, a.abs().max().item())
    return difference, size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--merged", required=True)
    parser.add_argument("--rows", type=int, default=100, help="test rows whose logits are compared [100]")
    args = parser.parse_args()
    results = read_results(args.results, args.adapter)
    tokenizer = AutoTokenizer.from_pretrained(args.merged)
    merged = LTA(path=args.merged).load(dtype=torch.float32).model
    live = load_live(args.adapter, read_adapter(args.adapter).quantized_model_dir, dtype=torch.float32)
    items = results["merged"]["predictions"]
    difference, size = largest_logit_difference(live, merged, tokenizer, items[:args.rows])
    differing = sum(a["prediction"] != b["prediction"] for a, b in zip(results["live"]["predictions"], items,
                                                                       strict=True))
    print()
    print(f"| {'model':<22} | accuracy | 95 % interval     | correct     |")
    print(f"|{'-' * 24}|{'-' * 10}|{'-' * 19}|{'-' * 13}|")
    for kind in ROWS:
        r = results[kind]
        low, high = r["interval_95"]
        share, count = f"{r['accuracy']:8.1%}", f"{r['correct']:4} of {r['rows']:4}"
        print(f"| {NAMES[kind]:<22} | {share} | {low:6.1%} to {high:6.1%}  | {count}|")
    print()
    print(f"share of integer weights moved by the merge: {results['merged']['moved']['all']:.4%}")
    print(f"largest difference between live and merged logits: {difference:.2e} (largest logit: {size:.1f})")
    print(f"predictions that differ between live and merged: {differing} of {len(items)}")


if __name__ == "__main__":
    run_script(main)
