"""The model without quantization: every weight rounded to one dtype, in shards, as transformers saves it.

GPTQModel keeps some layers in another layout than transformers: it splits gate_up_proj (Phi-3, GLM-4), and it turns the
Conv1D of GPT-2 into linear layers. What is written is transformers' layout, because transformers fills every tensor
that it does not find, or finds in another shape, at random.
"""
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from LoTA import UserError
from LoTA.adapter import has_own_code, load_16bit, load_live, load_merged, what_does_not_fit
from LoTA.export.shared import NO_CODE, copy_files, require_equal
from LoTA.folders import LAYER_TENSORS, GPTQFolder, LoraFolder, reading
from LoTA.storage import create_safetensors, overwrite_tensor, read_json, write_json

SHARD_BYTES = 5 * 10**9
FUSED, PARTS = "gate_up_proj", ("gate_proj", "up_proj")     # transformers' name, and GPTQModel's in transformers' order
# The largest ||difference|| / ||logits|| that rounding explains. With one layer at random it is far above 0.1.
# load_gptq() takes the embeddings of a float32 model through float16.
TOLERANCE = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.1}


def dense_tensors(model: GPTQFolder, dtype: torch.dtype | None) -> dict[
        str, tuple[torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """{name: (dtype, shape, a function that returns the tensor)}. dtype None is config.json's, else bfloat16."""
    dtype = weight_dtype(model, dtype)
    layers, tensors = transformers_layers(model), {}

    def weight(module: str) -> torch.Tensor:
        values = model.weight(module)
        return (values if isinstance(layers.get(module), Conv1D) else values.t()).contiguous().to(dtype)
    for name in sorted(model.file_of):
        module, _, role = name.rpartition(".")
        if module in model.modules and role in LAYER_TENSORS:
            if role == "qweight":
                cols, rows = model.shape(f"{module}.scales")[1], model.shape(f"{module}.g_idx")[0]
                shape = (rows, cols) if isinstance(layers.get(module), Conv1D) else (cols, rows)
                tensors[f"{module}.weight"] = dtype, shape, lambda m=module: weight(m)
        else:
            tensors[name] = model.dtype(name), model.shape(name), lambda n=name: model.tensor(n)
    for layer in layers:
        if layer.endswith(f".{FUSED}"):
            for role in ("weight", "bias"):
                fuse(tensors, f"{layer}.{role}")
    return tensors


def transformers_layers(model: GPTQFolder) -> dict[str, torch.nn.Module]:
    """{name: layer} of the model as transformers builds it, without memory for its weights.

    Empty where transformers does not know the architecture.
    """
    if has_own_code(model.path):
        return {}
    with reading(model.path, "config.json", NO_CODE), torch.device("meta"):
        return dict(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.path)).named_modules())


def fuse(tensors: dict, name: str) -> None:
    """Replaces the two parts of a tensor of a gate_up_proj by the whole, in place, where both parts are there."""
    parts = [name.replace(f".{FUSED}.", f".{part}.") for part in PARTS]
    if name in tensors or not all(part in tensors for part in parts):
        return
    (dtype, (first, *rest), get_first), (_, (second, *_), get_second) = (tensors.pop(part) for part in parts)
    tensors[name] = dtype, (first + second, *rest), lambda: torch.cat([get_first(), get_second()])


def write(model: GPTQFolder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the weights in shards of at most SHARD_BYTES, and a config.json without quantization.

    Raises UserError where transformers would not find every tensor that it needs.
    """
    copy_files(model, folder)
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    tensors = dense_tensors(model, dtype)
    config["dtype"] = str(weight_dtype(model, dtype)).removeprefix("torch.")
    write_json(folder / "config.json", config)

    shards, size = [{}], 0
    for name, (tensor_dtype, shape, _) in tensors.items():
        count = tensor_dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and size + count > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor_dtype, shape
        size += count
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {
            name: file for file, shard in zip(names, shards, strict=True) for name in shard}})
    for file, shard in zip(names, shards, strict=True):
        create_safetensors(folder / file, shard)
    unfit = what_does_not_fit(folder)
    at_random = unfit["missing"] + unfit["mismatched"]
    if at_random:
        more = f" and {len(at_random) - 3} more" if len(at_random) > 3 else ""
        raise UserError(f"{model.path} has no dense form: transformers would fill {', '.join(at_random[:3])}{more} at "
                        "random, because GPTQModel keeps these layers in another layout or they are not there; "
                        "--format gptq or peft keeps GPTQModel's layout")
    for file, shard in zip(names, shards, strict=True):
        for name in tqdm(shard, desc=f"writing {file}", unit="tensor"):
            overwrite_tensor(folder / file, name, tensors[name][2]())


def weight_dtype(model: GPTQFolder, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the weights that were quantized."""
    if dtype is None:
        with reading(model.path, "config.json", NO_CODE):
            dtype = AutoConfig.from_pretrained(model.path, trust_remote_code=False).dtype
    return dtype or torch.bfloat16


def check(model: GPTQFolder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Compares every tensor, then opens the folder with transformers and compares its logits with the model's own.

    Raises RuntimeError where a tensor or the logits differ, or transformers misses a tensor or knows none of its name.
    """
    tensors, seen = dense_tensors(model, dtype), set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as written:
            for name in tqdm(written.keys(), desc=f"verifying {file.name}", unit="tensor"):
                if name in tensors:
                    require_equal(name, "weight", written.get_tensor(name), tensors[name][2]())
                seen.add(name)
    if seen != set(tensors):
        raise RuntimeError(f"{folder} does not hold the merged model's tensors")
    misplaced = [f"{name} ({what})" for what, names in what_does_not_fit(folder).items() for name in names]
    if misplaced:
        raise RuntimeError(f"{folder}: transformers does not load this as it was written: {', '.join(misplaced)}")
    if has_own_code(folder):
        raise UserError(f"{model.path} opens with code of its own only, and so its dense form cannot be verified; "
                        "export it without --verify and compare its answers by hand")
    check_logits(model, folder, weight_dtype(model, dtype))


@torch.inference_mode()
def check_logits(model: GPTQFolder, folder: Path, dtype: torch.dtype) -> None:
    """Compares the logits of the folder in transformers with those of the model, on a few random tokens.

    Loads one after the other, in `dtype`. Raises RuntimeError where they differ by more than rounding explains.
    """
    loaded, answers = {"dtype": dtype, "backend": "gptq_torch"}, []
    for load in (lambda: load_live(model.adapter, model.path, **loaded) if isinstance(model, LoraFolder)
                 else load_merged(model, check=False, **loaded).model,
                 lambda: load_16bit(str(folder), dtype=dtype)):
        opened = load().eval()
        vocabulary = opened.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
        answers.append(opened(input_ids=ids.to(opened.device)).logits.float().cpu())
        del opened
    want, got = answers
    difference = float((got - want).norm() / want.norm())
    if not difference <= TOLERANCE[dtype]:                  # also where it is not a number
        raise RuntimeError(f"{folder}: the logits in transformers differ from the merged model's by {difference:.1%}")
