"""The method written out plainly in float64, for the tests to compare with. Imports nothing of the project's code.

It loops over values, groups and entries wherever that is plainest, because speed does not matter here.
A [in, r] and B [r, out] hold -1, 0, 1. weight_int [in, out], scales and zeros [groups, out], g_idx [in], as in
LoTA.ternary.
"""
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
