"""Shared by the tests: small GPTQ and adapter folders made at random, and a tiny model quantized by GPTQModel."""
import os

# Before torch is imported: a second thread only adds contention on tensors this small.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from LoTA.folders import GPTQFolder, LotaConfig
from LoTA.packing import pack_rows

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when the kernels are defined, at import

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "runs"))
PREFIX = "base_model.model."
LAYERS = {"model.layers.0.self_attn.q_proj": (64, 48), "model.layers.0.mlp.down_proj": (80, 64),
          "model.layers.1.self_attn.q_proj": (64, 48)}


def write_gptq(folder, bits=4, group_size=32, desc_act=False, checkpoint_format="gptq", shards=1, seed=0):
    """A GPTQ folder with random integers in LAYERS, and one tensor that is not quantized."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(16, 64, generator=generator).half()}
    for name, (rows, cols) in LAYERS.items():
        groups = -(-rows // group_size)
        g_idx = torch.arange(rows, dtype=torch.int32) // group_size
        if desc_act:
            g_idx = g_idx[torch.randperm(rows, generator=generator)]
        zeros = torch.randint(0, 2**bits, (groups, cols), generator=generator)
        if checkpoint_format == "gptq":                 # stores z - 1
            zeros = (zeros - 1).clamp(min=0)
        # int32 words, as all of the rows of a file of GPTQModel; odd columns are filled up by the packing
        tensors[f"{name}.qweight"] = pack_rows(torch.randint(0, 2**bits, (rows, cols), generator=generator), bits)
        tensors[f"{name}.qzeros"] = pack_rows(zeros.t().contiguous(), bits).t().contiguous()
        tensors[f"{name}.scales"] = (torch.rand(groups, cols, generator=generator) + 0.5).half()
        tensors[f"{name}.g_idx"] = g_idx
    folder.mkdir(parents=True)
    config = {"bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": False, "quant_method": "gptq",
              "checkpoint_format": checkpoint_format}
    (folder / "quantize_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        weight_map = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)}
        for file in set(weight_map.values()):
            save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_adapter(folder, gptq, rank=8, omega=3.0, residual=True, offset_scale="omega", seed=1, with_config=True,
                  learned_scales=False):
    """An adapter folder with random ternary matrices, and changes of the scales, for every layer of `gptq`."""
    generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, cols) in LAYERS.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randint(-1, 2, (rank, rows), generator=generator).float()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randint(-1, 2, (cols, rank), generator=generator).float()
        if learned_scales:
            groups = GPTQFolder(gptq).shape(f"{name}.scales")
            tensors[f"{PREFIX}{name}.lora_scale"] = 0.2 * torch.randn(groups, generator=other)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 2 * rank, "peft_type": "LORA"}))
    if with_config:
        source = GPTQFolder(gptq)
        LotaConfig(omega=omega, residual=residual, offset_scale=offset_scale, learned_scales=learned_scales,
                   bits=source.bits,
                   group_size=source.group_size, rank=rank, quantized_model_dir=str(gptq),
                   fingerprint=source.fingerprint()).save(folder)
    return folder


def run_main(module, *arguments):
    """Runs a script's main() in this process with a command line."""
    before = sys.argv
    sys.argv = [module.__name__, *map(str, arguments)]
    try:
        return module.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """The demo's data set, small: a folder with train.csv and test.csv."""
    import demo_data
    folder = tmp_path_factory.mktemp("data")
    run_main(demo_data, "--output", folder, "--train_rows", 1000, "--test_rows", 40)
    return folder


@pytest.fixture(scope="session")
def base_model(tmp_path_factory, demo_data):
    """A tiny Llama that has learned a little, saved as the script saves it."""
    import tiny_base
    folder = tmp_path_factory.mktemp("base")
    run_main(tiny_base, "--data_name", "viggo", "--data_dir", demo_data, "--output", folder, "--hidden_size", 64,
             "--intermediate_size", 160, "--layers", 2, "--heads", 2, "--vocab_size", 400, "--epochs", 10,
             "--batch_size", 16, "--learning_rate", 2e-3)
    return folder


@pytest.fixture(scope="session")
def quantize(tmp_path_factory, base_model, demo_data):
    """A function (bits, *flags) -> GPTQ folder made by gptq_quantize.py; every combination is made once."""
    import gptq_quantize
    made = {}

    def quantize(bits, *flags):
        if (bits, *flags) not in made:
            output = tmp_path_factory.mktemp("gptq")
            run_main(gptq_quantize, "--model", base_model, "--bits", bits, "--group_size", 32, "--calibration",
                     "viggo", "--data_dir", demo_data, "--samples", 8, "--output_dir", output, *flags)
            made[bits, *flags] = next(output.iterdir())
        return made[bits, *flags]
    return quantize
