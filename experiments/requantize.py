"""A baseline: a LoRA adapter is merged into 16 bits, and the sum is quantized again with GPTQ.

    python experiments/requantize.py --adapter ADAPTER --output DIR
    python experiments/requantize.py --adapter ADAPTER --output DIR --tune_scales "--max_steps 160 --scale_lr 0.03"

ADAPTER is a LoRA adapter of mode 1, trained on a GPTQ model. DIR gets

    dense/NAME_lora          the dequantized GPTQ weights + alpha / r * A @ B, in 16 bits
    gptq/intB_G_NAME_lora    these weights, quantized as ADAPTER's GPTQ model was: its lota_quantize.json says the bits,
                             the group size and the calibration
    scales/...               with --tune_scales: the adapter of the tuned scales
    tuned                    with --tune_scales: the same integers with the tuned scales, a plain GPTQ model

NAME is that of the 16-bit model. Mode 2 evaluates both results: --quantized_model_dir DIR/gptq/... and --load_adapter
DIR/tuned.
"""
import argparse
from pathlib import Path

import torch

import gptq_quantize
import LoTA_QAF_main
from LoTA import UserError, run_script
from LoTA.adapter_folder import AdapterFolder, LotaConfig
from LoTA.export.run import export
from LoTA.folders import GPTQFolder
from LoTA.lota_merge import merge_folders
from LoTA.storage import read_json

# Scales are tuned beside ternary adapters of this rank. An integer steps where |dW| passes omega = r - 1/2, so where
# all r entries of a column of B have moved. At this sigma a step moves about one entry of a layer's B.
# tune_scales() checks that no integer stepped.
RANK = 64
SIGMA = 1 - 2**-53          # the largest number below 1
STILL = {"method": "lota", "recipe": "scales", "lora_r": RANK, "interval_point": RANK - 0.5, "filter_ratio": SIGMA,
         "min_grad": SIGMA, "filter_upper": SIGMA}
# What the tuning of scales takes from the training of the adapter, where --tune_scales does not say it.
AS_TRAINED = ("pretrained", "data_dir", "data_columns", "data_split", "data_config", "prompt_template",
              "prompt_layout", "dtype", "device_map", "flash_attn", "trust_remote_code", "seed", "lora_target_modules",
              "training_data_name", "train_turns", "train_ratio", "debug_number", "num_train_epochs",
              "max_steps", "train_batch_size", "gradient_accumulation_steps", "source_max_len", "target_max_len",
              "distill", "distill_weight", "distill_model", "gradient_checkpointing", "logging_steps", "save_strategy")


def requantize(adapter: AdapterFolder, gptq: Path, output: Path, flags: list[str],
               dtype: torch.dtype | None = None) -> Path:
    """Merges `adapter` into the 16-bit weights of the GPTQ folder `gptq`, and quantizes them. Returns the new folder.

    flags: more flags for gptq_quantize.py. dtype: of the merged weights; None: the model's own.
    Raises UserError where the adapter is no LoRA, and where neither the GPTQ folder nor a flag says the calibration.
    """
    if adapter.config.method != "LoRA":
        raise UserError(f"{adapter.path} is a {adapter.config.method} adapter, which merges into its GPTQ model "
                        "without loss: python -m LoTA.lota_merge")
    quantization = quantization_flags(GPTQFolder(gptq))
    if not any(flag.startswith("--calibration") for flag in quantization + flags):
        raise UserError(f"{gptq} has no {gptq_quantize.PROVENANCE}, and so does not say its calibration: give "
                        "--quantize \"--calibration FILE\"")
    dense = output / "dense" / f"{name_of(gptq)}_lora"
    export(adapter, "dense", dense, dtype, verify=True, gptq=gptq)
    return gptq_quantize.main(["--model", str(dense), "--output_dir", str(output / "gptq"), *quantization, *flags])


def quantization_flags(folder: GPTQFolder) -> list[str]:
    """The flags of gptq_quantize.py that made a GPTQ folder. Of a folder of others: bits, group size, sym, desc_act."""
    record = folder.path / gptq_quantize.PROVENANCE
    settings = read_json(record)["settings"] if record.exists() else {
        "bits": folder.bits, "group_size": folder.group_size, "sym": bool(folder.config.get("sym")),
        "desc_act": bool(folder.config.get("desc_act"))}
    return flags_of({name: value for name, value in settings.items() if name not in ("model", "output_dir")},
                    switches=True)


def name_of(gptq: Path) -> str:
    """The name of the 16-bit model of a GPTQ folder, where its record says it, else the folder's own."""
    record = gptq / gptq_quantize.PROVENANCE
    return Path(read_json(record)["settings"]["model"]).name if record.exists() else gptq.resolve().name


def tune_scales(gptq: Path, trained: LotaConfig, output: Path, flags: list[str]) -> Path:
    """Trains the scales of a GPTQ folder as an adapter was trained, and merges them. Returns the folder output/tuned.

    trained: the adapter's LotaConfig. flags: more flags of mode 1, which win.
    Raises RuntimeError where an integer moved, because then more than the scales would have been tuned.
    """
    settings = {name: value for name, value in trained.settings.items() if name in AS_TRAINED}
    if trained.chat_template is not None:               # the record has the text, and the flag wants a file
        output.mkdir(parents=True, exist_ok=True)
        settings["chat_template"] = output / "chat_template.jinja"
        settings["chat_template"].write_text(trained.chat_template, encoding="utf-8")
    base, training, _ = LoTA_QAF_main.parse_args([
        "--mode", "1", *flags_of({**settings, **STILL}), *flags, "--quantized_model_dir", str(gptq), "--adapter_path",
        str(output / "scales")])
    adapter = AdapterFolder(LoTA_QAF_main.train(base, training))
    moved = adapter.config.training["moved"]["all"]
    if moved:
        raise RuntimeError(f"{adapter.path} moves {moved:.2%} of the integers, and the scales alone were to be tuned")
    merge_folders(adapter, GPTQFolder(gptq), output / "tuned")
    return output / "tuned"


def flags_of(settings: dict, switches: bool = False) -> list[str]:
    """{"name": value} as flags of a command line. None is left out. switches: True is a flag without a value."""
    flags = []
    for name, value in settings.items():
        if value is None or switches and value is False:
            continue
        values = [] if switches and value is True else value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="the LoRA adapter, a folder of mode 1")
    parser.add_argument("--output", required=True, help="the folder DIR")
    parser.add_argument("--gptq", help="the adapter's GPTQ model [the one that it names]")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
                        help="the dtype of the merged weights [the model's own]")
    parser.add_argument("--quantize", default="", metavar="FLAGS",
                        help="more flags of gptq_quantize.py, in one text; they win over the record")
    parser.add_argument("--tune_scales", nargs="?", const="", metavar="FLAGS",
                        help="also tune the scales, on the data and with the length of the adapter's training; FLAGS "
                             "are flags of mode 1 that win, in one text")
    args = parser.parse_args()
    adapter, output = AdapterFolder(args.adapter), Path(args.output)
    requantized = requantize(adapter, Path(adapter.gptq_path(args.gptq)), output, args.quantize.split(),
                             getattr(torch, args.dtype) if args.dtype else None)
    print(f"requantized: {requantized}")
    if args.tune_scales is not None:
        print(f"scales tuned: {tune_scales(requantized, adapter.config, output, args.tune_scales.split())}")


if __name__ == "__main__":
    run_script(main)
