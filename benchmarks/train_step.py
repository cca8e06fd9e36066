"""The time and the peak memory of a whole training step of LoRA, QA-LoRA and LoTA, on a Llama of random GPTQ integers.

    python benchmarks/train_step.py                   60 M weights on a CPU, 8 B on a GPU; 2 bits and 4
    python benchmarks/train_step.py --shape 1B --batch 16 --length 512 --no_checkpointing
    python benchmarks/train_step.py --quick           under a minute; prints only

A step is a forward, a backward with gradient checkpointing, and a step of the method's optimizer. Times are medians of
steps that alternate. The peak memory is counted beyond what stays between two steps: the model, its adapter and the
optimizer's state.
"""
import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import peak_extra_memory, print_table, save, time_interleaved
from peft import LoraConfig, get_peft_model
from random_model import SHAPES, write_gptq_llama

from LoTA.adapter import load_gptq
from LoTA.layer import register
from LoTA.settings import TARGET_MODULES
from LoTA.ternary import Threshold, ternarize_
from t_signSGD import tSignSGD

RANK, GROUP, OMEGA = 64, 64, 48.0


def make_step(folder: Path, method: str, dtype: torch.dtype, ids: torch.Tensor,
              checkpointing: bool) -> Callable[[], None]:
    """One training step of `method`, LoRA, QA-LoRA or LoTA, as a function."""
    model = load_gptq(folder, dtype=dtype, backend="gptq_torch").model
    model.config.use_cache = False
    extra = {"use_qalora": True, "qalora_group_size": GROUP} if method == "QA-LoRA" else {}
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM",
                        **extra)
    if method == "LoTA":
        register(config, Threshold(OMEGA, OMEGA))
    model = get_peft_model(model, config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    if method == "LoTA":
        for p in trained:                   # a fresh B is zero, which is cheaper to compute with than a trained one
            ternarize_(torch.nn.init.normal_(p.data))
        optimizer = tSignSGD(trained)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step():
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--quick", action="store_true", help="the tiny shape, 4 bits; prints only")
    parser.add_argument("--shape", default="8B" if on_gpu else "60M", choices=SHAPES)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2], help="[4 2]")
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 8)
    parser.add_argument("--length", type=int, default=1024 if on_gpu else 256, help="tokens of a row")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--no_checkpointing", action="store_true", help="keep all activations for the backward")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method [5]")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.bits, args.rounds = "tiny", [4], 3
    shape = SHAPES[args.shape]
    ids = torch.randint(10, shape.vocabulary, (args.batch, args.length), device="cuda" if on_gpu else "cpu")
    rows = []
    for bits in args.bits:
        with tempfile.TemporaryDirectory() as work:
            folder = write_gptq_llama(Path(work) / "gptq", shape, bits, GROUP)
            steps = {m: make_step(folder, m, getattr(torch, args.dtype), ids, not args.no_checkpointing)
                     for m in ("LoRA", "QA-LoRA", "LoTA")}
            seconds = time_interleaved(steps, args.rounds)
            memory = {m: peak_extra_memory(step) for m, step in steps.items()}
            rows += [{"shape": args.shape, "bits": bits, "tokens": ids.numel(), "dtype": args.dtype,
                      "checkpointing": not args.no_checkpointing, "method": m, "step_s": seconds[m],
                      "/ LoRA": seconds[m] / seconds["LoRA"], "peak MB": memory[m] / 1e6,
                      "memory / LoRA": memory[m] / memory["LoRA"]} for m in steps]
    print_table("one training step", rows)
    save("train_step", rows, args.quick)


if __name__ == "__main__":
    main()
