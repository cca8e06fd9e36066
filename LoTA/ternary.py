"""The method of LoTA-QAF as functions of tensors: ternary adapters on a GPTQ layer. Needs torch only.

Chen et al., "LoTA-QAF: Lossless Ternary Adaptation for Quantization-Aware Fine-Tuning", https://arxiv.org/abs/2505.18724

    W_int   weight_int  [in, out]      integers on the grid 0 ... maxq = 2**bits - 1
    s, z    scales, zeros [groups, out] per group of input rows
    A, B    lora_A [in, r], lora_B [r, out]  entries -1, 0, 1
    dW      aux         [in, out]      A @ B, integers in -r ... r
    W^      ternary     [in, out]      -1, 0, 1: the step each weight takes on its grid      (Eq. 3)
    mu      offset      [groups, out]  what the steps left over, moved into the zero factor  (Eq. 4)
    omega   threshold in (0, r);  kappa: what mu is divided by, omega in the published scripts, 1 in the paper

Three things make the fast path exact and cheap. All sums over A and B are sums of integers, exact in float32 in any
order, so every device and every blocking gives the same integers and the same mu. Sums over a group go through the
small factor: sum_i dW_ij = (sum_i A_i) @ B, so mu and both gradients need no [in, out] pass of their own. And |dW_ij|
is at most the number of entries that are not 0 in row i of A, and in column j of B: at omega = 0.75 r next to no weight
can step, and only the products of those that can are needed at all.
"""
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F

from LoTA import UserError
from LoTA.packing import step_at, unpack_rows, unpack_zeros, words_of

EXACT_IN_FLOAT32 = 2**24            # integers up to here are exact in float32 ...
EXACT_IN_BFLOAT16 = 2**8            # ... and in bfloat16
# Entries of one working block: on a CPU 2 MiB of float32, about an L2 cache; on a GPU few and large launches.
BLOCK_ENTRIES = {"cpu": 1 << 19, "cuda": 1 << 26}
SMALLEST_SCALE = 2**-24             # of float16
FEW = 1 / 8             # up to this share of the weights, those that may step are sought out one by one


# --- initialisation -----------------------------------------------------------------------------------------------

@torch.no_grad()
def ternarize_(weight):
    """Rounds `weight` in place to -1, 0, 1 with the threshold 0.75 * mean|weight|; returns it."""
    delta = 0.75 * weight.abs().mean()
    return weight.copy_((weight > delta).to(weight.dtype) - (weight < -delta).to(weight.dtype))


def check_settings(rank, omega, largest_group):
    """Raises UserError where omega or the rank leave the range in which the method is defined and exact."""
    if not 0 < omega < rank:
        raise UserError(f"omega (--interval_point) must lie in (0, r): it is {omega:g}, the rank is {rank}")
    if rank * largest_group > EXACT_IN_FLOAT32:
        raise UserError(f"rank {rank} is too large: sums of {rank} x {largest_group} ternary products are exact in "
                         f"float32 up to {EXACT_IN_FLOAT32} only")


# --- the grid -----------------------------------------------------------------------------------------------------

class Groups:
    """The groups of a layer's input rows, from GPTQ's `g_idx` [in]; made once a layer.

    count: number of groups. sizes: [count], rows each group really has. starts: int32 [count + 1], where each group
    begins once the rows are in order. order: None where the groups follow each
    other, else the row order that makes them (desc_act). size: rows of every group but perhaps the last, or None
    where the groups are of unequal size.
    """

    def __init__(self, g_idx, count):
        g_idx = g_idx.long()
        self.count, self.g_idx = count, g_idx
        self.sizes = torch.bincount(g_idx, minlength=count)
        if len(self.sizes) != count or int(self.sizes.min()) == 0:
            raise UserError(f"g_idx names {len(self.sizes.nonzero())} groups where the scales have {count}")
        self.order = None if bool((g_idx[1:] >= g_idx[:-1]).all()) else torch.argsort(g_idx, stable=True)
        sizes = self.sizes.tolist()
        self.size = sizes[0] if all(n == sizes[0] for n in sizes[:-1]) and sizes[-1] <= sizes[0] else None
        self.largest = max(sizes)
        self._starts = [0, *accumulate(sizes)]
        self.starts = torch.tensor(self._starts, dtype=torch.int32, device=g_idx.device)

    def blocks(self, cols):
        """Cuts the rows into runs of whole groups of about BLOCK_ENTRIES entries: (rows, first, last + 1, size).

        rows indexes dim 0 of an [in, ...] tensor; every group of the block has `size` rows.
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

    def sum(self, x):
        """Sums dim 0 of [in, n] over each group: [groups, n]."""
        if self.order is None and self.size and x.shape[0] == self.count * self.size:
            return x.view(self.count, self.size, -1).sum(1)
        return x.new_zeros(self.count, x.shape[1]).index_add_(0, self.g_idx, x)

    def sum_columns(self, x):
        """Sums dim 1 of [n, in] over each group: [n, groups]; every sum is rounded to x's dtype once."""
        if self.size is None:
            return x.new_zeros(x.shape[0], self.count, dtype=torch.float32).index_add_(1, self.g_idx, x.float()).to(
                x.dtype)
        if self.order is not None:
            x = x[:, self.order]
        missing = self.count * self.size - x.shape[1]
        return (F.pad(x, (0, missing)) if missing else x).view(-1, self.count, self.size).sum(2)

    def to(self, device):
        """Moves the index tensors, in place; returns self."""
        self.g_idx, self.sizes = self.g_idx.to(device), self.sizes.to(device)
        self.starts, self.order = self.starts.to(device), None if self.order is None else self.order.to(device)
        return self


class Grid:
    """The integer weights of one GPTQ layer as they lie in the checkpoint; unpacked only where they are asked for.

    qweight int32 [in * bits / 32, out]; qzeros int32 [groups, out * bits / 32]; scales, any float dtype,
    [groups, out]; g_idx [in]. checkpoint_format: "gptq" stores z - 1 in qzeros, "gptq_v2" stores z. groups: where
    they are known from before.
    """

    def __init__(self, qweight, qzeros, scales, g_idx, bits, checkpoint_format, groups=None):
        self.qweight, self.qzeros, self.scales, self.bits = qweight, qzeros, scales, bits
        self.base_scales = scales       # before rescaled(): see there
        self.checkpoint_format, self.maxq = checkpoint_format, 2**bits - 1
        self.groups = groups or Groups(g_idx, scales.shape[0])
        self.shape = len(g_idx), scales.shape[1]

    @cached_property
    def zeros(self):
        return unpack_zeros(self.qzeros, self.bits, self.shape[1], self.checkpoint_format)

    @cached_property
    def weight_int(self):
        """All of the integers, uint8 [in, out]."""
        return unpack_rows(self.qweight, self.bits, self.shape[0])

    def codes(self, rows):
        """The integers of some rows, a slice or an index tensor, as float32."""
        words = words_of(rows, self.bits) if isinstance(rows, slice) else None
        if words is None:
            return self.weight_int[rows].float()
        return unpack_rows(self.qweight[words], self.bits, rows.stop - rows.start, torch.float32)

    def with_integers(self, qweight):
        """The same grid with other integers on it, packed as these are."""
        return Grid(qweight, self.qzeros, self.scales, self.groups.g_idx, self.bits, self.checkpoint_format,
                    self.groups)

    @torch.no_grad()
    def rescaled(self, change):
        """The same integers on a grid of learned scales s * (1 + change), change [groups, out].

        Rounded to the float16 that a GPTQ checkpoint holds, so that training computes with what is written, but never
        to 0: the gradient of the change is found in W' / s. As PEQA (https://arxiv.org/abs/2305.14152), which trains
        nothing but the scales.
        """
        scales = (self.base_scales.float() * (1 + change.float())).half()
        scales.masked_fill_(scales == 0, SMALLEST_SCALE)
        grid = Grid(self.qweight, self.qzeros, scales, self.groups.g_idx, self.bits, self.checkpoint_format,
                    self.groups)
        grid.base_scales = self.base_scales
        return grid


@dataclass(frozen=True)
class Threshold:
    """omega of Eq. 3, and kappa, what the offset factor is divided by; kappa None leaves Eq. 4's offset out."""
    omega: float
    kappa: float | None


# --- the equations ------------------------------------------------------------------------------------------------

def ternary_step(aux, omega):
    """Eq. 3 but for the grid's ends: +1 above omega, -1 below -omega, else 0, strictly. Same shape, float32.

    aux holds integers, so that "above omega" is "above floor(omega)", which every float dtype here can hold.
    """
    return F.hardshrink(aux, math.floor(omega)).float().sign_()


def product_dtype(rank, device):
    """The dtype in which A @ B, integers in -r ... r, is exact and fastest: bfloat16 up to r = 256 where the hardware
    multiplies it, else float32."""
    if rank > EXACT_IN_BFLOAT16:
        return torch.float32
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    return torch.bfloat16


def offset_factor(aux_sum, ternary_sum, sizes, threshold):
    """Eq. 4, mu [groups, out] float32: (sum dW - omega * sum W^) / (kappa * n); both sums are exact integers."""
    return (aux_sum - threshold.omega * ternary_sum) / (threshold.kappa * sizes[:, None])


def _few_steps(lora_A, lora_B, omega):
    """(rows, cols, step) of the weights whose |dW| passes omega; None where they may be many, or are costly to find."""
    if lora_A.device.type != "cpu":                 # selecting would stop a GPU's queue
        return None
    rows = (torch.count_nonzero(lora_A, 1) > omega).nonzero().flatten()
    cols = (torch.count_nonzero(lora_B, 0) > omega).nonzero().flatten()
    if len(rows) * len(cols) > FEW * lora_A.shape[0] * lora_B.shape[1]:
        return None
    aux = lora_A[rows].float() @ lora_B[:, cols].float()
    where = (aux.abs() > omega).nonzero(as_tuple=True)
    return rows[where[0]], cols[where[1]], aux[where].sign()


def _take_few_steps(steps, aux_sum, grid, threshold):
    """Eq. 5 where few weights step: (the merged Grid, mu [groups, out] or None)."""
    rows, cols, step = steps
    qweight = grid.qweight.clone()
    taken = step_at(qweight, grid.bits, rows, cols, step).float()
    offset = None
    if aux_sum is not None:
        ternary_sum = torch.zeros_like(aux_sum).index_put_((grid.groups.g_idx[rows], cols), taken, accumulate=True)
        offset = offset_factor(aux_sum, ternary_sum, grid.groups.sizes, threshold)
    return grid.with_integers(qweight), offset


def _sum_of_aux(lora_A, lora_B, grid, threshold):
    """The sum of dW over each group [groups, out] float32, or None where there is no offset."""
    return None if threshold.kappa is None else grid.groups.sum(lora_A.float()) @ lora_B.float()


def _adapted_blocks(lora_A, lora_B, aux_sum, grid, threshold):
    """Eq. 3 and 4 a block of groups at a time, in float32.

    Yields (rows, first, last, W_int + W^ and W^, both [groups, rows, out], mu [groups, out] or None).
    """
    dtype = product_dtype(lora_B.shape[0], lora_B.device)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    for rows, first, last, size in grid.groups.blocks(lora_B.shape[1]):
        # All in float32: torch's operators that mix uint8 and float32 are ten times slower on a CPU.
        codes = grid.codes(rows).view(last - first, size, -1)
        # A step off the grid's end is no step: clamping the sum is Eq. 3's boundary check.
        stepped = ternary_step(lora_A[rows] @ lora_B, threshold.omega).view_as(codes).add_(codes).clamp_(0, grid.maxq)
        taken, offset = torch.sub(stepped, codes, out=codes), None
        if aux_sum is not None:
            offset = offset_factor(aux_sum[first:last], taken.sum(1), grid.groups.sizes[first:last], threshold)
        yield rows, first, last, stepped, taken, offset


@torch.no_grad()
def adapted_weight(lora_A, lora_B, grid, threshold, dtype=torch.float32, out=None, learned=None):
    """W' [in, out] = s * (W_int - z + W^ + mu) in `dtype`, computed in float32: what training multiplies with.

    Written into `out` where it is given. learned: mu [groups, out], where it is a parameter of its own instead of
    Eq. 4's (kappa None).
    """
    aux_sum, steps = _sum_of_aux(lora_A, lora_B, grid, threshold), _few_steps(lora_A, lora_B, threshold.omega)
    if steps is not None:
        merged, offset = _take_few_steps(steps, aux_sum, grid, threshold)
        return dequantize(merged, offset if learned is None else learned, dtype, out)
    weight = out if out is not None else torch.empty(grid.shape, dtype=dtype, device=grid.scales.device)
    for rows, first, last, stepped, _, offset in _adapted_blocks(lora_A, lora_B, aux_sum, grid, threshold):
        offset = offset if learned is None else learned[first:last]
        _write_weight(weight, rows, stepped, offset, grid, first, last)
    return weight


@torch.no_grad()
def merge(lora_A, lora_B, grid, threshold):
    """Eq. 5: (the Grid with the adapter moved into its integers, mu float32 [groups, out] or None)."""
    aux_sum, steps = _sum_of_aux(lora_A, lora_B, grid, threshold), _few_steps(lora_A, lora_B, threshold.omega)
    if steps is not None:
        return _take_few_steps(steps, aux_sum, grid, threshold)
    qweight = grid.qweight.clone()
    offset = torch.empty(grid.scales.shape, device=qweight.device) if threshold.kappa is not None else None
    for rows, first, last, _, taken, mu in _adapted_blocks(lora_A, lora_B, aux_sum, grid, threshold):
        taken = taken.flatten(0, 1)
        place, cols = taken.nonzero(as_tuple=True)
        row = place + rows.start if isinstance(rows, slice) else rows[place]
        step_at(qweight, grid.bits, row, cols, taken[place, cols])
        if offset is not None:
            offset[first:last] = mu
    return grid.with_integers(qweight), offset


@torch.no_grad()
def is_merge(lora_A, lora_B, before, after, offset, threshold):
    """Whether `after` and `offset` are what merge() makes of `before`: looks at every weight, in blocks."""
    aux_sum = _sum_of_aux(lora_A, lora_B, before, threshold)
    return (offset is None) == (aux_sum is None) and all(
        torch.equal(stepped.flatten(0, 1), after.codes(rows)) and (mu is None or torch.equal(mu, offset[first:last]))
        for rows, first, last, stepped, _, mu in _adapted_blocks(lora_A, lora_B, aux_sum, before, threshold))


@torch.no_grad()
def dequantize(grid, offset=None, dtype=torch.float32, out=None):
    """The merged layer's weight [in, out] = s * (W_int - z + mu) in `dtype`; offset [groups, out] or None.

    Written into `out` where it is given.
    """
    weight = out if out is not None else torch.empty(grid.shape, dtype=dtype, device=grid.scales.device)
    for rows, first, last, size in grid.groups.blocks(grid.scales.shape[1]):
        codes = grid.codes(rows).view(last - first, size, -1)
        _write_weight(weight, rows, codes, None if offset is None else offset[first:last], grid, first, last)
    return weight


def _write_weight(weight, rows, codes, offset, grid, first, last):
    """weight[rows] = s * (codes - z + mu) for the groups first ... last - 1; codes [groups, rows, out] is used up.

    The live and the merged layer both come through here: with equal integers their weights are equal bit for bit.
    """
    shift = -grid.zeros[first:last].float()
    if offset is not None:
        shift += offset.float()
    codes.add_(shift[:, None])
    scales = grid.scales[first:last, None].float()
    if isinstance(rows, slice) and weight.dtype == torch.float32:
        torch.mul(codes, scales, out=weight[rows].view_as(codes))
    else:
        weight[rows] = codes.mul_(scales).flatten(0, 1).to(weight.dtype)


@torch.no_grad()
def adapter_gradients(x, grad_output, lora_A, lora_B, grid, threshold, weight=None):
    """Gradients of A [in, r], B [r, out], a learned mu and a learned change of the scales [groups, out], float32.

    x [tokens, in], grad_output [tokens, out]; straight-through for W^. With G = x^T @ grad_output and H = s * G:
    dL/d(dW) = H + (sum of H over the group) / (kappa * n), dL/dA = dL/d(dW) @ B^T, dL/dB = A^T @ dL/d(dW);
    dL/d(mu) = sum of H over the group, where mu is a parameter of its own; and where `weight`, W', is given,
    dL/d(change) = sum of G * W' over the group * base s / s, straight-through for the rounding of s; else None.
    """
    lora_A, lora_B = lora_A.float(), lora_B.float()
    scaled = torch.mm(x.t(), grad_output, out=_workspace(grid.shape, x)).float()     # H, scaled below
    scaled_sum = torch.empty(grid.scales.shape, device=x.device)
    weight_sum = None if weight is None else torch.empty_like(scaled_sum)
    for rows, first, last, size in grid.groups.blocks(lora_B.shape[1]):
        block = scaled[rows].view(last - first, size, -1)
        if weight is not None:
            weight_sum[first:last] = (block * weight[rows].view_as(block)).sum(1)
        block.mul_(grid.scales[first:last, None].float())
        scaled_sum[first:last] = block.sum(1)
        if not isinstance(rows, slice):
            scaled[rows] = block.flatten(0, 1)
    grad_A, grad_B = scaled @ lora_B.t(), lora_A.t() @ scaled
    if threshold.kappa is not None:
        mean = scaled_sum / (threshold.kappa * grid.groups.sizes[:, None])
        grad_A += (mean @ lora_B.t())[grid.groups.g_idx]
        grad_B.addmm_(grid.groups.sum(lora_A).t(), mean)
    return grad_A, grad_B, scaled_sum, scale_gradient(weight_sum, grid)


def scale_gradient(weight_sum, grid):
    """dL/d(change) [groups, out] out of the sums of G * W' over the groups; None for None."""
    return None if weight_sum is None else weight_sum.mul_(grid.base_scales.float()).div_(grid.scales.float())


_workspaces = {}


def _workspace(shape, like):
    """A tensor of `shape` for a result that is used up at once, with the dtype and device of `like`.

    On a CPU the memory is kept from call to call, one piece for the largest layer: fresh memory of this size costs
    page faults that take as long as filling it. A GPU's allocator keeps memory by itself.
    """
    size = shape[0] * shape[1]
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if like.dtype not in _workspaces or _workspaces[like.dtype].numel() < size:
        _workspaces[like.dtype] = torch.empty(size, dtype=like.dtype)
    return _workspaces[like.dtype][:size].view(shape)


class TernaryLinear(torch.autograd.Function):
    """y = x @ W'(A, B) and the straight-through gradients; keeps only x and the adapters for the backward.

    W' is formed again in the backward rather than kept: it is as large as the layer would be without quantization.
    load_grid: called without arguments, returns the layer's grid. method: the module whose adapted_weight and
    adapter_gradients compute, this one or LoTA.kernels. learned: mu [groups, out] as a parameter of its own, or None.
    change: what load_grid's grid was rescaled() with [groups, out], here for its gradient only, or None.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, load_grid, threshold, method=sys.modules[__name__], learned=None, change=None):
        ctx.save_for_backward(x, lora_A, lora_B, learned)
        ctx.load_grid, ctx.threshold, ctx.method = load_grid, threshold, method
        grid = load_grid()
        return x @ method.adapted_weight(lora_A, lora_B, grid, threshold, x.dtype, _workspace(grid.shape, x), learned)

    @staticmethod
    def backward(ctx, grad_output):
        x, lora_A, lora_B, learned = ctx.saved_tensors
        grid, threshold, method = ctx.load_grid(), ctx.threshold, ctx.method
        grad_output = grad_output.to(x.dtype)           # they differ under autocast
        grad_x = grad_A = grad_B = grad_learned = grad_change = weight = None
        scales_learn = any(ctx.needs_input_grad[7:])        # shorter where arguments were left to their defaults
        if ctx.needs_input_grad[0] or scales_learn:
            weight = method.adapted_weight(lora_A, lora_B, grid, threshold, x.dtype,
                                           None if scales_learn else _workspace(grid.shape, x), learned)
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ weight.t()
        if not scales_learn:
            # W' is used up before x^T @ grad_output comes: one tensor of the layer's size lives at a time.
            weight = None
        if any(ctx.needs_input_grad[1:]):
            grad_A, grad_B, grad_learned, grad_change = method.adapter_gradients(
                x.flatten(0, -2), grad_output.flatten(0, -2), lora_A, lora_B, grid, threshold, weight)
            grad_A, grad_B = grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
        return (grad_x, grad_A, grad_B, None, None, None, None if learned is None else grad_learned.to(learned.dtype),
                grad_change)
