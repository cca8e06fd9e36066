"""One adapter in every export format and engine: size, accuracy on the test rows, difference from the live adapter.

    python runs/deploy_table.py --data_dir DATA --adapter ADAPTER --without_offset ADAPTER --output DIR

Exports with verification to DIR, generates greedily in each engine, prints the table and writes DIR/deploy.json.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Lora
from gptqmodel.utils.backend import BACKEND
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_print_save import encode_prompt, load_rows, prepare_tokenizer, read_messages, render_prompt
from evalGSV import confidence_interval, generate, is_correct
from LoTA import run_script
from LoTA.adapter import LTA, load_gptq, load_live
from LoTA.export import GGUF_FILE, export
from LoTA.folders import read_adapter, read_json, write_json
from LoTA.lota_merge import merge_folders

MAX_NEW_TOKENS = 160


def engines(live, plain, folder, bits):
    """(format, engine, folder whose size counts, a function that loads it), for adapters with and without offset."""
    gptq = read_adapter(live).quantized_model_dir
    rank = read_json(folder / "peft/adapter/adapter_config.json")["r"]
    wide, half = {"dtype": torch.float32}, {"dtype": torch.bfloat16}
    rows = [
        ("adapter, live", "PEFT, float32", gptq, lambda: load_live(live, gptq, **wide)),
        ("merged", "LTA on GPTQModel torch, float32", folder / "merged",
         lambda: LTA(path=str(folder / "merged")).load(**wide).model),
        ("merged", "LTA on GPTQModel torch, bfloat16", folder / "merged",
         lambda: LTA(path=str(folder / "merged")).load(**half).model),
        ("peft", "PEFT on transformers, bfloat16", folder / "peft",
         lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(
             folder / "peft", device_map="cpu", **half), str(folder / "peft/adapter"))),
        ("peft", "GPTQModel Lora, float32", folder / "peft",
         lambda: GPTQModel.load(str(folder / "peft"), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16,
                                adapter=Lora(path=str(folder / "peft/adapter"), rank=rank)).model.float()),
        ("gguf", "transformers, float32", folder / "gguf",
         lambda: AutoModelForCausalLM.from_pretrained(folder / "gguf", gguf_file=GGUF_FILE, **wide)),
        ("gguf", "llama.cpp", folder / "gguf", lambda: LlamaCpp(folder / "gguf" / GGUF_FILE)),
        ("dense", "transformers, bfloat16", folder / "dense",
         lambda: AutoModelForCausalLM.from_pretrained(folder / "dense", **half)),
        ("without offset: adapter, live", "PEFT, float32", gptq, lambda: load_live(plain, gptq, **wide)),
        ("gptq", "GPTQModel torch, float32", folder / "gptq", lambda: load_gptq(folder / "gptq", **wide).model),
        ("gptq", "transformers, bfloat16", folder / "gptq",
         lambda: AutoModelForCausalLM.from_pretrained(folder / "gptq", device_map="cpu", **half))]
    if bits == 4:           # GPTQModel's other kernels for a CPU take 4 bits only
        rows.insert(3, ("merged", "LTA on GPTQModel torch_aten, bfloat16", folder / "merged",
                        lambda: LTA(path=str(folder / "merged")).load(backend="gptq_torch_aten", **half).model))
        rows.append(("gptq", "GPTQModel torch_aten, bfloat16", folder / "gptq",
                     lambda: load_gptq(folder / "gptq", backend="gptq_torch_aten", **half).model))
    return rows


class LlamaCpp:
    """A GGUF file in llama.cpp, with greedy generation."""

    def __init__(self, file):
        from llama_cpp import Llama
        self.model = Llama(str(file), n_ctx=512, verbose=False)

    def answers(self, tokenizer, prompts):
        """llama.cpp tokenizes the prompts itself. Raises AssertionError where its tokens are not transformers'."""
        out = []
        for prompt in tqdm(prompts, desc="generating", unit="row"):
            tokens = self.model.tokenize(prompt.encode(), add_bos=False, special=True)
            assert tokens == encode_prompt(tokenizer, prompt), f"llama.cpp cuts {prompt!r} in another way"
            out.append(self.model.create_completion(tokens, max_tokens=MAX_NEW_TOKENS, temperature=0.0,
                                                    repeat_penalty=1.0)["choices"][0]["text"].strip())
        return out


def megabytes(folder):
    """What lies in a folder, without what this script did not ask about."""
    return sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--adapter", required=True, help="a LoTA adapter with offset")
    parser.add_argument("--without_offset", required=True, help="one trained with --residual False, same GPTQ model")
    parser.add_argument("--output", required=True)
    parser.add_argument("--limit", type=int, help="only the first so many rows [all]")
    args = parser.parse_args()
    folder, config = Path(args.output), read_adapter(args.adapter)
    merge_folders(args.adapter, config.quantized_model_dir, folder / "merged")
    merge_folders(args.without_offset, config.quantized_model_dir, folder / "merged_without_offset")
    for format in ("peft", "gguf", "dense"):
        export(folder / "merged", format, folder / format, verify=True)
    export(folder / "merged_without_offset", "gptq", folder / "gptq", verify=True)

    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder / "merged"))
    rows = load_rows("viggo", "test", args.data_dir)
    rows = rows.select(range(min(args.limit or len(rows), len(rows))))
    pairs = [read_messages("viggo", row) for row in rows]
    prompts = [render_prompt(tokenizer, messages) for messages, _ in pairs]
    table, live = [], None
    for format, engine, place, load in engines(args.adapter, args.without_offset, folder, config.bits):
        model = load()
        if isinstance(model, LlamaCpp):
            texts = model.answers(tokenizer, prompts)
        else:
            texts = generate(model.eval(), tokenizer, prompts, 64, MAX_NEW_TOKENS)
        live = texts if "live" in format else live              # what the rows below are compared with
        correct = sum(is_correct(text, label, "viggo") for text, (_, label) in zip(texts, pairs, strict=True))
        table.append({"bits": config.bits, "format": format, "engine": engine, "size_mb": megabytes(place),
                      "rows": len(texts), "correct": correct, "accuracy": correct / len(texts),
                      "interval_95": confidence_interval(correct, len(texts)),
                      "differ_from_live": sum(a != b for a, b in zip(texts, live, strict=True)),
                      "differ_of_first_100": sum(a != b for a, b in zip(texts[:100], live[:100], strict=True))})
        print(table[-1])
        del model
    write_json(folder / "deploy.json", table)
    print("\n| bits | format | engine | MB | exact match | texts that differ from live |\n|---|---|---|---|---|---|")
    for row in table:
        print(f"| {row['bits']} | {row['format']} | {row['engine']} | {row['size_mb']:.2f} | {row['accuracy']:.1%} | "
              f"{row['differ_from_live']} of {row['rows']} |")


if __name__ == "__main__":
    run_script(main)
