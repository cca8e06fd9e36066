"""What lies on disk: GPTQ folders, adapter folders, merged folders. Reads them, checks them, and writes folders whole.

Touches: files. Knows nothing of GPTQModel or PEFT, loads no model, unpickles nothing.
"""
import json
import math
import os
import re
import shutil
import struct
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from tqdm import tqdm

from LoTA import UserError
from LoTA.packing import SUPPORTED_BITS
from LoTA.ternary import Grid, Threshold, dequantize

LOTA_FORMAT = "lota_gptq"           # checkpoint_format of a merged folder that needs its offsets: stock tools refuse it
LOTA_SUBFOLDER = "lota"             # beside the weights, since some loaders glob *.safetensors in the root
OFFSETS_FILE = "offsets.safetensors"
LOTA_CONFIG = "lota_config.json"
QUANTIZE_CONFIG = "quantize_config.json"
LAYER_TENSORS = ("qweight", "qzeros", "scales", "g_idx")


# --- GPTQ folders -------------------------------------------------------------------------------------------------

class GPTQFolder:
    """A GPTQ checkpoint on disk, read one tensor at a time.

    config: quantize_config.json, or the quantization_config of config.json; bits, group_size, checkpoint_format ("gptq"
    or "gptq_v2") come from it. modules: the quantized layers. file_of: tensor name -> safetensors file.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not a folder: --quantized_model_dir wants a GPTQ model on disk")
        self.config = read_quantization_config(self.path)
        if self.config.get("checkpoint_format") == LOTA_FORMAT or (self.path / LOTA_SUBFOLDER).exists():
            raise UserError(f"{path} is a merged LoTA folder, not a GPTQ model to train on or merge into")
        self._read_index()

    def _read_index(self):
        self.bits, self.group_size = self.config["bits"], self.config.get("group_size", -1)
        self.checkpoint_format = self.config.get("checkpoint_format") or "gptq"
        if self.bits not in SUPPORTED_BITS:
            raise UserError(f"{self.path} has {self.bits} bits; LoTA works on {', '.join(map(str, SUPPORTED_BITS))}")
        if self.checkpoint_format not in ("gptq", "gptq_v2"):
            raise UserError(f"{self.path} has checkpoint_format '{self.checkpoint_format}'; LoTA reads gptq, gptq_v2")
        if self.config.get("dynamic") or self.config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise UserError(f"{self.path} packs its layers in a way that LoTA does not read: settings of single layers "
                            "(dynamic), or words other than int32 (pack_dtype)")
        self.file_of = {}
        for file in safetensors_files(self.path):
            with safe_open(file, "pt") as tensors:
                self.file_of.update(dict.fromkeys(tensors.keys(), file))
        self.modules = sorted(name.removesuffix(".qweight") for name in self.file_of if name.endswith(".qweight"))
        if not self.modules:
            raise UserError(f"{self.path} holds no quantized layer (no tensor named *.qweight)")
        for module in self.modules:
            for kind in LAYER_TENSORS:
                if f"{module}.{kind}" not in self.file_of:
                    raise UserError(f"{self.path} is not whole: {module}.{kind} is missing")

    def tensor(self, name):
        with safe_open(self.file_of[name], "pt") as tensors:
            return tensors.get_tensor(name)

    def shape(self, name):
        with safe_open(self.file_of[name], "pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def grid(self, module):
        """The integers of one layer as a ternary.Grid."""
        return Grid(*(self.tensor(f"{module}.{t}") for t in LAYER_TENSORS), self.bits, self.checkpoint_format)

    def offset(self, module):
        """mu [groups, out] float32 of one layer, or None: a GPTQ model has none."""
        return None

    def weight(self, module):
        """The numbers of one layer [in, out] float32: s * (W_int - z + mu)."""
        return dequantize(self.grid(module), self.offset(module))

    def fingerprint(self):
        """xxh3-128 over names and bytes of every quantized tensor: equal only for the same GPTQ weights."""
        digest = xxhash.xxh3_128()
        for module in tqdm(self.modules, desc="fingerprinting the GPTQ weights", unit="layer", leave=False):
            for kind in LAYER_TENSORS:
                name = f"{module}.{kind}"
                digest.update(name.encode())
                digest.update(self.tensor(name).contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


class MergedFolder(GPTQFolder):
    """A merged folder: a GPTQ folder, its LotaConfig as `lota`, and the offsets where it has them."""

    def __init__(self, path):
        self.path = Path(path)
        if not (self.path / LOTA_SUBFOLDER / LOTA_CONFIG).exists():
            raise UserError(f"{path} is no merged LoTA folder: it has no {LOTA_SUBFOLDER}/{LOTA_CONFIG}")
        self.lota = LotaConfig.load(self.path / LOTA_SUBFOLDER)
        self.config = read_quantization_config(self.path)
        if self.config.get("checkpoint_format") == LOTA_FORMAT:
            self.config["checkpoint_format"] = self.lota.base_format
        self._read_index()
        self.offsets_file = self.path / LOTA_SUBFOLDER / OFFSETS_FILE
        if self.lota.residual != self.offsets_file.exists():
            raise UserError(f"{path} is not whole: its {OFFSETS_FILE} and its {LOTA_CONFIG} disagree; merge again")

    def offset_modules(self):
        if not self.lota.residual:
            return []
        with safe_open(self.offsets_file, "pt") as offsets:
            return sorted(name.removesuffix(".offset") for name in offsets.keys())

    def offset(self, module):
        """mu [groups, out] float32 of one layer, or None where the layer has no adapter or no offset is used."""
        if not self.lota.residual:
            return None
        with safe_open(self.offsets_file, "pt") as offsets:
            name = f"{module}.offset"
            return offsets.get_tensor(name) if name in offsets.keys() else None


class LoraFolder(GPTQFolder):
    """A GPTQ folder with a LoRA adapter beside it, as one model whose weights are no integers any more."""

    def __init__(self, path, adapter):
        super().__init__(path)
        self.lota, self.adapter = read_adapter(adapter), AdapterTensors(adapter)
        self.scaling = lora_scaling(adapter)

    def weight(self, module):
        weight = super().weight(module)
        if module in self.adapter.modules:
            lora_A, lora_B = self.adapter.matrices(module)
            weight.addmm_(lora_A.float(), lora_B.float(), alpha=self.scaling)
        return weight


def lora_scaling(adapter):
    """alpha / r of a LoRA or QA-LoRA adapter folder, as PEFT applies it."""
    config = read_json(Path(adapter) / "adapter_config.json")
    return config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def check_model_name(flag, name):
    """Raises UserError unless `name` is a model folder, or looks like a name on the hub (owner/model or model)."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{flag} {name} is not a model folder: it has no config.json")
    if not path.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{flag} {name} does not exist")


def is_merged(path):
    return (Path(path) / LOTA_SUBFOLDER / LOTA_CONFIG).exists()


def read_quantization_config(path):
    """The GPTQ settings of a folder as a dict. Raises UserError where it is not a GPTQ model."""
    path = Path(path)
    if (path / QUANTIZE_CONFIG).exists():
        config = read_json(path / QUANTIZE_CONFIG)
    elif (path / "config.json").exists():
        config = read_json(path / "config.json").get("quantization_config") or {}
    else:
        raise UserError(f"{path} is not a model folder: it has neither {QUANTIZE_CONFIG} nor config.json")
    method = config.get("quant_method") or config.get("method") or ("gptq" if "bits" in config else None)
    if method != "gptq" or "bits" not in config:
        raise UserError(f"{path} is not a GPTQ model (quantization method: {method or 'none'}); "
                        "gptq_quantize.py makes one")
    return config


def set_checkpoint_format(folder, checkpoint_format):
    """Rewrites both files of a model folder that stock tools read so that they name `checkpoint_format`."""
    for name in (QUANTIZE_CONFIG, "config.json"):
        if (folder / name).exists():
            content = read_json(folder / name)
            quantization = content.get("quantization_config") if name == "config.json" else content
            if quantization:
                quantization["checkpoint_format"] = checkpoint_format
                if "format" in quantization:            # GPTQModel's newer name of the same
                    quantization["format"] = checkpoint_format
                write_json(folder / name, content)


def safetensors_files(path):
    """The weight files of a model folder: those its index names, or the one that is there."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    else:
        names = sorted(f.name for f in path.glob("*.safetensors"))
    missing = [n for n in names if not (path / n).exists()]
    if missing or not names:
        raise UserError(f"{path} is not whole: {', '.join(missing) or 'a *.safetensors file'} is missing")
    return [path / n for n in names]


# --- adapter folders ----------------------------------------------------------------------------------------------

@dataclass
class LotaConfig:
    """lota_config.json: how an adapter was trained, and so how it must be read."""
    method: str = "LoTA"                        # LoTA, LoRA or QA-LoRA
    omega: float | None = None
    residual: bool = True
    offset_scale: str = "omega"                 # "omega": kappa = omega; "paper": kappa = 1; "learned": a parameter
    learned_scales: bool = False
    bits: int | None = None
    group_size: int | None = None
    rank: int | None = None
    pretrained: str | None = None
    quantized_model_dir: str | None = None
    fingerprint: str | None = None              # of the GPTQ weights trained on; None: unknown, nothing to compare
    base_format: str | None = None              # in a merged folder: the checkpoint_format its integers are in
    data_set: str | None = None
    seed: int | None = None
    settings: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    format_version: int = 1

    @property
    def threshold(self):
        return make_threshold(self.omega, self.residual, self.offset_scale)

    @property
    def learned_offset(self):
        return self.method == "LoTA" and self.residual and self.offset_scale == "learned"

    def save(self, folder):
        write_json(Path(folder) / LOTA_CONFIG, asdict(self))

    @classmethod
    def load(cls, folder):
        content = read_json(Path(folder) / LOTA_CONFIG)
        if content.get("format_version") != cls.format_version:
            raise UserError(f"{folder}/{LOTA_CONFIG} has format version {content.get('format_version')}; this "
                            f"version of LoTA reads {cls.format_version}")
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in content.items() if k in known})


def make_threshold(omega, residual, offset_scale):
    """ternary.Threshold from the three settings as the flags name them."""
    kappas = {"omega": omega, "paper": 1.0, "learned": None}        # learned: mu does not come from Eq. 4
    if offset_scale not in kappas:
        raise UserError(f"--offset_scale must be omega, paper or learned, not '{offset_scale}'")
    kappa = kappas[offset_scale] if residual else None
    return Threshold(omega=float(omega), kappa=kappa)


ADAPTER_NAME = re.compile(r"(?P<size>[\d.]+[BM])_int(?P<bits>\d)_(?P<method>LoTA|LoRA|QA-LoRA)_(?P<first>[^_]+)_[^_]+"
                          r"_[^_]+_(?P<data_set>[^_]+)")


def read_adapter(path, omega=None, residual=None):
    """The LotaConfig of an adapter folder.

    A folder without lota_config.json, such as the published scripts make, is read by its name, or its parent's for a
    checkpoint: 8B_int4_LoTA_48_0.950_0.999_alpaca_... Where no name says it, ternary matrices mean LoTA, with `omega`
    (0.75 r where it is None) and `residual` (True where it is None).
    """
    path = Path(path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).exists():
            raise UserError(f"{path} is not an adapter folder: it has no {name}")
    peft_config = read_json(path / "adapter_config.json")
    rank = peft_config.get("r")
    if not isinstance(rank, int):
        raise UserError(f"{path} is not a LoRA or LoTA adapter: its adapter_config.json has no rank")
    if (path / LOTA_CONFIG).exists():
        config = LotaConfig.load(path)
        if config.rank != rank:
            raise UserError(f"{path}: {LOTA_CONFIG} says rank {config.rank}, adapter_config.json says {rank}")
        return config
    folder = path.resolve()
    named = ADAPTER_NAME.match(folder.name) or ADAPTER_NAME.match(folder.parent.name)
    config = LotaConfig(rank=rank, quantized_model_dir=peft_config.get("base_model_name_or_path"),
                        residual=residual is None or residual)
    if named:
        config.bits, config.data_set, config.method = int(named["bits"]), named["data_set"], named["method"]
    elif not AdapterTensors(path).is_ternary():
        config.method = "LoRA"
    if peft_config.get("use_qalora"):
        config.method = "QA-LoRA"
    if config.method == "LoTA":
        try:
            config.omega = float(named["first"]) if named else omega or 0.75 * rank
        except ValueError:
            raise UserError(f"{path}: no omega in the folder's name at '{named['first']}'") from None
    return config


class AdapterTensors:
    """The matrices of an adapter folder, read one layer at a time. modules: the layers it has."""

    PREFIX = "base_model.model."

    def __init__(self, path):
        self.file = Path(path) / "adapter_model.safetensors"
        with safe_open(self.file, "pt") as tensors:
            names = list(tensors.keys())
        self.modules = sorted(n.removeprefix(self.PREFIX).removesuffix(".lora_A.weight")
                              for n in names if n.endswith(".lora_A.weight"))

    def shapes(self, module):
        """((in, r), (r, out)) of one layer."""
        with safe_open(self.file, "pt") as tensors:
            return tuple(tuple(reversed(tensors.get_slice(f"{self.PREFIX}{module}.{kind}.weight").get_shape()))
                         for kind in ("lora_A", "lora_B"))

    def is_ternary(self):
        """Whether the first layer's matrices hold -1, 0, 1 only."""
        try:
            return bool(self.modules) and self.pair(self.modules[0]) is not None
        except UserError:
            return False

    def matrices(self, module):
        """(A [in, r], B [r, out]) of one layer; with QA-LoRA A is [groups, r]."""
        with safe_open(self.file, "pt") as tensors:
            return [tensors.get_tensor(f"{self.PREFIX}{module}.{kind}.weight").t() for kind in ("lora_A", "lora_B")]

    def offset(self, module):
        """The learned mu [groups, out] float32 of one layer."""
        return self._of_groups(module, "lora_offset")

    def scale_change(self, module):
        """The learned change of one layer's scales [groups, out] float32."""
        return self._of_groups(module, "lora_scale")

    def _of_groups(self, module, kind):
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(f"{self.PREFIX}{module}.{kind}").float()

    def pair(self, module):
        """matrices() of a LoTA adapter. Raises UserError where an entry is not -1, 0 or 1."""
        pair = self.matrices(module)
        for matrix, kind in zip(pair, "AB", strict=True):
            if not bool(((matrix == 0) | (matrix.abs() == 1)).all()):
                raise UserError(f"{self.file}: {kind} of {module} is not ternary; this is not a LoTA adapter")
        return pair


# --- reading and writing ----------------------------------------------------------------------------------------------

def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise UserError(f"{path} is not whole: {error}") from None


def write_json(path, content):
    """Writes JSON under a temporary name and renames it when whole: no half file ever stands at `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}


def create_safetensors(file, tensors):
    """A safetensors file of the right size with nothing in it yet: {name: (dtype, shape)}.

    The tensors come one by one through overwrite_tensor; those of a large model together would fill the memory.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)


def overwrite_tensor(file, name, tensor):
    """Replaces the bytes of one tensor of a safetensors file in place; shape and dtype must be as they were.

    A safetensors file is the header's length (8 bytes, little endian), a JSON header and the tensors' bytes:
    https://github.com/huggingface/safetensors#format
    """
    with open(file, "r+b") as f:
        header_size, = struct.unpack("<Q", f.read(8))
        entry = json.loads(f.read(header_size))[name]
        dtype, shape = SAFETENSORS_NAMES[tensor.dtype], list(tensor.shape)
        if entry["dtype"] != dtype or entry["shape"] != shape:
            raise UserError(f"{file}: {name} is {entry['dtype']} {entry['shape']}, expected {dtype} {shape}")
        f.seek(8 + header_size + entry["data_offsets"][0])
        f.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


@contextmanager
def whole_folder(path, marker):
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    An existing folder is replaced only if it is empty or holds the file `marker`, which says that it is ours.
    """
    path = Path(path)
    check_output_folder(path, marker)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            if old.exists():
                os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output_folder(path, marker):
    """Raises UserError where `path` stands and is not ours to replace."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists())):
        raise UserError(f"{path} exists and was not made by this project; choose another output folder or remove it")
