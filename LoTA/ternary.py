"""The method as functions of tensors: adapters whose product is a step on a GPTQ layer's grid. Needs torch only.

Chen et al., "LoTA-QAF: Lossless Ternary Adaptation for Quantization-Aware Fine-Tuning", https://arxiv.org/abs/2505.18724

    W_int   weight_int  [in, out]      integers on the grid 0 ... maxq = 2**bits - 1
    s, z    scales, zeros [groups, out] per group of input rows
    A, B    lora_A [in, r], lora_B [r, out]  entries -1, 0, 1
    dW      delta_w     [in, out]      A @ B, integers in -r ... r
    W^      step        [in, out]      -1, 0, 1: the step each weight takes on its grid      (Eq. 3)
    mu      offset      [groups, out]  what the steps left over, moved into the zero factor  (Eq. 4)
    omega   the threshold of Eq. 3, in (0, r)
    kappa   the divisor of Eq. 4's group mean: omega in the published scripts, 1 in the paper

    W       weight      [in, out]      s * (W_int - z + W^)
    y       x @ W + (group sums of x) @ (s * mu), which is x @ (s * (W_int - z + W^ + mu))

That is LoTA-QAF. How A and B become W^ is a rule, and LoTA.steps has another one too, that of --method lrqat. Its A, B
and dW are real numbers, its W^ are integers of any size, and its mu is a parameter or left out. The rest is the same.

Scales may be learned: s = s_base * (1 + scale_change), where s_base is the checkpoint's.

A merged model can be trained again. It has a mu of its own, and the mu of y is the sum of that one and of the adapter's
(PackedLayer.total_offset). Both are in grid steps, so learned scales scale both, as they scale z.

mu stays apart from W, because bfloat16 would lose most of it there: beside 8 grid steps its spacing is 1/32 step, and a
usual mu is smaller. A merged model computes y so too, because its integers have no place for mu. So training, live and
merged models do the same operations in the same order, and their outputs are equal bit for bit in every dtype.

Three facts make the computation exact and cheap.
1. All sums over A and B are sums of integers, times a power of two with --method lrqat. They are exact in float32 in
   any order, so every device and every blocking gives the same integers and the same mu.
2. The group sums of dW need the group sums of A only: (sum_i A_i) @ B, [groups, r] @ [r, out]. So mu's part in the
   gradients of A and B costs no product of the layer's size.
3. |dW_ij| is at most the number of non-zero entries in row i of A, and in column j of B. At omega = 0.75 r few weights
   can step. On a CPU only the rows and columns that can are multiplied.
"""
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

from LoTA.packed import Groups, PackedLayer, Rows
from LoTA.packing import step_at, values_at
from LoTA.steps import Rule, Threshold

SPARSE_SHARE = 1 / 8                # where at most this share of the weights can step, only those are computed


# --- the equations ------------------------------------------------------------------------------------------------

@torch.no_grad()
def ternarize_(weight: torch.Tensor) -> torch.Tensor:
    """Rounds `weight` in place to -1, 0, 1 with the threshold 0.75 * mean|weight|. Returns it."""
    delta = 0.75 * weight.abs().mean()
    return weight.copy_((weight > delta).to(weight.dtype) - (weight < -delta).to(weight.dtype))


@torch.no_grad()
def adapted_weight(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer, rule: Rule,
                   dtype: torch.dtype = torch.float32,
                   out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(W [in, out] = s * (W_int - z + W^) in `dtype`, Eq. 4's mu float32 [groups, out] or None).

    W is what GPTQModel's torch kernel makes of the merged integers: in bfloat16 and float16 the product is rounded to
    the dtype of the scales first. out: [in, out], where W shall be written; it decides the dtype then.
    """
    weight = out if out is not None else torch.empty(packed.shape, dtype=dtype, device=packed.scales.device)
    delta_w_sum = _group_sums_of_delta_w(lora_A, lora_B, packed, rule)
    steps = _sparse_steps(lora_A, lora_B, rule)
    if steps is not None:
        merged, offset = _take_sparse_steps(steps, delta_w_sum, packed, rule)
        for rows, first, last, size in packed.groups.blocks(packed.shape[1]):
            _write_weight(weight, rows, merged.integers(rows).view(last - first, size, -1), packed, first, last)
        return weight, offset
    offset = None if delta_w_sum is None else torch.empty_like(delta_w_sum, dtype=torch.float32)
    for rows, first, last, stepped, _, mu in _adapted_blocks(lora_A, lora_B, delta_w_sum, packed, rule):
        _write_weight(weight, rows, stepped, packed, first, last)
        if offset is not None:
            offset[first:last] = mu
    return weight, offset


def scaled_offset(offset: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """s * mu [groups, out] in `dtype`, as the layer multiplies with it. offset: mu. scales: s; both [groups, out]."""
    return (offset * scales.float()).to(dtype)


def add_offset_(out: torch.Tensor, x: torch.Tensor, scaled: torch.Tensor, groups: Groups) -> torch.Tensor:
    """out [tokens, out] += (group sums of x [tokens, in]) @ scaled [groups, out], in place. Returns out.

    This is Eq. 5's new zero factor. It costs 1 / (rows of a group) of the layer's work. scaled: scaled_offset()'s.
    """
    return out.add_(groups.sum_columns(x) @ scaled)


def layer_output(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scaled: torch.Tensor | None,
                 groups: Groups) -> torch.Tensor:
    """y [tokens, out] = x @ W + bias + (group sums of x) @ (s * mu), in the order in which GPTQModel's layer adds.

    x: [tokens, in]. scaled: scaled_offset()'s, or None where there is no mu.
    """
    out = x @ weight
    if bias is not None:
        out += bias.to(out.dtype)
    return out if scaled is None else add_offset_(out, x, scaled, groups)


@torch.no_grad()
def merge(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer,
          rule: Rule) -> tuple[PackedLayer, torch.Tensor | None]:
    """Eq. 5: (the layer whose integers took the adapter's steps, mu float32 [groups, out] or None)."""
    delta_w_sum = _group_sums_of_delta_w(lora_A, lora_B, packed, rule)
    steps = _sparse_steps(lora_A, lora_B, rule)
    if steps is not None:
        return _take_sparse_steps(steps, delta_w_sum, packed, rule)
    qweight = packed.qweight.clone()
    offset = torch.empty(packed.scales.shape, device=qweight.device) if rule.has_offset else None
    for rows, first, last, _, taken, mu in _adapted_blocks(lora_A, lora_B, delta_w_sum, packed, rule):
        taken = taken.flatten(0, 1)
        row, cols = taken.nonzero(as_tuple=True)        # row is relative to the block
        in_layer = row + rows.start if isinstance(rows, slice) else rows[row]
        step_at(qweight, packed.bits, in_layer, cols, taken[row, cols])
        if offset is not None:
            offset[first:last] = mu
    return packed.with_integers(qweight), offset


@torch.no_grad()
def count_steps(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer,
                rule: Rule) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(how many integers merge() would move, 0-dim int64 on their device; mu as merge() gives it).

    It packs no integer, and the CPU waits for no device.
    """
    delta_w_sum = _group_sums_of_delta_w(lora_A, lora_B, packed, rule)
    steps = _sparse_steps(lora_A, lora_B, rule)
    if steps is not None:
        rows, cols, step = steps
        old = values_at(packed.qweight, packed.bits, rows, cols)
        taken = (old + step.long()).clamp_(0, packed.maxq) - old
        return torch.count_nonzero(taken), _offset_of_sparse_steps(rows, cols, taken, delta_w_sum, packed, rule)
    count = torch.zeros((), dtype=torch.int64, device=packed.qweight.device)
    offsets = []
    for _, _, _, _, taken, mu in _adapted_blocks(lora_A, lora_B, delta_w_sum, packed, rule):
        count += torch.count_nonzero(taken)
        offsets.append(mu)
    return count, None if delta_w_sum is None else torch.cat(offsets)


@torch.no_grad()
def is_merge(lora_A: torch.Tensor, lora_B: torch.Tensor, before: PackedLayer, after: PackedLayer,
             offset: torch.Tensor | None, rule: Rule) -> bool:
    """Whether the integers of `after`, and `offset`, are what merge() makes of `before`. Looks at every weight.

    offset: the sum of mu of A and B and of the one that `before` has. None where A and B say none.
    """
    delta_w_sum, base = _group_sums_of_delta_w(lora_A, lora_B, before, rule), before.base_offset
    return (offset is None) == (delta_w_sum is None) and all(
        torch.equal(stepped.flatten(0, 1), after.integers(rows))
        and (mu is None or torch.equal(mu if base is None else base[first:last] + mu, offset[first:last]))
        for rows, first, last, stepped, _, mu in _adapted_blocks(lora_A, lora_B, delta_w_sum, before, rule))


@torch.no_grad()
def dequantize(packed: PackedLayer, offset: torch.Tensor | None = None,
               dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The merged layer as one weight s * (W_int - z + mu), [in, out], rounded to `dtype` once. For other engines.

    offset: mu [groups, out] or None.
    """
    weight = torch.empty(packed.shape, dtype=dtype, device=packed.scales.device)
    for rows, first, last, size in packed.groups.blocks(packed.shape[1]):
        shift = -packed.zeros[first:last].float() if offset is None else offset[first:last] - packed.zeros[first:last]
        block = packed.integers(rows).view(last - first, size, -1).add_(shift[:, None])
        weight[rows] = block.mul_(packed.scales[first:last, None].float()).flatten(0, 1).to(dtype)
    return weight


@torch.no_grad()
def step_gradients(x: torch.Tensor, grad_output: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor,
                   scales: torch.Tensor, groups: Groups, weight: torch.Tensor | None = None) -> tuple[
                       torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(H @ B^T, A^T @ H, the sum of G * W over each group or None), all float32.

    G = x^T @ grad_output [in, out] and H = scales * G are in the dtype of x. x: [tokens, in]. grad_output: [tokens,
    out]. scales: float32 [groups, out]. weight: W [in, out]. Without it there is no third result, [groups, out].
    """
    shape = x.shape[1], grad_output.shape[1]
    gradient = torch.mm(x.t(), grad_output, out=_workspace(shape, x))               # G, made H block by block
    weight_sum = None if weight is None else torch.empty(scales.shape, device=x.device)
    for rows, first, last, size in groups.blocks(shape[1]):
        block = gradient[rows].view(last - first, size, -1).float()
        if weight is not None:
            weight_sum[first:last] = (block * weight[rows].view_as(block)).sum(1)
        block.mul_(scales[first:last, None])
        if not isinstance(rows, slice) or gradient.dtype != torch.float32:          # else `block` is a part of it
            gradient[rows] = block.flatten(0, 1).to(gradient.dtype)
    lora_A, lora_B = lora_A.to(gradient.dtype), lora_B.to(gradient.dtype)
    return float_product(gradient, lora_B.t()), float_product(lora_A.t(), gradient), weight_sum


@torch.no_grad()
def layer_gradients(x: torch.Tensor, grad_output: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor,
                    packed: PackedLayer, rule: Rule, backend: ModuleType, learned_offset: bool = False,
                    weight: torch.Tensor | None = None, offset: torch.Tensor | None = None) -> tuple[
                        torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of A [in, r], B [r, out], a learned mu and a learned scale_change [groups, out], in this order.

    x: [tokens, in]. grad_output: [tokens, out]. learned_offset: whether mu is a parameter. All gradients are float32.
    In W the step W^ is straight-through: its derivative by dW is 1, at the grid's ends too. In mu it is a constant.
    With G = x^T @ grad_output, H = s * G, and P = (group sums of x)^T @ grad_output:

        dL/d(mu) = s * P                                                     of no use where A and B say no mu
        dL/d(dW) = H + dL/d(mu) / (kappa * n)                                without the last part where mu is learned

    With Rounding dW is in units of the weights, so that H = G. A and B are the fixed-point ones.

        dL/dA = dL/d(dW) @ B^T,  dL/dB = A^T @ dL/d(dW)            gradient_of_A() then changes dL/dA
        dL/d(scale_change) = ((sum of G * W over the group) / s + P * mu) * s_base

    The last one needs `weight`, W [in, out], and `offset`, all of mu where there is one. It is None without `weight`.
    Rounding s to float16 is straight-through too. backend: the module whose step_gradients() computes.
    """
    groups, scales, grad_offset = packed.groups, packed.scales.float(), None
    lora_A, lora_B = rule.values(lora_A, lora_B)
    grad_A, grad_B, weight_sum = backend.step_gradients(x, grad_output, lora_A, lora_B, rule.gradient_scales(packed),
                                                        groups, weight)
    grad_A = rule.gradient_of_A(grad_A, groups)
    if learned_offset or rule.has_offset or weight is not None and offset is not None:
        group_product = float_product(groups.sum_columns(x).t(), grad_output)
        grad_offset = group_product * scales
    if rule.kappa is not None:
        mean = grad_offset / (rule.kappa * groups.sizes[:, None])
        grad_A += (mean @ lora_B.float().t())[groups.g_idx]
        grad_B.addmm_(groups.sum(lora_A.float()).t(), mean)
    if weight_sum is not None:
        weight_sum.div_(scales)
        if offset is not None:
            weight_sum.addcmul_(group_product, offset)
        weight_sum.mul_(packed.base_scales.float())
    return grad_A, grad_B, grad_offset, weight_sum


# --- the layer ----------------------------------------------------------------------------------------------------

class GridLinear(torch.autograd.Function):
    """y [..., out] = layer_output() of x [..., in] with W and mu of A and B, and the straight-through gradients.

    Only x, A, B and a learned mu are saved for the backward. W is formed again there, because it is as large as the
    layer would be without quantization.

    load_packed: a function that returns the layer's PackedLayer.
    backend: the module whose adapted_weight() and step_gradients() compute: this one or LoTA.kernels.
    learned_offset: mu [groups, out] where it is a parameter, else None. bias: [out] or None; it is not trained.
    scale_change: [groups, out], what load_packed's layer was rescaled with; it is here for its gradient only.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor,
                load_packed: Callable[[], PackedLayer], rule: Rule,
                backend: ModuleType = sys.modules[__name__], learned_offset: torch.Tensor | None = None,
                scale_change: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
        packed = load_packed()
        weight, offset = backend.adapted_weight(lora_A, lora_B, packed, rule, x.dtype, _workspace(packed.shape, x))
        offset = packed.total_offset(offset if learned_offset is None else learned_offset)
        ctx.save_for_backward(x, lora_A, lora_B, learned_offset)
        ctx.load_packed, ctx.rule, ctx.backend = load_packed, rule, backend
        scaled = None if offset is None else scaled_offset(offset, packed.scales, x.dtype)
        return layer_output(x.flatten(0, -2), weight, bias, scaled, packed.groups).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        x, lora_A, lora_B, learned_offset = ctx.saved_tensors
        packed, rule, backend = ctx.load_packed(), ctx.rule, ctx.backend
        shape, x = x.shape, x.flatten(0, -2)
        grad_output = grad_output.to(x.dtype).flatten(0, -2)        # the dtypes differ under autocast
        grad_x = grad_A = grad_B = grad_offset = grad_scale_change = weight = offset = None
        scales_learn = any(ctx.needs_input_grad[7:8])   # a slice, because an argument left out has no entry
        if ctx.needs_input_grad[0] or scales_learn:
            weight, offset = backend.adapted_weight(lora_A, lora_B, packed, rule, x.dtype,
                                                    None if scales_learn else _workspace(packed.shape, x))
            offset = packed.total_offset(offset if learned_offset is None else learned_offset)
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ weight.t()
            if offset is not None:
                scaled = scaled_offset(offset, packed.scales, x.dtype)
                packed.groups.add_to_columns_(grad_x, grad_output @ scaled.t())
            grad_x = grad_x.view(shape)
        if not scales_learn:
            weight = None       # used up, so that W and x^T @ grad_output never need memory at the same time
        if any(ctx.needs_input_grad[1:8]):
            grad_A, grad_B, grad_offset, grad_scale_change = layer_gradients(
                x, grad_output, lora_A, lora_B, packed, rule, backend, learned_offset is not None, weight, offset)
            grad_A, grad_B = grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype)
            grad_offset = None if learned_offset is None else grad_offset.to(learned_offset.dtype)
        return grad_x, grad_A, grad_B, None, None, None, grad_offset, grad_scale_change, None


# --- how it is computed -------------------------------------------------------------------------------------------

def float_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32, a and b of one dtype. On a CPU a 16-bit product is rounded to that dtype first.

    It could not be had unrounded there without copies in float32, whose products take three times as long.
    """
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype != torch.float32 else (a @ b).float()


def _group_sums_of_delta_w(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer,
                           rule: Rule) -> torch.Tensor | None:
    """The rule's group_sums() [groups, out]; None where A and B say no mu."""
    return rule.group_sums(rule.factors(lora_A, lora_B), packed) if rule.has_offset else None


def _sparse_steps(lora_A: torch.Tensor, lora_B: torch.Tensor, rule: Rule) -> tuple[
        torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(rows, cols, step), each [n], of the weights whose |dW| passes omega.

    None where more than SPARSE_SHARE of the weights may pass it, and for other rules than Threshold. None on a GPU too,
    because there the CPU would have to wait for the selection.
    """
    if lora_A.device.type != "cpu" or not isinstance(rule, Threshold):
        return None
    omega = rule.omega
    rows = (torch.count_nonzero(lora_A, 1) > omega).nonzero().flatten()
    cols = (torch.count_nonzero(lora_B, 0) > omega).nonzero().flatten()
    if len(rows) * len(cols) > SPARSE_SHARE * lora_A.shape[0] * lora_B.shape[1]:
        return None
    delta_w = lora_A[rows].float() @ lora_B[:, cols].float()
    beyond = (delta_w.abs() > omega).nonzero(as_tuple=True)
    return rows[beyond[0]], cols[beyond[1]], delta_w[beyond].sign()


def _take_sparse_steps(steps: tuple[torch.Tensor, torch.Tensor, torch.Tensor], delta_w_sum: torch.Tensor | None,
                       packed: PackedLayer, rule: Rule) -> tuple[PackedLayer, torch.Tensor | None]:
    """Eq. 5 for the weights of _sparse_steps(): (the merged layer, mu [groups, out] or None)."""
    rows, cols, step = steps
    qweight = packed.qweight.clone()
    taken = step_at(qweight, packed.bits, rows, cols, step)
    return packed.with_integers(qweight), _offset_of_sparse_steps(rows, cols, taken, delta_w_sum, packed, rule)


def _offset_of_sparse_steps(rows: torch.Tensor, cols: torch.Tensor, taken: torch.Tensor,
                            delta_w_sum: torch.Tensor | None, packed: PackedLayer,
                            rule: Rule) -> torch.Tensor | None:
    """Eq. 4 where only the weights at (rows, cols) step, by `taken`: mu [groups, out], or None without delta_w_sum."""
    if delta_w_sum is None:
        return None
    ternary_sum = torch.zeros_like(delta_w_sum)
    ternary_sum.index_put_((packed.groups.g_idx[rows], cols), taken.float(), accumulate=True)
    return rule.offset(delta_w_sum, ternary_sum, packed.groups.sizes)


def _adapted_blocks(lora_A: torch.Tensor, lora_B: torch.Tensor, delta_w_sum: torch.Tensor | None, packed: PackedLayer,
                    rule: Rule) -> Iterator[tuple[Rows, int, int, torch.Tensor, torch.Tensor,
                                                            torch.Tensor | None]]:
    """Eq. 3 and 4 for one block of groups at a time, in float32.

    Yields (rows, first, last, W_int + W^, W^, mu). The first three are as Groups.blocks() yields them. The next two are
    [last - first, size, out], and mu is [last - first, out] or None.
    """
    factors = rule.factors(lora_A, lora_B)
    for rows, first, last, size in packed.groups.blocks(lora_B.shape[1]):
        # All in float32, because torch's operators that mix uint8 and float32 are ten times slower on a CPU.
        integers = packed.integers(rows).view(last - first, size, -1)
        # Clamping the sum is Eq. 3's boundary check: a step ends at the grid's end.
        step = rule.step(factors, rows, first, last, packed, delta_w_sum)
        stepped = step.view_as(integers).add_(integers).clamp_(0, packed.maxq)
        taken, offset = torch.sub(stepped, integers, out=integers), None
        if delta_w_sum is not None:
            offset = rule.offset(delta_w_sum[first:last], taken.sum(1), packed.groups.sizes[first:last])
        yield rows, first, last, stepped, taken, offset


def _write_weight(weight: torch.Tensor, rows: Rows, integers: torch.Tensor, packed: PackedLayer, first: int,
                  last: int) -> None:
    """weight[rows] = s * (integers - z) for the groups first ... last - 1. Overwrites `integers`.

    integers: float32 [last - first, size, out].
    """
    integers.sub_(packed.zeros[first:last, None].float())
    scales = packed.scales[first:last, None].float()
    if isinstance(rows, slice) and weight.dtype == torch.float32:
        torch.mul(integers, scales, out=weight[rows].view_as(integers))
        return
    integers.mul_(scales)
    if weight.dtype != torch.float32:
        # GPTQModel multiplies in this dtype. By way of float32, because torch converts float16 to bfloat16 slowly.
        integers.copy_(integers.to(packed.scales.dtype))
    if isinstance(rows, slice):
        weight[rows].view_as(integers).copy_(integers)
    else:
        weight[rows] = integers.flatten(0, 1).to(weight.dtype)


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
