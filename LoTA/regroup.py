"""A GPTQ model with finer groups: the same integers, and each group's scale and zero point once for each of its parts.

QA-LoRA may pool fewer inputs than a GPTQ group has. Then a group has several offsets, and a merged model has room for
one. So the groups are cut into parts first. Every weight stays equal, bit for bit. Touches files, a tensor at a time.
"""
from pathlib import Path

import torch
from tqdm import tqdm

from LoTA import UserError
from LoTA.folders import (
    GPTQFolder,
    copy_other_files,
    set_quantization,
)
from LoTA.storage import create_safetensors, overwrite_tensor

KERNEL_SIZES = (16, 32, 64, 128, 256, 512, 1024)        # the group sizes that GPTQModel's plain torch kernel takes


def regroup(source: GPTQFolder, size: int, folder: Path) -> GPTQFolder:
    """Writes `source` with groups of `size` inputs into `folder`, which must not exist, and opens it.

    size: a divisor of the group size of `source`. Raises UserError where a layer's groups are not in the order of its
    inputs (desc_act), RuntimeError where what was written has another weight than `source`.
    """
    folder.mkdir()
    weights = sorted(set(source.file_of.values()))
    copy_other_files(source, folder)
    set_quantization(folder, "group_size", size)
    for file in weights:
        names = [name for name, its_file in source.file_of.items() if its_file == file]
        create_safetensors(folder / file.name, {name: (source.dtype(name), _new_shape(source, name, size))
                                                for name in names})
        for name in tqdm(names, desc=f"cutting the groups of {file.name}", unit="tensor", leave=False):
            overwrite_tensor(folder / file.name, name, _cut(source, name, size))
    finer = GPTQFolder(folder)
    for module in source.modules:
        if not torch.equal(source.weight(module), finer.weight(module)):
            raise RuntimeError(f"{module}: the weights with finer groups differ from the model's")
    return finer


def _is_of_groups(source: GPTQFolder, name: str) -> bool:
    """Whether a tensor has a row for each group."""
    module, _, kind = name.rpartition(".")
    return kind in ("scales", "qzeros") and f"{module}.qweight" in source.file_of


def _new_shape(source: GPTQFolder, name: str, size: int) -> tuple[int, ...]:
    shape = source.shape(name)
    if not _is_of_groups(source, name):
        return shape
    rows, = source.shape(f"{name.rpartition('.')[0]}.g_idx")
    return -(-rows // size), shape[1]


def _cut(source: GPTQFolder, name: str, size: int) -> torch.Tensor:
    """A tensor of the model with finer groups: a row of the old group for each part of it."""
    tensor, (module, _, kind) = source.tensor(name), name.rpartition(".")
    if kind == "g_idx" and f"{module}.qweight" in source.file_of:
        return torch.arange(len(tensor), dtype=tensor.dtype) // size
    if not _is_of_groups(source, name):
        return tensor
    g_idx = source.tensor(f"{module}.g_idx").long()
    if bool((g_idx[1:] < g_idx[:-1]).any()):
        raise UserError(f"{source.path}: the groups of {module} are not in the order of its inputs (desc_act), so they "
                        f"cannot be cut into groups of {size}")
    return tensor[g_idx[::size]]
