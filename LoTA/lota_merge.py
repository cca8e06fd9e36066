"""Merges a trained adapter, LoTA, LR-QAT or QA-LoRA, into its GPTQ model: folder in, folder out.

    python -m LoTA.lota_merge --adapter ADAPTER --gptq GPTQ_MODEL --output MERGED

It works layer by layer on the files. It needs no GPU, loads no model and never touches the originals. Without offsets
(adapters trained with --residual False) the result is a plain GPTQ model. With offsets it has a checkpoint_format of
its own, so a stock tool refuses it rather than compute something else, and LoTA.adapter opens it. A QA-LoRA adapter,
also one that PEFT alone trained, becomes an offset per group and output, and moves no integer. GPTQ_MODEL may be a
merged folder itself. Its offsets are added to the new ones, and its record is kept.
"""
import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from LoTA import UserError, run_script

# Torch is imported in the functions that need it, so that --help answers at once.
if TYPE_CHECKING:
    import torch

    from LoTA.adapter_folder import AdapterFolder
    from LoTA.folders import GPTQFolder, MergedFolder
    from LoTA.packed import PackedLayer

# (name of the layer, its PackedLayer) -> (the merged layer, mu [groups, out] or None)
LayerMerger = Callable[[str, "PackedLayer"], "tuple[PackedLayer, torch.Tensor | None]"]


def merge_folders(adapter: "AdapterFolder", source: "GPTQFolder", output: str | Path, verify: bool = True) -> dict:
    """Merges `adapter` into `source`, writes the folder `output`, and returns {projection: share of integers moved}.

    source: a GPTQ model, or a merged folder. Its offsets and the adapter's are added up in float32. Where a QA-LoRA
    adapter pools fewer inputs than a group has, the output has finer groups, see finer_groups().
    Raises UserError where adapter and model do not belong together, RuntimeError where the verification fails.
    """
    from LoTA.folders import MARKER
    from LoTA.regroup import regroup
    from LoTA.storage import check_output_folder, temporary_folder
    check_output_folder(output, MARKER)
    if adapter.config.method == "LoRA":
        raise UserError(f"{adapter.path} is a LoRA adapter: its 16-bit product moves every weight by another amount, "
                        "which the GPTQ grid cannot hold; python -m LoTA.export ADAPTER --format dense writes the sum")
    if Path(output).resolve() == source.path.resolve():
        raise UserError(f"the output folder {output} is the model to merge into, which would be replaced; name another")
    adapter.require_whole()
    adapter.check_match(source)
    size = finer_groups(adapter, source)
    if size is None:
        return _merge_into(adapter, source, output, verify, source)
    print(f"{adapter.path} pools {adapter.peft_config.qalora_group_size} inputs, and {source.path} has groups of "
          f"{source.group_size}: the merged model gets groups of {size}")
    with temporary_folder() as folder:
        return _merge_into(adapter, regroup(source, size, folder / "gptq"), output, verify, source)


def finer_groups(adapter: "AdapterFolder", source: "GPTQFolder") -> int | None:
    """The group size that the merged model needs where the GPTQ groups are too large for its offsets; None elsewhere.

    It is the largest at which a group lies in one of the GPTQ groups and in one pool of a QA-LoRA adapter.
    Raises UserError where there is no such size, or no kernel takes it.
    """
    from LoTA.regroup import KERNEL_SIZES
    if adapter.config.method != "QA-LoRA":
        return None
    pool, group = adapter.peft_config.qalora_group_size, source.group_size
    longest = max(source.shape(f"{module}.g_idx")[0] for module in adapter.modules)
    if pool % (longest if group == -1 else group) == 0:
        return None
    size = pool if group == -1 else math.gcd(pool, group)
    sizes = f"the QA-LoRA adapter pools {pool} inputs, and {source.path} has groups of {group}"
    if size not in KERNEL_SIZES:
        raise UserError(f"{sizes}: the merged model needs groups of {size}, and GPTQModel runs "
                        f"{', '.join(map(str, KERNEL_SIZES))}; train with qalora_group_size {group}" if group != -1
                        else f"{sizes}: the merged model needs groups of {size}, which GPTQModel does not run")
    if source.config.get("desc_act"):
        raise UserError(f"{sizes} in another order (desc_act): no offset of a group says what a pool adds")
    if source.offset_modules():
        raise UserError(f"{sizes} with offsets from a merge before, which cannot be cut: pool {group} inputs")
    return size


def _merge_into(adapter: "AdapterFolder", source: "GPTQFolder", output: str | Path, verify: bool,
                named: "GPTQFolder") -> dict:
    """merge_folders() after its checks. named: the model that the record names, where `source` is a copy of it."""
    import torch
    from tqdm import tqdm

    from LoTA.export.card import write_merged_card
    from LoTA.folders import (
        LOTA_FORMAT,
        LOTA_SUBFOLDER,
        MARKER,
        OFFSETS_FILE,
        MergedFolder,
        copy_other_files,
        set_checkpoint_format,
    )
    from LoTA.packed import rescale
    from LoTA.packing import count_different
    from LoTA.storage import (
        checksums,
        create_safetensors,
        files_below,
        overwrite_tensor,
        rewrite_safetensors,
        whole_folder,
    )
    config = adapter.config
    merge_layer = layer_merger(adapter)

    with whole_folder(output, MARKER) as folder:
        weights = sorted(set(source.file_of.values()))
        copy_other_files(source, folder)
        (folder / LOTA_SUBFOLDER).mkdir()
        with_offset = offset_layers(adapter, source)
        if with_offset:
            create_safetensors(folder / LOTA_SUBFOLDER / OFFSETS_FILE, {
                f"{module}.offset": (torch.float32, source.shape(f"{module}.scales")) for module in with_offset})
            for module in set(with_offset) - set(adapter.modules):
                overwrite_tensor(folder / LOTA_SUBFOLDER / OFFSETS_FILE, f"{module}.offset", source.offset(module))
            set_checkpoint_format(folder, LOTA_FORMAT)
        modules, different, sizes, moved = set(adapter.modules), {}, {}, Moved()
        with tqdm(total=len(modules), desc="merging", unit="layer") as progress:
            def merged_tensor(name: str) -> "torch.Tensor | None":
                """What takes the place of a tensor of the GPTQ model; None where it stays."""
                module, _, tensor = name.rpartition(".")
                if module in modules and tensor == "scales" and config.learned_scales:
                    return rescale(source.tensor(name), adapter.scale_change(module))
                if module not in modules or tensor != "qweight":
                    return None
                packed = source.packed(module)
                merged, offset = merge_layer(module, packed)
                if offset is not None:
                    overwrite_tensor(folder / LOTA_SUBFOLDER / OFFSETS_FILE, f"{module}.offset", offset)
                different[module] = count_different(packed.qweight, merged.qweight, packed.bits)
                sizes[module] = math.prod(packed.shape)
                progress.update()
                return merged.qweight
            written = {file.name: rewrite_safetensors(file, folder / file.name, merged_tensor) for file in weights}
        for module in adapter.modules:
            moved.add(module, different[module], sizes[module])
        record = replace(config, quantized_model_dir=str(named.path.resolve()), base_format=source.checkpoint_format,
                         training={**config.training, "moved": moved.shares()}, sha256={}, history=named.history())
        record.save(folder / LOTA_SUBFOLDER)
        if verify:
            verify_folders(adapter, source, MergedFolder(folder), merge_layer)
        write_merged_card(folder, Path(output).name, record, source.bits, source.group_size)
        names = [name for name in files_below(folder) if name != MARKER]
        written |= checksums(folder, [name for name in names if name not in written])
        replace(record, sha256={name: written[name] for name in names}).save(folder / LOTA_SUBFOLDER)
    return moved.shares()


def layer_merger(adapter: "AdapterFolder") -> LayerMerger:
    """The function that merges one layer of this adapter. Its mu is the sum of the layer's own and of the adapter's."""
    from LoTA.ternary import merge
    config = adapter.config
    if config.method == "QA-LoRA":
        return lambda module, packed: (packed, packed.total_offset(qalora_offset(
            *adapter.matrices(module), adapter.scaling(module), packed, module)))

    def merge_steps(module: str, packed: "PackedLayer") -> "tuple[PackedLayer, torch.Tensor | None]":
        (lora_A, lora_B), rule = adapter.pair(module), adapter.rule(module)
        rule.check(lora_A.shape[1], packed.groups.largest)
        merged, offset = merge(lora_A, lora_B, packed, rule)
        return merged, packed.total_offset(adapter.offset(module) if config.learned_offset else offset)
    return merge_steps


def offset_layers(adapter: "AdapterFolder", source: "GPTQFolder") -> list[str]:
    """The names of the layers that have an offset after the merge: those of the adapter, and those of the model."""
    return sorted({*source.offset_modules(), *(adapter.modules if adapter.config.residual else [])})


def qalora_offset(lora_A: "torch.Tensor", lora_B: "torch.Tensor", scaling: float, packed: "PackedLayer",
                  module: str) -> "torch.Tensor":
    """mu of a QA-LoRA layer, float32 [groups, out]. lora_A: [pools, r]. lora_B: [r, out].

    PEFT adds scaling * (pools * mean of x over the pool) @ A @ B, where a pool is so many neighbouring inputs. So all
    weights of a pool shift by scaling * pools / size of a pool * (A @ B)[pool], and divided by the scale that is mu.
    Raises UserError unless each GPTQ group lies in one pool, and where a mu is not finite.
    """
    import torch
    g_idx, pools = packed.groups.g_idx, lora_A.shape[0]
    size = packed.shape[0] // pools
    pool_of = torch.arange(len(g_idx)) // size
    of_group = torch.empty(packed.groups.count, dtype=torch.int64).scatter_(0, g_idx, pool_of)
    if not torch.equal(of_group[g_idx], pool_of):
        raise UserError(f"{module}: the QA-LoRA adapter pools {size} inputs in their order, and a GPTQ group of "
                        f"{packed.groups.largest} inputs has some of several pools (desc_act); it does not merge")
    offset = scaling * pools / size * (lora_A.float() @ lora_B.float())[of_group] / packed.scales.float()
    if not bool(offset.isfinite().all()):
        raise UserError(f"{module}: an offset is not finite, because the adapter is damaged or a GPTQ scale is 0")
    return offset


def verify_folders(adapter: "AdapterFolder", source: "GPTQFolder", merged: "MergedFolder",
                   merge_layer: LayerMerger) -> None:
    """Reads the merged folder back and checks that each integer, offset and scale is what the equations say.

    The names of its tensors must be the source's, and those of its offsets exactly offset_layers().

    It computes the step of every weight again, because the merge may have computed only those that can step. Where
    integers, offsets, scales and all other tensors are equal, W' is equal. Raises RuntimeError, because a difference is
    a defect of this program or of the disk.
    """
    import torch
    from tqdm import tqdm

    from LoTA.ternary import is_merge
    config, wanted = merged.lota, offset_layers(adapter, source)
    renamed = sorted(set(merged.file_of) ^ set(source.file_of))
    renamed += [f"{module}.offset" for module in sorted(set(merged.offset_modules()) ^ set(wanted))]
    for wrong in renamed:
        raise RuntimeError(f"{wrong}: the merged folder's tensors are not those of the model and its adapter")
    for module in tqdm(adapter.modules, desc="verifying", unit="layer"):
        before, after, offset = source.packed(module), merged.packed(module), merged.offset(module)
        untouched = ["qzeros", "g_idx", "scales"]
        if config.method == "QA-LoRA":
            same = torch.equal(before.qweight, after.qweight) and torch.equal(offset, merge_layer(module, before)[1])
        else:
            rule = adapter.rule(module)
            same = is_merge(*adapter.pair(module), before, after, offset if rule.has_offset else None, rule)
            if not rule.has_offset and offset is not None:
                same &= torch.equal(offset, before.total_offset(adapter.offset(module) if config.learned_offset
                                                                else None))
        if config.learned_scales:
            untouched.remove("scales")
            same &= torch.equal(before.rescaled(adapter.scale_change(module)).scales, after.scales)
        if not same:
            raise RuntimeError(f"{module}: the merged weights differ from the trained ones")
        if not all(torch.equal(source.tensor(f"{module}.{t}"), merged.tensor(f"{module}.{t}")) for t in untouched):
            raise RuntimeError(f"{module}: a tensor that the merge must not touch was changed")
    for module in set(wanted) - set(adapter.modules):
        if not torch.equal(merged.offset(module), source.offset(module)):
            raise RuntimeError(f"{module}: an offset that the merge must not touch was changed")


class Moved:
    """Counts the integers that a merge moves, by projection (the last part of a layer's name)."""

    def __init__(self):
        self.counts: dict[str, tuple[int, int]] = {}        # {projection: (integers moved, integers)}
        self.in_layer: dict[str, float] = {}                # {layer: share moved}

    def add(self, module: str, different: int, size: int) -> None:
        """Counts one layer, of whose `size` integers `different` move."""
        projection = module.rsplit(".", 1)[-1]
        moved, total = self.counts.get(projection, (0, 0))
        self.counts[projection] = moved + different, total + size
        self.in_layer[module] = different / size

    def shares(self) -> dict[str, float]:
        """{projection: share moved}, and as "all" the share over all adapted layers."""
        moved, total = (sum(count[i] for count in self.counts.values()) for i in (0, 1))
        return {**{projection: count[0] / count[1] for projection, count in self.counts.items()}, "all": moved / total}


def print_moved(shares: dict[str, float]) -> None:
    """Prints what Moved.shares() returns."""
    print("share of integer weights moved by the merge")
    for projection, share in shares.items():
        print(f"  {projection:<12} {share:.4%}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m LoTA.lota_merge", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="the trained adapter's folder")
    parser.add_argument("--gptq", help="the GPTQ model it was trained on [the one that the adapter names]")
    parser.add_argument("--output", required=True, help="the merged folder to write")
    parser.add_argument("--interval_point", type=float, default=None,
                        help="omega, where neither lota_config.json nor the name of the adapter's folder says it "
                             "[0.75 r]")
    args = parser.parse_args()
    from LoTA.adapter_folder import AdapterFolder
    from LoTA.folders import open_base
    adapter = AdapterFolder(args.adapter, args.interval_point)
    print_moved(merge_folders(adapter, open_base(adapter.gptq_path(args.gptq)), args.output))
    print(f"merged and verified: {args.output}")


def cli() -> None:
    """The console command lota-merge."""
    run_script(main)


if __name__ == "__main__":
    cli()
