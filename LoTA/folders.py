"""Model folders on disk: GPTQ models, merged models, and a GPTQ model with a LoRA adapter beside it.

Touches files, one tensor at a time. Knows nothing of GPTQModel or PEFT, loads no model and unpickles nothing.
"""
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xxhash
from pydantic import Field
from safetensors import safe_open
from tqdm import tqdm

from LoTA import SUPPORTED_BITS, UserError, explain
from LoTA.adapter_folder import LOTA_CONFIG, AdapterFolder, LotaConfig
from LoTA.packed import Groups, PackedLayer
from LoTA.packing import words_of
from LoTA.storage import (
    SAFETENSORS_NAMES,
    checksums,
    files_below,
    read_json,
    read_record,
    require_safetensors,
    require_unchanged,
    write_json,
)
from LoTA.ternary import dequantize

LOTA_FORMAT = "lota_gptq"           # checkpoint_format of a merged folder with offsets, so that stock tools refuse it
LOTA_SUBFOLDER = "lota"             # not the root, because some loaders take every *.safetensors there
MARKER = f"{LOTA_SUBFOLDER}/{LOTA_CONFIG}"      # written last, so it says that a folder is a whole merged model of ours
OFFSETS_FILE = "offsets.safetensors"
QUANTIZE_CONFIG = "quantize_config.json"
PICKLED_MODELS = ("pytorch_model", "model", "consolidated")
SETTINGS_FILES = (".json", ".jinja", ".model", ".txt", ".py")       # the ends of their names
LAYER_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
# The dtypes of these tensors, by safetensors' names.
LAYER_DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32"), "g_idx": ("I32", "I64")}


@dataclass(frozen=True)
class QuantizationConfig:
    """The entries of quantize_config.json that LoTA reads, with their types."""
    bits: int
    group_size: int = -1
    sym: bool | None = True
    desc_act: bool | None = None
    checkpoint_format: str | None = None
    format: str | None = None               # GPTQModel's newer name of the same
    pack_dtype: str | None = "int32"
    dynamic: Any = None
    meta: dict | None = None

    def made_by_gptqmodel(self) -> bool:
        """Whether meta names GPTQModel 0.9 or later, whose writer keeps a zero point of 0."""
        makers = (self.meta or {}).get("quantizer") or []
        versions = (re.match(r"gptqmodel:(\d+)\.(\d+)", str(maker).lower())
                    for maker in (makers if isinstance(makers, list) else [makers]))
        return any(v and (int(v[1]), int(v[2])) >= (0, 9) for v in versions)


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says about the quantization."""
    quantization_config: QuantizationConfig | None = None


@dataclass(frozen=True)
class ShardIndex:
    """model.safetensors.index.json."""
    weight_map: dict[str, str]              # {tensor: name of its file}


@dataclass(frozen=True)
class Architecture:
    """The entries of config.json over whose type libraries stumble."""
    model_type: str | None = None
    architectures: list[str] | None = None


TokenIds = Annotated[int, Field(ge=0, lt=2**31)]


@dataclass(frozen=True)
class Generation:
    """The entries of generation_config.json that LoTA reads: transformers would take no end token for a wrong one."""
    eos_token_id: TokenIds | list[TokenIds] | None = None
    pad_token_id: int | None = None         # -1 in some, and never used


@dataclass(frozen=True)
class SpecialTokens:
    """The entries of special_tokens_map.json and tokenizer_config.json that name special tokens."""
    bos_token: str | dict | None = None
    eos_token: str | dict | None = None
    unk_token: str | dict | None = None
    pad_token: str | dict | None = None
    additional_special_tokens: list[str | dict] | dict[str, str | dict] | None = None


@dataclass(frozen=True)
class TokenizerSettings(SpecialTokens):
    """The entries of tokenizer_config.json over whose type libraries stumble, or prompts would."""
    tokenizer_class: str | None = None
    model_max_length: float | None = None
    padding_side: Literal["left", "right"] | None = None
    chat_template: str | list[dict] | dict[str, str] | None = None
    added_tokens_decoder: dict[str, dict] | None = None


# {file beside the weights of a model: what is read of it}. tokenizer.json is an object; its library says the rest.
MODEL_FILES = {"config.json": Architecture, "generation_config.json": Generation, "tokenizer.json": dict[str, Any],
               "tokenizer_config.json": TokenizerSettings, "special_tokens_map.json": SpecialTokens}


class GPTQFolder:
    """A GPTQ checkpoint on disk, read one tensor at a time.

    config: quantize_config.json, or the quantization_config in config.json. bits, group_size and checkpoint_format
    ("gptq" or "gptq_v2") come from it.
    modules: the names of the quantized layers. file_of: {tensor name: its safetensors file}.
    Raises UserError where there is no folder, it is not whole, or it is packed in a way that LoTA does not read.
    """

    def __init__(self, path: str | Path | None):
        if path is None:
            raise UserError("--quantized_model_dir is missing; gptq_quantize.py makes a GPTQ model")
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not a folder: --quantized_model_dir wants a GPTQ model on disk")
        self.config = read_quantization_config(self.path)
        if LOTA_FORMAT in _formats(self.config) or (self.path / LOTA_SUBFOLDER).exists():
            raise UserError(f"{path} is a merged LoTA folder, where a GPTQ model as it was quantized is wanted")
        self._read_index()

    def _read_index(self) -> None:
        self.bits, self.group_size = self.config["bits"], self.config.get("group_size", -1)
        forms = _formats(self.config)
        if len(forms) > 1:
            raise UserError(f"{self.path} has two formats, checkpoint_format {self.config['checkpoint_format']} and "
                            f"format {self.config['format']}; remove the wrong one from its {QUANTIZE_CONFIG}")
        self.checkpoint_format = forms.pop() if forms else "gptq"
        if self.bits not in SUPPORTED_BITS:
            raise UserError(f"{self.path} has {self.bits} bits; LoTA works on {', '.join(map(str, SUPPORTED_BITS))}")
        if self.group_size < 1 and self.group_size != -1:
            raise UserError(f"{self.path} has group_size {self.group_size}; it must be positive, or -1 for one group")
        if self.checkpoint_format not in ("gptq", "gptq_v2"):
            raise UserError(f"{self.path} has checkpoint_format '{self.checkpoint_format}'; LoTA reads gptq, gptq_v2")
        if self.config.get("dynamic") or self.config.get("pack_dtype", "int32") not in ("int32", "torch.int32", None):
            raise UserError(f"{self.path} packs its layers in a way that LoTA does not read: settings of single layers "
                            "(dynamic), or words other than int32 (pack_dtype)")
        check_model_files(self.path)
        self.file_of = {}
        for file in safetensors_files(self.path):
            with safe_open(file, "pt") as tensors:
                self.file_of.update(dict.fromkeys(tensors.keys(), file))
        self.modules = sorted(name.removesuffix(".qweight") for name in self.file_of if name.endswith(".qweight"))
        if not self.modules:
            raise UserError(f"{self.path} holds no quantized layer (no tensor named *.qweight)")
        for module in self.modules:
            for tensor in LAYER_TENSORS:
                if f"{module}.{tensor}" not in self.file_of:
                    raise UserError(f"{self.path} is not whole: {module}.{tensor} is missing")
        for name in self.file_of:
            module, _, tensor = name.rpartition(".")
            if tensor in ("qzeros", "g_idx") and f"{module}.qweight" not in self.file_of:
                raise UserError(f"{self.path} is not whole: {name} belongs to a layer without qweight")
        self._check_tensors()

    def _check_tensors(self) -> None:
        """Raises UserError that names the first tensor of a layer whose dtype, shape or group numbers are wrong."""
        headers, g_idx = {}, {}
        for file in sorted(set(self.file_of.values())):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    module, _, kind = name.rpartition(".")
                    if f"{module}.qweight" in self.file_of and kind in LAYER_TENSORS:
                        header = tensors.get_slice(name)
                        headers[name] = header.get_dtype(), tuple(header.get_shape())
                        if kind == "g_idx":
                            g_idx[module] = tensors.get_tensor(name)
        for module in self.modules:
            fault = layer_fault(*(headers[f"{module}.{kind}"] for kind in LAYER_TENSORS), self.bits, self.group_size)
            if not fault:
                try:
                    Groups(g_idx[module], headers[f"{module}.scales"][1][0])
                except UserError as error:
                    fault = "g_idx", str(error)
            if fault:
                name = f"{module}.{fault[0]}"
                raise UserError(f"{self.file_of[name]}: {name} is wrong: {fault[1]}")

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor of the checkpoint, on the CPU, in the file's dtype."""
        with safe_open(self._file(name), "pt") as tensors:
            return tensors.get_tensor(name)

    def _file(self, name: str) -> Path:
        """The file that one tensor is in."""
        return self.file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, from the file's header."""
        return tuple(self._header(name)[1])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor, from the file's header. Raises UserError for one that LoTA does not write."""
        named = self._header(name)[0]
        for dtype, its_name in SAFETENSORS_NAMES.items():
            if its_name == named:
                return dtype
        raise UserError(f"{self.file_of[name]}: {name} has the dtype {named}, which LoTA does not write")

    def packed(self, module: str) -> PackedLayer:
        """One layer: its integers, zero points, scales and groups, still packed."""
        return PackedLayer(*(self.tensor(f"{module}.{tensor}") for tensor in LAYER_TENSORS), self.bits,
                           self.checkpoint_format, base_offset=self.offset(module))

    def offset(self, module: str) -> torch.Tensor | None:
        """mu of one layer, float32 [groups, out], or None. A GPTQ model has none."""
        return None

    def offset_modules(self) -> list[str]:
        """The names of the layers that have an offset. A GPTQ model has none."""
        return []

    def history(self) -> list[dict]:
        """The records of the merges that made the model, oldest first. A GPTQ model has none."""
        return []

    def weight(self, module: str) -> torch.Tensor:
        """The weight of one layer, s * (W_int - z + mu), float32 [in, out]."""
        return dequantize(self.packed(module), self.offset(module))

    def fingerprint(self) -> str:
        """xxh3-128 over the names and bytes of every quantized tensor. Equal only for the same GPTQ weights."""
        digest = xxhash.xxh3_128()
        for name, data in self._bytes_of(self._quantized_names(), "fingerprinting the GPTQ weights"):
            digest.update(name.encode())
            digest.update(data)
        return digest.hexdigest()

    def fingerprints(self) -> tuple[str, str]:
        """(fingerprint(), "all:" and an xxh3-128 over the names, dtypes, shapes and bytes of every tensor)."""
        of_quantized, of_all = xxhash.xxh3_128(), xxhash.xxh3_128()
        quantized = self._quantized_names()
        others = sorted(set(self.file_of) - set(quantized))
        for i, (name, data) in enumerate(self._bytes_of(quantized + others, "fingerprinting the model")):
            if i < len(quantized):
                of_quantized.update(name.encode())
                of_quantized.update(data)
            of_all.update(f"{name} {self._header(name)}".encode())
            of_all.update(data)
        return of_quantized.hexdigest(), f"all:{of_all.hexdigest()}"

    def file_checksums(self) -> dict[str, str]:
        """{name: SHA-256} of the files that say how the model runs: its configuration, tokenizer, chat template."""
        return checksums(self.path, sorted(file.name for file in self.path.iterdir() if file.suffix in SETTINGS_FILES
                                           and not file.name.endswith(".index.json")))

    def _quantized_names(self) -> list[str]:
        return [f"{module}.{tensor}" for module in self.modules for tensor in LAYER_TENSORS]

    def _bytes_of(self, names: list[str], desc: str) -> Iterator[tuple[str, np.ndarray]]:
        for name in tqdm(names, desc=desc, unit="tensor", leave=False):
            yield name, self.tensor(name).contiguous().view(-1).view(torch.uint8).numpy()

    def _header(self, name: str) -> tuple[str, list[int]]:
        """(safetensors' name of a tensor's dtype, its shape), from the file's header."""
        with safe_open(self._file(name), "pt") as tensors:
            entry = tensors.get_slice(name)
            return entry.get_dtype(), entry.get_shape()

    def model_size(self, name: str | None = None) -> tuple[str, float]:
        """(a label such as "8B", the number of parameters), by `name` or the folder's name, else by the shapes."""
        named = re.search(r"(?<![a-zA-Z0-9.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", Path(name or self.path).name)
        if named:
            return f"{named[1]}B", float(named[1]) * 1e9
        count = 0
        for tensor in self.file_of:
            role, shape = tensor.rsplit(".", 1)[-1], self.shape(tensor)
            if role == "qweight":
                count += shape[0] * 32 // self.bits * shape[1]
            elif role not in LAYER_TENSORS:
                count += math.prod(shape)
        return (f"{count / 1e9:.0f}B" if count >= 1e9 else f"{max(1, round(count / 1e6))}M"), count


Header = tuple[str, tuple[int, ...]]            # (safetensors' name of the dtype, shape) of a tensor


def layer_fault(qweight: Header, qzeros: Header, scales: Header, g_idx: Header, bits: int,
                group_size: int) -> tuple[str, str] | None:
    """(the tensor of a GPTQ layer whose dtype or shape is wrong, what is wrong), or None. g_idx says the inputs."""
    headers = dict(zip(LAYER_TENSORS, (qweight, qzeros, scales, g_idx), strict=True))
    for kind, (dtype, shape) in headers.items():
        if dtype not in LAYER_DTYPES[kind]:
            return kind, f"its dtype is {dtype}, not {' or '.join(LAYER_DTYPES[kind])}"
        if len(shape) != (1 if kind == "g_idx" else 2) or 0 in shape:
            return kind, f"its shape is {shape}, not that of a filled {'vector' if kind == 'g_idx' else 'matrix'}"
    (rows,), cols = g_idx[1], qweight[1][1]
    groups = 1 if group_size == -1 else math.ceil(rows / group_size)
    lengths = {kind: _lengths(count, bits) for kind, count in (("qweight", rows), ("qzeros", cols))}
    wanted = {"qweight": [(n, cols) for n in lengths["qweight"]], "qzeros": [(groups, n) for n in lengths["qzeros"]],
              "scales": [(groups, cols)]}
    for kind, shapes in wanted.items():
        if headers[kind][1] not in shapes:
            return kind, (f"its shape is {headers[kind][1]}, not {shapes[0]}, which {rows} inputs, {cols} outputs, "
                          f"{bits} bits and group_size {group_size} want")
    return None


def _lengths(values: int, bits: int) -> range:
    """How many words may hold so many packed values: to the last value's word, or to the end of its unit of words."""
    return range(math.ceil(values * bits / 32), words_of(slice(0, values), bits).stop + 1)


class MergedFolder(GPTQFolder):
    """A merged folder: a GPTQ folder, its LotaConfig as `lota`, and the offsets where it has them.

    It can be trained on and merged into again, as a GPTQ model. Its fingerprints are of the offsets too.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not is_merged(path):
            raise UserError(f"{path} is no merged LoTA folder: it has no {LOTA_SUBFOLDER}/{LOTA_CONFIG}")
        self.lota = LotaConfig.load(self.path / LOTA_SUBFOLDER)
        self.config = read_quantization_config(self.path)
        if LOTA_FORMAT in _formats(self.config):
            self.config = {**self.config, "checkpoint_format": self.lota.base_format, "format": self.lota.base_format}
        self._read_index()
        self.offsets_file = self.path / LOTA_SUBFOLDER / OFFSETS_FILE
        if self.lota.has_offsets != self.offsets_file.exists():
            raise UserError(f"{path} is not whole: its {OFFSETS_FILE} and its {LOTA_CONFIG} disagree; merge again")
        self._check_offsets()

    def _check_offsets(self) -> None:
        """Raises UserError for an offset of no layer, or of another shape or dtype than float32 [groups, out]."""
        if not self.lota.has_offsets:
            return
        with safe_open(self.offsets_file, "pt") as offsets:
            for name in offsets.keys():
                module, _, kind = name.rpartition(".")
                if kind != "offset" or f"{module}.qweight" not in self.file_of:
                    raise UserError(f"{self.offsets_file}: {name} is no offset of a quantized layer")
                header, wanted = offsets.get_slice(name), self.shape(f"{module}.scales")
                if header.get_dtype() != "F32" or tuple(header.get_shape()) != wanted:
                    raise UserError(f"{self.offsets_file}: {name} is {header.get_dtype()} of shape "
                                    f"{tuple(header.get_shape())}, not F32 of shape {wanted}")

    def offset_modules(self) -> list[str]:
        """The names of the layers that have an offset."""
        if not self.lota.has_offsets:
            return []
        with safe_open(self.offsets_file, "pt") as offsets:
            return sorted(name.removesuffix(".offset") for name in offsets.keys())

    def history(self) -> list[dict]:
        """The records of the merges that made the model, oldest first. The last one is this folder's own.

        A record is the content of a lota_config.json without the checksums of the files, which a next merge replaces.
        """
        own = {name: value for name, value in asdict(self.lota).items() if name not in ("history", "sha256")}
        return [*self.lota.history, own]

    def _file(self, name: str) -> Path:
        return self.file_of[name] if name in self.file_of else self.offsets_file

    def _quantized_names(self) -> list[str]:
        return super()._quantized_names() + [f"{module}.offset" for module in self.offset_modules()]

    def require_whole(self) -> None:
        """Raises UserError where a file has other bytes than those that were written, or was added."""
        require_unchanged(self.path, self.lota.sha256, "copy the folder again or merge again")
        if not self.lota.sha256:
            return
        for name in files_below(self.path):
            if name.endswith(".safetensors") and name not in self.lota.sha256:
                raise UserError(f"{self.path}: {name} was not there when the folder was written; move it away")

    def offset(self, module: str) -> torch.Tensor | None:
        """mu of one layer, float32 [groups, out], or None where the layer has no adapter or no offset."""
        if not self.lota.has_offsets:
            return None
        with safe_open(self.offsets_file, "pt") as offsets:
            name = f"{module}.offset"
            return offsets.get_tensor(name) if name in offsets.keys() else None


class LoraFolder(GPTQFolder):
    """A GPTQ folder plus a LoRA adapter, as one model. Only weight() has the adapter in it: the sum is off the grid."""

    def __init__(self, path: str | Path, adapter: AdapterFolder):
        self.base = open_base(path)
        self.path, self.config = self.base.path, self.base.config
        self._read_index()
        self.lota, self.adapter = adapter.config, adapter

    def _file(self, name: str) -> Path:
        return self.base._file(name)

    def _quantized_names(self) -> list[str]:
        return self.base._quantized_names()

    def weight(self, module: str) -> torch.Tensor:
        """The weight of one layer, that of the model + alpha / r * A @ B, float32 [in, out]."""
        weight = self.base.weight(module)
        if module in self.adapter.modules:
            lora_A, lora_B = self.adapter.matrices(module)
            weight.addmm_(lora_A.float(), lora_B.float(), alpha=self.adapter.scaling(module))
        return weight


def is_merged(path: str | Path) -> bool:
    """Whether `path` is a merged folder."""
    return (Path(path) / LOTA_SUBFOLDER / LOTA_CONFIG).exists()


def open_base(path: str | Path | None) -> GPTQFolder:
    """The model to train on or to merge into: a GPTQ folder, or a merged folder, which is a base again.

    Raises UserError as GPTQFolder() does, and where a file of a merged folder has other bytes than were written.
    """
    if path is None or not is_merged(path):
        return GPTQFolder(path)
    folder = MergedFolder(path)
    folder.require_whole()
    return folder


def check_model_name(flag: str, name: str) -> None:
    """Raises UserError unless `name` is a model folder, or looks like a hub name (owner/model or model)."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{flag} {name} is not a model folder: it has no config.json")
    if path.is_dir():
        check_model_files(path)
        require_safetensors(path, "*.safetensors", PICKLED_MODELS)
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{flag} {name} does not exist")


def check_model_files(path: Path) -> None:
    """Checks what is beside a model's weights: whole JSON, and types over which libraries stumble or err silently.

    Raises UserError that names the file.
    """
    for name, kind in MODEL_FILES.items():
        if (path / name).exists():
            read_record(path / name, kind, _object(path / name))


@contextmanager
def reading(place: str | Path, file: str,
            remedy: str = "it runs only with --trust_remote_code; read it first") -> Iterator[None]:
    """While a library reads `file` of the model at `place`, a folder or a hub name, its errors become a UserError.

    remedy: what to do where the model cannot be read without code of its own.
    Libraries raise anything over a damaged file. The file that check_model_files() finds is named, else `file`.
    What explain() knows passes, because it says what it is: no memory, no such file, no connection.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:          # tokenizers raises Exception itself
        if Path(place).is_dir():
            check_model_files(Path(place))
        if explain(error) is not None:
            raise
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise UserError(f"{Path(place) / file} names code that comes with the model (auto_map): {remedy}") from None
        raise UserError(f"{Path(place) / file} cannot be used: {type(error).__name__}: {reason[:300]}") from error


def read_quantization_config(path: str | Path) -> dict:
    """The GPTQ settings of a folder.

    Raises UserError where it is not a GPTQ model, where an entry that LoTA reads has another type, and where its writer
    may have damaged the zero points.
    """
    path = Path(path)
    if (path / QUANTIZE_CONFIG).exists():
        file, kind = path / QUANTIZE_CONFIG, QuantizationConfig
    elif (path / "config.json").exists():
        file, kind = path / "config.json", ModelConfig
    else:
        raise UserError(f"{path} is not a model folder: it has neither {QUANTIZE_CONFIG} nor config.json")
    content = _object(file)
    config = content if kind is QuantizationConfig else content.get("quantization_config") or {}
    if not isinstance(config, dict):
        raise UserError(f"{file} cannot be read: its quantization_config is no JSON object")
    method = config.get("quant_method") or config.get("method") or ("gptq" if "bits" in config else None)
    if method != "gptq" or "bits" not in config:
        raise UserError(f"{path} is not a GPTQ model (quantization method: {method or 'none'}); "
                        "gptq_quantize.py makes one")
    checked = read_record(file, kind, content)
    checked = checked if kind is QuantizationConfig else checked.quantization_config
    if checked.sym is False and _formats(config) <= {"gptq"} and not checked.made_by_gptqmodel():
        raise UserError(f"{path} has sym false and the format gptq, and its meta does not name GPTQModel 0.9 or later. "
                        "AutoGPTQ and older writers destroyed zero points there; quantize again with gptq_quantize.py")
    return config


def _object(file: Path) -> dict:
    """The content of a JSON file. Raises UserError where it is no object."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} cannot be read: it is no JSON object")
    return content


def _formats(config: dict) -> set[str]:
    """The values of checkpoint_format and of format, its newer name, where they are given."""
    return {config[name] for name in ("checkpoint_format", "format") if config.get(name)}


def check_own_file(file: Path) -> None:
    """Raises UserError for a link that leads out of the model folder, because its target may not be meant for others.

    The cache of the hub is an exception: its snapshots are links to its blobs.
    """
    root, target = file.parent.resolve(), file.resolve()
    own = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(place) for place in own):
        raise UserError(f"{file} is a link to a file outside of its folder; replace it by the file, or remove it")


def copy_own_file(file: Path, folder: Path) -> None:
    """Copies a file of a model folder into `folder`. Raises UserError as check_own_file() does."""
    check_own_file(file)
    shutil.copyfile(file, folder / file.name)


def copy_other_files(source: GPTQFolder, folder: Path) -> None:
    """Copies all files of a model but those of its tensors. Raises UserError as check_own_file() does, for any file."""
    weights = set(source.file_of.values())
    for item in sorted(file for file in source.path.iterdir() if file.is_file()):
        if item in weights:
            check_own_file(item)
        else:
            copy_own_file(item, folder)


def set_checkpoint_format(folder: Path, checkpoint_format: str) -> None:
    """Writes `checkpoint_format`, and format, GPTQModel's newer name of it, where that is there."""
    set_quantization(folder, "checkpoint_format", checkpoint_format)
    set_quantization(folder, "format", checkpoint_format, only_where_given=True)


def set_quantization(folder: Path, entry: str, value: str | int, only_where_given: bool = False) -> None:
    """Writes an entry into quantize_config.json and config.json, because stock tools read either."""
    for name in (QUANTIZE_CONFIG, "config.json"):
        if (folder / name).exists():
            content = read_json(folder / name)
            quantization = content.get("quantization_config") if name == "config.json" else content
            if quantization and (entry in quantization or not only_where_given):
                quantization[entry] = value
                write_json(folder / name, content)


def safetensors_files(path: Path) -> list[Path]:
    """The weight files of a model folder: those that its index names, else all that are there.

    Raises UserError where one is missing, or where the index names a file by a path.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_record(index, ShardIndex).weight_map.values()))
        for name in names:
            if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
                raise UserError(f"{index} names the file '{name}'; a name without a path is wanted")
    else:
        names = sorted(f.name for f in path.glob("*.safetensors"))
    missing = [n for n in names if not (path / n).exists()]
    if not names:
        require_safetensors(path, "*.safetensors", PICKLED_MODELS)
    if missing or not names:
        raise UserError(f"{path} is not whole: {', '.join(missing) or 'a *.safetensors file'} is missing")
    return [path / n for n in names]
