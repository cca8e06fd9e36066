"""The method written out plainly in float64, for the tests to compare with. Imports nothing of the project's code.

It loops over values, groups and entries wherever that is plainest, because speed does not matter here.
A [in, r] and B [r, out] hold -1, 0, 1. weight_int [in, out], scales and zeros [groups, out], g_idx [in], as in
LoTA.ternary.
"""
from fractions import Fraction

import numpy as np
import torch

# --- the packed integers ------------------------------------------------------------------------------------------


def pack_stream(values, bits):
    """Python integers -> the 32-bit words of their bit stream, least significant bit first, as signed integers."""
    stream = 0
    for k, value in enumerate(values):
        assert 0 <= value < 2**bits
        stream |= value << (k * bits)
    words = []
    for _ in range(-(-len(values) * bits // 32)):
        word = stream & 0xFFFFFFFF
        words.append(word - 2**32 if word >= 2**31 else word)
        stream >>= 32
    return words


def unpack_stream(words, bits, count):
    """Inverse of pack_stream: the first `count` values."""
    stream = 0
    for k, word in enumerate(words):
        stream |= (word & 0xFFFFFFFF) << (32 * k)
    return [(stream >> (k * bits)) & (2**bits - 1) for k in range(count)]


def pack_columns(values, bits):
    """Integers [rows, cols] -> int32 [words, cols]. Each column is a stream of its own."""
    columns = [pack_stream(column, bits) for column in values.t().tolist()]
    return torch.tensor(columns, dtype=torch.int32).t().contiguous()


def unpack_columns(packed, bits, rows):
    """Inverse of pack_columns: int32 [words, cols] -> int64 [rows, cols]."""
    return torch.tensor([unpack_stream(column, bits, rows) for column in packed.t().tolist()]).t().contiguous()


# --- the weights --------------------------------------------------------------------------------------------------

def delta_w(A, B):
    """dW = A B, in float64."""
    return A.double() @ B.double()


def ternary_step(dw, weight_int, omega, bits):
    """Eq. 3: the step of each weight for dW [in, out]. It is 0 where it would leave the grid."""
    step = torch.zeros(dw.shape, dtype=torch.float64)
    for i, (changes, integers) in enumerate(zip(dw.tolist(), weight_int.tolist(), strict=True)):
        for j, (change, integer) in enumerate(zip(changes, integers, strict=True)):
            if change > omega and integer < 2**bits - 1:
                step[i, j] = 1
            elif change < -omega and integer > 0:
                step[i, j] = -1
    return step


def group_means(matrix, g_idx, groups):
    """[in, out] -> [groups, out]: the mean over the rows that a group really has."""
    return torch.stack([matrix[g_idx == g].mean(0) for g in range(groups)])


def offset(dw, step, g_idx, groups, omega, kappa):
    """Eq. 4: mu [groups, out], the group mean of dW - omega W^, divided by kappa. Zeros where kappa is None."""
    if kappa is None:
        return torch.zeros(groups, dw.shape[1], dtype=torch.float64)
    return group_means(dw - omega * step, g_idx, groups) / kappa


def weight(weight_int, step, mu, scales, zeros, g_idx):
    """W' = s (W_int - z + W^ + mu)."""
    rows = g_idx.long()
    return scales.double()[rows] * (weight_int.double() - zeros.double()[rows] + step + mu[rows])


def adapted_weight(A, B, weight_int, scales, zeros, g_idx, bits, omega, kappa):
    """W' of the training layer."""
    dw = delta_w(A, B)
    step = ternary_step(dw, weight_int, omega, bits)
    mu = offset(dw, step, g_idx, scales.shape[0], omega, kappa)
    return weight(weight_int, step, mu, scales, zeros, g_idx)


def merge(A, B, weight_int, scales, g_idx, bits, omega, kappa):
    """Eq. 5: (W_int + W^, mu)."""
    dw = delta_w(A, B)
    step = ternary_step(dw, weight_int, omega, bits)
    return weight_int.long() + step.long(), offset(dw, step, g_idx, scales.shape[0], omega, kappa)


def forward_and_gradients(x, grad_output, A, B, weight_int, scales, zeros, g_idx, bits, omega, kappa):
    """y = x W' and the gradients of x, A and B, by autograd through the straight-through form of W'."""
    x, A, B = (t.detach().double().requires_grad_() for t in (x, A, B))
    dw = A @ B
    step = ternary_step(dw.detach(), weight_int, omega, bits)
    straight_through = dw + (step - dw).detach()
    mu = offset(dw, step, g_idx, scales.shape[0], omega, kappa)    # the step is a constant here
    y = x @ weight(weight_int, straight_through, mu, scales, zeros, g_idx)
    return y.detach(), *torch.autograd.grad(y, (x, A, B), grad_output.double())


# --- LR-QAT: a rounded product ------------------------------------------------------------------------------------

def fixed_point(matrix):
    """(integers [rows, cols], e): each entry of a float32 matrix in units of 2**e, the nearest, to even at a tie.

    e is the smallest at which no integer is beyond 127.
    """
    values = [[Fraction(v) for v in row] for row in matrix.tolist()]
    largest, e = max(abs(v) for row in values for v in row), -60
    while largest > 127 * Fraction(2)**e:
        e += 1
    return [[round(v / Fraction(2)**e) for v in row] for row in values], e


def noise(seed, row, col, width):
    """The dither of one weight: a hash of 32 bits, of which the upper 8 are the number, in -128 ... 127."""
    x = (row * width + col ^ seed) & 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return (x >> 24) - 256 * (x >= 2**31)


def rounded_step(A, B, scaling, scales, g_idx, dither, mean=False):
    """The step of each weight, int64 [in, out], before the clamp: round(dW / s - m + u), in float32 as IEEE rounds it.

    dither: [[int]] in steps of 1/256, or None. mean: whether m is the mean of dW / s over the group; else it is 0.
    """
    (a, of_a), (b, of_b) = fixed_point(A), fixed_point(B)
    unit, steps = np.float32(2.0**of_a) * np.float32(2.0**of_b) * np.float32(scaling), []
    means = mean_of_group(A, B, scaling, scales, g_idx) if mean else None
    for i, row in enumerate(a):
        steps.append([])
        for j in range(len(b[0])):
            product = sum(x * b[k][j] for k, x in enumerate(row))
            value = np.float32(product) * unit / np.float32(scales[g_idx[i], j].item())
            if mean:
                value -= np.float32(means[g_idx[i], j].item())
            if dither is not None:
                value += np.float32((dither[i][j] + 0.5) / 256)
            steps[-1].append(round(float(value)))
    return torch.tensor(steps)


def rounded_merge(A, B, scaling, weight_int, scales, g_idx, bits, dither, mean=False):
    """W_int + W^, on the grid: int64 [in, out]."""
    return (weight_int.long() + rounded_step(A, B, scaling, scales, g_idx, dither, mean)).clamp(0, 2**bits - 1)


def mean_of_group(A, B, scaling, scales, g_idx, moved=None):
    """The mean of dW / s over each group, less that of the steps `moved` [in, out] if given: float32 [groups, out].

    The sum of a group's products is exact. It goes times the unit and by the scale, less the sum of the steps, and by
    the rows: four operations, each of them rounded to float64, and the result to float32.
    """
    (a, of_a), (b, of_b) = fixed_point(A), fixed_point(B)
    unit, means = float(np.float32(2.0**of_a) * np.float32(2.0**of_b) * np.float32(scaling)), []
    for group in range(scales.shape[0]):
        rows = [i for i, g in enumerate(g_idx.tolist()) if g == group]
        means.append([])
        for j in range(len(b[0])):
            product = sum(x * b[k][j] for i in rows for k, x in enumerate(a[i]))
            taken = 0 if moved is None else sum(int(moved[i, j]) for i in rows)
            means[-1].append((float(product) * unit / scales[group, j].item() - taken) / len(rows))
    return torch.tensor(means, dtype=torch.float64).float()


def rounded_forward_and_gradients(x, grad_output, A, B, change, mu, scaling, weight_int, scales, zeros, g_idx, bits,
                                  dither, mean=False):
    """y and the gradients of x, A, B, change and mu, by autograd: straight through every rounding and the clamp.

    change, mu: [groups, out]. The learned scales are scales * (1 + change), here without rounding to float16.
    """
    leaves = x, A, B, change, mu = tuple(t.detach().double().requires_grad_() for t in (x, A, B, change, mu))
    fixed = []
    for matrix in (A, B):
        integers, e = fixed_point(matrix.detach())
        fixed.append(matrix + (torch.tensor(integers).double() * 2.0**e - matrix).detach())
    rows = g_idx.long()
    steps = scaling * fixed[0] @ fixed[1] / scales.double()[rows]
    taken = rounded_merge(A.detach().float(), B.detach().float(), scaling, weight_int, scales, g_idx, bits,
                          dither, mean) - weight_int.long()
    steps = steps + (taken - steps).detach()
    weight = (scales.double() * (1 + change))[rows] * (weight_int.double() - zeros.double()[rows] + steps + mu[rows])
    y = x @ weight
    of_x, of_A, *others = torch.autograd.grad(y, leaves, grad_output.double())
    if mean:                                # the mean of a group stays, the rest goes by the root of its rows
        for group in range(scales.shape[0]):
            own = of_A[rows == group]
            of_A[rows == group] = own.mean(0) + (own - own.mean(0)) / len(own)**0.5
    return y.detach(), of_x, of_A, *others


# --- initialisation and training ----------------------------------------------------------------------------------

def ternarized(values):
    """+1 above delta, -1 below -delta, else 0, where delta = 0.75 mean|values|."""
    values = values.double()
    delta = 0.75 * values.abs().mean().item()
    return torch.tensor([[1.0 if v > delta else -1.0 if v < -delta else 0.0 for v in row] for row in values.tolist()])


def sigma(t, steps, first=0.95, turn=0.999, last=0.9999):
    """sigma of step t = 1 ... steps: from first to turn over 80 % of the steps, then from turn to last, linearly."""
    if t >= steps:
        return last
    phase = 0.8 * steps
    if t <= phase:
        return first + t / phase * (turn - first)
    return turn + (t - phase) / (steps - phase) * (last - turn)


def sign_step(parameters, gradients, level, last_phase):
    """One t-SignSGD step over lists of tensors, for sigma = level. Returns the new parameters in float64.

    last_phase: whether t > 80 % of the steps.
    """
    norm = sum(float((g.double() ** 2).sum()) for g in gradients) ** 0.5
    out = []
    for p, g in zip(parameters, gradients, strict=True):
        g = g.double()
        size = g.abs()
        moves = size > max(1e-9, torch.quantile(size, level).item())
        if last_phase and norm > 10:
            moves &= size < torch.quantile(size, 0.99995)
        out.append((p.double() - torch.where(moves, g.sign(), 0.0)).clip(-1, 1))
    return out
