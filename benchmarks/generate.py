"""Tokens per second and memory of the bare GPTQ model, of GPTQ + LoRA and of the merged LoTA model.

    python benchmarks/generate.py                     a random Llama of 60 M weights on a CPU, of 8 B on a GPU
    python benchmarks/generate.py --shape 1B --backend gptq_triton gptq_torch
    python benchmarks/generate.py --quick             under a minute; prints only

Each model decodes greedily a fixed number of new tokens after a short prompt. Times are medians of runs that alternate.
"""
import argparse
import tempfile
from pathlib import Path

import torch
from common import peak_extra_memory, print_table, save, time_interleaved
from peft import LoraConfig, get_peft_model
from random_gptq import write_lota_adapter
from random_model import SHAPES, write_gptq_llama

from LoTA.adapter import LTA, load_gptq
from LoTA.adapter_folder import AdapterFolder
from LoTA.folders import GPTQFolder
from LoTA.lota_merge import merge_folders
from LoTA.settings import TARGET_MODULES

RANK, GROUP, OMEGA = 64, 64, 32.0


def weights_of(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers, and of LTA's offsets in float32."""
    held = {t.data_ptr(): t.numel() * t.itemsize for t in (*model.parameters(), *model.buffers())}
    offsets = (m.adapter.offset for m in model.modules() if isinstance(getattr(m, "adapter", None), LTA))
    return sum(held.values()) + sum(o.numel() * o.itemsize for o in offsets)


def measure(work: Path, shape: str, bits: int, backend: str, batches: list[int], new_tokens: int, prompt: int,
            rounds: int) -> list[dict]:
    """One row of results for each model and batch size. work: the folder that holds gptq/ and merged/."""
    kwargs = {"dtype": torch.bfloat16, "backend": backend}
    lora = get_peft_model(load_gptq(work / "gptq", **kwargs).model, LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGET_MODULES), init_lora_weights=False)).eval()
    models = {"GPTQ": load_gptq(work / "gptq", **kwargs).model, "GPTQ + LoRA": lora,
              "merged LoTA": LTA(path=str(work / "merged")).load(**kwargs).model}
    rows = []
    for batch in batches:
        ids = torch.randint(10, SHAPES[shape].vocabulary, (batch, prompt), device=models["GPTQ"].device)

        def generate(model, ids=ids):
            with torch.inference_mode():
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                               min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        seconds = time_interleaved({n: lambda m=m: generate(m) for n, m in models.items()}, rounds)
        speed = {n: batch * new_tokens / s for n, s in seconds.items()}
        memory = {n: (weights_of(m), peak_extra_memory(lambda m=m: generate(m))) for n, m in models.items()}
        rows += [{"shape": shape, "bits": bits, "kernel": backend, "batch": batch, "model": n, "tokens / s": v,
                  "/ GPTQ": v / speed["GPTQ"], "/ GPTQ + LoRA": v / speed["GPTQ + LoRA"],
                  "model MB": memory[n][0] / 1e6, "peak extra MB": memory[n][1] / 1e6} for n, v in speed.items()]
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--quick", action="store_true", help="the tiny shape, one batch, 8 new tokens; prints only")
    parser.add_argument("--shape", default="8B" if on_gpu else "60M", choices=SHAPES)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2], help="[4 2]")
    parser.add_argument("--backend", nargs="+", default=["auto"], help="names of GPTQModel's BACKEND [auto]")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128] if on_gpu else [1, 8, 32])
    parser.add_argument("--new_tokens", type=int, default=128 if on_gpu else 16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt [32]")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each model [5]")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.batch, args.bits, args.rounds, args.new_tokens = "tiny", [8], [4], 3, 8
    rows = []
    for bits in args.bits:
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            write_gptq_llama(work / "gptq", SHAPES[args.shape], bits, GROUP)
            write_lota_adapter(work / "adapter", work / "gptq", rank=RANK, omega=OMEGA)
            merge_folders(AdapterFolder(work / "adapter"), GPTQFolder(work / "gptq"), work / "merged", verify=False)
            for backend in args.backend:
                rows += measure(work, args.shape, bits, backend, args.batch, args.new_tokens, args.prompt, args.rounds)
    print_table(f"generation, {args.new_tokens} new tokens, bfloat16", rows)
    save("generate", rows, args.quick)


if __name__ == "__main__":
    main()
