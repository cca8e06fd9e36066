"""Exports a merged model: folder in, folder out, one tensor in memory at a time."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from LoTA import UserError
from LoTA.adapter_folder import AdapterFolder
from LoTA.export import FORMATS
from LoTA.export.card import write_model_card
from LoTA.export.shared import MARKER, ExportRecord
from LoTA.folders import LoraFolder, MergedFolder, is_merged, open_base
from LoTA.lota_merge import merge_folders
from LoTA.storage import check_output_folder, checksums, files_below, temporary_folder, whole_folder


def export(source: str | Path | MergedFolder | AdapterFolder, format: str, output: str | Path,
           dtype: torch.dtype | None = None, evaluation: dict | None = None, verify: bool = False,
           gptq: str | Path | None = None) -> None:
    """Writes `source`, a merged folder or an adapter folder, in `format` to the folder `output`.

    dtype: of dense weights; None takes the model's own. evaluation: results of mode 2, quoted in the model card.
    verify: reads everything back and compares it with the source.
    gptq: the GPTQ model of an adapter; None takes the one that the adapter names.
    Raises UserError where the format cannot hold the model, RuntimeError where the verification fails.
    """
    if format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, not '{format}'")
    check_output_folder(output, MARKER)
    module = FORMATS[format].load()
    with opened(source, format, gptq) as model, whole_folder(output, MARKER) as folder:
        module.write(model, folder, dtype)
        if verify:
            module.check(model, folder, dtype)
        write_model_card(folder, Path(output).name, model, FORMATS[format], evaluation)
        origin = Path(getattr(source, "path", source)).resolve()
        ExportRecord(format, str(origin), verify, checksums(folder, files_below(folder))).save(folder)


@contextmanager
def opened(source: str | Path | MergedFolder | AdapterFolder, format: str,
           gptq: str | Path | None = None) -> Iterator[MergedFolder | LoraFolder]:
    """The model to export: a merged folder, an adapter merged into a temporary folder, or a LoraFolder."""
    if isinstance(source, str | Path):
        if not is_merged(source) and not (Path(source) / "adapter_config.json").exists():
            raise UserError(f"{source} is neither a merged folder nor an adapter folder")
        source = MergedFolder(source) if is_merged(source) else AdapterFolder(source)
    source.require_whole()
    if isinstance(source, MergedFolder):
        yield source
        return
    adapter, gptq = source, source.gptq_path(gptq)
    if adapter.config.method == "LoRA":
        if not FORMATS[format].holds_lora:
            able = " or ".join(name for name, entry in FORMATS.items() if entry.holds_lora)
            raise UserError(f"{adapter.path} is a LoRA adapter: it moves every weight by another amount, which no "
                            f"low-bit grid holds; --format {able} writes the dequantized sum")
        model = LoraFolder(gptq, adapter)
        adapter.check_match(model)
        yield model
        return
    with temporary_folder() as temporary:
        merge_folders(adapter, open_base(gptq), temporary / "merged")
        yield MergedFolder(temporary / "merged")
