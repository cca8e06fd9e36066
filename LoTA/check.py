"""Checks that a folder is whole: a merged model, an adapter, a GPTQ model or an export.

    python -m LoTA.check FOLDER

Every file is compared with the checksum that was recorded when the folder was written. Of a model or an adapter the
names, dtypes and shapes of all tensors are checked too, and the GPTQ model that it names, where that is on this
machine. It prints one line for each finding and exits with 1, or prints "whole: N files". It loads no model.
"""
import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from LoTA import UserError, run_script

# Torch is imported in the functions that need it, so that --help answers at once.
if TYPE_CHECKING:
    from LoTA.adapter_folder import LotaConfig
    from LoTA.folders import GPTQFolder


class Report:
    """What check_folder() found.

    findings: one line for each thing that is wrong. notes: one line for each comparison that could not be made.
    files: the number of files that were looked at.
    """

    def __init__(self):
        self.findings: list[str] = []
        self.notes: list[str] = []
        self.files = 0


def check_folder(path: str | Path) -> Report:
    """Checks one folder. Raises UserError where it is none of the kinds that it knows."""
    from safetensors import SafetensorError

    from LoTA.export.shared import MARKER
    from LoTA.folders import is_merged
    path, report = Path(path), Report()
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    check = (_check_export if (path / MARKER).exists() else _check_merged if is_merged(path) else
             _check_adapter if (path / "adapter_config.json").exists() else _check_gptq)
    try:
        check(report, path)
    except (UserError, OSError, SafetensorError) as error:      # what refuses a folder is a finding like the others
        report.findings.append(str(error).splitlines()[0])
    return report


def _check_export(report: Report, path: Path) -> None:
    from LoTA.export.shared import MARKER, ExportRecord
    _compare_files(report, path, ExportRecord.load(path).sha256, MARKER)


def _check_gptq(report: Report, path: Path) -> None:
    from LoTA.folders import GPTQFolder
    report.files = len(set(GPTQFolder(path).file_of.values()))
    report.notes.append("a GPTQ model records no checksums, so there is nothing to compare its values with; an adapter "
                        "of it has a fingerprint of them")


def _compare_files(report: Report, root: Path, recorded: dict[str, str], marker: str,
                   only: tuple[str, ...] | None = None) -> None:
    """Compares the files below `root` with `recorded`. only: the files that are recorded, where not all are."""
    from LoTA.storage import differences, files_below
    present = [name for name in files_below(root) if name != marker and (only is None or name in only)]
    report.files = len(present) + (root / marker).exists()
    if not recorded:
        report.notes.append("it records no checksums, because it was made before they were: there is nothing to "
                            "compare its bytes with")
        return
    report.findings += differences(root, recorded)
    report.findings += [f"{name} was not there when the folder was written" for name in present
                        if name not in recorded]


def _check_merged(report: Report, path: Path) -> None:
    from LoTA.adapter_folder import LotaConfig
    from LoTA.folders import LOTA_SUBFOLDER, MARKER, MergedFolder
    _compare_files(report, path, LotaConfig.load(path / LOTA_SUBFOLDER).sha256, MARKER)
    if report.findings:                 # of a damaged file the tensors say nothing more
        return
    merged = MergedFolder(path)
    base = _base(report, merged.lota)
    if base is not None:
        other = merged.lota.other_weights(base)
        if other:
            report.findings.append(f"{base.path} has other {other} than those that it was trained on (fingerprints "
                                   "differ)")
        report.findings += [f"{name} is in only one of the merged model and its GPTQ model {base.path}"
                            for name in sorted(set(merged.file_of) ^ set(base.file_of))]


def _check_adapter(report: Report, path: Path) -> None:
    from LoTA.adapter_folder import ADAPTER_FILES, LOTA_CONFIG, AdapterFolder, LotaConfig
    recorded = LotaConfig.load(path).sha256 if (path / LOTA_CONFIG).exists() else {}
    gone = [name for name in recorded if name not in ADAPTER_FILES and not (path / name).exists()]
    if gone:                            # an adapter is whole without it
        report.notes.append(f"{', '.join(gone)} is not here, so training cannot be resumed from this folder")
    recorded = {name: value for name, value in recorded.items() if name not in gone}
    _compare_files(report, path, recorded, LOTA_CONFIG, (*ADAPTER_FILES, *recorded))
    if report.findings:
        return
    adapter = AdapterFolder(path)
    base = _base(report, adapter.config)
    if base is not None:
        adapter.check_match(base)


def _base(report: Report, config: "LotaConfig") -> "GPTQFolder | None":
    """The GPTQ model that a record names, checked; None, and a note, where it is not on this machine."""
    from LoTA.folders import open_base
    name = config.quantized_model_dir
    if name is None or not Path(name).is_dir():
        report.notes.append(f"its GPTQ model ({name or 'not named'}) is not here, and was not compared")
        return None
    return open_base(name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m LoTA.check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="a merged model, an adapter, a GPTQ model or an export")
    args = parser.parse_args()
    report = check_folder(args.folder)
    for note in report.notes:
        print(f"note: {note}")
    for finding in report.findings:
        print(finding)
    if report.findings:
        sys.exit(1)
    print(f"whole: {report.files} files")


def cli() -> None:
    """The console command lota-check."""
    run_script(main)


if __name__ == "__main__":
    cli()
