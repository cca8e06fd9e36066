"""The project from Python: quantize, train, merge, evaluate, export.

    from lota_qaf import evaluate, export, merge, quantize, train

    gptq = quantize("meta-llama/Llama-3.1-8B", bits=4)
    adapter = train(gptq, method="lrqat", training_data_name="viggo", num_train_epochs=1)
    merged = merge(adapter, "merged")
    print(evaluate(merged, ft_dataset_name="viggo").accuracy)
    export(merged, "gguf", "gguf")

Settings have the names and the defaults of the scripts' flags, and `help(train)` lists them. What is wrong is a
UserError of one line, as on the command line. Every function returns an object that says what it made. It stands for
the folder's path too, so the next function takes it.

What the scripts print is left out, unless verbose=True. Bars of progress are shown.

The work is done in the scripts of the same purpose and in LoTA/. Importing this file loads no library.
"""
import contextlib
import inspect
import os
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import gptq_quantize
import LoTA_QAF_main
from LoTA import UserError, quiet_libraries
from LoTA.settings import baseConfig, default_of, evalConfig, from_given, trainingConfig

if typing.TYPE_CHECKING:
    from LoTA.adapter_folder import LotaConfig

__all__ = ["Evaluation", "Exported", "MergedModel", "QuantizedModel", "TrainedAdapter", "UserError", "evaluate",
           "export", "merge", "quantize", "train"]

Place = str | os.PathLike


# --- what the functions return ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Made:
    """A folder that a function made. path: where it is. It stands for the path wherever one is wanted."""
    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class QuantizedModel(Made):
    """A GPTQ model. bits: of a weight. group_size: rows of a group; -1: all of them."""
    bits: int
    group_size: int


@dataclass(frozen=True)
class TrainedAdapter(Made):
    """An adapter. config: its lota_config.json. log: what each logging step recorded, the last one the whole run."""
    config: "LotaConfig" = field(repr=False)
    log: list[dict] = field(repr=False)

    @property
    def loss(self) -> float:
        """The mean training loss, in nats a token."""
        return self.config.training["loss"]

    @property
    def moved(self) -> dict[str, float] | None:
        """{projection or "all": the share of its integers that a merge moves}. None for LoRA and QA-LoRA."""
        return self.config.training.get("moved")


@dataclass(frozen=True)
class MergedModel(Made):
    """A merged model. moved: {projection or "all": the share of its integers that the merge moved}."""
    moved: dict[str, float]


@dataclass(frozen=True)
class Exported(Made):
    """A merged model in the format of another engine. files: {name: SHA-256}."""
    format: str
    files: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model. Numbers that were not asked for are None.

    rows, correct, accuracy, interval_95: of the generated answers. loss: of the right answers, in nats a token.
    predictions: a dictionary for each row: prompt, label, prediction, correct.
    lm_eval: {task: {metric: value}}. results: all of it, as the JSON files have it.
    """
    rows: int | None
    correct: int | None
    accuracy: float | None
    interval_95: tuple[float, float] | None
    loss: float | None
    predictions: list[dict] = field(repr=False)
    lm_eval: dict[str, dict]
    results: dict = field(repr=False)


# --- the functions ------------------------------------------------------------------------------------------------

def quantize(model: Place, output_dir: Place = "./gptq", *, verbose: bool = False,
             **settings: object) -> QuantizedModel:
    """Quantizes a 16-bit model, a folder or a hub name, with GPTQ, into OUTPUT_DIR/int{bits}_{group_size}_{name}."""
    known = {f.name for f in fields(gptq_quantize.quantizeConfig)}
    for name in settings.keys() - known:
        raise UserError(f"there is no setting {name}; python gptq_quantize.py --help lists all, as flags")
    config = gptq_quantize.quantizeConfig(os.fspath(model), os.fspath(output_dir), **_texts(settings))
    with _printing(verbose):
        return QuantizedModel(gptq_quantize.quantize(config), config.bits, config.group_size)


def train(quantized_model_dir: Place, *, verbose: bool = False, **settings: object) -> TrainedAdapter:
    """Trains an adapter on a GPTQ model, as mode 1 does. method: "lota", "lrqat", "lora" or "qalora"."""
    with _printing(verbose):
        base, training, _ = from_given({"mode": 1, "quantized_model_dir": quantized_model_dir, **settings})
        path = LoTA_QAF_main.train(base, training)
    from LoTA.adapter_folder import LotaConfig
    from LoTA.storage import read_json
    return TrainedAdapter(path, LotaConfig.load(path), read_json(path / "log_history.json"))


def merge(adapter: Place, output: Place, quantized_model_dir: Place | None = None) -> MergedModel:
    """Merges an adapter into its GPTQ model, and reads the result back. Not for LoRA, which does not merge.

    quantized_model_dir: the GPTQ model; None: the one that the adapter names.
    """
    from LoTA.adapter_folder import AdapterFolder
    from LoTA.folders import open_base
    from LoTA.lota_merge import merge_folders
    folder = AdapterFolder(adapter)
    base = open_base(folder.gptq_path(quantized_model_dir, "quantized_model_dir"))
    return MergedModel(Path(output), merge_folders(folder, base, output))


def evaluate(model: Place, *, verbose: bool = False, **settings: object) -> Evaluation:
    """Measures a model, as mode 2 does: ft_dataset_name, answer_loss and tasks say what.

    model: an adapter folder, which is merged first or with merge=False stays live; a merged folder; a GPTQ folder; or
    a 16-bit model, a folder or a hub name.
    """
    with _printing(verbose):
        base, _, evaluation = from_given({"mode": 2, **_which(Path(model), os.fspath(model)), **settings})
        results = LoTA_QAF_main.evaluate(base, evaluation)
    found = results.get(evaluation.ft_dataset_name, {})
    return Evaluation(**{name: found.get(name) for name in ("rows", "correct", "accuracy", "interval_95", "loss")},
                      predictions=found.get("predictions", []), lm_eval=results.get("lm_eval", {}).get("results", {}),
                      results=results)


def export(source: Place, format: str, output: Place, dtype: str | None = None,
           quantized_model_dir: Place | None = None) -> Exported:
    """Writes a merged folder, or an adapter, in the format of another engine, and reads it back.

    format: "gptq", "gguf", "peft" or "dense". dtype: of dense weights, such as "float16"; None: the model's own.
    """
    import torch

    from LoTA.export.run import export as write
    from LoTA.export.shared import ExportRecord
    write(os.fspath(source), format, output, getattr(torch, dtype) if dtype else None, verify=True,
          gptq=quantized_model_dir)
    return Exported(Path(output), format, ExportRecord.load(Path(output)).sha256)


@contextlib.contextmanager
def _printing(verbose: bool) -> Iterator[None]:
    """What the block prints is left out, unless verbose."""
    quiet_libraries()
    with open(os.devnull, "w") as nowhere, contextlib.nullcontext() if verbose else contextlib.redirect_stdout(nowhere):
        yield


def _texts(settings: dict) -> dict:
    return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()}


def _which(path: Path, name: str) -> dict:
    """The settings of mode 2 that choose a model."""
    from LoTA.folders import is_merged
    if (path / "adapter_config.json").exists() or is_merged(path):
        return {"load_adapter": name}
    if (path / "quantize_config.json").exists():
        return {"quantized_model_dir": name}
    return {"auto_gptq": "none", "pretrained": name}


def _with_settings(function: Callable, *configs: type) -> None:
    """Gives a function the settings of these classes as keywords in its signature, for help() and for notebooks."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    taken = {p.name for p in own} | {"mode", "load_adapter", "auto_gptq"}
    more = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name],
                              default=default_of(f))
            for config in configs for hints in [typing.get_type_hints(config)] for f in fields(config)
            if f.name not in taken and (f.default, f.default_factory) != (MISSING, MISSING)]
    function.__signature__ = inspect.Signature([*own, *more], return_annotation=function.__annotations__["return"])


_with_settings(quantize, gptq_quantize.quantizeConfig)
_with_settings(train, baseConfig, trainingConfig)
_with_settings(evaluate, baseConfig, evalConfig)
