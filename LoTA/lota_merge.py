"""Merges a trained adapter, LoTA or QA-LoRA, into the grid of its GPTQ model: folder in, folder out.

    python -m LoTA.lota_merge --adapter ADAPTER --gptq GPTQ_MODEL --output MERGED

Works layer by layer on the files: no GPU, no model is loaded, the originals are never touched. Without offsets
(adapters trained with --residual False) the result is a plain GPTQ model; with offsets it has a checkpoint_format of
its own, so that a stock tool refuses it rather than compute something else, and LoTA.adapter opens it. A QA-LoRA
adapter is nothing but an offset per group: its integers stay.
"""
import argparse
import math
import shutil

import torch
from tqdm import tqdm

from LoTA import UserError, run_script
from LoTA.folders import (
    LOTA_CONFIG,
    LOTA_FORMAT,
    LOTA_SUBFOLDER,
    OFFSETS_FILE,
    AdapterTensors,
    GPTQFolder,
    MergedFolder,
    check_output_folder,
    create_safetensors,
    lora_scaling,
    overwrite_tensor,
    read_adapter,
    set_checkpoint_format,
    whole_folder,
)
from LoTA.packing import count_different
from LoTA.ternary import check_settings, is_merge, merge

MARKER = f"{LOTA_SUBFOLDER}/{LOTA_CONFIG}"


def merge_folders(adapter_dir, gptq_dir, output, omega=None, residual=None, verify=True):
    """Merges `adapter_dir` into `gptq_dir`, writes `output`, and returns {projection: share of integers moved}.

    omega and residual are used only for an adapter that does not say its own. Raises UserError where adapter and
    model do not belong together.
    """
    check_output_folder(output, MARKER)
    config = read_adapter(adapter_dir, omega, residual)
    if config.method == "LoRA":
        raise UserError(f"{adapter_dir} is a LoRA adapter: its 16-bit product moves every weight by another amount, "
                        "which the GPTQ grid cannot hold; python -m LoTA.export ADAPTER --format dense writes the sum")
    source, adapter = GPTQFolder(gptq_dir), AdapterTensors(adapter_dir)
    check_match(adapter_dir, config, adapter, source)
    merge_layer = layer_merger(adapter_dir, config, adapter)

    with whole_folder(output, MARKER) as folder:
        for item in tqdm([f for f in sorted(source.path.iterdir()) if f.is_file()], desc="copying", unit="file"):
            shutil.copyfile(item, folder / item.name)
        (folder / LOTA_SUBFOLDER).mkdir()
        if config.residual:
            create_safetensors(folder / LOTA_SUBFOLDER / OFFSETS_FILE, {
                f"{m}.offset": (torch.float32, source.shape(f"{m}.scales")) for m in adapter.modules})
            set_checkpoint_format(folder, LOTA_FORMAT)
        moved = {}
        for module in tqdm(adapter.modules, desc="merging", unit="layer"):
            grid = source.grid(module)
            merged, offset = merge_layer(module, grid)
            name = f"{module}.qweight"
            overwrite_tensor(folder / source.file_of[name].name, name, merged.qweight)
            if config.learned_scales:
                name = f"{module}.scales"
                overwrite_tensor(folder / source.file_of[name].name, name, merged.scales)
            if offset is not None:
                overwrite_tensor(folder / LOTA_SUBFOLDER / OFFSETS_FILE, f"{module}.offset", offset)
            count_moved(moved, module, grid, merged)
        config.quantized_model_dir, config.base_format = str(source.path.resolve()), source.checkpoint_format
        config.training["moved"] = shares(moved)
        config.save(folder / LOTA_SUBFOLDER)
        if verify:
            verify_folders(adapter, source, MergedFolder(folder), merge_layer)
    return shares(moved)


def layer_merger(adapter_dir, config, adapter):
    """The function (module, Grid) -> (merged Grid, mu or None) that merges this kind of adapter into a base's Grid."""
    if config.method == "QA-LoRA":
        scaling = lora_scaling(adapter_dir)
        return lambda module, grid: (grid, qalora_offset(*adapter.matrices(module), scaling, grid, module))
    threshold = config.threshold

    def merge_ternary(module, grid):
        lora_A, lora_B = adapter.pair(module)
        check_settings(lora_A.shape[1], threshold.omega, grid.groups.largest)
        if config.learned_scales:
            grid = grid.rescaled(adapter.scale_change(module))
        merged, offset = merge(lora_A, lora_B, grid, threshold)
        return merged, adapter.offset(module) if config.learned_offset else offset
    return merge_ternary


def qalora_offset(lora_A, lora_B, scaling, grid, module):
    """mu [groups, out] float32 of a QA-LoRA layer: lora_A [groups, r], lora_B [r, out].

    PEFT adds scaling * (groups * mean of x over the group) @ A @ B, so each row of group g moves by
    scaling * groups / rows * (A @ B)[g], whatever its integer; over the scale this is an offset.
    """
    groups = grid.groups
    if lora_A.shape[0] != groups.count or groups.order is not None or groups.sizes.min() != groups.largest:
        raise UserError(f"{module}: the QA-LoRA adapter pools {grid.shape[0] // lora_A.shape[0]} inputs in their order "
                        "and the GPTQ groups are others; only with equal groups it merges")
    return scaling * groups.count / groups.largest * (lora_A.float() @ lora_B.float()) / grid.scales.float()


def check_match(adapter_dir, config, adapter, source):
    """Raises UserError unless the adapter fits this GPTQ model, and was trained on it as far as the adapter says."""
    missing = [m for m in adapter.modules if m not in source.modules]
    if missing or not adapter.modules:
        raise UserError(f"{adapter_dir} does not fit {source.path}: it adapts "
                        f"{missing[0] + ', which is no quantized layer there' if missing else 'no layer'}")
    for module in adapter.modules:
        (rows, rank), (_, cols) = adapter.shapes(module)
        groups, width = source.shape(f"{module}.scales")
        shape = (source.shape(f"{module}.g_idx")[0], width)
        if config.method == "QA-LoRA":          # its A has a row for each group
            rows = rows * shape[0] // groups if rows == groups else rows
        if (rows, cols) != shape or rank != config.rank:
            raise UserError(f"{adapter_dir} does not fit {source.path}: {module} is {shape[0]} x {shape[1]}, its "
                            f"adapter {rows} x {cols} of rank {rank}")
    for what, trained, given in (("bits", config.bits, source.bits),
                                 ("rows in a group", config.group_size, source.group_size)):
        if trained is not None and trained != given:
            raise UserError(f"{adapter_dir} was trained on {trained} {what}, {source.path} has {given}")
    if config.fingerprint is not None and source.fingerprint() != config.fingerprint:
        raise UserError(f"{adapter_dir} was trained on other GPTQ weights than those of {source.path} (fingerprints "
                        f"differ); it was trained on {config.quantized_model_dir}")


def verify_folders(adapter, source, merged, merge_layer):
    """Reads the merged folder back and checks every layer: each integer, offset and scale is what the equations say.

    For a ternary adapter it takes the road that looks at every weight, whichever one the merge took. Equal integers and
    offsets, with the tensors that a merge does not touch, are an equal W'. Raises RuntimeError: a failure here is a
    defect of this program or of the disk.
    """
    for module in tqdm(adapter.modules, desc="verifying", unit="layer"):
        before, after, offset = source.grid(module), merged.grid(module), merged.offset(module)
        if merged.lota.method == "QA-LoRA":
            same = torch.equal(before.qweight, after.qweight) and torch.equal(offset, merge_layer(module, before)[1])
        else:
            learned = merged.lota.learned_offset
            same = is_merge(*adapter.pair(module), before, after, None if learned else offset, merged.lota.threshold)
            same &= not learned or torch.equal(offset, adapter.offset(module))
        untouched = ["qzeros", "g_idx", "scales"]
        if merged.lota.learned_scales:
            untouched.remove("scales")
            same &= torch.equal(before.rescaled(adapter.scale_change(module)).scales, after.scales)
        if not same:
            raise RuntimeError(f"{module}: the merged weights differ from the trained ones")
        if not all(torch.equal(source.tensor(f"{module}.{t}"), merged.tensor(f"{module}.{t}")) for t in untouched):
            raise RuntimeError(f"{module}: a tensor that the merge must not touch was changed")


def count_moved(moved, module, before, after):
    """Adds one layer, its Grid before and after, to {projection: [integers moved, integers]}; returns its share."""
    count = moved.setdefault(module.rsplit(".", 1)[-1], [0, 0])
    different, size = count_different(before.qweight, after.qweight, before.bits), math.prod(before.shape)
    count[0], count[1] = count[0] + different, count[1] + size
    return different / size


def shares(moved):
    """{projection: share moved}, and the share of all as "all"."""
    total = [sum(c[i] for c in moved.values()) for i in (0, 1)]
    return {**{name: c[0] / c[1] for name, c in moved.items()}, "all": total[0] / total[1]}


def print_moved(moved):
    print("share of integer weights moved by the merge")
    for name, share in moved.items():
        print(f"  {name:<12} {share:.4%}")


def main():
    parser = argparse.ArgumentParser(prog="python -m LoTA.lota_merge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="the trained adapter's folder")
    parser.add_argument("--gptq", help="the GPTQ model it was trained on [the one that the adapter names]")
    parser.add_argument("--output", required=True, help="the merged folder to write")
    parser.add_argument("--interval_point", type=float, default=None,
                        help="omega, for an adapter that says it neither in lota_config.json nor in its name")
    args = parser.parse_args()
    gptq = args.gptq or read_adapter(args.adapter, args.interval_point).quantized_model_dir
    if gptq is None:
        raise UserError(f"{args.adapter} does not name its GPTQ model; name it with --gptq")
    print_moved(merge_folders(args.adapter, gptq, args.output, args.interval_point))
    print(f"merged and verified: {args.output}")


if __name__ == "__main__":
    run_script(main)
