"""The model without quantization: every weight rounded to one dtype, in shards, as transformers saves it."""
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig

from LoTA.export.shared import copy_files, require_equal
from LoTA.folders import LAYER_TENSORS, GPTQFolder
from LoTA.storage import create_safetensors, overwrite_tensor, read_json, write_json

SHARD_BYTES = 5 * 10**9


def dense_tensors(model: GPTQFolder, dtype: torch.dtype | None) -> dict[
        str, tuple[torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """{name: (dtype, shape, a function that returns the tensor)}. dtype None is config.json's, else bfloat16."""
    dtype = dtype or AutoConfig.from_pretrained(model.path).dtype or torch.bfloat16
    tensors = {}
    for name in sorted(model.file_of):
        module, _, role = name.rpartition(".")
        if module in model.modules and role in LAYER_TENSORS:
            if role == "qweight":
                cols, rows = model.shape(f"{module}.scales")[1], model.shape(f"{module}.g_idx")[0]
                tensors[f"{module}.weight"] = (dtype, (cols, rows),
                                               lambda m=module: model.weight(m).t().contiguous().to(dtype))
        else:
            own = model.tensor(name)
            tensors[name] = (own.dtype, tuple(own.shape), lambda n=name: model.tensor(n))
    return tensors


def write(model: GPTQFolder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the weights in shards of at most SHARD_BYTES, and a config.json without quantization."""
    copy_files(model, folder)
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    tensors = dense_tensors(model, dtype)
    weight = next(dtype for name, (dtype, _, _) in tensors.items() if name.removesuffix(".weight") in model.modules)
    config["dtype"] = str(weight).removeprefix("torch.")
    write_json(folder / "config.json", config)

    shards, size = [{}], 0
    for name, (tensor_dtype, shape, _) in tensors.items():
        count = tensor_dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and size + count > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor_dtype, shape
        size += count
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        create_safetensors(folder / file, shard)
        for name in tqdm(shard, desc=f"writing {file}", unit="tensor"):
            overwrite_tensor(folder / file, name, tensors[name][2]())
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {
            name: file for file, shard in zip(names, shards, strict=True) for name in shard}})


def check(model: GPTQFolder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Compares every tensor. Raises RuntimeError where one differs."""
    tensors, seen = dense_tensors(model, dtype), set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as written:
            for name in tqdm(written.keys(), desc=f"verifying {file.name}", unit="tensor"):
                if name in tensors:
                    require_equal(name, "weight", written.get_tensor(name), tensors[name][2]())
                seen.add(name)
    if seen != set(tensors):
        raise RuntimeError(f"{folder} does not hold the merged model's tensors")
