"""The GPTQ grid: unpack and pack `qweight` and `qzeros`; 2, 3, 4 and 8 bits. Imports torch only.

GPTQ packs along one axis as a bit stream in 32-bit words, least significant bit first: value k occupies the bits
k*bits ... k*bits + bits - 1. So 32 values take `bits` words; at 3 bits two values of each 32 straddle two words.
Layout: https://github.com/IST-DASLab/gptq and the checkpoint formats "gptq" and "gptq_v2" of GPTQModel.
"""
import torch
import torch.nn.functional as F

WORD = 32
UNPACK_ENTRIES = 1 << 19


def _fields(bits):
    """For each value of one repeating unit: (word, shift, bits that spill into the next word)."""
    values, words = (WORD, bits) if WORD % bits else (WORD // bits, 1)
    fields = []
    for k in range(values):
        word, shift = divmod(k * bits, WORD)
        fields.append((word, shift, max(0, shift + bits - WORD)))
    return fields, words


def unpack_rows(packed, bits, rows, dtype=torch.uint8):
    """Unpacks along dim 0: int32 [>= ceil(rows * bits / 32), cols] -> [rows, cols], values 0 ... 2**bits - 1."""
    fields, words = _fields(bits)
    if packed.shape[0] % words:
        packed = F.pad(packed, (0, 0, 0, -packed.shape[0] % words))
    units, cols = packed.shape[0] // words, packed.shape[1]
    packed = packed.view(units, words, cols)
    out = torch.empty(units, len(fields), cols, dtype=dtype, device=packed.device)
    step = max(1, UNPACK_ENTRIES // (len(fields) * max(1, cols)))       # the int32 values of a piece stay in the cache
    for first in range(0, units, step):
        piece = slice(first, first + step)
        out[piece] = _unpack_units(packed[piece], fields, bits).bitwise_and_(2**bits - 1)
    return out.view(units * len(fields), cols)[:rows]


def _unpack_units(packed, fields, bits):
    """int32 [units, words, cols] -> int32 [units, values, cols], with other values' bits above the lowest `bits`."""
    if packed.shape[1] == 1:
        # >> on int32 copies the sign bit: into those other bits.
        return packed >> torch.arange(0, WORD, bits, dtype=torch.int32, device=packed.device)[:, None]
    values = torch.empty(packed.shape[0], len(fields), packed.shape[2], dtype=torch.int32, device=packed.device)
    for k, (word, shift, spill) in enumerate(fields):
        torch.bitwise_right_shift(packed[:, word], shift, out=values[:, k])
        if spill:
            values[:, k].bitwise_and_(2**(bits - spill) - 1).bitwise_or_(packed[:, word + 1] << (bits - spill))
    return values


def words_of(rows, bits):
    """The slice of packed words that hold the rows of the slice `rows` and begin with them, or None where a word
    begins with other rows."""
    values = WORD if WORD % bits else WORD // bits
    if rows.start % values:
        return None
    return slice(rows.start * bits // WORD, -(-rows.stop // values) * values * bits // WORD)


def pack_rows(values, bits):
    """Inverse of unpack_rows: integers [rows, cols] in 0 ... 2**bits - 1 -> int32 [words, cols].

    words = ceil(rows * bits / 32), at 3 bits rounded up to a multiple of 3; the rest is filled with zeros.
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


def step_at(packed, bits, rows, cols, step):
    """Adds `step` (integers [n]) to the values at (rows, cols), in place, but never beyond 0 ... 2**bits - 1.

    No place may come twice. Returns the steps that were taken, int64 [n]. Touches only the words concerned.
    """
    mask, word, shift = 2**WORD - 1, rows * bits // WORD, rows * bits % WORD
    value = (packed[word, cols].long() & mask) >> shift
    if WORD % bits:                                             # values may spill into the next word
        upper = (word + 1).clamp_(max=packed.shape[0] - 1)
        value |= (packed[upper, cols].long() & mask) << (WORD - shift)
    old = value & (2**bits - 1)
    new = (old + step.long()).clamp_(0, 2**bits - 1)
    before, after = old << shift, new << shift
    # Differences of whole fields add up in a word without touching each other, in any order, modulo 2**32.
    packed.index_put_((word, cols), ((after & mask) - (before & mask)).int(), accumulate=True)
    if WORD % bits:
        packed.index_put_((upper, cols), ((after >> WORD) - (before >> WORD)).int(), accumulate=True)
    return new - old


def count_different(packed, other, bits):
    """How many values differ between two packed tensors of one shape. Unpacks only what differs."""
    fields, words = _fields(bits)
    units = -(-packed.shape[0] // words)
    if packed.shape[0] != units * words:
        packed, other = (F.pad(p, (0, 0, 0, units * words - len(p))) for p in (packed, other))
    packed, other = (p.view(units, words, -1) for p in (packed, other))
    differ = (packed != other).any(1)
    values = (unpack_rows(p.transpose(0, 1)[:, differ], bits, len(fields)) for p in (packed, other))
    return int(torch.count_nonzero(torch.ne(*values)))


def unpack_zeros(qzeros, bits, cols, checkpoint_format):
    """Zero points: int32 [groups, ceil(cols * bits / 32)] -> uint8 [groups, cols].

    checkpoint_format "gptq" stores z - 1, "gptq_v2" stores z. The 1 is added to the packed words, so that a zero
    point of 0, whose subtraction borrowed from its neighbour, comes back as it was; at 3 bits, where values straddle
    words, GPTQModel wraps each field by itself, and so does this.
    """
    if checkpoint_format == "gptq" and WORD % bits == 0:
        qzeros = qzeros + sum(1 << shift for shift in range(0, WORD, bits))
    zeros = unpack_rows(qzeros.t().contiguous(), bits, cols).t().contiguous()
    if checkpoint_format == "gptq" and WORD % bits:
        zeros = (zeros + 1).bitwise_and_(2**bits - 1)
    return zeros
