"""Writes a merged model in the formats that other engines open: folder in, folder out, one tensor in memory at a time.

    python -m LoTA.export MERGED --format gguf --output DIR --verify

gptq    a plain GPTQ checkpoint, for models without offset. Nothing is rounded
peft    the same, and the offset as a LoRA whose rank is the number of groups, in the subfolder adapter, in float32.
        Nothing is rounded
gguf    Q4_1 blocks for llama.cpp, 2 to 4 bits, d * code + m. The integers are kept; m = s * (mu - z) goes to float16
dense   weights without quantization; each is rounded to --dtype

MERGED is a merged folder, or an adapter folder, which is merged first; a LoRA adapter can only become dense.
"""
import argparse
import hashlib
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from LoTA import UserError, run_script
from LoTA.folders import (
    LAYER_TENSORS,
    LOTA_FORMAT,
    QUANTIZE_CONFIG,
    AdapterTensors,
    GPTQFolder,
    LoraFolder,
    MergedFolder,
    check_output_folder,
    create_safetensors,
    is_merged,
    overwrite_tensor,
    read_adapter,
    read_json,
    set_checkpoint_format,
    whole_folder,
    write_json,
)
from LoTA.lota_merge import check_match, merge_folders

MARKER = "lota_export.json"         # written last; says that a folder is a whole export of ours
SHARD_BYTES = 5 * 10**9
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(source, format, output, dtype=None, evaluation=None, verify=False):
    """Writes `source`, a merged or an adapter folder, in `format` to the folder `output`.

    dtype: of dense weights, a torch dtype; None takes the model's own. evaluation: results of mode 2 (a dict), quoted
    in the model card. verify: reads everything back and compares it with the source. Raises UserError where the format
    cannot hold the model, RuntimeError where the verification fails.
    """
    if format not in FORMATS:
        raise UserError(f"--format must be one of {', '.join(FORMATS)}, not '{format}'")
    check_output_folder(output, MARKER)
    write, check = FORMATS[format]
    with opened(source, format) as model, whole_folder(output, MARKER) as folder:
        write(model, folder, dtype)
        if verify:
            check(model, folder, dtype)
        from LoTA.model_card import write_model_card
        write_model_card(folder, model, format, evaluation)
        checksums = {str(file.relative_to(folder)): sha256(file)
                     for file in sorted(folder.rglob("*")) if file.is_file()}
        write_json(folder / MARKER, {"format": format, "source": str(Path(source).resolve()), "verified": verify,
                                     "sha256": checksums})


@contextmanager
def opened(source, format):
    """The folder to export from: a MergedFolder, or a LoraFolder, whose weights are no integers any more."""
    if is_merged(source):
        yield MergedFolder(source)
        return
    if not (Path(source) / "adapter_config.json").exists():
        raise UserError(f"{source} is neither a merged folder nor an adapter folder")
    config = read_adapter(source)
    if config.quantized_model_dir is None:
        raise UserError(f"{source} does not name its GPTQ model; merge it first: python -m LoTA.lota_merge")
    if config.method == "LoRA":
        if format != "dense":
            raise UserError(f"{source} is a LoRA adapter: its 16-bit product moves every weight by another amount, "
                            "which no low-bit grid holds; --format dense writes the sum in 16 bits")
        model = LoraFolder(config.quantized_model_dir, source)
        check_match(source, config, model.adapter, model)
        yield model
        return
    with tempfile.TemporaryDirectory() as temporary:
        merge_folders(source, config.quantized_model_dir, Path(temporary) / "merged")
        yield MergedFolder(Path(temporary) / "merged")


def copy_files(model, folder, weights=False):
    """Copies a model folder's own files; its weights, and what says how they are quantized, only where asked for."""
    for item in sorted(model.path.iterdir()):
        is_weights = item.suffix == ".safetensors" or item.name in ("model.safetensors.index.json", QUANTIZE_CONFIG)
        if item.is_file() and (weights or not is_weights) and item.name not in (MARKER, "README.md"):
            shutil.copyfile(item, folder / item.name)


def sha256(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def require_equal(module, kind, one, other):
    """Raises RuntimeError unless two tensors are the same bits: a defect of this program or of the disk."""
    if one.dtype != other.dtype or not torch.equal(one, other):
        raise RuntimeError(f"{module}: the {kind} that was written differs from the merged model's")


# --- gptq ---------------------------------------------------------------------------------------------------------

def write_gptq(model, folder, dtype=None):
    if model.offset_modules():
        raise UserError(f"{model.path} has offsets, which GPTQ's integer zero points cannot hold: --format peft, gguf "
                        "or dense keep them; adapters trained with --residual False have none")
    write_plain_gptq(model, folder)


def write_plain_gptq(model, folder):
    """The merged integers as the GPTQ checkpoint that they are, without the offsets."""
    copy_files(model, folder, weights=True)
    set_checkpoint_format(folder, model.checkpoint_format)


def check_gptq(model, folder, dtype=None):
    """Opens the folder as any GPTQ checkpoint and compares every tensor."""
    written = GPTQFolder(folder)
    if set(written.file_of) != set(model.file_of) or written.checkpoint_format == LOTA_FORMAT:
        raise RuntimeError(f"{folder} does not hold the merged model's tensors")
    for name in tqdm(written.file_of, desc="verifying", unit="tensor"):
        require_equal(name, "tensor", written.tensor(name), model.tensor(name))


# --- peft ---------------------------------------------------------------------------------------------------------

def write_peft(model, folder, dtype=None):
    """The integers as plain GPTQ, and in adapter/ a LoRA that adds x @ indicator @ (s * mu) to each layer.

    The indicator [in, groups] says which group a row is in, in any order, so desc_act needs nothing more.
    """
    from peft import LoraConfig
    modules = model.offset_modules()
    if not modules:
        raise UserError(f"{model.path} has no offsets, and so needs no adapter: --format gptq")
    write_plain_gptq(model, folder)
    adapter = folder / "adapter"
    adapter.mkdir()
    rows = {m: model.shape(f"{m}.g_idx")[0] for m in modules}
    shapes = {m: model.shape(f"{m}.scales") for m in modules}
    ranks = {m: groups for m, (groups, _) in shapes.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {m: r for m, r in ranks.items() if r != rank}
    LoraConfig(r=rank, lora_alpha=rank, rank_pattern=others, alpha_pattern=others, target_modules=modules,
               lora_dropout=0.0, task_type="CAUSAL_LM", inference_mode=True).save_pretrained(adapter)
    file = adapter / "adapter_model.safetensors"
    create_safetensors(file, {f"{AdapterTensors.PREFIX}{m}.{kind}.weight": (torch.float32, shape) for m in modules
                              for kind, shape in (("lora_A", (ranks[m], rows[m])),
                                                  ("lora_B", (shapes[m][1], ranks[m])))})
    for module in tqdm(modules, desc="writing the offsets", unit="layer"):
        for kind, matrix in zip(("lora_A", "lora_B"), offset_as_lora(model, module), strict=True):
            overwrite_tensor(file, f"{AdapterTensors.PREFIX}{module}.{kind}.weight", matrix)


def offset_as_lora(model, module):
    """(A [groups, in], B [out, groups]) float32 with x @ A^T @ B^T = (group sums of x) @ (s * mu)."""
    offset = model.offset(module) * model.tensor(f"{module}.scales").float()
    indicator = torch.nn.functional.one_hot(model.tensor(f"{module}.g_idx").long(), offset.shape[0])
    return indicator.t().float().contiguous(), offset.t().contiguous()


def check_peft(model, folder, dtype=None):
    check_gptq(model, folder)
    adapter = AdapterTensors(folder / "adapter")
    if adapter.modules != model.offset_modules():
        raise RuntimeError(f"{folder}/adapter does not hold the merged model's offsets")
    for module in tqdm(adapter.modules, desc="verifying the offsets", unit="layer"):
        for written, matrix in zip(adapter.matrices(module), offset_as_lora(model, module), strict=True):
            require_equal(module, "offset", written.t(), matrix)


# --- dense --------------------------------------------------------------------------------------------------------

def dense_tensors(model, dtype):
    """{name: (dtype, shape, a function that returns the tensor)} of the model without quantization."""
    from transformers import AutoConfig
    dtype = dtype or AutoConfig.from_pretrained(model.path).dtype or torch.bfloat16
    tensors = {}
    for name in sorted(model.file_of):
        module, _, kind = name.rpartition(".")
        if module in model.modules and kind in LAYER_TENSORS:
            if kind == "qweight":
                cols, rows = model.shape(f"{module}.scales")[1], model.shape(f"{module}.g_idx")[0]
                tensors[f"{module}.weight"] = (dtype, (cols, rows),
                                               lambda m=module: model.weight(m).t().contiguous().to(dtype))
        else:
            own = model.tensor(name)
            tensors[name] = (own.dtype, tuple(own.shape), lambda n=name: model.tensor(n))
    return tensors


def write_dense(model, folder, dtype=None):
    copy_files(model, folder)
    config = read_json(folder / "config.json")
    config.pop("quantization_config", None)
    tensors = dense_tensors(model, dtype)
    weight = next(dtype for name, (dtype, _, _) in tensors.items() if name.removesuffix(".weight") in model.modules)
    config["dtype"] = str(weight).removeprefix("torch.")
    write_json(folder / "config.json", config)

    shards, size = [{}], 0
    for name, (kind, shape, _) in tensors.items():
        count = kind.itemsize * torch.Size(shape).numel()
        if shards[-1] and size + count > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = kind, shape
        size += count
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        create_safetensors(folder / file, shard)
        for name in tqdm(shard, desc=f"writing {file}", unit="tensor"):
            overwrite_tensor(folder / file, name, tensors[name][2]())
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": {
            name: file for file, shard in zip(names, shards, strict=True) for name in shard}})


def check_dense(model, folder, dtype=None):
    tensors, seen = dense_tensors(model, dtype), set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as written:
            for name in tqdm(written.keys(), desc=f"verifying {file.name}", unit="tensor"):
                require_equal(name, "weight", written.get_tensor(name), tensors[name][2]())
                seen.add(name)
    if seen != set(tensors):
        raise RuntimeError(f"{folder} does not hold the merged model's tensors")


# --- gguf ---------------------------------------------------------------------------------------------------------

def write_gguf(model, folder, dtype=None):
    from LoTA.gguf_file import write
    write(model, folder / GGUF_FILE)


def check_gguf(model, folder, dtype=None):
    from LoTA.gguf_file import check
    check(model, folder / GGUF_FILE)


GGUF_FILE = "model-q4_1.gguf"
FORMATS = {"gptq": (write_gptq, check_gptq), "peft": (write_peft, check_peft), "gguf": (write_gguf, check_gguf),
           "dense": (write_dense, check_dense)}


def main():
    parser = argparse.ArgumentParser(prog="python -m LoTA.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MERGED", help="a merged folder, or an adapter folder")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of dense weights [the model's own]")
    parser.add_argument("--results", help="a results file of mode 2, to be quoted in the model card")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare it, tensor by tensor")
    args = parser.parse_args()
    evaluation = read_json(args.results) if args.results else None
    export(args.source, args.format, args.output, DTYPES.get(args.dtype), evaluation, args.verify)
    print(f"exported{' and verified' if args.verify else ''}: {args.output}")


if __name__ == "__main__":
    run_script(main)
