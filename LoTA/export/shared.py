"""What the formats share: the record of an export, copying a model's own files, and comparing what was written."""
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from LoTA import UserError
from LoTA.folders import QUANTIZE_CONFIG, GPTQFolder, copy_own_file
from LoTA.storage import read_json, read_record, record_checksum, write_json

NO_CODE = "an export runs none; --format gptq or peft keeps the files as they are, and so does dense with --dtype"
MARKER = "lota_export.json"         # written last, so it says that a folder is a whole export of ours


@dataclass(frozen=True)
class ExportRecord:
    """lota_export.json. sha256: {file: SHA-256}; empty: made before they were recorded."""
    format: str
    source: str
    verified: bool
    sha256: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes lota_export.json into `folder`, with a checksum of its own content among the others."""
        content = asdict(self)
        content["sha256"][MARKER] = record_checksum(content, MARKER)
        write_json(folder / MARKER, content)

    @classmethod
    def load(cls, folder: Path) -> "ExportRecord":
        """Reads lota_export.json. Raises UserError where its content is not what was written."""
        content = read_json(folder / MARKER)
        record = read_record(folder / MARKER, cls, content)
        own = record.sha256.pop(MARKER, None)
        # A field of another name is a damaged name: a lost "sha256" would look like a record without checksums.
        if set(content) - {f.name for f in fields(cls)} or own not in (None, record_checksum(content, MARKER)):
            raise UserError(f"{folder / MARKER} has other content than what was written; export again")
        return record


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
