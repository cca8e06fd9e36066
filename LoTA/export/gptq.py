"""A plain GPTQ checkpoint: the merged integers as they are, without offsets."""
from pathlib import Path

import torch
from tqdm import tqdm

from LoTA import UserError
from LoTA.export.shared import copy_files, require_equal
from LoTA.folders import LOTA_FORMAT, GPTQFolder, MergedFolder, set_checkpoint_format


def write(model: MergedFolder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the checkpoint. Raises UserError where the model has offsets."""
    if model.offset_modules():
        raise UserError(f"{model.path} has offsets, which GPTQ's integer zero points cannot hold: --format peft, gguf "
                        "or dense keep them; adapters trained with --residual False have none")
    write_integers(model, folder)


def write_integers(model: MergedFolder, folder: Path) -> None:
    """Writes the merged integers as a GPTQ checkpoint and leaves the offsets out."""
    copy_files(model, folder, weights=True)
    set_checkpoint_format(folder, model.checkpoint_format)


def check(model: MergedFolder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Opens the folder as any GPTQ checkpoint and compares every tensor. Raises RuntimeError where one differs."""
    written = GPTQFolder(folder)
    if set(written.file_of) != set(model.file_of) or written.checkpoint_format == LOTA_FORMAT:
        raise RuntimeError(f"{folder} does not hold the merged model's tensors")
    for name in tqdm(written.file_of, desc="verifying", unit="tensor"):
        require_equal(name, "tensor", written.tensor(name), model.tensor(name))
