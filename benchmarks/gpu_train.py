"""A real run from nothing: a small Llama learns the demo's data, is quantized, and LoTA trains, merges and is compared.

    python benchmarks/gpu_train.py            a Llama of 30 M weights, 3 bits, 300 steps of each recipe in bfloat16
    python benchmarks/gpu_train.py --quick    a tiny one, a few steps; prints only

The integers are the nearest ones, with a scale and a zero point for the least and the largest weight of a group,
because GPTQ's calibration needs GPTQModel. Trainer gets the rows as a list, because `datasets` may not be installed.
It gets its arguments here and not from LoTA.trainer, because their names differ between releases of transformers.
"""
import argparse
import math
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, print_table, save, synchronize
from safetensors.torch import save_file
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, TrainingArguments

import LoTA_QAF_main
from data_print_save import read_messages, set_seed
from LoTA import IGNORE_INDEX
from LoTA.adapter import load_for_training, load_live, load_merged
from LoTA.adapter_folder import AdapterFolder
from LoTA.answer_loss import answer_loss, sum_answer_losses
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.layer import adapter_state
from LoTA.lota_merge import merge_folders
from LoTA.packing import pack_rows
from LoTA.prompts import encode_answer, fit_prompt
from LoTA.settings import complete_training
from LoTA.storage import write_json
from LoTA.trainer import GridTrainer, LotaTrainer, config_of_run, peak_memory_mb, real_optimizer

sys.path.append(str(ROOT / "experiments"))
import demo_data
import tiny_base

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUP, BATCH = 32, 64


@dataclass(frozen=True)
class Size:
    """How much of everything. rate: of the 16-bit model's AdamW."""
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    base_steps: int
    rate: float
    steps: int
    train_rows: int
    test_rows: int
    rank: int


FULL = Size(512, 1408, 8, 8, 1500, 800, 1e-3, 300, 6000, 256, 64)
RECIPES = "lota:published", "lota:full", "lrqat:full"
QUICK = Size(64, 160, 2, 2, 400, 60, 8e-3, 6, 400, 32, 8)


def make_rows(size: Size) -> tuple[list[dict], list[dict]]:
    """(training rows, test rows) of the demo. No sentence occurs twice."""
    rng, rows = random.Random(42), {}
    while len(rows) < size.train_rows + size.test_rows:
        meaning, sentence = demo_data.draw_row(rng)
        rows[sentence] = meaning
    rows = [{"mr": meaning, "ref": sentence} for sentence, meaning in rows.items()]
    return rows[size.test_rows:], rows[:size.test_rows]


def encode(tokenizer, rows: list[dict]) -> list[dict]:
    """The rows as Trainer takes them: input_ids, and labels with IGNORE_INDEX for the prompt."""
    encoded = []
    for row in rows:
        messages, answer = read_messages("viggo", row)
        source, target = fit_prompt(tokenizer, messages, 512)[0], encode_answer(tokenizer, answer)
        encoded.append({"input_ids": source + target, "labels": [IGNORE_INDEX] * len(source) + target})
    return encoded


def train_base(size: Size, tokenizer, rows: list[dict], collate) -> LlamaForCausalLM:
    """The 16-bit model, trained from scratch."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), size.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.rate, size.base_steps, pct_start=0.05)
    rng = random.Random(0)
    for _ in range(size.base_steps):
        batch = collate(rng.sample(rows, BATCH)).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = answer_loss(model, **batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.bfloat16().eval()


def quantize(model: LlamaForCausalLM, tokenizer, folder: Path, bits: int) -> None:
    """Writes the model as a GPTQ folder, with the nearest integers. In a group the weights lie between -s z and
    s (2**bits - 1 - z)."""
    maxq, tensors = 2**bits - 1, {}
    for name, value in model.state_dict().items():
        if value.dim() != 2 or "embed" in name or "lm_head" in name:
            if name != "lm_head.weight":        # it is the embeddings' matrix
                tensors[name] = value.cpu().contiguous()
            continue
        groups = value.float().cpu().t().unflatten(0, (-1, GROUP))          # [groups, GROUP, out]
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scales = ((high - low) / maxq).clamp(min=1e-5).half()
        zeros = (-low / scales.float()).round().clamp(0, maxq)
        integers = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, maxq).flatten(0, 1)
        layer = name.removesuffix(".weight")
        tensors |= {f"{layer}.qweight": pack_rows(integers.int(), bits), f"{layer}.scales": scales,
                    f"{layer}.qzeros": pack_rows(zeros.t().int(), bits).t().contiguous(),
                    f"{layer}.g_idx": torch.arange(len(integers), dtype=torch.int32) // GROUP}
    quantization = {"bits": bits, "group_size": GROUP, "desc_act": False, "sym": False, "quant_method": "gptq",
                    "checkpoint_format": "gptq_v2", "pack_dtype": "int32", "lm_head": False,
                    "meta": {"quantizer": ["gptqmodel:7.7.0"]}}     # whose packing this is
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "quantize_config.json", quantization)
    write_json(folder / "config.json", {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"],
                                        "dtype": "bfloat16", "quantization_config": quantization})
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def loss_of(model, rows: list[dict], collate) -> float:
    """The mean cross entropy of all answer tokens."""
    total, count = 0.0, 0
    for i in range(0, len(rows), BATCH):
        batch = collate(rows[i:i + BATCH]).to(DEVICE)
        labels = batch.pop("labels")
        loss, answers = sum_answer_losses(model, labels, **batch)
        total, count = total + loss.item(), count + answers
    return total / count


def run(tried: str, gptq: Path, work: Path, size: Size, data: tuple[list[dict], list[dict]], collate) -> dict:
    """Trains METHOD:RECIPE, which is `tried`, on the folder `gptq`, merges it, and compares. Returns a row of results.
    """
    folder, (method, recipe) = GPTQFolder(gptq), tried.split(":")
    base, training, _ = LoTA_QAF_main.parse_args(list(map(str, [
        "--mode", 1, "--method", method, "--recipe", recipe, "--quantized_model_dir", gptq, "--pretrained", gptq,
        "--training_data_name", "viggo", "--lora_r", size.rank, "--max_steps", size.steps, "--dtype", "bfloat16"])))
    base, training = complete_training(base, training, folder)
    config = config_of_run(base, training, folder)
    set_seed(base.seed)
    model = load_for_training(base, config, folder)
    before = loss_of(model.eval(), data[1], collate)
    falling = {"learning_rate": training.learning_rate, "lr_scheduler_type": "linear"} if method == "lrqat" else {}
    arguments = TrainingArguments(
        output_dir=str(work / "trainer"), max_steps=size.steps, per_device_train_batch_size=BATCH,
        train_sampling_strategy="group_by_length", logging_steps=max(1, size.steps // 10), save_strategy="no",
        report_to="none", use_cpu=DEVICE == "cpu", dataloader_pin_memory=DEVICE == "cuda", max_grad_norm=0.0,
        seed=base.seed, **falling)
    arguments._n_gpu = min(1, arguments.n_gpu)
    common = {"model": model, "train_dataset": data[0], "args": arguments, "config": config, "data_collator": collate}
    trainer = (LotaTrainer(LoTA_QAF_main.ternary_optimizer(model, base, training), **common) if method == "lota" else
               GridTrainer(real_optimizer(model, base, training, arguments), **common))
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    start = time.perf_counter()
    trainer.train()
    synchronize()
    seconds, peak = time.perf_counter() - start, peak_memory_mb()
    adapter = work / f"adapter_{method}_{recipe}"
    config.save(adapter, complete=False)
    model.save_pretrained(str(adapter), state_dict=adapter_state(model, finished=True), save_embedding_layers=False)
    config.save_adapter(adapter)
    moved = trainer.monitor.moved.shares()
    del model, trainer

    output = work / f"merged_{method}_{recipe}"
    merge_folders(AdapterFolder(adapter), folder, output)
    live = load_live(AdapterFolder(adapter), gptq, dtype=torch.bfloat16)
    merged = load_merged(MergedFolder(output), dtype=torch.bfloat16, backend="gptq_torch").model
    batch = collate(data[1][:BATCH]).to(DEVICE)
    labels = batch.pop("labels")
    with torch.inference_mode():
        ours, theirs = (m(**batch).logits.float()[labels != IGNORE_INDEX] for m in (live, merged))
    return {"recipe": tried, "bits": folder.bits, "weights": sum(math.prod(folder.packed(name).shape)
                                                                  for name in folder.modules), "steps": size.steps,
            "rows of a step": BATCH, "steps / s": size.steps / seconds, "peak MiB": peak, "loss before": before,
            "loss live": loss_of(live, data[1], collate), "loss merged": loss_of(merged, data[1], collate),
            "moved": max(moved.values()), "|live - merged|": (ours - theirs).abs().max().item(),
            "|logit|": ours.abs().max().item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps; prints only")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="METHOD:RECIPE", help=f"[{' '.join(RECIPES)}]")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    set_seed(0)
    rows, test = make_rows(size)
    tokenizer = tiny_base.tokenizer_of("viggo", rows, size.vocabulary)
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    data = encode(tokenizer, rows), encode(tokenizer, test)
    start = time.perf_counter()
    model = train_base(size, tokenizer, data[0], collate)
    loss_16bit = loss_of(model, data[1], collate)
    print(f"the 16-bit model: loss {loss_16bit:.4f} after {time.perf_counter() - start:.0f} s")
    with tempfile.TemporaryDirectory() as work:
        quantize(model, tokenizer, Path(work) / "gptq", args.bits)
        del model
        results = [{"loss 16 bits": loss_16bit, **run(tried, Path(work) / "gptq", Path(work), size, data, collate)}
                   for tried in args.recipes]
    print_table("training, bfloat16", results)
    save("gpu_train", results, args.quick)
    sys.exit(any(row["|live - merged|"] for row in results))


if __name__ == "__main__":
    main()
