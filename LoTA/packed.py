"""PackedLayer holds the integer weights of one GPTQ layer as the checkpoint has them; Groups are its groups of rows.

Imports torch and LoTA.packing only. Integers are unpacked a block of groups at a time, because a whole layer in float32
takes 32 / bits times the memory of the packed one.
"""
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F

from LoTA import UserError
from LoTA.packing import unpack_rows, unpack_zeros, words_of

# Entries of one working block. On a CPU 2 MiB of float32 fit an L2 cache. A GPU wants few and large launches.
BLOCK_ENTRIES = {"cpu": 1 << 19, "cuda": 1 << 26}
SMALLEST_SCALE = 2**-24             # the smallest positive number of float16

Rows = slice | torch.Tensor         # an index into dim 0: neighbouring rows, or any rows


class Groups:
    """The groups of a layer's input rows, from GPTQ's `g_idx` [in].

    count: the number of groups.
    sizes: int64 [count], the rows that each group has.
    size: the rows of each group; the last may have fewer. None for any other mix of sizes.
    largest: the rows of the largest group.
    order: int64 [in], the row order in which the groups follow each other; None where they already do. Only models
        that were quantized with desc_act need it.
    starts: int32 [count + 1]; group k takes the places starts[k] ... starts[k + 1] - 1 of that order.

    Raises UserError where `g_idx` does not name exactly `count` groups.
    """

    def __init__(self, g_idx: torch.Tensor, count: int):
        g_idx = g_idx.long()
        # Before bincount(), which takes memory for every number up to the largest.
        lowest, highest = int(g_idx.min()), int(g_idx.max())
        if lowest < 0 or highest >= count:
            raise UserError(f"g_idx must name every group 0 ... {count - 1} that has scales, and no other; it names "
                            f"{lowest if lowest < 0 else highest}")
        self.count, self.g_idx = count, g_idx
        self.sizes = torch.bincount(g_idx, minlength=count)
        if int(self.sizes.min()) == 0:
            raise UserError(f"g_idx must name every group 0 ... {count - 1} that has scales, and no other; it names "
                            f"{len(self.sizes.nonzero())} groups up to {highest}")
        self.order = None if bool((g_idx[1:] >= g_idx[:-1]).all()) else torch.argsort(g_idx, stable=True)
        sizes = self.sizes.tolist()
        self.size = sizes[0] if all(n == sizes[0] for n in sizes[:-1]) and sizes[-1] <= sizes[0] else None
        self.largest = max(sizes)
        self._starts = [0, *accumulate(sizes)]
        self.starts = torch.tensor(self._starts, dtype=torch.int32, device=g_idx.device)

    def blocks(self, cols: int) -> Iterator[tuple[Rows, int, int, int]]:
        """Cuts the rows of an [in, cols] tensor into blocks of whole groups.

        A block has at most BLOCK_ENTRIES entries, or is a single group.

        Yields (rows, first, last, size): the block holds the groups first ... last - 1, each of `size` rows, and
        `rows` indexes dim 0.
        """
        entries = BLOCK_ENTRIES.get(self.g_idx.device.type, BLOCK_ENTRIES["cuda"])
        step = max(1, entries // (self.size * cols)) if self.size else 1
        first = 0
        while first < self.count:
            last = min(first + step, self.count)
            if last - first > 1 and self._starts[last] - self._starts[first] != (last - first) * self.size:
                last -= 1                                           # a short last group is a block of its own
            start, end = self._starts[first], self._starts[last]
            rows = slice(start, end) if self.order is None else self.order[start:end]
            yield rows, first, last, (end - start) // (last - first)
            first = last

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sums dim 0 of [in, n] over each group: [groups, n]."""
        if self.order is None and self.size and x.shape[0] == self.count * self.size:
            return x.view(self.count, self.size, -1).sum(1)
        return x.new_zeros(self.count, x.shape[1]).index_add_(0, self.g_idx, x)

    def sum_columns(self, x: torch.Tensor) -> torch.Tensor:
        """Sums dim 1 of [n, in] over each group: [n, groups]. Each sum is rounded to the dtype of x once."""
        if self.size is None:
            return x.new_zeros(x.shape[0], self.count, dtype=torch.float32).index_add_(1, self.g_idx, x.float()).to(
                x.dtype)
        if self.order is not None:
            x = x[:, self.order]
        missing = self.count * self.size - x.shape[1]
        return (F.pad(x, (0, missing)) if missing else x).view(-1, self.count, self.size).sum(2)

    def add_to_columns_(self, x: torch.Tensor, of_groups: torch.Tensor) -> None:
        """Adds to each column of x [n, in] its group's column of `of_groups` [n, groups], in place."""
        whole = x.shape[1] // self.size * self.size if self.size and self.order is None else 0
        if whole:
            x[:, :whole].unflatten(1, (-1, self.size)).add_(of_groups[:, :whole // self.size, None])
        if whole < x.shape[1]:
            x[:, whole:].add_(of_groups[:, self.g_idx[whole:]])

    def to(self, device: torch.device | str) -> "Groups":
        """Moves the index tensors to `device` in place. Returns itself."""
        self.g_idx, self.sizes = self.g_idx.to(device), self.sizes.to(device)
        self.starts, self.order = self.starts.to(device), None if self.order is None else self.order.to(device)
        return self


class PackedLayer:
    """The integer weights of one GPTQ layer.

    qweight: int32 [ceil(in * bits / 32), out]. qzeros: int32 [groups, ceil(out * bits / 32)]. bits: of one integer.
    scales: [groups, out] in any float dtype. g_idx: [in], the group of each row.
    base_scales: the scales before rescaled().
    base_offset: mu of the model on disk, float32 [groups, out]; None where it has none. Only a merged model has one.
    checkpoint_format: "gptq" stores z - 1 in qzeros, "gptq_v2" stores z.
    groups: the layer's Groups, where the caller has them already.
    """

    def __init__(self, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor,
                 bits: int, checkpoint_format: str, groups: Groups | None = None,
                 base_offset: torch.Tensor | None = None):
        self.qweight, self.qzeros, self.scales, self.bits = qweight, qzeros, scales, bits
        self.base_scales, self.base_offset = scales, base_offset
        self.checkpoint_format, self.maxq = checkpoint_format, 2**bits - 1
        self.groups = groups or Groups(g_idx, scales.shape[0])
        self.shape = len(g_idx), scales.shape[1]

    @cached_property
    def zeros(self) -> torch.Tensor:
        """The zero points, uint8 [groups, out]."""
        return unpack_zeros(self.qzeros, self.bits, self.shape[1], self.checkpoint_format)

    @cached_property
    def weight_int(self) -> torch.Tensor:
        """All integers, uint8 [in, out]."""
        return unpack_rows(self.qweight, self.bits, self.shape[0])

    def integers(self, rows: Rows) -> torch.Tensor:
        """The integers of some rows, float32 [rows, out]."""
        words = words_of(rows, self.bits) if isinstance(rows, slice) else None
        if words is None:
            return self.weight_int[rows].float()
        return unpack_rows(self.qweight[words], self.bits, rows.stop - rows.start, torch.float32)

    def with_integers(self, qweight: torch.Tensor) -> "PackedLayer":
        """The same layer with other integers, packed as `qweight`."""
        return self._with(qweight, self.scales)

    @torch.no_grad()
    def rescaled(self, scale_change: torch.Tensor) -> "PackedLayer":
        """The same integers with learned scales, see rescale()."""
        return self._with(self.qweight, rescale(self.base_scales, scale_change))

    def total_offset(self, offset: torch.Tensor | None) -> torch.Tensor | None:
        """mu of the model on disk plus that of an adapter on it, float32 [groups, out]. None: neither is there.

        offset: mu of the adapter [groups, out], or None. Training, live and merged models all add up here, so that
        their sums are equal bit for bit.
        """
        if self.base_offset is None or offset is None:
            return self.base_offset if offset is None else offset
        return self.base_offset + offset.float()

    def _with(self, qweight: torch.Tensor, scales: torch.Tensor) -> "PackedLayer":
        layer = PackedLayer(qweight, self.qzeros, scales, self.groups.g_idx, self.bits, self.checkpoint_format,
                            self.groups, self.base_offset)
        layer.base_scales = self.base_scales
        return layer


def rescale(scales: torch.Tensor, scale_change: torch.Tensor) -> torch.Tensor:
    """Learned scales s = scales * (1 + scale_change), float16. All are [groups, out].

    They are rounded to float16, because a GPTQ checkpoint holds float16 and training must compute with what will be
    written. They never become 0, because the gradient of scale_change divides by s. Training the scales alone is PEQA
    (https://arxiv.org/abs/2305.14152).
    """
    scales = (scales.float() * (1 + scale_change.float())).half()
    return scales.masked_fill_(scales == 0, SMALLEST_SCALE)
