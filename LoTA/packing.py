"""GPTQ's packed integers: unpacks and packs `qweight` and `qzeros`, for any number of bits up to 8. Imports torch only.

GPTQ packs along one axis, as a bit stream in 32-bit words with the least significant bit first. Value k takes the bits
k * bits ... k * bits + bits - 1. So 32 values take `bits` words, and at 3 bits two of the 32 values lie in two words.
Layout: https://github.com/IST-DASLab/gptq, and the checkpoint formats "gptq" and "gptq_v2" of GPTQModel.
"""
import torch
import torch.nn.functional as F

WORD = 32                       # bits of a word
UNPACK_ENTRIES = 1 << 19        # entries unpacked at a time, so that their int32 values stay in the cache


def _fields(bits: int) -> tuple[list[tuple[int, int, int]], int]:
    """(fields, words) of a unit: the fewest whole words that hold whole values. `fields` has one entry for each value.

    A field is (word, shift, spill): the value begins in `word` at bit `shift`, and its top `spill` bits are in the next
    word.
    """
    values, words = (WORD, bits) if WORD % bits else (WORD // bits, 1)
    fields = []
    for k in range(values):
        word, shift = divmod(k * bits, WORD)
        fields.append((word, shift, max(0, shift + bits - WORD)))
    return fields, words


def unpack_rows(packed: torch.Tensor, bits: int, rows: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Unpacks along dim 0: int32 [>= ceil(rows * bits / 32), cols] -> `dtype` [rows, cols], in 0 ... 2**bits - 1."""
    fields, words = _fields(bits)
    if packed.shape[0] % words:
        packed = F.pad(packed, (0, 0, 0, -packed.shape[0] % words))
    units, cols = packed.shape[0] // words, packed.shape[1]
    packed = packed.view(units, words, cols)
    out = torch.empty(units, len(fields), cols, dtype=dtype, device=packed.device)
    step = max(1, UNPACK_ENTRIES // (len(fields) * max(1, cols)))
    for first in range(0, units, step):
        piece = slice(first, first + step)
        out[piece] = _unpack_units(packed[piece], fields, bits).bitwise_and_(2**bits - 1)
    return out.view(units * len(fields), cols)[:rows]


def _unpack_units(packed: torch.Tensor, fields: list[tuple[int, int, int]], bits: int) -> torch.Tensor:
    """int32 [units, words, cols] -> int32 [units, values, cols]. Only the lowest `bits` bits are the value's."""
    if packed.shape[1] == 1:
        # >> on int32 fills in the sign bit from above. The caller masks it away.
        return packed >> torch.arange(0, WORD, bits, dtype=torch.int32, device=packed.device)[:, None]
    values = torch.empty(packed.shape[0], len(fields), packed.shape[2], dtype=torch.int32, device=packed.device)
    for k, (word, shift, spill) in enumerate(fields):
        torch.bitwise_right_shift(packed[:, word], shift, out=values[:, k])
        if spill:
            values[:, k].bitwise_and_(2**(bits - spill) - 1).bitwise_or_(packed[:, word + 1] << (bits - spill))
    return values


def words_of(rows: slice, bits: int) -> slice | None:
    """The packed words that hold `rows`, to the end of the last unit. None where rows.start does not begin a unit."""
    fields, words = _fields(bits)
    if rows.start % len(fields):
        return None
    return slice(rows.start // len(fields) * words, -(-rows.stop // len(fields)) * words)


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of unpack_rows(): integers [rows, cols] in 0 ... 2**bits - 1 -> int32 [words, cols].

    words is ceil(rows * bits / 32); where 32 is no multiple of `bits` it is rounded up to a multiple of `bits`. What is
    left of the last words is zero.
    """
    fields, words = _fields(bits)
    rows, cols = values.shape
    units = -(-rows // len(fields))
    if rows != units * len(fields):
        values = F.pad(values, (0, 0, 0, units * len(fields) - rows))
    values = values.view(units, len(fields), cols)
    packed = torch.zeros(units, words, cols, dtype=torch.int32, device=values.device)
    for k, (word, shift, spill) in enumerate(fields):
        value = values[:, k].int()
        packed[:, word] |= value << shift
        if spill:
            packed[:, word + 1] |= value >> (bits - spill)
    return packed.view(units * words, cols)


def values_at(packed: torch.Tensor, bits: int, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """The values at (rows, cols), int64 [n]. packed: int32 [words, cols]. rows, cols: int64 [n]."""
    mask, (word, upper, shift) = 2**WORD - 1, _place(packed, bits, rows)
    value = (packed[word, cols].long() & mask) >> shift
    if WORD % bits:
        value |= (packed[upper, cols].long() & mask) << (WORD - shift)
    return value & (2**bits - 1)


def _place(packed: torch.Tensor, bits: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the word in which the value of a row begins, the word into which it may spill, its first bit), int64 [n]."""
    word = rows * bits // WORD
    return word, (word + 1).clamp_(max=packed.shape[0] - 1), rows * bits % WORD


def step_at(packed: torch.Tensor, bits: int, rows: torch.Tensor, cols: torch.Tensor,
            step: torch.Tensor) -> torch.Tensor:
    """Adds `step` to the values at (rows, cols), in place, but never beyond 0 ... 2**bits - 1.

    packed: int32 [words, cols]. rows, cols: int64 [n]; no pair (row, col) may come twice. step: [n].
    Returns the steps that were taken, int64 [n]. It touches only the words that hold these values.
    """
    mask, (word, upper, shift) = 2**WORD - 1, _place(packed, bits, rows)
    old = values_at(packed, bits, rows, cols)
    new = (old + step.long()).clamp_(0, 2**bits - 1)
    before, after = old << shift, new << shift
    # Values may share a word. int32 sums wrap modulo 2**32, so in any order they give the word with all new values.
    packed.index_put_((word, cols), ((after & mask) - (before & mask)).int(), accumulate=True)
    if WORD % bits:
        packed.index_put_((upper, cols), ((after >> WORD) - (before >> WORD)).int(), accumulate=True)
    return new - old


def count_different(packed: torch.Tensor, other: torch.Tensor, bits: int) -> int:
    """How many values differ between two packed tensors, int32 [words, cols]. Unpacks only the units that differ."""
    fields, words = _fields(bits)
    units = -(-packed.shape[0] // words)
    if packed.shape[0] != units * words:
        packed, other = (F.pad(p, (0, 0, 0, units * words - len(p))) for p in (packed, other))
    packed, other = (p.view(units, words, -1) for p in (packed, other))
    differ = packed != other
    differ = differ.any(1) if words > 1 else differ[:, 0]
    values = (unpack_rows(p.transpose(0, 1)[:, differ], bits, len(fields)) for p in (packed, other))
    return int(torch.count_nonzero(torch.ne(*values)))


def unpack_zeros(qzeros: torch.Tensor, bits: int, cols: int, checkpoint_format: str) -> torch.Tensor:
    """Zero points: int32 [groups, ceil(cols * bits / 32)] -> uint8 [groups, cols].

    checkpoint_format "gptq" stores z - 1, "gptq_v2" stores z. The writer of "gptq" subtracted the 1s from whole words,
    so z = 0 borrowed from its neighbour. Adding the 1s to whole words gives the borrow back. Where values lie in two
    words (3 bits), GPTQModel wraps each value by itself, and so does this function.
    """
    if checkpoint_format == "gptq" and WORD % bits == 0:
        qzeros = qzeros + sum(1 << shift for shift in range(0, WORD, bits))
    zeros = unpack_rows(qzeros.t().contiguous(), bits, cols).t().contiguous()
    if checkpoint_format == "gptq" and WORD % bits:
        zeros = (zeros + 1).bitwise_and_(2**bits - 1)
    return zeros
