"""One adapter in every export format and engine: its size, its accuracy on the test rows, its difference from live.

    python experiments/deploy.py --data_dir DATA --adapter ADAPTER --without_offset ADAPTER --output DIR

Exports to DIR with verification, generates greedily in each engine, prints a table and writes DIR/deploy.json.
"""
import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Lora
from gptqmodel.utils.backend import BACKEND
from peft import PeftModel
from run import commit
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from data_print_save import load_rows, read_messages
from evalGSV import confidence_interval, generate, is_correct
from LoTA import run_script
from LoTA.adapter import LTA, load_gptq, load_live
from LoTA.adapter_folder import AdapterFolder
from LoTA.export.gguf import GGUF_FILE
from LoTA.export.run import export
from LoTA.folders import GPTQFolder
from LoTA.lota_merge import merge_folders
from LoTA.prompts import encode_prompt, prepare_tokenizer, render_prompt
from LoTA.storage import read_json, write_json

MAX_NEW_TOKENS = 160
BATCH_SIZE = 64


def engines(live: AdapterFolder, plain: AdapterFolder, folder: Path) -> list[tuple[str, str, Path, Callable]]:
    """Rows of the table: (format, engine, the folder whose size counts, a function that loads the model).

    live: an adapter with offset. plain: one without. folder: where main() merged and exported the two.
    A row whose format says "live" comes first of all that is made from its adapter.
    """
    gptq = Path(live.config.quantized_model_dir)
    rank = read_json(folder / "peft/adapter/adapter_config.json")["r"]
    float32, bfloat16 = {"dtype": torch.float32}, {"dtype": torch.bfloat16}
    rows = [
        ("adapter, live", "PEFT, float32", gptq, lambda: load_live(live, gptq, **float32)),
        ("merged", "LTA on GPTQModel torch, float32", folder / "merged",
         lambda: LTA(path=str(folder / "merged")).load(**float32).model),
        ("merged", "LTA on GPTQModel torch, bfloat16", folder / "merged",
         lambda: LTA(path=str(folder / "merged")).load(**bfloat16).model),
        ("peft", "PEFT on transformers, bfloat16", folder / "peft",
         lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(
             folder / "peft", device_map="cpu", **bfloat16), str(folder / "peft/adapter"))),
        ("peft", "GPTQModel Lora, float32", folder / "peft",
         lambda: GPTQModel.load(str(folder / "peft"), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16,
                                adapter=Lora(path=str(folder / "peft/adapter"), rank=rank)).model.float()),
        ("gguf", "transformers, float32", folder / "gguf",
         lambda: AutoModelForCausalLM.from_pretrained(folder / "gguf", gguf_file=GGUF_FILE, **float32)),
        ("gguf", "llama.cpp", folder / "gguf", lambda: LlamaCpp(folder / "gguf" / GGUF_FILE)),
        ("dense", "transformers, bfloat16", folder / "dense",
         lambda: AutoModelForCausalLM.from_pretrained(folder / "dense", **bfloat16)),
        ("without offset: adapter, live", "PEFT, float32", gptq, lambda: load_live(plain, gptq, **float32)),
        ("gptq", "GPTQModel torch, float32", folder / "gptq", lambda: load_gptq(folder / "gptq", **float32).model),
        ("gptq", "transformers, bfloat16", folder / "gptq",
         lambda: AutoModelForCausalLM.from_pretrained(folder / "gptq", device_map="cpu", **bfloat16))]
    if live.config.bits == 4:           # GPTQModel's other kernels for a CPU take 4 bits only
        rows.insert(3, ("merged", "LTA on GPTQModel torch_aten, bfloat16", folder / "merged",
                        lambda: LTA(path=str(folder / "merged")).load(backend="gptq_torch_aten", **bfloat16).model))
        rows.append(("gptq", "GPTQModel torch_aten, bfloat16", folder / "gptq",
                     lambda: load_gptq(folder / "gptq", backend="gptq_torch_aten", **bfloat16).model))
    return rows


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path):
        from llama_cpp import Llama
        self.model = Llama(str(file), n_ctx=512, verbose=False)

    def answers(self, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
        """Greedy answers to rendered prompts.

        Raises AssertionError where llama.cpp's own tokenizer makes other tokens of a prompt than transformers'.
        """
        out = []
        for prompt in tqdm(prompts, desc="generating", unit="row"):
            tokens = self.model.tokenize(prompt.encode(), add_bos=False, special=True)
            assert tokens == encode_prompt(tokenizer, prompt), f"llama.cpp makes other tokens of {prompt!r}"
            out.append(self.model.create_completion(tokens, max_tokens=MAX_NEW_TOKENS, temperature=0.0,
                                                    repeat_penalty=1.0)["choices"][0]["text"].strip())
        return out


def megabytes(folder: Path) -> float:
    """The size of all files in a folder and its subfolders, in MB; the tokenizer and the model card count too."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def print_table(rows: list[dict]) -> None:
    print("\n| bits | format | engine | MB | exact match | texts that differ from live |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['bits']} | {row['format']} | {row['engine']} | {row['size_mb']:.2f} | {row['accuracy']:.1%} | "
              f"{row['differ_from_live']} of {row['rows']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="a folder with ViGGO's test.csv")
    parser.add_argument("--adapter", required=True, help="a LoTA adapter with offset")
    parser.add_argument("--without_offset", required=True,
                        help="an adapter that was trained with --residual False on the same GPTQ model")
    parser.add_argument("--output", required=True, help="the folder for the exports and deploy.json")
    parser.add_argument("--limit", type=int, help="only the first so many rows [all]")
    args = parser.parse_args()
    folder, live, plain = Path(args.output), AdapterFolder(args.adapter), AdapterFolder(args.without_offset)
    gptq, bits = GPTQFolder(live.config.quantized_model_dir), live.config.bits
    merge_folders(live, gptq, folder / "merged")
    merge_folders(plain, gptq, folder / "merged_without_offset")
    for format in ("peft", "gguf", "dense"):
        export(folder / "merged", format, folder / format, verify=True)
    export(folder / "merged_without_offset", "gptq", folder / "gptq", verify=True)

    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder / "merged"))
    rows = load_rows("viggo", "test", args.data_dir)
    rows = rows.select(range(min(args.limit or len(rows), len(rows))))
    pairs = [read_messages("viggo", row, live.config.prompt_layout) for row in rows]
    prompts = [render_prompt(tokenizer, messages) for messages, _ in pairs]
    table, live_texts = [], []
    for format, engine, place, load in engines(live, plain, folder):
        model = load()
        if isinstance(model, LlamaCpp):
            texts = model.answers(tokenizer, prompts)
        else:
            texts = generate(model.eval(), tokenizer, prompts, BATCH_SIZE, MAX_NEW_TOKENS)
        if "live" in format:            # the rows after it are compared with it
            live_texts = texts
        correct = sum(is_correct(text, label, "viggo") for text, (_, label) in zip(texts, pairs, strict=True))
        differs = [a != b for a, b in zip(texts, live_texts, strict=True)]
        table.append({"bits": bits, "format": format, "engine": engine, "size_mb": megabytes(place),
                      "rows": len(texts), "correct": correct, "accuracy": correct / len(texts),
                      "interval_95": confidence_interval(correct, len(texts)), "differ_from_live": sum(differs),
                      "differ_of_first_100": sum(differs[:100]), "from": f"experiments/deploy.py at {commit()}"})
        print(table[-1])
        del model
    write_json(folder / "deploy.json", table)
    print_table(table)


if __name__ == "__main__":
    run_script(main)
