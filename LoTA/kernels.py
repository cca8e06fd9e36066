"""adapted_weight(), merge() and adapter_gradients() of LoTA.ternary as Triton kernels. Needs torch and triton.

The integers and mu are equal to LoTA.ternary's bit for bit, and so is W'. The gradients are equal to rounding. The
integers are unpacked inside the kernel. One program handles one group and a block of outputs, so Eq. 4's sum over the
group stays in registers and the forward writes no [in, out] tensor but W'. A group of more than MAX_ROWS rows is taken
in pieces, once for the sum and once more for the weights.

The ternary product runs on the tensor cores: float16 factors and float32 sums are exact, because the entries are -1, 0,
1. Without a GPU the kernels run under Triton's interpreter (set TRITON_INTERPRET=1 before this module is imported).
"""
import math

import torch
import triton
import triton.language as tl

from LoTA.packed import Groups, PackedLayer
from LoTA.packing import pack_rows
from LoTA.ternary import Threshold, scale_gradient

MAX_ROWS = 128          # rows of one piece of a group
BLOCK_COLS = 64         # outputs of one program
BLOCK_RANK = 64         # columns of A, rows of B, of one tensor core product
# No fused multiply-add, because torch rounds every product and training must equal merged bit for bit. No software
# pipeline, because its buffers take the shared memory that lets several programs run at once, and no loop here is long.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}


@torch.no_grad()
def adapted_weight(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer, threshold: Threshold,
                   dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None,
                   learned_offset: torch.Tensor | None = None) -> torch.Tensor:
    """W' [in, out] = s * (W_int - z + W^ + mu), as ternary.adapted_weight() describes it."""
    weight = out if out is not None else torch.empty(packed.shape, dtype=dtype, device=packed.qweight.device)
    # Triton needs a tensor here. `weight` stands in for it, because the kernel reads it only when LEARNED.
    offset = weight if learned_offset is None else learned_offset.float().contiguous()
    _launch_step(weight, offset, lora_A, lora_B, packed, threshold, learned=learned_offset is not None)
    return weight


@torch.no_grad()
def merge(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer,
          threshold: Threshold) -> tuple[PackedLayer, torch.Tensor | None]:
    """Eq. 5: (the merged layer, mu float32 [groups, out] or None), as ternary.merge() describes it."""
    device = packed.qweight.device
    merged = torch.empty(packed.shape, dtype=torch.uint8, device=device)
    offset = torch.empty(packed.scales.shape, device=device)
    _launch_step(merged, offset, lora_A, lora_B, packed, threshold, merging=True)
    qweight = pack_rows(merged, packed.bits)[:packed.qweight.shape[0]]
    return packed.with_integers(qweight), offset if threshold.kappa is not None else None


@torch.no_grad()
def adapter_gradients(x: torch.Tensor, grad_output: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor,
                      packed: PackedLayer, threshold: Threshold, weight: torch.Tensor | None = None) -> tuple[
                          torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients of A, B, a learned mu and a learned scale_change, as ternary.adapter_gradients() describes them.

    x^T @ grad_output becomes dL/d(dW) in place, in the dtype of x. dL/d(dW) @ B^T and A^T @ dL/d(dW) add
    up in float32.
    """
    gradient = x.t() @ grad_output
    pieces, rows_block = _pieces(packed.groups)
    cols = packed.shape[1]
    scaled_sum = torch.empty(packed.scales.shape, device=gradient.device)
    weight_sum = None if weight is None else torch.empty_like(scaled_sum)
    weighted = weight is not None                   # where it is False, any tensor may stand in for the unread ones
    with torch.cuda.device_of(gradient):            # Triton launches on the current GPU; it must be the layer's
        _gradient_kernel[packed.groups.count, triton.cdiv(cols, BLOCK_COLS)](
            gradient, scaled_sum, weight if weighted else gradient, weight_sum if weighted else scaled_sum,
            packed.scales, _order(packed.groups), packed.groups.starts, cols, threshold.kappa or 1.0,
            OFFSET=threshold.kappa is not None, WEIGHTED=weighted, SHUFFLED=packed.groups.order is not None,
            PIECES=pieces, ROWS=rows_block, COLS=BLOCK_COLS, **OPTIONS)
    lora_A, lora_B = lora_A.to(gradient.dtype), lora_B.to(gradient.dtype)
    return (_product(gradient, lora_B.t()), _product(lora_A.t(), gradient), scaled_sum,
            scale_gradient(weight_sum, packed))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32. On a GPU the sums are float32 without a copy of a and b in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _pieces(groups: Groups) -> tuple[int, int]:
    """(pieces of the largest group, rows of a piece). The rows are a power of two, because Triton's tiles are."""
    rows = min(MAX_ROWS, max(16, triton.next_power_of_2(groups.largest)))
    return triton.cdiv(groups.largest, rows), rows


def _order(groups: Groups) -> torch.Tensor:
    """The row order of the groups. Where the rows are in order the kernel does not read it, and any tensor will do."""
    return groups.starts if groups.order is None else groups.order


def _launch_step(out: torch.Tensor, offset: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor,
                 packed: PackedLayer, threshold: Threshold, merging: bool = False, learned: bool = False) -> None:
    groups, cols = packed.groups, packed.shape[1]
    pieces, rows_block = _pieces(groups)
    rank = lora_B.shape[0]
    rank_block = min(BLOCK_RANK, max(16, triton.next_power_of_2(rank)))
    with torch.cuda.device_of(out):
        _step_kernel[groups.count, triton.cdiv(cols, BLOCK_COLS)](
            out, offset, lora_A, lora_B, packed.qweight, packed.qzeros, packed.scales, _order(groups), groups.starts,
            *lora_A.stride(), *lora_B.stride(), packed.qweight.stride(0), packed.qzeros.stride(0), cols, rank,
            float(math.floor(threshold.omega)), float(threshold.omega), float(threshold.kappa or 1.0),
            BITS=packed.bits, ONE_LESS=packed.checkpoint_format == "gptq",
            OFFSET=threshold.kappa is not None and not learned, SHUFFLED=groups.order is not None, MERGING=merging,
            LEARNED=learned, PIECES=pieces, ROWS=rows_block, COLS=BLOCK_COLS, RANK=rank_block,
            RANK_PIECES=triton.cdiv(rank, rank_block), **OPTIONS)


# --- the kernels --------------------------------------------------------------------------------------------------

@triton.jit
def _bits_at(words, bit, stride, col, inside, BITS: tl.constexpr):
    """The values of BITS bits at bit positions `bit` of streams of words. Word k is at words + k * stride + col."""
    word = bit // 32
    shift = (bit % 32).to(tl.uint32)
    value = tl.load(words + word * stride + col, mask=inside, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        spills = shift > 32 - BITS
        upper = tl.load(words + (word + 1) * stride + col, mask=inside & spills, other=0).to(
            tl.uint32, bitcast=True)
        value |= tl.where(spills, upper << ((32 - shift) % 32), 0)
    return value & ((1 << BITS) - 1)


@triton.jit
def _zeros(qzeros, group, cols, stride, inside, BITS: tl.constexpr, ONE_LESS: tl.constexpr):
    """The zero points of one group, float32, as packing.unpack_zeros() reads them."""
    row = qzeros + group * stride
    if ONE_LESS and 32 % BITS == 0:
        # The 1s are added to whole words, because a zero point of 0 borrowed from its neighbour when 1 was subtracted.
        ones: tl.constexpr = 0xFFFFFFFF // ((1 << BITS) - 1)
        bit = cols * BITS
        words = tl.load(row + bit // 32, mask=inside, other=0).to(tl.uint32, bitcast=True) + ones
        value = (words >> (bit % 32).to(tl.uint32)) & ((1 << BITS) - 1)
    else:
        value = _bits_at(row, cols * BITS, 1, 0, inside, BITS)
        if ONE_LESS:
            value = (value + 1) & ((1 << BITS) - 1)
    return value.to(tl.float32)


@triton.jit
def _rows(order, start, end, ROWS: tl.constexpr, SHUFFLED: tl.constexpr):
    """(the rows of one piece of a group, a mask of those that exist)."""
    place = start + tl.arange(0, ROWS)
    there = place < end
    rows = place
    if SHUFFLED:
        rows = tl.load(order + place, mask=there, other=0).to(tl.int32)
    return rows, there


@triton.jit
def _stepped(lora_A, lora_B, qweight, rows, there, cols, inside, a_row, a_rank, b_rank, b_col, q_row, rank,
             omega_floor, BITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
             RANK_PIECES: tl.constexpr):
    """(dW, W_int, W_int + W^) of one tile, float32 (Eq. 3)."""
    delta_w = tl.zeros([ROWS, COLS], tl.float32)
    for piece in tl.static_range(RANK_PIECES):
        k = piece * RANK + tl.arange(0, RANK)
        known = k < rank
        a = tl.load(lora_A + rows[:, None] * a_row + k[None, :] * a_rank, mask=there[:, None] & known[None, :], other=0)
        b = tl.load(lora_B + k[:, None] * b_rank + cols[None, :] * b_col, mask=known[:, None] & inside[None, :],
                    other=0)
        delta_w = tl.dot(a.to(tl.float16), b.to(tl.float16), delta_w)
    integers = _bits_at(qweight, rows[:, None] * BITS, q_row, cols[None, :], there[:, None] & inside[None, :], BITS).to(
        tl.float32)
    step = tl.where(delta_w > omega_floor, 1.0, tl.where(delta_w < -omega_floor, -1.0, 0.0))
    return delta_w, integers, tl.minimum(tl.maximum(integers + step, 0.0), (1 << BITS) - 1.0)


@triton.jit
def _step_kernel(out, offset, lora_A, lora_B, qweight, qzeros, scales, order, starts, a_row, a_rank, b_rank, b_col,
                 q_row, z_row, width, rank, omega_floor, omega, kappa, BITS: tl.constexpr, ONE_LESS: tl.constexpr,
                 OFFSET: tl.constexpr, SHUFFLED: tl.constexpr, MERGING: tl.constexpr, LEARNED: tl.constexpr,
                 PIECES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
                 RANK_PIECES: tl.constexpr):
    """Eq. 3 to 5 for one group and COLS outputs: writes W', or W_int' and mu when MERGING.

    offset: when MERGING mu is written there; when LEARNED mu is read from there.
    """
    group = tl.program_id(0)
    start, end = tl.load(starts + group), tl.load(starts + group + 1)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < width
    delta_w_sum = tl.zeros([COLS], tl.float32)
    ternary_sum = tl.zeros([COLS], tl.float32)
    mu = tl.zeros([COLS], tl.float32)
    if PIECES == 1:                     # the tile is the whole group, and stays in registers until it is stored
        rows, there = _rows(order, start, end, ROWS, SHUFFLED)
        delta_w, integers, stepped = _stepped(
            lora_A, lora_B, qweight, rows, there, cols, inside, a_row, a_rank, b_rank, b_col, q_row, rank,
            omega_floor, BITS, ROWS, COLS, RANK, RANK_PIECES)
        delta_w_sum += tl.sum(delta_w, 0)
        ternary_sum += tl.sum(stepped - integers, 0)
    elif OFFSET:
        for piece in range(PIECES):
            rows, there = _rows(order, start + piece * ROWS, end, ROWS, SHUFFLED)
            delta_w, integers, stepped = _stepped(
                lora_A, lora_B, qweight, rows, there, cols, inside, a_row, a_rank, b_rank, b_col, q_row, rank,
                omega_floor, BITS, ROWS, COLS, RANK, RANK_PIECES)
            delta_w_sum += tl.sum(delta_w, 0)
            ternary_sum += tl.sum(stepped - integers, 0)
    if OFFSET:
        mu = tl.div_rn(delta_w_sum - omega * ternary_sum, kappa * (end - start).to(tl.float32))
    if LEARNED:
        mu += tl.load(offset + group * width + cols, mask=inside, other=0)
    if MERGING:
        tl.store(offset + group * width + cols, mu, mask=inside)
    shift = -_zeros(qzeros, group, cols, z_row, inside, BITS, ONE_LESS) + mu
    scale = tl.load(scales + group * width + cols, mask=inside, other=0).to(tl.float32)
    if PIECES == 1:
        _store_step(out, stepped, shift, scale, rows, there, cols, inside, width, MERGING)
    else:
        for piece in range(PIECES):
            rows, there = _rows(order, start + piece * ROWS, end, ROWS, SHUFFLED)
            delta_w, integers, stepped = _stepped(
                lora_A, lora_B, qweight, rows, there, cols, inside, a_row, a_rank, b_rank, b_col, q_row, rank,
                omega_floor, BITS, ROWS, COLS, RANK, RANK_PIECES)
            _store_step(out, stepped, shift, scale, rows, there, cols, inside, width, MERGING)


@triton.jit
def _store_step(out, stepped, shift, scale, rows, there, cols, inside, width, MERGING: tl.constexpr):
    result = stepped
    if not MERGING:
        result = (stepped + shift[None, :]) * scale[None, :]
    tl.store(out + rows[:, None] * width + cols[None, :], result.to(out.dtype.element_ty),
             mask=there[:, None] & inside[None, :])


@triton.jit
def _gradient_kernel(gradient, scaled_sum, weight, weight_sum, scales, order, starts, width, kappa,
                     OFFSET: tl.constexpr, WEIGHTED: tl.constexpr, SHUFFLED: tl.constexpr, PIECES: tl.constexpr,
                     ROWS: tl.constexpr, COLS: tl.constexpr):
    """G = x^T @ grad_output becomes dL/d(dW) = s * (G + (sum of G over the group) / (kappa * n)) in place.

    Also writes the sums of s * G over the group and, when WEIGHTED, those of G * W'.
    """
    group = tl.program_id(0)
    start, end = tl.load(starts + group), tl.load(starts + group + 1)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < width
    scale = tl.load(scales + group * width + cols, mask=inside, other=0).to(tl.float32)
    total = tl.zeros([COLS], tl.float32)
    weighted = tl.zeros([COLS], tl.float32)
    for piece in range(PIECES):
        rows, there = _rows(order, start + piece * ROWS, end, ROWS, SHUFFLED)
        block = _load(gradient, rows, there, cols, inside, width)
        total += tl.sum(block, 0)
        if WEIGHTED:
            weighted += tl.sum(block * _load(weight, rows, there, cols, inside, width), 0)
    if WEIGHTED:
        tl.store(weight_sum + group * width + cols, weighted, mask=inside)
    tl.store(scaled_sum + group * width + cols, total * scale, mask=inside)
    mean = tl.zeros([COLS], tl.float32)
    if OFFSET:
        mean = total / (kappa * (end - start).to(tl.float32))
    for piece in range(PIECES):                 # the second read of a piece comes out of the cache
        rows, there = _rows(order, start + piece * ROWS, end, ROWS, SHUFFLED)
        result = (_load(gradient, rows, there, cols, inside, width) + mean[None, :]) * scale[None, :]
        tl.store(gradient + rows[:, None] * width + cols[None, :], result.to(gradient.dtype.element_ty),
                 mask=there[:, None] & inside[None, :])


@triton.jit
def _load(matrix, rows, there, cols, inside, width):
    return tl.load(matrix + rows[:, None] * width + cols[None, :], mask=there[:, None] & inside[None, :],
                   other=0).to(tl.float32)
