"""The time and the peak memory of a whole training step of LoRA, QA-LoRA and LoTA, on a Llama of random GPTQ integers.

    python benchmarks/train_step.py                   60 M weights on a CPU, 8 B on a GPU; 2 bits and 4
    python benchmarks/train_step.py --shape 1B --batch 16 --length 512 --no_checkpointing
    python benchmarks/train_step.py --data_dir DATA --output train_step_viggo
    python benchmarks/train_step.py --quick           under a minute; prints only

A step is a forward, a backward with gradient checkpointing, and a step of the method's optimizer. Times are medians of
steps that alternate. The peak memory is counted beyond what stays between two steps: the model, its adapter and the
optimizer's state.

DATA is a folder with ViGGO. The batch then has the lengths of the rows around the median, padded to one length, and the
tokens of a prompt have no label. A byte-level BPE tokenizer of the training rows counts the tokens, because a random
model has none. Each method runs with the model's own loss ("whole" logits), as plain transformers, and with LoTA's,
which forms the "answers" logits only. Without DATA every token has a label, and the losses are the same.
"""
import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import peak_extra_memory, print_table, save, time_interleaved
from peft import LoraConfig, PeftModel, get_peft_model
from random_model import SHAPES, write_gptq_llama
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_print_save import load_rows, prepare_dataset, read_messages
from LoTA import IGNORE_INDEX
from LoTA.adapter import load_gptq
from LoTA.answer_loss import answer_loss
from LoTA.layer import register
from LoTA.settings import TARGET_MODULES
from LoTA.steps import Threshold
from LoTA.ternary import ternarize_
from t_signSGD import tSignSGD

RANK, GROUP, OMEGA = 64, 64, 48.0
Batch = dict[str, torch.Tensor]


def constant_batch(rows: int, length: int, vocabulary: int) -> Batch:
    """Random tokens, all of them with a label. Each tensor is [rows, length]."""
    ids = torch.randint(10, vocabulary, (rows, length))
    return {"input_ids": ids, "labels": ids}


def train_tokenizer(data_name: str, vocabulary: int, data_dir: str | Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most so many tokens, of the training rows of a data set."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [(messages[-1]["content"], answer) for messages, answer in
             (read_messages(data_name, row) for row in load_rows(data_name, "train", data_dir))]
    bpe.train_from_iterator((text for pair in texts for text in pair), trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def viggo_batch(rows: int, vocabulary: int, data_dir: str) -> Batch:
    """Random tokens in the lengths of ViGGO's training rows around the median. Each tensor is [rows, longest]."""
    data = prepare_dataset("viggo", train_tokenizer("viggo", vocabulary, data_dir), data_dir=data_dir)
    data = data.sort("length").select(range((len(data) - rows) // 2, (len(data) + rows) // 2))
    width = -(-max(data["length"]) // 8) * 8             # as DataCollatorForSeq2Seq pads
    ids = torch.randint(10, vocabulary, (rows, width))
    labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
    for i, row in enumerate(data):
        prompt = row["labels"].count(IGNORE_INDEX)
        labels[i, prompt:row["length"]] = ids[i, prompt:row["length"]]
        mask[i, :row["length"]] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def make_model(folder: Path, method: str, dtype: torch.dtype,
               checkpointing: bool) -> tuple[PeftModel, torch.optim.Optimizer]:
    """A GPTQ model with adapters of `method`, LoRA, QA-LoRA or LoTA, and the method's optimizer."""
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
    return model, optimizer


def take_step(forward: Callable, optimizer: torch.optim.Optimizer, batch: Batch, autocast: bool) -> None:
    """A training step. forward: a function (a batch's tensors) -> {"loss": ...}. autocast: compute in bfloat16."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
        loss = forward(**batch)["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def make_steps(folder: Path, method: str, dtype: torch.dtype, batch: Batch,
               checkpointing: bool) -> dict[str, Callable[[], None]]:
    """One training step of `method` as a function for each loss: {"whole" or "answers": it}. Both train one model."""
    model, optimizer = make_model(folder, method, dtype, checkpointing)
    return {name: partial(take_step, forward, optimizer, batch, dtype == torch.bfloat16)
            for name, forward in (("whole", model), ("answers", partial(answer_loss, model)))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--quick", action="store_true", help="the tiny shape, two rows, 4 bits; prints only")
    parser.add_argument("--shape", default="8B" if on_gpu else "60M", choices=SHAPES)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2], help="[4 2]")
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 8)
    parser.add_argument("--length", type=int, default=1024 if on_gpu else 256, help="tokens of a row")
    parser.add_argument("--data_dir", help="a folder with ViGGO, for its lengths in place of --length")
    parser.add_argument("--methods", nargs="+", default=["LoRA", "QA-LoRA", "LoTA"],
                        choices=["LoRA", "QA-LoRA", "LoTA"], help="LoRA must be one of them, because it is the measure")
    parser.add_argument("--output", default="train_step", help="name of the JSON file [train_step]")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--no_checkpointing", action="store_true", help="keep all activations for the backward")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method [5]")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.bits, args.rounds, args.batch = "tiny", [4], 3, 2
    if "LoRA" not in args.methods:
        parser.error("--methods needs LoRA, because it is the measure")
    shape = SHAPES[args.shape]
    batch = (viggo_batch(args.batch, shape.vocabulary, args.data_dir) if args.data_dir
             else constant_batch(args.batch, args.length, shape.vocabulary))
    batch = {name: tensor.to("cuda" if on_gpu else "cpu") for name, tensor in batch.items()}
    losses = ["whole", "answers"] if args.data_dir else ["whole"]
    rows = []
    for bits in args.bits:
        with tempfile.TemporaryDirectory() as work:
            folder = write_gptq_llama(Path(work) / "gptq", shape, bits, GROUP)
            steps = {}
            for method in args.methods:
                made = make_steps(folder, method, getattr(torch, args.dtype), batch, not args.no_checkpointing)
                steps |= {(method, loss): made[loss] for loss in losses}
            seconds = time_interleaved(steps, args.rounds)
            memory = {key: peak_extra_memory(step) for key, step in steps.items()}
        for method, loss in steps:
            row = {"shape": args.shape, "bits": bits, "tokens": batch["input_ids"].numel(),
                   "answer tokens": int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()), "dtype": args.dtype,
                   "checkpointing": not args.no_checkpointing, "method": method, "loss": loss,
                   "step_s": seconds[method, loss], "peak MB": memory[method, loss] / 1e6}
            for suffix, peer in (("LoRA", "whole"), ("LoRA, same loss", loss)):
                row |= {f"/ {suffix}": seconds[method, loss] / seconds["LoRA", peer],
                        f"memory / {suffix}": memory[method, loss] / memory["LoRA", peer]}
            rows.append(row)
    print_table("one training step", rows)
    save(args.output, rows, args.quick)


if __name__ == "__main__":
    main()
