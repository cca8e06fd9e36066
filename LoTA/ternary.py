"""The method of LoTA-QAF as functions of tensors: ternary adapters on a GPTQ layer. Needs torch only.

Chen et al., "LoTA-QAF: Lossless Ternary Adaptation for Quantization-Aware Fine-Tuning", https://arxiv.org/abs/2505.18724

    W_int   weight_int  [in, out]      integers on the grid 0 ... maxq = 2**bits - 1
    s, z    scales, zeros [groups, out] per group of input rows
    A, B    lora_A [in, r], lora_B [r, out]  entries -1, 0, 1
    dW      aux         [in, out]      A @ B, integers in -r ... r
    W^      ternary     [in, out]      -1, 0, 1: the step each weight takes on its grid      (Eq. 3)
    mu      offset      [groups, out]  what the steps left over, moved into the zero factor  (Eq. 4)
    omega   threshold in (0, r);  kappa: what mu is divided by, omega in the published scripts, 1 in the paper

Two things make the fast path exact and cheap. All sums over A and B are sums of integers, exact in float32 in any
order, so every device and every blocking gives the same integers and the same mu. And sums over a group go through
the small factor: sum_i dW_ij = (sum_i A_i) @ B, so mu and both gradients need no [in, out] pass of their own.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from LoTA import UserError

EXACT_IN_FLOAT32 = 2**24            # integers up to here are exact in float32 ...
EXACT_IN_BFLOAT16 = 2**8            # ... and in bfloat16
# Entries of one working block: on a CPU 1 MiB of float32, about an L2 cache; on a GPU few and large launches.
BLOCK_ENTRIES = {"cpu": 1 << 18, "cuda": 1 << 26}


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

    count: number of groups. sizes: [count], rows each group really has. order: None where the groups follow each
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
        self._starts = [0]
        for n in sizes:
            self._starts.append(self._starts[-1] + n)

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
        self.order = None if self.order is None else self.order.to(device)
        return self


@dataclass
class Grid:
    """The integer weights of one GPTQ layer, unpacked, and what turns them into numbers.

    weight_int uint8 [in, out]; zeros, any integer dtype, and scales, any float dtype, [groups, out].
    """
    weight_int: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: Groups
    maxq: int


@dataclass(frozen=True)
class Threshold:
    """omega of Eq. 3, and kappa, what the offset factor is divided by; kappa None leaves the offset out."""
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


def _adapted_blocks(lora_A, lora_B, grid, threshold):
    """Eq. 3 and 4 a block of groups at a time, in float32.

    Yields (rows, first, last, W_int + W^ [groups, rows, out], mu [groups, out] or None).
    """
    aux_sum = None if threshold.kappa is None else grid.groups.sum(lora_A.float()) @ lora_B.float()
    dtype = product_dtype(lora_B.shape[0], lora_B.device)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    for rows, first, last, size in grid.groups.blocks(lora_B.shape[1]):
        # All in float32: torch's operators that mix uint8 and float32 are ten times slower on a CPU.
        codes = grid.weight_int[rows].float().view(last - first, size, -1)
        # A step off the grid's end is no step: clamping the sum is Eq. 3's boundary check.
        stepped = ternary_step(lora_A[rows] @ lora_B, threshold.omega).view_as(codes).add_(codes).clamp_(0, grid.maxq)
        offset = None
        if aux_sum is not None:
            ternary_sum = torch.sub(stepped, codes, out=codes).sum(1)
            offset = offset_factor(aux_sum[first:last], ternary_sum, grid.groups.sizes[first:last], threshold)
        yield rows, first, last, stepped, offset


@torch.no_grad()
def adapted_weight(lora_A, lora_B, grid, threshold, dtype=torch.float32, out=None):
    """W' [in, out] = s * (W_int - z + W^ + mu) in `dtype`, computed in float32: what training multiplies with.

    Written into `out` where it is given.
    """
    weight = out if out is not None else torch.empty(grid.weight_int.shape, dtype=dtype, device=grid.weight_int.device)
    for rows, first, last, stepped, offset in _adapted_blocks(lora_A, lora_B, grid, threshold):
        _write_weight(weight, rows, stepped, offset, grid, first, last)
    return weight


@torch.no_grad()
def merge(lora_A, lora_B, grid, threshold):
    """Eq. 5: (W_int' uint8 [in, out], mu float32 [groups, out] or None): the adapter moved into the integer grid."""
    merged = torch.empty_like(grid.weight_int)
    offset = torch.empty(grid.scales.shape, device=merged.device) if threshold.kappa is not None else None
    for rows, first, last, stepped, mu in _adapted_blocks(lora_A, lora_B, grid, threshold):
        merged[rows] = stepped.flatten(0, 1).to(torch.int32).to(torch.uint8)    # by way of int32: five times faster
        if offset is not None:
            offset[first:last] = mu
    return merged, offset


@torch.no_grad()
def dequantize(grid, offset=None, dtype=torch.float32):
    """The merged layer's weight [in, out] = s * (W_int - z + mu) in `dtype`; offset [groups, out] or None."""
    weight = torch.empty(grid.weight_int.shape, dtype=dtype, device=grid.weight_int.device)
    for rows, first, last, size in grid.groups.blocks(grid.scales.shape[1]):
        codes = grid.weight_int[rows].view(last - first, size, -1).float()
        _write_weight(weight, rows, codes, None if offset is None else offset[first:last], grid, first, last)
    return weight


def _write_weight(weight, rows, codes, offset, grid, first, last):
    """weight[rows] = s * (codes - z + mu) for the groups first ... last - 1; codes [groups, rows, out] is used up.

    The live and the merged layer both come through here: with equal integers their weights are equal bit for bit.
    """
    shift = -grid.zeros[first:last].float()
    if offset is not None:
        shift += offset
    codes.add_(shift[:, None])
    scales = grid.scales[first:last, None].float()
    if isinstance(rows, slice) and weight.dtype == torch.float32:
        torch.mul(codes, scales, out=weight[rows].view_as(codes))
    else:
        weight[rows] = codes.mul_(scales).flatten(0, 1).to(weight.dtype)


@torch.no_grad()
def adapter_gradients(x, grad_output, lora_A, lora_B, grid, threshold):
    """Gradients of A [in, r] and B [r, out], float32, with the straight-through estimator for W^.

    x [tokens, in], grad_output [tokens, out]. With H = s * (x^T @ grad_output):
    dL/d(dW) = H + (sum of H over the group) / (kappa * n), dL/dA = dL/d(dW) @ B^T, dL/dB = A^T @ dL/d(dW).
    """
    lora_A, lora_B = lora_A.float(), lora_B.float()
    scaled = torch.mm(x.t(), grad_output, out=_workspace(grid.weight_int.shape, x)).float()     # H, scaled below
    scaled_sum = torch.empty(grid.scales.shape, device=x.device)
    for rows, first, last, size in grid.groups.blocks(lora_B.shape[1]):
        block = scaled[rows].view(last - first, size, -1).mul_(grid.scales[first:last, None].float())
        scaled_sum[first:last] = block.sum(1)
        if not isinstance(rows, slice):
            scaled[rows] = block.flatten(0, 1)
    grad_A, grad_B = scaled @ lora_B.t(), lora_A.t() @ scaled
    if threshold.kappa is not None:
        scaled_sum /= threshold.kappa * grid.groups.sizes[:, None]
        grad_A += (scaled_sum @ lora_B.t())[grid.groups.g_idx]
        grad_B.addmm_(grid.groups.sum(lora_A).t(), scaled_sum)
    return grad_A, grad_B


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
    load_grid: called without arguments, returns the layer's Grid.
    """

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, load_grid, threshold):
        ctx.save_for_backward(x, lora_A, lora_B)
        ctx.load_grid, ctx.threshold = load_grid, threshold
        grid = load_grid()
        return x @ adapted_weight(lora_A, lora_B, grid, threshold, x.dtype, _workspace(grid.weight_int.shape, x))

    @staticmethod
    def backward(ctx, grad_output):
        x, lora_A, lora_B = ctx.saved_tensors
        grid, threshold = ctx.load_grid(), ctx.threshold
        grad_output = grad_output.to(x.dtype)           # they differ under autocast
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            # W' is used up before x^T @ grad_output comes: one tensor of the layer's size lives at a time.
            weight = adapted_weight(lora_A, lora_B, grid, threshold, x.dtype, _workspace(grid.weight_int.shape, x))
            grad_x = grad_output @ weight.t()
            del weight
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_A, grad_B = adapter_gradients(
                x.flatten(0, -2), grad_output.flatten(0, -2), lora_A, lora_B, grid, threshold)
            grad_A, grad_B = grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
        return grad_x, grad_A, grad_B, None, None
