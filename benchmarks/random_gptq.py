"""Random GPTQ models and LoTA adapters on disk, for tests and benchmarks. Imports torch, safetensors and LoTA only."""
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from LoTA.adapter_folder import PREFIX, LotaConfig
from LoTA.folders import open_base
from LoTA.packing import pack_rows
from LoTA.storage import create_safetensors, overwrite_tensor, write_json


def write_gptq(folder: str | Path, layers: Mapping[str, tuple[int, int]], bits: int = 4, group_size: int = 32, *,
               desc_act: bool = False, checkpoint_format: str = "gptq", shards: int = 1, seed: int = 0,
               zeros: tuple[int, int] | None = None, scales: tuple[float, float] = (0.5, 1.5),
               other_tensors: Mapping[str, torch.Tensor] | None = None, config: dict | None = None) -> Path:
    """Writes a GPTQ model with random integers and returns its folder, which must not exist.

    layers: {name: (in, out)}. The last group of a layer may be short. group_size -1: one group.
    desc_act: the rows of the groups are shuffled.
    checkpoint_format: "gptq" stores z - 1, so z begins at 1; "gptq_v2" stores z.
    shards: the number of safetensors files, of about equal size. The tensors of one layer lie in several of them.
    zeros: the lowest and the highest zero point; None: all that can be stored. scales: the range of the float16 scales.
    other_tensors: {name: tensor} of what is not quantized. config: what config.json holds beside the quantization.

    At any time one layer and `other_tensors` are in memory.
    """
    generator, other_tensors, folder = torch.Generator().manual_seed(seed), other_tensors or {}, Path(folder)
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in other_tensors.items()}
    for name, (rows, cols) in layers.items():
        groups = _groups(rows, group_size)
        specs |= {f"{name}.qweight": (torch.int32, (_words(rows, bits), cols)),
                  f"{name}.qzeros": (torch.int32, (groups, _words(cols, bits))),
                  f"{name}.scales": (torch.float16, (groups, cols)), f"{name}.g_idx": (torch.int32, (rows,))}
    folder.mkdir(parents=True)
    file_of = _create_shards(folder, specs, shards)

    for name, tensor in other_tensors.items():
        overwrite_tensor(file_of[name], name, tensor)
    lowest, highest = zeros or (int(checkpoint_format == "gptq"), 2**bits - 1)
    for name, (rows, cols) in layers.items():
        groups, size = _groups(rows, group_size), rows if group_size == -1 else group_size
        g_idx = torch.arange(rows, dtype=torch.int32) // size
        if desc_act:
            g_idx = g_idx[torch.randperm(rows, generator=generator)]
        integers = torch.randint(0, 2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
        points = torch.randint(lowest, highest + 1, (cols, groups), generator=generator)
        tensors = {"qweight": pack_rows(integers, bits), "g_idx": g_idx,
                   "qzeros": pack_rows(points - int(checkpoint_format == "gptq"), bits).t(),
                   "scales": torch.empty(groups, cols).uniform_(*scales, generator=generator).half()}
        for kind, tensor in tensors.items():
            overwrite_tensor(file_of[f"{name}.{kind}"], f"{name}.{kind}", tensor)

    quantization = {"bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": False, "quant_method": "gptq",
                    "checkpoint_format": checkpoint_format, "pack_dtype": "int32", "lm_head": False,
                    "meta": {"quantizer": ["gptqmodel:7.7.0"]}}     # whose packing this is
    write_json(folder / "quantize_config.json", quantization)
    write_json(folder / "config.json", {**(config or {"model_type": "llama"}), "quantization_config": quantization})
    return folder


def write_lota_adapter(folder: str | Path, gptq: str | Path, layers: Iterable[str] | None = None, rank: int = 8,
                       omega: float = 3.0, *, residual: bool = True, offset_scale: str = "omega",
                       learned_scales: bool = False, seed: int = 1, with_config: bool = True, **record) -> Path:
    """Writes a LoTA adapter with random ternary matrices for the model `gptq` and returns its folder.

    layers: the names of the layers it adapts; None: all. A learned offset and learned scales are random too.
    with_config: whether it has a lota_config.json, as the published adapters have not. record: other entries of it.
    """
    source, folder, tensors = open_base(gptq), Path(folder), {}
    # Two generators, so that the matrices of a seed do not depend on what else is learned.
    generator, learned = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    config = LotaConfig(omega=omega, residual=residual, offset_scale=offset_scale, learned_scales=learned_scales,
                        bits=source.bits, group_size=source.group_size, rank=rank, quantized_model_dir=str(gptq),
                        fingerprint=source.fingerprint() if with_config else None, **record)
    for name in source.modules if layers is None else layers:
        (rows,), (groups, cols) = source.shape(f"{name}.g_idx"), source.shape(f"{name}.scales")
        tensors[f"{name}.lora_A.weight"] = torch.randint(-1, 2, (rank, rows), generator=generator).float()
        tensors[f"{name}.lora_B.weight"] = torch.randint(-1, 2, (cols, rank), generator=generator).float()
        if config.learned_offset:
            tensors[f"{name}.lora_offset"] = 0.3 * torch.randn(groups, cols, generator=learned)
        if learned_scales:
            tensors[f"{name}.lora_scale"] = 0.2 * torch.randn(groups, cols, generator=learned)
    folder.mkdir(parents=True)
    save_file({PREFIX + name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"r": rank, "lora_alpha": 2 * rank, "peft_type": "LORA"})
    if with_config:
        config.save(folder)
    return folder


def _groups(rows: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-rows // group_size)


def _words(values: int, bits: int) -> int:
    """The 32-bit words that pack_rows() fills with so many values."""
    return len(pack_rows(torch.zeros(values, 1, dtype=torch.uint8), bits))


def _create_shards(folder: Path, specs: dict[str, tuple[torch.dtype, tuple[int, ...]]], shards: int) -> dict[str, Path]:
    """Creates the safetensors files with room for all tensors. Returns {tensor name: its file}."""
    names = ["model.safetensors"] if shards == 1 else [f"model-{i:05}-of-{shards:05}.safetensors"
                                                       for i in range(1, shards + 1)]
    sizes, weight_map = dict.fromkeys(names, 0), {}
    for tensor, (dtype, shape) in sorted(specs.items()):
        weight_map[tensor] = smallest = min(sizes, key=sizes.get)
        sizes[smallest] += dtype.itemsize * torch.Size(shape).numel()
    for name in names:
        create_safetensors(folder / name, {t: specs[t] for t in sorted(specs) if weight_map[t] == name})
    if shards > 1:
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return {tensor: folder / name for tensor, name in weight_map.items()}
