"""The integers as a plain GPTQ checkpoint, and the offsets as a LoRA adapter in the subfolder adapter."""
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from tqdm import tqdm

from LoTA import UserError
from LoTA.adapter_folder import PREFIX, AdapterFolder
from LoTA.export import gptq
from LoTA.export.shared import require_equal
from LoTA.folders import MergedFolder
from LoTA.storage import create_safetensors, overwrite_tensor


def write(model: MergedFolder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the checkpoint and the adapter. Raises UserError where the model has no offsets, and so needs no adapter.

    The LoRA adds x @ indicator @ (s * mu). The indicator [in, groups] says which group a row is in, whatever the order
    of the rows, so desc_act needs nothing more.
    """
    modules = model.offset_modules()
    if not modules:
        raise UserError(f"{model.path} has no offsets, and so needs no adapter: --format gptq")
    gptq.write_integers(model, folder)
    adapter = folder / "adapter"
    adapter.mkdir()
    rows = {m: model.shape(f"{m}.g_idx")[0] for m in modules}
    shapes = {m: model.shape(f"{m}.scales") for m in modules}
    ranks = {m: groups for m, (groups, _) in shapes.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {m: r for m, r in ranks.items() if r != rank}
    LoraConfig(r=rank, lora_alpha=rank, rank_pattern=others, alpha_pattern=others, target_modules=modules,
               lora_dropout=0.0, task_type="CAUSAL_LM", inference_mode=True).save_pretrained(adapter)
    file = adapter / "adapter_model.safetensors"
    create_safetensors(file, {f"{PREFIX}{m}.{matrix}.weight": (torch.float32, shape) for m in modules
                              for matrix, shape in (("lora_A", (ranks[m], rows[m])),
                                                    ("lora_B", (shapes[m][1], ranks[m])))})
    for module in tqdm(modules, desc="writing the offsets", unit="layer"):
        for matrix, values in zip(("lora_A", "lora_B"), offset_as_lora(model, module), strict=True):
            overwrite_tensor(file, f"{PREFIX}{module}.{matrix}.weight", values)


def offset_as_lora(model: MergedFolder, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [groups, in], B [out, groups]), float32, with x @ A^T @ B^T = (group sums of x) @ (s * mu)."""
    offset = model.offset(module) * model.tensor(f"{module}.scales").float()
    indicator = torch.nn.functional.one_hot(model.tensor(f"{module}.g_idx").long(), offset.shape[0])
    return indicator.t().float().contiguous(), offset.t().contiguous()


def check(model: MergedFolder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Compares every tensor of the checkpoint and of the adapter. Raises RuntimeError where one differs."""
    gptq.check(model, folder)
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    if names != {f"{PREFIX}{m}.{matrix}.weight" for m in model.offset_modules() for matrix in ("lora_A", "lora_B")}:
        raise RuntimeError(f"{folder}/adapter does not hold the merged model's offsets")
    adapter = AdapterFolder(folder / "adapter")
    for module in tqdm(adapter.modules, desc="verifying the offsets", unit="layer"):
        for written, expected in zip(adapter.matrices(module), offset_as_lora(model, module), strict=True):
            require_equal(module, "offset", written.t(), expected)
