"""Adapter folders: what lota_config.json records, the matrices, and the check that an adapter fits a GPTQ model.

Touches files. Knows nothing of GPTQModel or PEFT, loads no model and unpickles nothing.
"""
import math
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from safetensors import safe_open

from LoTA import OLD_RECIPE_NAMES, UserError
from LoTA.own_rows import without_places
from LoTA.steps import Rounding, Rule, Threshold, layer_seed, power_of_two
from LoTA.storage import (
    checksums,
    read_json,
    read_record,
    record_checksum,
    require_safetensors,
    require_unchanged,
    write_json,
)

LOTA_CONFIG = "lota_config.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")        # what PEFT writes
# What a checkpoint must have. Trainer silently begins anew what is not there.
STATE = ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state*.pth")
PREFIX = "base_model.model."        # PEFT puts it before the name of every adapted layer
# What the name of an adapter folder says: ..._int4_LoTA_48_0.950_0.999_alpaca_... Users put words before it and leave
# numbers out.
ADAPTER_NAME = re.compile(r"(?:^|[^a-z0-9])int(?P<bits>\d)_(?P<method>qa-lora|lr-qat|lota|lora)"
                          r"_(?P<first>\d+(?:\.\d+)?(?:e-?\d+)?)"
                          r"(?:_[\d.]+){0,2}(?:_(?P<data_set>[^\W\d_][^_]*))?(?=_|$)", re.IGNORECASE)
METHOD_NAMES = {"lota": "LoTA", "lora": "LoRA", "qa-lora": "QA-LoRA", "lr-qat": "LR-QAT"}
# The tensors of an adapter file: the layer, and which of its tensors it is.
TENSOR_NAME = re.compile(r"(?P<layer>.+)\.(?P<kind>lora_[AB]\.(?:weight|exponent)|lora_offset|lora_scale|lora_dither)")
# Entries of adapter_config.json that change nothing in a trained adapter, because they say how it was initialized or
# trained, or which layers it has, and the tensors say that too.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "revision", "runtime_config",
    "target_modules", "target_parameters", "task_type"}
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")      # the others also change the model's weights


@dataclass(frozen=True)
class LotaConfig:
    """lota_config.json: how an adapter was trained, and so how it must be read."""
    method: Literal["LoTA", "LoRA", "QA-LoRA", "LR-QAT"] = "LoTA"
    omega: float | None = None                  # None for all but LoTA
    residual: bool = True                       # whether there is an offset mu
    # "omega": kappa = omega. "paper": kappa = 1. "learned": mu is a parameter. "mean": the mean of LR-QAT's dW
    # over a group, and what the rounding left over.
    offset_scale: Literal["omega", "paper", "learned", "mean"] = "omega"
    learned_scales: bool = False
    # LR-QAT: what is added below the rounding. "noise" is made from the layer's name, "fraction" is in the adapter.
    dither: Literal["none", "noise", "fraction"] = "none"
    bits: int | None = None
    group_size: int | None = None
    rank: int | None = None
    pretrained: str | None = None
    quantized_model_dir: str | None = None
    fingerprint: str | None = None              # of the GPTQ weights it was trained on; None: not known
    base_format: str | None = None              # merged folders only: the checkpoint_format of the integers
    data_set: str | None = None
    seed: int | None = None
    settings: dict = field(default_factory=dict)        # all flags, and template_date
    versions: dict = field(default_factory=dict)        # {package: version}
    # processes, data (the fingerprint of the tokenized rows), teacher (that of the 16-bit model, with --distill),
    # runtime_s, peak_mb, steps, loss, moved. A checkpoint has what a resumed run needs to go on counting: loss_sum,
    # loss_unlogged, last_logged.
    training: dict = field(default_factory=dict)
    fingerprint_all: str | None = None          # "all:...": of every tensor, so of embeddings and norms too
    sha256: dict = field(default_factory=dict)          # {file: SHA-256}; empty: made before they were recorded
    base_files: dict = field(default_factory=dict)      # the same of the GPTQ model's configuration and tokenizer
    # Merged folders only: the records of the merges before, oldest first, where the base was a merged model itself.
    history: list[dict] = field(default_factory=list)
    format_version: int = 1

    @property
    def in_grid(self) -> bool:
        """Whether the adapter is a step on the grid, so that it has a rule."""
        return self.method in ("LoTA", "LR-QAT")

    @property
    def rule(self) -> Rule:
        """How A and B become a step. For LR-QAT what differs from layer to layer is missing, see AdapterFolder.rule().

        The baselines have none.
        """
        return (Rounding(scaling=1.0, mean=self.residual and self.offset_scale == "mean")
                if self.method == "LR-QAT" else
                make_threshold(self.omega, self.residual, self.offset_scale))

    @property
    def learned_offset(self) -> bool:
        """Whether mu is a parameter of the adapter."""
        return self.in_grid and self.residual and self.offset_scale == "learned"

    @property
    def has_offsets(self) -> bool:
        """Whether the merged model has offsets: this adapter's, or those of a merge before."""
        return self.residual or any(record.get("residual", True) for record in self.history)

    @property
    def template_date(self) -> str | None:
        """The day that the chat template wrote into the prompts, such as 2026-07-31. None: it wrote none."""
        return self.settings.get("template_date")

    @property
    def chat_template(self) -> str | None:
        """The text of --chat_template. None: the tokenizer's own template wrote the prompts."""
        return self.settings.get("chat_template")

    @property
    def prompt_layout(self) -> str:
        """Where the prompts of the training had the instruction: PromptStyle.layout in LoTA/prompts.py."""
        without_record = "system" if self.settings else "published"     # no settings: others made it
        return self.settings.get("prompt_layout") or without_record

    def other_weights(self, source: "QuantizedModel") -> str | None:
        """What of `source` differs by the recorded fingerprints; None where nothing does, or none is recorded."""
        if self.fingerprint_all is None:                            # folders made before have the other one only
            differs = self.fingerprint is not None and self.fingerprint != source.fingerprint()
            return "GPTQ weights" if differs else None
        quantized, everything = source.fingerprints()
        if self.fingerprint not in (None, quantized):
            return "GPTQ weights"
        return "embeddings, norms or biases" if self.fingerprint_all != everything else None

    def warn_of_other_files(self, found: dict[str, str], model: str | Path | None) -> None:
        """Prints which configuration and tokenizer files of `model`, {name: SHA-256}, are others than in the training.

        They are not refused, because users may edit a chat template. Yet the prompts or the results may be others.
        """
        recorded = self.base_files
        other = sorted(name for name in found | recorded if found.get(name) != recorded.get(name))
        if found and recorded and other:
            print(f"{model}: {', '.join(other)} changed after the adapter was trained; prompts or results may be "
                  "others")

    def record(self) -> "AdapterRecord":
        """What mode 2 prints and saves about an adapter."""
        return AdapterRecord(**{f.name: getattr(self, f.name) for f in fields(AdapterRecord)})

    def save(self, folder: str | Path, complete: bool = True) -> None:
        """Writes lota_config.json into `folder`. With checksums it gets one of its own.

        complete: whether all other files are there. A save that takes several files writes False before the first and
        True after the last, so that a folder is not read where the process was killed in between.
        """
        content = {**asdict(self), "complete": complete}
        if self.sha256:
            content["sha256"] = {**self.sha256, LOTA_CONFIG: _own_checksum(content)}
        write_json(Path(folder) / LOTA_CONFIG, content)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes lota_config.json into an adapter folder, with the checksums of what is loaded or resumed from it."""
        state = sorted(file.name for pattern in STATE for file in Path(folder).glob(pattern))
        replace(self, sha256=checksums(folder, [*ADAPTER_FILES, *state])).save(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "LotaConfig":
        """Reads lota_config.json from `folder`.

        Raises UserError where it is not complete, where its format_version is another, where its content is not what
        was written, where a field has another type, and where a LoTA adapter has no omega.
        """
        content = read_json(Path(folder) / LOTA_CONFIG)
        known = content if isinstance(content, dict) else {}
        if not known.get("complete", True):             # older files do not say it, and were written last
            raise UserError(f"{folder} is not whole, because its saving was interrupted: take an earlier checkpoint")
        if known.get("format_version") != cls.format_version:
            raise UserError(f"{folder}/{LOTA_CONFIG} has format version {known.get('format_version')}; this version of "
                            f"LoTA reads {cls.format_version}")
        config = read_record(Path(folder) / LOTA_CONFIG, cls, content)
        own = config.sha256.pop(LOTA_CONFIG, None)
        # Every version that writes fingerprint_all writes sha256 too. Where it is gone, its name was changed.
        lost = "fingerprint_all" in content and "sha256" not in content
        if lost or own not in (None, _own_checksum(content)):
            raise UserError(f"{folder}/{LOTA_CONFIG} has other content than what was written; copy the folder again "
                            "or make it again")
        if config.method == "LoTA" and config.omega is None:
            raise UserError(f"{folder}/{LOTA_CONFIG} records a LoTA adapter without omega")
        return config


def _own_checksum(content: dict) -> str:
    """SHA-256 of lota_config.json's content. The base models' paths are left out, because users move folders."""
    return record_checksum(content, LOTA_CONFIG, without=("pretrained", "quantized_model_dir"))


@dataclass(frozen=True)
class AdapterRecord:
    """The facts of a LotaConfig that a reader of results needs. They are saved beside the settings."""
    method: str
    rank: int | None
    omega: float | None
    residual: bool
    offset_scale: str
    learned_scales: bool
    dither: str
    data_set: str | None
    seed: int | None


@dataclass(frozen=True)
class PeftConfig:
    """What a merge needs of adapter_config.json. The names and defaults are those of PEFT's LoraConfig."""
    r: Annotated[int, Field(ge=1)]
    lora_alpha: float = 8
    use_rslora: bool = False
    use_qalora: bool = False
    qalora_group_size: Annotated[int, Field(ge=1)] = 16         # neighbouring inputs that QA-LoRA pools
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None      # {regular expression: rank of its layers}
    alpha_pattern: dict[str, float] | None = None
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None

    @classmethod
    def load(cls, folder: Path) -> "PeftConfig":
        """Reads adapter_config.json from `folder`. Raises UserError for an entry that would change the merged model."""
        path = folder / "adapter_config.json"
        content = read_json(path)
        if not isinstance(content, dict) or content.get("r") is None:
            raise UserError(f"{folder} is not a LoRA or LoTA adapter: its {path.name} has no rank")
        config = read_record(path, cls, content)
        if config.peft_type != "LORA":
            raise UserError(f"{path}: peft_type {config.peft_type} is not supported; LoTA reads LORA")
        known = WITHOUT_EFFECT | {f.name for f in fields(cls)}
        for name, value in content.items():
            harmless = value in PLAIN_INITS if name == "init_lora_weights" else value in (None, False, "none", [], {})
            if name not in known and not harmless:
                raise UserError(f"{path}: {name} {repr(value)[:60]} is not supported, because a merge would leave it "
                                "out; train without it")
        for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{path}: '{pattern}' is no regular expression: {error}") from None
        return config

    def rank_of(self, layer: str) -> int:
        """The rank of one layer."""
        return _by_pattern(self.rank_pattern, layer, self.r)

    def scaling_of(self, layer: str) -> float:
        """What PEFT multiplies A @ B of one layer by: alpha / r, or alpha / sqrt(r) with use_rslora."""
        rank = self.rank_of(layer)
        return _by_pattern(self.alpha_pattern, layer, self.lora_alpha) / (rank ** 0.5 if self.use_rslora else rank)


def _by_pattern(patterns: dict | None, layer: str, default: float) -> float:
    """The value of the first pattern that matches the end of a layer's name from a dot on, as in PEFT."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", layer)),
                default)


def make_threshold(omega: float, residual: bool, offset_scale: str) -> Threshold:
    """The Threshold that the flags --interval_point, --residual and --offset_scale ask for.

    Raises UserError for an unknown offset_scale.
    """
    kappas = {"omega": omega, "paper": 1.0, "learned": None}        # learned: mu does not come from Eq. 4
    if offset_scale not in kappas:
        raise UserError(f"--offset_scale must be omega, paper or learned, not '{offset_scale}'")
    return Threshold(omega=float(omega), kappa=kappas[offset_scale] if residual else None)


# What may differ between a checkpoint's settings and those that resume it. All other settings must be the same.
MAY_DIFFER = {
    "adapter_ckpt", "adapter_path", "report_to", "logging_steps",                                   # what is written
    "save_strategy", "save_number", "save_total_limit", "loss_guard",
    "max_steps", "num_train_epochs",                                                                # how long it is
    "device_map", "flash_attn", "gradient_checkpointing", "trust_remote_code",                      # the device
    "packing",                              # how a batch is computed: its rows are the same, its gradients to rounding
    # Where the files are. What is in them is compared: by the fingerprints of the weights and of the tokenized rows.
    "quantized_model_dir", "pretrained", "distill_model", "data_dir", "prompt_template", "sym",
    "template_date"}                        # a resumed run takes the checkpoint's


def check_resumable(checkpoint: str | Path, config: LotaConfig) -> None:
    """Raises UserError unless `checkpoint` is whole and was made by a run with the settings and the data of `config`.

    What a checkpoint of an older version does not record is not compared. Reads all matrices, so that none is damaged.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / LOTA_CONFIG).exists():
        raise UserError(f"--adapter_ckpt {checkpoint} is not whole (it has no {LOTA_CONFIG}); "
                        "take an earlier checkpoint")
    saved = LotaConfig.load(checkpoint)
    for name in ("method", "rank", "omega", "residual", "offset_scale", "learned_scales", "dither", "bits",
                 "prompt_layout", "fingerprint"):
        if getattr(saved, name) != getattr(config, name):
            raise UserError(f"--adapter_ckpt {checkpoint} cannot be resumed with these settings: its {name} is "
                            f"{getattr(saved, name)}, not {getattr(config, name)}")
    if saved.fingerprint_all not in (None, config.fingerprint_all):
        raise UserError(f"--adapter_ckpt {checkpoint} cannot be resumed on this GPTQ model: its embeddings, norms or "
                        "biases are others (fingerprints differ)")
    # What older versions did where they record nothing. inf is no limit either.
    unlimited = config.settings.get("flip_limit") and math.inf
    before = {"distill": "none", "flip_limit": unlimited, "warm_up": 0.0, **_comparable(saved.settings)}
    if "recipe" in before:
        before["recipe"] = OLD_RECIPE_NAMES.get(before["recipe"], before["recipe"])
    different = [f"its --{name} is {before[name]}, not {value}" for name, value in _comparable(config.settings).items()
                 if name not in MAY_DIFFER and name in before and before[name] != value]
    processes = config.training.get("processes")
    if saved.training.get("processes", processes) != processes:
        different.append(f"it was trained by {saved.training['processes']} processes, not {processes}")
    if different:
        raise UserError(f"--adapter_ckpt {checkpoint} cannot be resumed with these settings: {'; '.join(different)}")
    rows = saved.training.get("data")
    if rows is not None and config.training.get("data") not in (None, rows):
        raise UserError(f"--adapter_ckpt {checkpoint} cannot be resumed with this data: the tokenized rows of "
                        f"--training_data_name {config.data_set} are others than those it was trained on (fingerprint "
                        f"{rows}, not {config.training['data']}); give the same rows and the same tokenizer")
    for pattern in STATE:
        if not any(checkpoint.glob(pattern)):
            raise UserError(f"--adapter_ckpt {checkpoint} is not whole (it has no {pattern.replace('*', '')}); take an "
                            "earlier checkpoint")
    require_unchanged(checkpoint, saved.sha256, "copy the folder again, or take an earlier checkpoint")
    saved.warn_of_other_files(config.base_files, config.quantized_model_dir)
    AdapterFolder(checkpoint).check_values()


def _comparable(settings: dict) -> dict:
    """Settings without what may differ inside of one, and with a chat template as a short text.

    The places of rows may differ, as --data_dir may.
    """
    short = {"training_data_name": without_places,
             "chat_template": lambda text: text and f"one with SHA-256 {sha256(text.encode()).hexdigest()[:12]}"}
    return {name: short[name](value) if name in short else value for name, value in settings.items()}


def config_of_checkpoint(checkpoint: str | Path | None) -> LotaConfig:
    """What a checkpoint records; an empty LotaConfig where there is none. A resumed run writes its prompts so."""
    if checkpoint is None or not (Path(checkpoint) / LOTA_CONFIG).exists():
        return LotaConfig()
    return LotaConfig.load(checkpoint)


class QuantizedModel(Protocol):
    """What check_match() asks of a GPTQ model on disk. LoTA.folders.GPTQFolder is one."""
    path: Path
    bits: int
    group_size: int
    modules: list[str]

    def shape(self, name: str) -> tuple[int, ...]: ...

    def fingerprint(self) -> str: ...

    def fingerprints(self) -> tuple[str, str]: ...

    def file_checksums(self) -> dict[str, str]: ...


class AdapterFolder:
    """An adapter folder, opened once: its LotaConfig as `config`, and its matrices, read one layer at a time.

    modules: the names of the adapted layers as in the file, and after check_match() as in the model.
    peft_config: what adapter_config.json says.

    A folder without lota_config.json comes from the published scripts or from PEFT. Its name, or for a checkpoint its
    parent's name, says the method, the bits and omega. Without such a name, ternary matrices mean LoTA, with `omega`
    (None: 0.75 r). No name records whether there is an offset, so `residual` says it (None: True).
    Prints one line that says which omega was taken, and from where.

    Raises UserError where the folder is no adapter, where it holds what LoTA does not read, where `omega` contradicts
    the folder, and where the folder's name mentions LoTA but no omega is known.
    """

    def __init__(self, path: str | Path, omega: float | None = None, residual: bool | None = None):
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(f"{path} is not an adapter folder: there is no such folder")
        recorded = LotaConfig.load(self.path) if (self.path / LOTA_CONFIG).exists() else None
        require_safetensors(self.path, ADAPTER_FILES[1], ("adapter_model",))
        for name in ADAPTER_FILES:
            if not (self.path / name).exists():
                raise UserError(f"{path} is not an adapter folder: it has no {name}")
        self.peft_config = PeftConfig.load(self.path)
        self.file = self.path / "adapter_model.safetensors"
        kinds = self._read_names()
        self._layer_in_file = {layer.removeprefix(PREFIX): layer for layer in kinds}
        self._fixed_point = recorded is not None and recorded.method == "LR-QAT"
        if recorded:
            self.config, origin = self._checked(recorded), f"from {LOTA_CONFIG}"
        else:
            self.config, origin = self._inferred(omega, residual)
        if self.config.method == "LoTA":
            if omega is not None and omega != self.config.omega:
                raise UserError(f"{path} has omega {self.config.omega:g} ({origin}), not {omega:g} as given; leave the "
                                "flag out, or rename the folder where its name is wrong")
            print(f"{self.path}: omega is {self.config.omega:g}, {origin}")
        self._check_learned(kinds)

    @property
    def modules(self) -> list[str]:
        return sorted(self._layer_in_file)

    def gptq_path(self, given: str | Path | None = None, flag: str = "--gptq") -> str | Path:
        """The folder of the model that the adapter was trained on: `given`, or else the one that the adapter names.

        flag: how the caller's user gives it, for the message. Raises UserError where no folder is named, or none is
        there.
        """
        path = given or self.config.quantized_model_dir
        if path is None:
            raise UserError(f"{self.path} does not name its GPTQ model; name it with {flag}")
        if not Path(path).is_dir():
            raise UserError(f"the GPTQ model {path} is no folder here: name the folder that has it with {flag}")
        return path

    def _read_names(self) -> dict[str, set[str]]:
        """{layer as in the file: which tensors it has}. Raises UserError for a tensor that is none of TENSOR_NAME's."""
        kinds = defaultdict(set)
        with safe_open(self.file, "pt") as tensors:
            for name in tensors.keys():
                known = TENSOR_NAME.fullmatch(name)
                if not known:
                    raise UserError(f"{self.file}: {name} is not supported, because a merge would leave it out; LoTA "
                                    "reads lora_A, lora_B, lora_offset, lora_scale and lora_dither")
                kinds[known["layer"]].add(known["kind"])
                if known["kind"].endswith("weight") and len(tensors.get_slice(name).get_shape()) != 2:
                    raise UserError(f"{self.file}: {name} is no matrix")
        for layer, found in kinds.items():
            for kind in sorted({"lora_A.weight", "lora_B.weight"} - found):
                raise UserError(f"{self.file} is not whole: {layer}.{kind} is missing")
            if layer.startswith(PREFIX) and layer.removeprefix(PREFIX) in kinds:
                raise UserError(f"{self.file}: {layer} is there twice, with and without {PREFIX}")
        return kinds

    def _check_learned(self, kinds: dict[str, set[str]]) -> None:
        """Raises UserError unless exactly what the LotaConfig calls learned is there, for every layer."""
        learned = {"lora_offset": self.config.learned_offset, "lora_scale": self.config.learned_scales,
                   "lora_dither": self.config.dither == "fraction",
                   **{f"lora_{matrix}.exponent": self.config.method == "LR-QAT" for matrix in "AB"}}
        for layer, found in kinds.items():
            for kind, wanted in learned.items():
                # The published scripts learn neither, so what has them without a record is half of a folder of ours.
                if kind in found and not wanted:
                    what = "learned offsets or scales" if kind in ("lora_offset", "lora_scale") else "LR-QAT's tensors"
                    raise UserError(f"{self.path} is not whole: it has {what}, and no {LOTA_CONFIG} says that it was "
                                    f"learned ({layer}.{kind}); take an earlier checkpoint")
                if wanted and kind not in found:
                    raise UserError(f"{self.file}: {layer}.{kind} is missing")

    def _checked(self, config: LotaConfig) -> LotaConfig:
        rank = self.peft_config.r
        if config.rank != rank:
            raise UserError(f"{self.path}: {LOTA_CONFIG} says rank {config.rank}, adapter_config.json says {rank}")
        return config

    def _inferred(self, omega: float | None, residual: bool | None) -> tuple[LotaConfig, str]:
        """(the LotaConfig, where its omega comes from)."""
        rank, folder = self.peft_config.r, self.path.resolve()
        name = folder.parent.name if folder.name.startswith("checkpoint") else folder.name
        named, origin = ADAPTER_NAME.search(name), "as given"
        method = METHOD_NAMES[named["method"].lower()] if named else "LoTA" if self._is_ternary() else "LoRA"
        if self.peft_config.use_qalora:
            method = "QA-LoRA"
        if method == "LR-QAT":
            raise UserError(f"{self.path} is not whole: an LR-QAT adapter cannot be read without {LOTA_CONFIG}")
        if method != "LoTA":
            omega = None
        elif named:
            omega, origin = float(named["first"]), f"from the folder's name {name}"
        elif omega is None:
            if "lota" in name.lower():
                raise UserError(f"{self.path}: there is no {LOTA_CONFIG}, and omega cannot be read from the folder's "
                                "name; give it with --load_ada_interval (mode 2) or --interval_point (lota_merge)")
            omega, origin = 0.75 * rank, f"the default 0.75 r, because no {LOTA_CONFIG}, no name and no flag says it"
        # QA-LoRA is nothing but an offset.
        residual = residual is None or residual or method == "QA-LoRA"
        return LotaConfig(method=method, omega=omega, residual=residual, rank=rank,
                          bits=int(named["bits"]) if named else None, data_set=named["data_set"] if named else None,
                          quantized_model_dir=self.peft_config.base_model_name_or_path or None), origin

    # --- tensors ------------------------------------------------------------------------------------------------------

    def scaling(self, module: str) -> float:
        """PEFT's scaling of one layer of a LoRA or QA-LoRA adapter."""
        return self.peft_config.scaling_of(self._layer_in_file[module].removeprefix(PREFIX))

    def matrices(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [in, r], B [r, out]) of one layer, in the file's dtype. A QA-LoRA adapter's A is [pools, r]."""
        return tuple(self._tensor(module, f"{matrix}.weight").t() for matrix in ("lora_A", "lora_B"))

    def pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [in, r], B [r, out]) of one layer, float32, as the rule takes them. Raises UserError where they are not.

        For LoTA the file has int8, or floats where an older version or the published scripts wrote it. For LR-QAT it
        has int8 and an exponent, or floats in a checkpoint.
        """
        stored = self.matrices(module)
        pair = tuple(matrix.float() for matrix in stored)
        if self._fixed_point:
            if stored[0].dtype != torch.int8:
                return pair
            exponents = (self._tensor(module, f"{matrix}.exponent") for matrix in ("lora_A", "lora_B"))
            return tuple(matrix * power_of_two(e) for matrix, e in zip(pair, exponents, strict=True))
        for matrix, letter in zip(pair, "AB", strict=True):
            if not bool(((matrix == 0) | (matrix.abs() == 1)).all()):
                raise UserError(f"{self.file}: {letter} of {module} is not ternary; this is not a LoTA adapter")
        return pair

    def rule(self, module: str) -> Rule:
        """How A and B of one layer become a step. After check_match(), because noise goes by the model's names."""
        if self.config.method != "LR-QAT":
            return self.config.rule
        dither = self.config.dither
        return replace(self.config.rule, scaling=self.scaling(module),
                       seed=layer_seed(module) if dither == "noise" else None,
                       dither=self._tensor(module, "lora_dither") if dither == "fraction" else None)

    def offset(self, module: str) -> torch.Tensor:
        """The learned mu of one layer, float32 [groups, out]."""
        return self._tensor(module, "lora_offset").float()

    def scale_change(self, module: str) -> torch.Tensor:
        """The learned relative change of one layer's scales, float32 [groups, out]."""
        return self._tensor(module, "lora_scale").float()

    def check_values(self) -> None:
        """Reads every tensor. Raises UserError where one is not finite, or A or B are not what the rule takes."""
        with safe_open(self.file, "pt") as tensors:
            wrong = [name for name in tensors.keys() if not bool(tensors.get_tensor(name).isfinite().all())]
        if wrong:
            raise UserError(f"{self.file} is damaged: {min(wrong)} is not finite; take an earlier checkpoint")
        if self.config.in_grid:
            for module in self.modules:
                self.pair(module)

    def _tensor(self, module: str, kind: str) -> torch.Tensor:
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(f"{self._layer_in_file[module]}.{kind}")

    def _is_ternary(self) -> bool:
        """Whether the first layer's matrices hold -1, 0, 1 only."""
        try:
            return bool(self.modules) and self.pair(self.modules[0]) is not None
        except UserError:
            return False

    def require_whole(self) -> None:
        """Raises UserError where a file of the adapter has other bytes than those that were written."""
        recorded = {name: value for name, value in self.config.sha256.items() if name in ADAPTER_FILES}
        require_unchanged(self.path, recorded, "copy the folder again, or take an earlier checkpoint")

    # --- the model it belongs to --------------------------------------------------------------------------------------

    def check_match(self, source: QuantizedModel) -> None:
        """Takes the names of the model's layers, and checks that the adapter fits the model.

        Raises UserError unless every adapted layer is one quantized layer of the model, and the shapes and any recorded
        bits, group size and fingerprint are the model's.
        """
        config = self.config
        self._layer_in_file = self.match_names(source)
        for module in self.modules:
            rank, rows = self._shape(module, "lora_A.weight")
            cols, other_rank = self._shape(module, "lora_B.weight")
            groups, width = source.shape(f"{module}.scales")
            shape = (source.shape(f"{module}.g_idx")[0], width)
            if config.method == "QA-LoRA":                              # its A has a row for each pool of inputs
                rows *= self.peft_config.qalora_group_size
            wanted = self.peft_config.rank_of(self._layer_in_file[module].removeprefix(PREFIX))
            if (rows, cols) != shape or not rank == other_rank == wanted:
                raise UserError(f"{self.path} does not fit {source.path}: {module} is {shape[0]} x {shape[1]}, its "
                                f"adapter {rows} x {cols} of rank {rank}")
            for kind, learned, wanted in (("lora_offset", config.learned_offset, (groups, width)),
                                          ("lora_scale", config.learned_scales, (groups, width)),
                                          ("lora_dither", config.dither == "fraction", shape)):
                if learned and self._shape(module, kind) != wanted:
                    raise UserError(f"{self.path} does not fit {source.path}: {module}.{kind} is not {wanted[0]} x "
                                    f"{wanted[1]}")
        for fact, trained, given in (("bits", config.bits, source.bits),
                                     ("rows in a group", config.group_size, source.group_size)):
            if trained is not None and trained != given:
                raise UserError(f"{self.path} was trained on {trained} {fact}, {source.path} has {given}")
        other = config.other_weights(source)
        if other:
            raise UserError(f"{self.path} was trained on other {other} than those of {source.path} (fingerprints "
                            f"differ); it was trained on {config.quantized_model_dir}")
        if config.base_files:
            config.warn_of_other_files(source.file_checksums(), source.path)

    def key_mapping(self, source: QuantizedModel) -> dict[str, str]:
        """{pattern: replacement} that turns the file's names into those of `source`, as PEFT's loader wants it.

        The names have no PREFIX there. It is empty where they are equal already. Raises UserError for a name without
        PREFIX, because PEFT would leave its tensor out without a word.
        """
        layers = defaultdict(list)                      # {(what to cut in front, what to put there): layers}
        for module, layer in self.match_names(source).items():
            if not layer.startswith(PREFIX):
                raise UserError(f"{self.file}: {layer} does not begin with {PREFIX}, so PEFT cannot load it; merge it")
            stem = layer.removeprefix(PREFIX)
            shared = min(len(stem), len(module))
            if stem != module:
                layers[stem[:len(stem) - shared], module[:len(module) - shared]].append(stem[len(stem) - shared:])
        return {rf"^{re.escape(cut)}(?=(?:{'|'.join(map(re.escape, ends))})\.lora_)": put
                for (cut, put), ends in layers.items()}

    def match_names(self, source: QuantizedModel) -> dict[str, str]:
        """{layer of the model: layer as in the file}, by the end of the names, because wrappers put more before them.

        Raises UserError unless there is one layer of the model for each, and another one for each.
        """
        found, modules = {}, set(source.modules)
        for layer in self._layer_in_file.values():
            stem = layer.removeprefix(PREFIX)
            matches = [stem] if stem in modules else [m for m in source.modules if layer.endswith(f".{m}")
                                                      or m.endswith(f".{stem}")]
            problem = ("is no quantized layer there" if not matches else
                       f"could be {' or '.join(matches[:2])} there" if len(matches) > 1 else
                       f"is {matches[0]} there, as {found[matches[0]]} is" if matches[0] in found else None)
            if problem:
                raise UserError(f"{self.path} does not fit {source.path}: it adapts {stem}, which {problem}")
            found[matches[0]] = layer
        if not found:
            raise UserError(f"{self.path} does not fit {source.path}: it adapts no layer")
        return found

    def _shape(self, module: str, kind: str) -> tuple[int, int]:
        """The shape of one of a layer's matrices as in the file: A is [r, in], B is [out, r]."""
        with safe_open(self.file, "pt") as tensors:
            return tuple(tensors.get_slice(f"{self._layer_in_file[module]}.{kind}").get_shape())
