"""The GPTQ grid: unpack and pack `qweight` and `qzeros`; 2, 3, 4 and 8 bits. Imports torch only.

GPTQ packs along one axis as a bit stream in 32-bit words, least significant bit first: value k occupies the bits
k*bits ... k*bits + bits - 1. So 32 values take `bits` words; at 3 bits two values of each 32 straddle two words.
Layout: https://github.com/IST-DASLab/gptq and the checkpoint formats "gptq" and "gptq_v2" of GPTQModel.
"""
import torch

SUPPORTED_BITS = (2, 3, 4, 8)
WORD = 32


def _fields(bits):
    """For each value of one repeating unit: (word, shift, bits that spill into the next word)."""
    values, words = (WORD, bits) if WORD % bits else (WORD // bits, 1)
    fields = []
    for k in range(values):
        word, shift = divmod(k * bits, WORD)
        fields.append((word, shift, max(0, shift + bits - WORD)))
    return fields, words


def unpack_rows(packed, bits, rows):
    """Unpacks along dim 0: int32 [>= ceil(rows * bits / 32), cols] -> uint8 [rows, cols], values 0 ... 2**bits - 1."""
    fields, words = _fields(bits)
    if packed.shape[0] % words:
        packed = torch.cat([packed, packed.new_zeros(-packed.shape[0] % words, packed.shape[1])])
    units, cols = packed.shape[0] // words, packed.shape[1]
    packed = packed.view(units, words, cols)
    mask = 2**bits - 1
    out = torch.empty(units, len(fields), cols, dtype=torch.uint8, device=packed.device)
    value = torch.empty(units, cols, dtype=torch.int32, device=packed.device)
    for k, (word, shift, spill) in enumerate(fields):
        # >> on int32 copies the sign bit; the mask removes the copies except where the value itself is cut short.
        torch.bitwise_right_shift(packed[:, word], shift, out=value)
        if spill:
            value.bitwise_and_(mask >> spill).bitwise_or_(packed[:, word + 1] << (bits - spill))
        out[:, k] = value.bitwise_and_(mask)
    return out.view(units * len(fields), cols)[:rows]


def pack_rows(values, bits):
    """Inverse of unpack_rows: integers [rows, cols] in 0 ... 2**bits - 1 -> int32 [words, cols].

    words = ceil(rows * bits / 32), at 3 bits rounded up to a multiple of 3; the rest is filled with zeros.
    """
    fields, words = _fields(bits)
    rows, cols = values.shape
    units = -(-rows // len(fields))
    if rows != units * len(fields):
        values = torch.cat([values, values.new_zeros(units * len(fields) - rows, cols)])
    values = values.view(units, len(fields), cols)
    packed = torch.zeros(units, words, cols, dtype=torch.int32, device=values.device)
    for k, (word, shift, spill) in enumerate(fields):
        value = values[:, k].int()
        packed[:, word] |= value << shift
        if spill:
            packed[:, word + 1] |= value >> (bits - spill)
    return packed.view(units * words, cols)


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
