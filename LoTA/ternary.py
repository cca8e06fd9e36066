"""The method of LoTA-QAF as functions of tensors: ternary adapters on a GPTQ layer. Needs torch only.

Chen et al., "LoTA-QAF: Lossless Ternary Adaptation for Quantization-Aware Fine-Tuning", https://arxiv.org/abs/2505.18724

    W_int   weight_int  [in, out]      integers on the grid 0 ... maxq = 2**bits - 1
    s, z    scales, zeros [groups, out] per group of input rows
    A, B    lora_A [in, r], lora_B [r, out]  entries -1, 0, 1
    dW      delta_w     [in, out]      A @ B, integers in -r ... r
    W^      ternary     [in, out]      -1, 0, 1: the step each weight takes on its grid      (Eq. 3)
    mu      offset      [groups, out]  what the steps left over, moved into the zero factor  (Eq. 4)
    omega   the threshold of Eq. 3, in (0, r)
    kappa   the divisor of Eq. 4's group mean: omega in the published scripts, 1 in the paper

Scales may be learned: s = s_base * (1 + scale_change), where s_base is the checkpoint's.

Three facts make the computation exact and cheap.
1. All sums over A and B are sums of integers. They are exact in float32 in any order, so every device and every
   blocking gives the same integers and the same mu.
2. The group sums of dW need the group sums of A only: (sum_i A_i) @ B, [groups, r] @ [r, out]. So mu's part in the
   gradients of A and B costs no product of the layer's size.
3. |dW_ij| is at most the number of non-zero entries in row i of A, and in column j of B. At omega = 0.75 r few weights
   can step. On a CPU only the rows and columns that can are multiplied.
"""
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F

from LoTA import UserError
from LoTA.packed import PackedLayer, Rows
from LoTA.packing import step_at

EXACT_IN_FLOAT32 = 2**24            # integers up to here are exact in float32 ...
EXACT_IN_BFLOAT16 = 2**8            # ... and in bfloat16
SPARSE_SHARE = 1 / 8                # where at most this share of the weights can step, only those are computed


@dataclass(frozen=True)
class Threshold:
    """How dW becomes a step and an offset.

    omega: the threshold of Eq. 3. kappa: the divisor of Eq. 4's group mean; None leaves Eq. 4's offset out.
    """
    omega: float
    kappa: float | None


def check_settings(rank: int, omega: float, largest_group: int) -> None:
    """Raises UserError where omega or the rank leave the range in which the method is defined and exact.

    largest_group: the rows of the largest group, because sums over a group must be exact too.
    """
    if not 0 < omega < rank:
        raise UserError(f"omega (--interval_point) must lie in (0, r): it is {omega:g}, the rank is {rank}")
    if rank * largest_group > EXACT_IN_FLOAT32:
        raise UserError(f"rank {rank} is too large: rank x rows of a group is {rank * largest_group}, and float32 adds "
                        f"up integers exactly to {EXACT_IN_FLOAT32} only")


# --- the equations ------------------------------------------------------------------------------------------------

@torch.no_grad()
def ternarize_(weight: torch.Tensor) -> torch.Tensor:
    """Rounds `weight` in place to -1, 0, 1 with the threshold 0.75 * mean|weight|. Returns it."""
    delta = 0.75 * weight.abs().mean()
    return weight.copy_((weight > delta).to(weight.dtype) - (weight < -delta).to(weight.dtype))


def ternary_step(delta_w: torch.Tensor, omega: float) -> torch.Tensor:
    """Eq. 3 before its boundary check: +1 where dW > omega, -1 where dW < -omega, else 0. Float32, of dW's shape.

    dW holds integers, so "above omega" means "above floor(omega)". The dtype of product_dtype() holds floor(omega)
    exactly, because floor(omega) < r.
    """
    return F.hardshrink(delta_w, math.floor(omega)).float().sign_()


def offset_factor(delta_w_sum: torch.Tensor, ternary_sum: torch.Tensor, sizes: torch.Tensor,
                  threshold: Threshold) -> torch.Tensor:
    """Eq. 4: mu = (sum dW - omega * sum W^) / (kappa * n), float32 [groups, out].

    Both sums [groups, out] run over the rows of a group and are exact integers. sizes: int64 [groups], the rows n of
    each group. threshold.kappa must not be None.
    """
    return (delta_w_sum - threshold.omega * ternary_sum) / (threshold.kappa * sizes[:, None])


@torch.no_grad()
def adapted_weight(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer, threshold: Threshold,
                   dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None,
                   learned_offset: torch.Tensor | None = None) -> torch.Tensor:
    """W' [in, out] = s * (W_int - z + W^ + mu), the weight that training multiplies with.

    It is computed in float32, then rounded to `dtype`.
    out: [in, out], where W' shall be written; it decides the dtype then.
    learned_offset: mu [groups, out] where mu is a parameter, used in the place of Eq. 4's.
    """
    delta_w_sum = _group_sums_of_delta_w(lora_A, lora_B, packed, threshold)
    steps = _sparse_steps(lora_A, lora_B, threshold.omega)
    if steps is not None:
        merged, offset = _take_sparse_steps(steps, delta_w_sum, packed, threshold)
        return dequantize(merged, offset if learned_offset is None else learned_offset, dtype, out)
    weight = out if out is not None else torch.empty(packed.shape, dtype=dtype, device=packed.scales.device)
    for rows, first, last, stepped, _, offset in _adapted_blocks(lora_A, lora_B, delta_w_sum, packed, threshold):
        offset = offset if learned_offset is None else learned_offset[first:last]
        _write_weight(weight, rows, stepped, offset, packed, first, last)
    return weight


@torch.no_grad()
def merge(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer,
          threshold: Threshold) -> tuple[PackedLayer, torch.Tensor | None]:
    """Eq. 5: (the layer whose integers took the adapter's steps, mu float32 [groups, out] or None)."""
    delta_w_sum = _group_sums_of_delta_w(lora_A, lora_B, packed, threshold)
    steps = _sparse_steps(lora_A, lora_B, threshold.omega)
    if steps is not None:
        return _take_sparse_steps(steps, delta_w_sum, packed, threshold)
    qweight = packed.qweight.clone()
    offset = torch.empty(packed.scales.shape, device=qweight.device) if threshold.kappa is not None else None
    for rows, first, last, _, taken, mu in _adapted_blocks(lora_A, lora_B, delta_w_sum, packed, threshold):
        taken = taken.flatten(0, 1)
        row, cols = taken.nonzero(as_tuple=True)        # row is relative to the block
        in_layer = row + rows.start if isinstance(rows, slice) else rows[row]
        step_at(qweight, packed.bits, in_layer, cols, taken[row, cols])
        if offset is not None:
            offset[first:last] = mu
    return packed.with_integers(qweight), offset


@torch.no_grad()
def is_merge(lora_A: torch.Tensor, lora_B: torch.Tensor, before: PackedLayer, after: PackedLayer,
             offset: torch.Tensor | None, threshold: Threshold) -> bool:
    """Whether the integers of `after`, and `offset`, are what merge() makes of `before`. Looks at every weight."""
    delta_w_sum = _group_sums_of_delta_w(lora_A, lora_B, before, threshold)
    return (offset is None) == (delta_w_sum is None) and all(
        torch.equal(stepped.flatten(0, 1), after.integers(rows))
        and (mu is None or torch.equal(mu, offset[first:last]))
        for rows, first, last, stepped, _, mu in _adapted_blocks(lora_A, lora_B, delta_w_sum, before, threshold))


@torch.no_grad()
def dequantize(packed: PackedLayer, offset: torch.Tensor | None = None, dtype: torch.dtype = torch.float32,
               out: torch.Tensor | None = None) -> torch.Tensor:
    """The merged layer's weight s * (W_int - z + mu), [in, out], in `dtype`. offset: mu [groups, out] or None.

    out: [in, out], where the weight shall be written; it decides the dtype then.
    """
    weight = out if out is not None else torch.empty(packed.shape, dtype=dtype, device=packed.scales.device)
    for rows, first, last, size in packed.groups.blocks(packed.scales.shape[1]):
        integers = packed.integers(rows).view(last - first, size, -1)
        _write_weight(weight, rows, integers, None if offset is None else offset[first:last], packed, first, last)
    return weight


@torch.no_grad()
def adapter_gradients(x: torch.Tensor, grad_output: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor,
                      packed: PackedLayer, threshold: Threshold, weight: torch.Tensor | None = None) -> tuple[
                          torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of A [in, r], B [r, out], a learned mu and a learned scale_change [groups, out], in this order.

    x: [tokens, in]. grad_output: [tokens, out]. All gradients are float32.
    In W' the step W^ is straight-through: its derivative by dW is 1, at the grid's ends too. In mu it is a constant.
    With G = x^T @ grad_output, rounded to the dtype of x, and H = s * G:

        dL/d(dW) = H + (sum of H over the group) / (kappa * n)
        dL/dA = dL/d(dW) @ B^T,  dL/dB = A^T @ dL/d(dW)
        dL/d(mu) = sum of H over the group, where mu is a parameter
        dL/d(scale_change) = (sum of G * W' over the group) * s_base / s

    The last one needs `weight`, W' [in, out], and is None without it. Rounding s to float16 is straight-through too.
    """
    lora_A, lora_B = lora_A.float(), lora_B.float()
    scaled = torch.mm(x.t(), grad_output, out=_workspace(packed.shape, x)).float()     # G, made H block by block
    scaled_sum = torch.empty(packed.scales.shape, device=x.device)
    weight_sum = None if weight is None else torch.empty_like(scaled_sum)
    for rows, first, last, size in packed.groups.blocks(lora_B.shape[1]):
        block = scaled[rows].view(last - first, size, -1)
        if weight is not None:
            weight_sum[first:last] = (block * weight[rows].view_as(block)).sum(1)
        block.mul_(packed.scales[first:last, None].float())
        scaled_sum[first:last] = block.sum(1)
        if not isinstance(rows, slice):
            scaled[rows] = block.flatten(0, 1)
    grad_A, grad_B = scaled @ lora_B.t(), lora_A.t() @ scaled
    if threshold.kappa is not None:
        mean = scaled_sum / (threshold.kappa * packed.groups.sizes[:, None])
        grad_A += (mean @ lora_B.t())[packed.groups.g_idx]
        grad_B.addmm_(packed.groups.sum(lora_A).t(), mean)
    return grad_A, grad_B, scaled_sum, scale_gradient(weight_sum, packed)


def scale_gradient(weight_sum: torch.Tensor | None, packed: PackedLayer) -> torch.Tensor | None:
    """dL/d(scale_change) [groups, out]. None for None.

    weight_sum: the sums of G * W' over the groups, float32 [groups, out]. It is overwritten with the result.
    """
    return None if weight_sum is None else weight_sum.mul_(packed.base_scales.float()).div_(packed.scales.float())


# --- the layer ----------------------------------------------------------------------------------------------------

class TernaryLinear(torch.autograd.Function):
    """y [..., out] = x [..., in] @ W'(A, B), with the straight-through gradients.

    Only x, A, B and a learned mu are saved for the backward. W' is formed again there, because it is as large as the
    layer would be without quantization.

    load_packed: a function that returns the layer's PackedLayer.
    backend: the module whose adapted_weight() and adapter_gradients() compute: this one or LoTA.kernels.
    learned_offset: mu [groups, out] where it is a parameter, else None.
    scale_change: [groups, out], what load_packed's layer was rescaled with; it is here for its gradient only.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor,
                load_packed: Callable[[], PackedLayer], threshold: Threshold,
                backend: ModuleType = sys.modules[__name__], learned_offset: torch.Tensor | None = None,
                scale_change: torch.Tensor | None = None) -> torch.Tensor:
        ctx.save_for_backward(x, lora_A, lora_B, learned_offset)
        ctx.load_packed, ctx.threshold, ctx.backend = load_packed, threshold, backend
        packed = load_packed()
        return x @ backend.adapted_weight(lora_A, lora_B, packed, threshold, x.dtype, _workspace(packed.shape, x),
                                          learned_offset)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        x, lora_A, lora_B, learned_offset = ctx.saved_tensors
        packed, threshold, backend = ctx.load_packed(), ctx.threshold, ctx.backend
        grad_output = grad_output.to(x.dtype)           # they differ under autocast
        grad_x = grad_A = grad_B = grad_offset = grad_scale_change = weight = None
        scales_learn = any(ctx.needs_input_grad[7:])    # a slice, because an argument left out has no entry
        if ctx.needs_input_grad[0] or scales_learn:
            weight = backend.adapted_weight(lora_A, lora_B, packed, threshold, x.dtype,
                                            None if scales_learn else _workspace(packed.shape, x), learned_offset)
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ weight.t()
        if not scales_learn:
            weight = None       # used up, so that W' and x^T @ grad_output never need memory at the same time
        if any(ctx.needs_input_grad[1:]):
            grad_A, grad_B, grad_offset, grad_scale_change = backend.adapter_gradients(
                x.flatten(0, -2), grad_output.flatten(0, -2), lora_A, lora_B, packed, threshold, weight)
            grad_A, grad_B = grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
        return (grad_x, grad_A, grad_B, None, None, None,
                None if grad_offset is None or learned_offset is None else grad_offset.to(learned_offset.dtype),
                grad_scale_change)


# --- how it is computed -------------------------------------------------------------------------------------------

def product_dtype(rank: int, device: torch.device) -> torch.dtype:
    """The fastest dtype in which A @ B, integers in -r ... r, is exact.

    That is bfloat16 up to r = 256 where the hardware multiplies it, else float32.
    """
    if rank > EXACT_IN_BFLOAT16:
        return torch.float32
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    return torch.bfloat16


def _group_sums_of_delta_w(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer,
                           threshold: Threshold) -> torch.Tensor | None:
    """The sum of dW over each group, float32 [groups, out]; None where there is no offset to compute."""
    return None if threshold.kappa is None else packed.groups.sum(lora_A.float()) @ lora_B.float()


def _sparse_steps(lora_A: torch.Tensor, lora_B: torch.Tensor, omega: float) -> tuple[
        torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(rows, cols, step), each [n], of the weights whose |dW| passes omega.

    None where more than SPARSE_SHARE of the weights may pass it. None on a GPU too, because there the CPU would have to
    wait for the selection.
    """
    if lora_A.device.type != "cpu":
        return None
    rows = (torch.count_nonzero(lora_A, 1) > omega).nonzero().flatten()
    cols = (torch.count_nonzero(lora_B, 0) > omega).nonzero().flatten()
    if len(rows) * len(cols) > SPARSE_SHARE * lora_A.shape[0] * lora_B.shape[1]:
        return None
    delta_w = lora_A[rows].float() @ lora_B[:, cols].float()
    beyond = (delta_w.abs() > omega).nonzero(as_tuple=True)
    return rows[beyond[0]], cols[beyond[1]], delta_w[beyond].sign()


def _take_sparse_steps(steps: tuple[torch.Tensor, torch.Tensor, torch.Tensor], delta_w_sum: torch.Tensor | None,
                       packed: PackedLayer, threshold: Threshold) -> tuple[PackedLayer, torch.Tensor | None]:
    """Eq. 5 for the weights of _sparse_steps(): (the merged layer, mu [groups, out] or None)."""
    rows, cols, step = steps
    qweight = packed.qweight.clone()
    taken = step_at(qweight, packed.bits, rows, cols, step).float()
    offset = None
    if delta_w_sum is not None:
        ternary_sum = torch.zeros_like(delta_w_sum)
        ternary_sum.index_put_((packed.groups.g_idx[rows], cols), taken, accumulate=True)
        offset = offset_factor(delta_w_sum, ternary_sum, packed.groups.sizes, threshold)
    return packed.with_integers(qweight), offset


def _adapted_blocks(lora_A: torch.Tensor, lora_B: torch.Tensor, delta_w_sum: torch.Tensor | None, packed: PackedLayer,
                    threshold: Threshold) -> Iterator[tuple[Rows, int, int, torch.Tensor, torch.Tensor,
                                                            torch.Tensor | None]]:
    """Eq. 3 and 4 for one block of groups at a time, in float32.

    Yields (rows, first, last, W_int + W^, W^, mu). The first three are as Groups.blocks() yields them. The next two are
    [last - first, size, out], and mu is [last - first, out] or None.
    """
    dtype = product_dtype(lora_B.shape[0], lora_B.device)
    lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
    for rows, first, last, size in packed.groups.blocks(lora_B.shape[1]):
        # All in float32, because torch's operators that mix uint8 and float32 are ten times slower on a CPU.
        integers = packed.integers(rows).view(last - first, size, -1)
        # Clamping the sum is Eq. 3's boundary check: a step off the grid's end is no step.
        step = ternary_step(lora_A[rows] @ lora_B, threshold.omega)
        stepped = step.view_as(integers).add_(integers).clamp_(0, packed.maxq)
        taken, offset = torch.sub(stepped, integers, out=integers), None
        if delta_w_sum is not None:
            offset = offset_factor(delta_w_sum[first:last], taken.sum(1), packed.groups.sizes[first:last], threshold)
        yield rows, first, last, stepped, taken, offset


def _write_weight(weight: torch.Tensor, rows: Rows, integers: torch.Tensor, offset: torch.Tensor | None,
                  packed: PackedLayer, first: int, last: int) -> None:
    """weight[rows] = s * (integers - z + mu) for the groups first ... last - 1. Overwrites `integers`.

    integers: float32 [last - first, size, out]. On a CPU the training layer and the merged layer both come through
    here, so equal integers give weights that are equal bit for bit.
    """
    shift = -packed.zeros[first:last].float()
    if offset is not None:
        shift += offset.float()
    integers.add_(shift[:, None])
    scales = packed.scales[first:last, None].float()
    if isinstance(rows, slice) and weight.dtype == torch.float32:
        torch.mul(integers, scales, out=weight[rows].view_as(integers))
    else:
        weight[rows] = integers.mul_(scales).flatten(0, 1).to(weight.dtype)


_workspaces: dict[torch.dtype, torch.Tensor] = {}


def _workspace(shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of `shape` with the dtype and device of `like`.

    On a CPU the next call with this dtype returns the same memory, so the caller must be done with it by then. The
    memory is kept because page faults in fresh memory of this size take as long as filling it. A GPU's allocator keeps
    memory by itself.
    """
    size = shape[0] * shape[1]
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if like.dtype not in _workspaces or _workspaces[like.dtype].numel() < size:
        _workspaces[like.dtype] = torch.empty(size, dtype=like.dtype)
    return _workspaces[like.dtype][:size].view(shape)
