"""adapted_weight(), count_steps() and step_gradients() of LoTA.ternary as Triton kernels. Needs torch and triton.

The counts, mu and W are equal to LoTA.ternary's bit for bit. The gradients are equal to rounding. The integers are
unpacked inside the kernel. One program handles one piece of a group, of at most MAX_ROWS rows, and a block of outputs.
It writes its tile of W and its part of the two sums that mu needs; torch adds up the parts. So the forward writes no
[in, out] tensor but W, and a group of any size gives enough programs.

The product runs on the tensor cores. Ternary factors take float16 and float32 sums, which are exact because the entries
are -1, 0, 1. Fixed-point factors (--method lrqat) take int8 and int32 sums. Without a GPU the kernels run under
Triton's interpreter (set TRITON_INTERPRET=1 before this module is imported).
"""
import math

import torch
import triton
import triton.language as tl

from LoTA.packed import Groups, PackedLayer
from LoTA.steps import Rounding, Rule, as_int32
from LoTA.ternary import float_product

MAX_ROWS = 64           # rows of one piece of a group; with 128 a thread runs out of registers at 3 bits, and spills
BLOCK_COLS = 64         # outputs of one program
BLOCK_RANK = 32         # columns of A, rows of B, of one tensor core product; int8 products need at least 32
LARGEST_INT32 = 2**31 - 1


def options(rows: int) -> dict:
    """Triton's options for pieces of so many rows.

    Eight warps for the largest pieces and at most 128 registers, because more registers let fewer programs run at once.
    No fused multiply-add, because torch rounds every product and training must equal merged bit for bit. No software
    pipeline, because its buffers take the shared memory that lets several programs run at once, and no loop here is
    long.
    """
    return {"enable_fp_fusion": False, "num_stages": 1, "num_warps": 8 if rows > 32 else 4, "maxnreg": 128}


@torch.no_grad()
def adapted_weight(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer, rule: Rule,
                   dtype: torch.dtype = torch.float32,
                   out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(W [in, out] = s * (W_int - z + W^), mu [groups, out] or None), as ternary.adapted_weight() describes them."""
    weight = out if out is not None else torch.empty(packed.shape, dtype=dtype, device=packed.qweight.device)
    return weight, _launch_step(weight, lora_A, lora_B, packed, rule)


@torch.no_grad()
def count_steps(lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer,
                rule: Rule) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(how many integers merge() would move, 0-dim int64; mu or None), as ternary.count_steps() describes them."""
    pieces, _ = _pieces(packed.groups)
    counts = torch.empty(packed.groups.count * pieces, triton.cdiv(packed.shape[1], BLOCK_COLS), dtype=torch.int32,
                         device=packed.qweight.device)
    offset = _launch_step(counts, lora_A, lora_B, packed, rule, counting=True)
    return counts.sum(), offset


@torch.no_grad()
def step_gradients(x: torch.Tensor, grad_output: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor,
                   scales: torch.Tensor, groups: Groups, weight: torch.Tensor | None = None) -> tuple[
                       torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(H @ B^T, A^T @ H, the sum of G * W over each group or None), as ternary.step_gradients() describes them.

    G = x^T @ grad_output becomes H in place, in the dtype of x. The two products add up in float32.
    """
    gradient = x.t() @ grad_output
    pieces, rows_block = _pieces(groups)
    cols, weighted = gradient.shape[1], weight is not None
    sums = torch.empty(groups.count, pieces, cols, device=gradient.device) if weighted else gradient
    with torch.cuda.device_of(gradient):            # Triton launches on the current GPU; it must be the layer's
        _gradient_kernel[groups.count * pieces, triton.cdiv(cols, BLOCK_COLS)](
            gradient, weight if weighted else gradient, sums,       # where unread, any tensor may stand in
            scales, _order(groups), groups.starts, cols, WEIGHTED=weighted, SHUFFLED=groups.order is not None,
            WIDE=_is_wide(gradient.shape), PIECES=pieces, ROWS=rows_block, COLS=BLOCK_COLS, **options(rows_block))
    lora_A, lora_B = lora_A.to(gradient.dtype), lora_B.to(gradient.dtype)
    return (float_product(gradient, lora_B.t()), float_product(lora_A.t(), gradient), sums.sum(1) if weighted else None)


def _pieces(groups: Groups) -> tuple[int, int]:
    """(pieces of the largest group, rows of a piece). The rows are a power of two, because Triton's tiles are."""
    rows = min(MAX_ROWS, max(16, triton.next_power_of_2(groups.largest)))
    return triton.cdiv(groups.largest, rows), rows


def _order(groups: Groups) -> torch.Tensor:
    """The row order of the groups. Where the rows are in order the kernel does not read it, and any tensor will do."""
    return groups.starts if groups.order is None else groups.order


def _is_wide(shape: tuple[int, int]) -> bool:
    """Whether an index into [in, out] tensors of this shape may pass int32."""
    return shape[0] * shape[1] > LARGEST_INT32


def _launch_step(out: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, packed: PackedLayer,
                 rule: Rule, counting: bool = False) -> torch.Tensor | None:
    """Fills `out` [in, out] with W. Returns mu [groups, out], or None without kappa.

    counting: `out` [pieces of all groups, blocks of outputs] gets the number of steps of each program instead.
    """
    groups, (_, cols), rank = packed.groups, packed.shape, lora_B.shape[0]
    pieces, rows_block = _pieces(groups)
    rounding = isinstance(rule, Rounding)
    rank_block = BLOCK_RANK if rounding else min(BLOCK_RANK, max(16, triton.next_power_of_2(rank)))
    unit = divisors = means = dither = seed = None
    if rounding:
        factors = rule.factors(lora_A, lora_B)
        lora_A, lora_B, unit = factors.A.to(torch.int8), factors.B.to(torch.int8), factors.unit
        divisors, dither, seed = rule.divisors(packed), rule.dither, rule.seed
        if rule.has_offset:
            delta_w_sum = rule.group_sums(factors, packed)
            means = rule.means(delta_w_sum, groups.sizes)
    omega_floor = 0.0 if rounding else float(math.floor(rule.omega))
    # The sums of dW and of W^, for each piece of a group. Triton needs a tensor, so `out` stands in where it is unread.
    sums = torch.empty(2, groups.count, pieces, cols, device=out.device) if rule.has_offset else out
    with torch.cuda.device_of(out):
        _step_kernel[groups.count * pieces, triton.cdiv(cols, BLOCK_COLS)](
            out, sums, lora_A, lora_B, packed.qweight, packed.qzeros, packed.scales, _order(groups), groups.starts,
            *(out if tensor is None else tensor for tensor in (unit, divisors, means, dither)), *lora_A.stride(),
            *lora_B.stride(), packed.qweight.stride(0), packed.qzeros.stride(0), cols, rank,
            groups.count * pieces * cols, omega_floor, as_int32(seed or 0), BITS=packed.bits,
            ONE_LESS=packed.checkpoint_format == "gptq", OFFSET=rule.has_offset, ROUNDING=rounding,
            NOISE=seed is not None, DITHER=dither is not None, SHUFFLED=groups.order is not None,
            WIDE=_is_wide(packed.shape),
            COUNTING=counting, PIECES=pieces, ROWS=rows_block, COLS=BLOCK_COLS, RANK=rank_block,
            RANK_PIECES=triton.cdiv(rank, rank_block), **options(rows_block))
    if not rule.has_offset:
        return None
    # The parts are integers, so their sums are exact in any order.
    if rounding:
        return rule.offset(delta_w_sum, sums[1].sum(1), groups.sizes)
    return rule.offset(*sums.sum(2), groups.sizes)


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
def _rows(program, order, starts, PIECES: tl.constexpr, ROWS: tl.constexpr, SHUFFLED: tl.constexpr, WIDE: tl.constexpr):
    """(the group of a program, the rows of its piece, a mask of those that exist)."""
    group = program // PIECES
    place = tl.load(starts + group) + program % PIECES * ROWS + tl.arange(0, ROWS)
    there = place < tl.load(starts + group + 1)
    rows = place
    if SHUFFLED:
        rows = tl.load(order + place, mask=there, other=0).to(tl.int32)
    if WIDE:
        rows = rows.to(tl.int64)
    return group, rows, there


@triton.jit
def _noise(seed, place):
    """noise() of LoTA.steps for the weights at `place`, int32."""
    x = place.to(tl.uint32) ^ seed.to(tl.uint32, bitcast=True)
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x.to(tl.int32, bitcast=True) >> 24


@triton.jit
def _rounded(product, unit, divisor, mean, dither, DITHERED: tl.constexpr):
    """Rounding.step() of LoTA.steps: round(dW / s - m + u), float32. dither: u in steps of 1/256."""
    # Triton's own division is approximate. div_rn rounds as IEEE says, and as torch does.
    value = tl.math.div_rn(product.to(tl.float32) * tl.load(unit), divisor) - mean
    if DITHERED:
        value += (dither.to(tl.float32) + 0.5) * 0.00390625
    value = tl.minimum(tl.maximum(value, -256.0), 256.0)
    # Adding 1.5 * 2**23 leaves no bits below 1, so that the sum is rounded to the nearest integer, ties to even.
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _step_kernel(out, sums, lora_A, lora_B, qweight, qzeros, scales, order, starts, unit, divisors, means, dithers,
                 a_row, a_rank, b_rank, b_col, q_row, z_row, width, rank, sums_size, omega_floor, seed,
                 BITS: tl.constexpr, ONE_LESS: tl.constexpr, OFFSET: tl.constexpr, ROUNDING: tl.constexpr,
                 NOISE: tl.constexpr, DITHER: tl.constexpr, SHUFFLED: tl.constexpr, WIDE: tl.constexpr,
                 COUNTING: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                 RANK: tl.constexpr, RANK_PIECES: tl.constexpr):
    """The steps of one piece of a group and COLS outputs: writes W, or when COUNTING only how many steps it takes.

    When OFFSET, the sums of dW and of W^ over the piece go to sums [2, groups * PIECES, width]; when ROUNDING, too, the
    latter only.
    """
    program = tl.program_id(0)
    group, rows, there = _rows(program, order, starts, PIECES, ROWS, SHUFFLED, WIDE)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < width
    tile = there[:, None] & inside[None, :]
    if ROUNDING:
        delta_w = tl.zeros([ROWS, COLS], tl.int32)
    else:
        delta_w = tl.zeros([ROWS, COLS], tl.float32)
    for piece in range(RANK_PIECES):
        k = piece * RANK + tl.arange(0, RANK)
        known = k < rank
        a = tl.load(lora_A + rows[:, None] * a_row + k[None, :] * a_rank, mask=there[:, None] & known[None, :], other=0)
        b = tl.load(lora_B + k[:, None] * b_rank + cols[None, :] * b_col, mask=known[:, None] & inside[None, :],
                    other=0)
        if ROUNDING:
            delta_w = tl.dot(a, b, delta_w, out_dtype=tl.int32)
        else:
            delta_w = tl.dot(a.to(tl.float16), b.to(tl.float16), delta_w)
    integers = _bits_at(qweight, rows[:, None] * BITS, q_row, cols[None, :], tile, BITS).to(tl.float32)
    places = rows[:, None] * width + cols[None, :]
    if ROUNDING:
        dither = integers
        if NOISE:
            dither = _noise(seed, places)
        if DITHER:
            dither = tl.load(dithers + places, mask=tile, other=0)
        divisor = tl.load(divisors + group * width + cols, mask=inside, other=1.0)
        mean = 0.0
        if OFFSET:
            mean = tl.load(means + group * width + cols, mask=inside, other=0)[None, :]
            mean = tl.where(there[:, None], mean, 0.0)          # rows that do not exist take no step
        step = _rounded(delta_w, unit, divisor[None, :], mean, dither, NOISE or DITHER)
    else:
        step = tl.where(delta_w > omega_floor, 1.0, tl.where(delta_w < -omega_floor, -1.0, 0.0))
    stepped = tl.minimum(tl.maximum(integers + step, 0.0), (1 << BITS) - 1.0)
    if OFFSET:
        place = sums + program * width + cols
        if not ROUNDING:                # float32 does not hold these sums of the other rule
            tl.store(place, tl.sum(delta_w, 0), mask=inside)
        tl.store(place + sums_size, tl.sum(stepped - integers, 0), mask=inside)
    if COUNTING:
        taken = tl.sum((stepped != integers).to(tl.int32))
        tl.store(out + program * tl.num_programs(1) + tl.program_id(1), taken)
    else:
        zeros = _zeros(qzeros, group, cols, z_row, inside, BITS, ONE_LESS)
        scale = tl.load(scales + group * width + cols, mask=inside, other=0)
        result = (stepped - zeros[None, :]) * scale.to(tl.float32)[None, :]
        if out.dtype.element_ty != tl.float32:
            result = result.to(scale.dtype)             # GPTQModel multiplies in this dtype
        tl.store(out + places, result.to(out.dtype.element_ty), mask=tile)


@triton.jit
def _gradient_kernel(gradient, weight, sums, scales, order, starts, width, WEIGHTED: tl.constexpr,
                     SHUFFLED: tl.constexpr, WIDE: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
                     COLS: tl.constexpr):
    """G [in, width] becomes s * G in place. When WEIGHTED, sums [groups * PIECES, width] gets the sums of G * W."""
    program = tl.program_id(0)
    group, rows, there = _rows(program, order, starts, PIECES, ROWS, SHUFFLED, WIDE)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < width
    tile, places = there[:, None] & inside[None, :], rows[:, None] * width + cols[None, :]
    block = tl.load(gradient + places, mask=tile, other=0).to(tl.float32)
    if WEIGHTED:
        product = block * tl.load(weight + places, mask=tile, other=0).to(tl.float32)
        tl.store(sums + program * width + cols, tl.sum(product, 0), mask=inside)
    scale = tl.load(scales + group * width + cols, mask=inside, other=0).to(tl.float32)
    tl.store(gradient + places, (block * scale[None, :]).to(gradient.dtype.element_ty), mask=tile)
