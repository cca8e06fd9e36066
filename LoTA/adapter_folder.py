"""Adapter folders: what lota_config.json records, the matrices, and the check that an adapter fits a GPTQ model.

Touches files. Knows nothing of GPTQModel or PEFT, loads no model and unpickles nothing.
"""
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from LoTA import UserError
from LoTA.storage import checksums, read_json, require_unchanged, write_json
from LoTA.ternary import Threshold

LOTA_CONFIG = "lota_config.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")        # what PEFT writes
PREFIX = "base_model.model."        # PEFT puts it before the name of every adapted layer
# The name of an adapter folder: 8B_int4_LoTA_48_0.950_0.999_alpaca_...
ADAPTER_NAME = re.compile(r"(?P<size>[\d.]+[BM])_int(?P<bits>\d)_(?P<method>LoTA|LoRA|QA-LoRA)_(?P<first>[^_]+)_[^_]+"
                          r"_[^_]+_(?P<data_set>[^_]+)")


@dataclass(frozen=True)
class LotaConfig:
    """lota_config.json: how an adapter was trained, and so how it must be read."""
    method: str = "LoTA"                        # LoTA, LoRA or QA-LoRA
    omega: float | None = None                  # None for LoRA and QA-LoRA
    residual: bool = True                       # whether there is an offset mu
    offset_scale: str = "omega"                 # "omega": kappa = omega; "paper": kappa = 1; "learned": a parameter
    learned_scales: bool = False
    bits: int | None = None
    group_size: int | None = None
    rank: int | None = None
    pretrained: str | None = None
    quantized_model_dir: str | None = None
    fingerprint: str | None = None              # of the GPTQ weights it was trained on; None: not known
    base_format: str | None = None              # merged folders only: the checkpoint_format of the integers
    data_set: str | None = None
    seed: int | None = None
    settings: dict = field(default_factory=dict)        # all flags
    versions: dict = field(default_factory=dict)        # {package: version}
    training: dict = field(default_factory=dict)        # runtime_s, peak_mb, steps, loss, moved
    fingerprint_all: str | None = None          # "all:...": of every tensor, so of embeddings and norms too
    sha256: dict = field(default_factory=dict)          # {file: SHA-256}; empty: made before they were recorded
    format_version: int = 1

    @property
    def threshold(self) -> Threshold:
        """How a LoTA adapter's dW becomes a step and an offset. The baselines have no omega, and so no threshold."""
        return make_threshold(self.omega, self.residual, self.offset_scale)

    @property
    def learned_offset(self) -> bool:
        """Whether mu is a parameter of the adapter."""
        return self.method == "LoTA" and self.residual and self.offset_scale == "learned"

    def other_weights(self, source: "QuantizedModel") -> str | None:
        """What of `source` differs by the recorded fingerprints; None where nothing does, or none is recorded."""
        if self.fingerprint_all is None:                            # folders made before have the other one only
            differs = self.fingerprint is not None and self.fingerprint != source.fingerprint()
            return "GPTQ weights" if differs else None
        quantized, everything = source.fingerprints()
        if self.fingerprint not in (None, quantized):
            return "GPTQ weights"
        return "embeddings, norms or biases" if self.fingerprint_all != everything else None

    def record(self) -> "AdapterRecord":
        """What mode 2 prints and saves about an adapter."""
        return AdapterRecord(**{f.name: getattr(self, f.name) for f in fields(AdapterRecord)})

    def save(self, folder: str | Path) -> None:
        """Writes lota_config.json into `folder`. With checksums it gets one of its own."""
        content = asdict(self)
        if self.sha256:
            content["sha256"] = {**self.sha256, LOTA_CONFIG: _own_checksum(content)}
        write_json(Path(folder) / LOTA_CONFIG, content)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes lota_config.json into an adapter folder, with the checksums of the files that are loaded."""
        replace(self, sha256=checksums(folder, ADAPTER_FILES)).save(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "LotaConfig":
        """Reads lota_config.json from `folder`.

        Raises UserError where its format_version is another, or its content is not what was written.
        """
        content = read_json(Path(folder) / LOTA_CONFIG)
        if content.get("format_version") != cls.format_version:
            raise UserError(f"{folder}/{LOTA_CONFIG} has format version {content.get('format_version')}; this "
                            f"version of LoTA reads {cls.format_version}")
        own = content.get("sha256", {}).pop(LOTA_CONFIG, None)
        # Every version that writes fingerprint_all writes sha256 too. Where it is gone, its name was changed.
        lost = "fingerprint_all" in content and "sha256" not in content
        if lost or own not in (None, _own_checksum(content)):
            raise UserError(f"{folder}/{LOTA_CONFIG} has other content than what was written; copy the folder again "
                            "or make it again")
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in content.items() if k in known})


def _own_checksum(content: dict) -> str:
    """SHA-256 of lota_config.json's content. The base models' paths are left out, because users move folders."""
    kept = {key: value for key, value in content.items() if key not in ("pretrained", "quantized_model_dir")}
    kept["sha256"] = {name: value for name, value in content.get("sha256", {}).items() if name != LOTA_CONFIG}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class AdapterRecord:
    """The facts of a LotaConfig that a reader of results needs. They are saved beside the settings."""
    method: str
    rank: int | None
    omega: float | None
    residual: bool
    offset_scale: str
    learned_scales: bool
    data_set: str | None
    seed: int | None


def make_threshold(omega: float, residual: bool, offset_scale: str) -> Threshold:
    """The Threshold that the flags --interval_point, --residual and --offset_scale ask for.

    Raises UserError for an unknown offset_scale.
    """
    kappas = {"omega": omega, "paper": 1.0, "learned": None}        # learned: mu does not come from Eq. 4
    if offset_scale not in kappas:
        raise UserError(f"--offset_scale must be omega, paper or learned, not '{offset_scale}'")
    return Threshold(omega=float(omega), kappa=kappas[offset_scale] if residual else None)


def check_resumable(checkpoint: str | Path, config: LotaConfig) -> None:
    """Raises UserError unless `checkpoint` is whole and agrees with `config` in the fields that are compared below."""
    checkpoint = Path(checkpoint)
    if not (checkpoint / LOTA_CONFIG).exists():
        raise UserError(f"--adapter_ckpt {checkpoint} is not whole (it has no {LOTA_CONFIG}, which is written last); "
                        "take an earlier checkpoint")
    saved = LotaConfig.load(checkpoint)
    for name in ("method", "rank", "omega", "residual", "offset_scale", "learned_scales", "bits", "fingerprint"):
        if getattr(saved, name) != getattr(config, name):
            raise UserError(f"--adapter_ckpt {checkpoint} cannot be resumed with these settings: its {name} is "
                            f"{getattr(saved, name)}, not {getattr(config, name)}")
    if saved.fingerprint_all not in (None, config.fingerprint_all):
        raise UserError(f"--adapter_ckpt {checkpoint} cannot be resumed on this GPTQ model: its embeddings, norms or "
                        "biases are others (fingerprints differ)")


class QuantizedModel(Protocol):
    """What check_match() asks of a GPTQ model on disk. LoTA.folders.GPTQFolder is one."""
    path: Path
    bits: int
    group_size: int
    modules: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...

    def fingerprint(self) -> str: ...

    def fingerprints(self) -> tuple[str, str]: ...


class AdapterFolder:
    """An adapter folder, opened once: its LotaConfig as `config`, and its matrices, read one layer at a time.

    modules: the names of the adapted layers. peft_config: the content of adapter_config.json.

    A folder without lota_config.json comes from the published scripts. Its name, or for a checkpoint its parent's name,
    says the method, the bits and omega. Without such a name, ternary matrices mean LoTA, with `omega` (None: 0.75 r).
    No name records whether there is an offset, so `residual` says it (None: True).
    Raises UserError where the folder is no adapter.
    """

    def __init__(self, path: str | Path, omega: float | None = None, residual: bool | None = None):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not an adapter folder: there is no such folder")
        for name in ADAPTER_FILES:
            if not (self.path / name).exists():
                raise UserError(f"{path} is not an adapter folder: it has no {name}")
        self.peft_config = read_json(self.path / "adapter_config.json")
        if not isinstance(self.peft_config.get("r"), int):
            raise UserError(f"{path} is not a LoRA or LoTA adapter: its adapter_config.json has no rank")
        self.file = self.path / "adapter_model.safetensors"
        with safe_open(self.file, "pt") as tensors:
            names = list(tensors.keys())
        self.modules = sorted(name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                              for name in names if name.endswith(".lora_A.weight"))
        self.config = self._recorded() if (self.path / LOTA_CONFIG).exists() else self._inferred(omega, residual)

    def _recorded(self) -> LotaConfig:
        config, rank = LotaConfig.load(self.path), self.peft_config["r"]
        if config.rank != rank:
            raise UserError(f"{self.path}: {LOTA_CONFIG} says rank {config.rank}, adapter_config.json says {rank}")
        return config

    def _inferred(self, omega: float | None, residual: bool | None) -> LotaConfig:
        rank, folder = self.peft_config["r"], self.path.resolve()
        named = ADAPTER_NAME.match(folder.name) or ADAPTER_NAME.match(folder.parent.name)
        method = named["method"] if named else "LoTA" if self._is_ternary() else "LoRA"
        if self.peft_config.get("use_qalora"):
            method = "QA-LoRA"
        if method != "LoTA":
            omega = None
        elif named:
            try:
                omega = float(named["first"])
            except ValueError:
                raise UserError(f"{self.path}: no omega in the folder's name at '{named['first']}'") from None
        else:
            omega = omega or 0.75 * rank
        return LotaConfig(method=method, omega=omega, residual=residual is None or residual, rank=rank,
                          bits=int(named["bits"]) if named else None, data_set=named["data_set"] if named else None,
                          quantized_model_dir=self.peft_config.get("base_model_name_or_path"))

    @property
    def scaling(self) -> float:
        """PEFT's scaling of a LoRA or QA-LoRA adapter: alpha / r, or alpha / sqrt(r) with use_rslora."""
        alpha, rank = self.peft_config["lora_alpha"], self.peft_config["r"]
        return alpha / (rank ** 0.5 if self.peft_config.get("use_rslora") else rank)

    # --- tensors ------------------------------------------------------------------------------------------------------

    def matrices(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [in, r], B [r, out]) of one layer, in the file's dtype. A QA-LoRA adapter's A is [groups, r]."""
        return tuple(self._tensor(f"{module}.{matrix}.weight").t() for matrix in ("lora_A", "lora_B"))

    def ternary_pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """matrices() of a LoTA adapter. Raises UserError where an entry is not -1, 0 or 1."""
        pair = self.matrices(module)
        for matrix, letter in zip(pair, "AB", strict=True):
            if not bool(((matrix == 0) | (matrix.abs() == 1)).all()):
                raise UserError(f"{self.file}: {letter} of {module} is not ternary; this is not a LoTA adapter")
        return pair

    def offset(self, module: str) -> torch.Tensor:
        """The learned mu of one layer, float32 [groups, out]."""
        return self._tensor(f"{module}.lora_offset").float()

    def scale_change(self, module: str) -> torch.Tensor:
        """The learned relative change of one layer's scales, float32 [groups, out]."""
        return self._tensor(f"{module}.lora_scale").float()

    def _tensor(self, name: str) -> torch.Tensor:
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(PREFIX + name)

    def _is_ternary(self) -> bool:
        """Whether the first layer's matrices hold -1, 0, 1 only."""
        try:
            return bool(self.modules) and self.ternary_pair(self.modules[0]) is not None
        except UserError:
            return False

    def misfits(self) -> list[str]:
        """One line for each tensor whose name fits no adapted layer, and for each one that a layer lacks."""
        config = self.config
        roles = ["lora_A.weight", "lora_B.weight", *["lora_offset"] * config.learned_offset,
                 *["lora_scale"] * (config.method == "LoTA" and config.learned_scales)]
        with safe_open(self.file, "pt") as tensors:
            present = set(tensors.keys())
        # A letter that changed in one name leaves the layer's other names, so every layer that any name tells counts.
        modules = {name.removesuffix(f".{role}") for name in present for role in roles if name.endswith(f".{role}")}
        expected = {f"{module}.{role}" for module in modules for role in roles}
        # A LoRA of others may hold more than pairs of matrices, and PEFT knows what that is.
        unknown = set() if config.method == "LoRA" else present - expected
        return [f"{name} is missing" for name in sorted(expected - present)] + [
            f"{name} is no tensor of a {config.method} adapter" for name in sorted(unknown)]

    def require_whole(self) -> None:
        """Raises UserError where a file has other bytes than those that were written, or a tensor fits nowhere."""
        require_unchanged(self.path, self.config.sha256, "copy the folder again, or take an earlier checkpoint")
        for misfit in self.misfits():
            raise UserError(f"{self.path}/{self.file.name}: {misfit}; copy the folder again")

    # --- the model it belongs to --------------------------------------------------------------------------------------

    def check_match(self, source: QuantizedModel) -> None:
        """Raises UserError unless the shapes and any recorded bits, group size and fingerprint are the model's."""
        config = self.config
        missing = [module for module in self.modules if module not in source.modules]
        if missing or not self.modules:
            raise UserError(f"{self.path} does not fit {source.path}: it adapts "
                            f"{missing[0] + ', which is no quantized layer there' if missing else 'no layer'}")
        for module in self.modules:
            (rows, rank), (_, cols) = (self._shape(module, matrix) for matrix in ("lora_A", "lora_B"))
            groups, width = source.shape(f"{module}.scales")
            shape = (source.shape(f"{module}.g_idx")[0], width)
            if config.method == "QA-LoRA" and rows == groups:          # its A has a row for each group
                rows = shape[0]
            if (rows, cols) != shape or rank != config.rank:
                raise UserError(f"{self.path} does not fit {source.path}: {module} is {shape[0]} x {shape[1]}, its "
                                f"adapter {rows} x {cols} of rank {rank}")
        for fact, trained, given in (("bits", config.bits, source.bits),
                                     ("rows in a group", config.group_size, source.group_size)):
            if trained is not None and trained != given:
                raise UserError(f"{self.path} was trained on {trained} {fact}, {source.path} has {given}")
        other = config.other_weights(source)
        if other:
            raise UserError(f"{self.path} was trained on other {other} than those of {source.path} (fingerprints "
                            f"differ); it was trained on {config.quantized_model_dir}")

    def _shape(self, module: str, matrix: str) -> tuple[int, int]:
        """The shape of A, (in, r), or of B, (r, out)."""
        with safe_open(self.file, "pt") as tensors:
            return tuple(reversed(tensors.get_slice(f"{PREFIX}{module}.{matrix}.weight").get_shape()))
