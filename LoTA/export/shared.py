"""What the formats share: copying a model's own files, and comparing what was written."""
from pathlib import Path

import torch

from LoTA.folders import QUANTIZE_CONFIG, GPTQFolder, copy_own_file

MARKER = "lota_export.json"         # written last, so it says that a folder is a whole export of ours


def copy_files(model: GPTQFolder, folder: Path, weights: bool = False) -> None:
    """Copies a model's own files into `folder`. weights: also those that hold or describe the quantized weights."""
    for item in sorted(model.path.iterdir()):
        is_weights = item.suffix == ".safetensors" or item.name in ("model.safetensors.index.json", QUANTIZE_CONFIG)
        if item.is_file() and (weights or not is_weights) and item.name not in (MARKER, "README.md"):
            copy_own_file(item, folder)


def require_equal(module: str, what: str, written: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises RuntimeError unless two tensors are the same bits: a defect of this program or of the disk."""
    if written.dtype != expected.dtype or not torch.equal(written, expected):
        raise RuntimeError(f"{module}: the {what} that was written differs from the merged model's")
