"""Compares the formula of memory.py with the tensors of small models of random GPTQ integers. Runs on a CPU.

The models are loaded, adapted, trained for one step, merged and called as the project does it.
"""
import gc
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from common import print_table
from memory import BITS, METHODS, Shape, merged_bytes, merged_bytes_on_cpu, training_bytes, weight_bytes
from random_gptq import write_lota_adapter
from random_model import write_gptq_llama
from transformers import Trainer

from LoTA import settings, ternary
from LoTA.adapter import LTA, load_for_training
from LoTA.adapter_folder import AdapterFolder
from LoTA.folders import GPTQFolder
from LoTA.layer import CustomLoraLinear
from LoTA.lota_merge import merge_folders
from LoTA.packed import Groups
from LoTA.trainer import config_of_run, training_arguments
from LoTA_QAF_main import parse_args, ternary_optimizer

GROUP_SIZE, RANK, TOKENS = 32, 8, 12
SHAPES = {"Llama, tied": Shape("random", 128, 192, 2, 4, 2, 160, tied=True),
          "Qwen 2": Shape("random", 64, 160, 2, 4, 2, 96, qkv_bias=True)}
# The end of a tensor's name -> its part of the formula. What has another end stays in 16 bits.
PARTS = {"qweight": "integers", "qzeros": "zero points", "scales": "scales", "g_idx": "g_idx",
         "wf_unsqueeze_zero": "tables", "wf_unsqueeze_neg_one": "tables", "inv_freq": "tables",
         "original_inv_freq": "tables"}


def check() -> bool:
    """Compares every method at every number of bits, prints a table, and returns whether all is equal."""
    rows = []
    for shape in SHAPES:
        for bits in BITS:
            for method in (*METHODS, "merged"):
                with tempfile.TemporaryDirectory() as work:
                    rows += [{"shape": shape, "bits": bits, "method": method, "part": part, "formula": formula,
                              "measured": measured}
                             for part, (formula, measured) in compare(shape, bits, method, Path(work)).items()]
    print_table("bytes", rows)
    different = sum(row["formula"] != row["measured"] for row in rows)
    print(f"\n{len(rows)} comparisons, {different} differ")
    return different == 0


def compare(shape: str, bits: int, method: str, work: Path) -> dict[str, tuple[int, int]]:
    """{part: (bytes by the formula, bytes measured)} of one of METHODS, or of the "merged" model.

    work: a folder to write to. The part "everything" is all tensors that are alive then and were not before.
    """
    gptq = write_gptq_llama(work / "gptq", SHAPES[shape], bits, GROUP_SIZE)
    computed = weight_bytes(SHAPES[shape], bits, GROUP_SIZE)
    if method == "merged":
        computed |= merged_bytes(SHAPES[shape], GROUP_SIZE) | merged_bytes_on_cpu(SHAPES[shape], bits, GROUP_SIZE)
    else:
        computed |= training_bytes(SHAPES[shape], GROUP_SIZE, RANK, method)
    measured = measure_merged(gptq, work) if method == "merged" else measure_training(gptq, method, work)
    computed["everything"] = sum(computed.values())
    return {part: (computed.get(part, 0), size) for part, size in measured.items()}


def measure_training(gptq: Path, method: str, work: Path) -> dict[str, int]:
    """{part: bytes} after the first step, without what the step needed while it computed."""
    before = _alive()
    flags = ["--method", "lora"] if method == "LoRA" else ["--method", "lota", "--recipe", method]
    base, training, _ = parse_args(["--quantized_model_dir", str(gptq), "--device_map", "cpu", "--lora_r", str(RANK),
                                    "--max_steps", "1", *flags])
    folder = GPTQFolder(gptq)
    base, training = settings.complete_training(base, training, folder)
    model = load_for_training(base, config_of_run(base, training, folder), folder).train()
    optimizer = (Trainer(model=model, args=training_arguments(base, training, work / "run")).create_optimizer()
                 if method == "LoRA" else ternary_optimizer(model, base, training))
    _loss(model).backward()
    optimizer.step()
    ternary._workspaces.clear()         # a layer needs them while it computes

    state = [optimizer.state]
    if method != "LoRA":
        state += [optimizer.flipped, optimizer.real_optimizer.state if optimizer.real_optimizer else {}]
    parts = _by_part(model) | {
        "gradients": [p.grad for p in model.parameters() if p.grad is not None], "optimizer": _tensors_in(state),
        "index of the groups": _tensors_in([m.groups() for m in model.modules() if isinstance(m, CustomLoraLinear)])}
    return {part: _bytes(tensors) for part, tensors in parts.items()} | {"everything": _bytes(_alive(before))}


def measure_merged(gptq: Path, work: Path) -> dict[str, int]:
    """{part: bytes} of a merged model that was called once."""
    adapter = write_lota_adapter(work / "adapter", gptq, rank=RANK, omega=0.75 * RANK)
    merge_folders(AdapterFolder(adapter), GPTQFolder(gptq), work / "merged", verify=False)
    before = _alive()
    model = LTA(path=str(work / "merged")).load(device="cpu").model
    with torch.inference_mode():
        _loss(model)
    layers = [m for m in model.modules() if isinstance(getattr(m, "adapter", None), LTA)]
    parts = _by_part(model) | {
        "offsets": _tensors_in([m.adapter._ready for m in layers]),
        "float32 offsets, scales": [tensor for m in layers for tensor in (m.adapter.mu, m.adapter.scales)],
        "index of the groups": _tensors_in([m.adapter.groups for m in layers]),
        "kernel": _tensors_in([(m._zeros_cache, m._g_idx_long_cache) for m in layers])}
    return {part: _bytes(tensors) for part, tensors in parts.items()} | {"everything": _bytes(_alive(before))}


def _loss(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(10, model.config.vocab_size, (1, TOKENS))
    return model(input_ids=ids, labels=ids).loss


def _by_part(model: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """{part: its parameters and buffers} of a model with or without an adapter."""
    parts = {part: [] for part in (*PARTS.values(), "16 bits", "A and B", "mu and scales")}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "lora_" in name:
            part = "A and B" if "lora_A" in name or "lora_B" in name else "mu and scales"
        else:
            part = PARTS.get(name.rsplit(".", 1)[-1], "16 bits")
        parts[part].append(tensor)
    return parts


def _tensors_in(thing: object) -> Iterator[torch.Tensor]:
    """The tensors in nested containers and in Groups."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, Groups):
        yield from _tensors_in(vars(thing))
    elif isinstance(thing, dict):
        yield from _tensors_in(list(thing.values()))
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from _tensors_in(part)


def _alive(before: Iterable[torch.Tensor] = ()) -> list[torch.Tensor]:
    """All tensors that Python knows now, but for those of `before`."""
    gc.collect()
    known = {id(tensor) for tensor in before}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # asking an object for its class wakes deprecated ones up
        return [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and id(thing) not in known]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors. Tensors at the same place count once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.itemsize for tensor in tensors}.values())
