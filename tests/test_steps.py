"""LoTA.steps' Rounding, the rule of --method lrqat, against the oracle: all integers equal, on every road there is."""
import math
from unittest.mock import patch

import oracle
import pytest
import torch
from pairs import pairwise
from test_kernels import DEVICE, LAYOUTS, TOLERANCE, Case, cut_off

from LoTA import SUPPORTED_BITS, UserError, kernels, packed, ternary
from LoTA.steps import (
    Rounding,
    dither_from_fraction,
    dither_value,
    fixed_point,
    layer_seed,
    noise,
    power_of_two,
)
from LoTA.ternary import GridLinear, adapted_weight, count_steps, is_merge, merge

RANK, SCALING, SEED = 8, 2.0, layer_seed("model.layers.0.self_attn.q_proj")
DITHERS = ("none", "noise", "fraction")
BACKENDS = {"torch": ternary, "triton": kernels}


class RealCase(Case):
    """A random layer with real A and B whose steps go from -4 to 4 and beyond the grid's ends."""

    def __init__(self, bits=4, layout="even", form="gptq", dither="noise", rank=RANK, cols=40, seed=0,
                 mean=False):
        super().__init__(bits, layout, form, rank, cols, seed)
        generator = torch.Generator().manual_seed(seed)
        self.A = torch.randn(self.A.shape, generator=generator)
        self.B = 0.25 / math.sqrt(rank) * torch.randn(self.B.shape, generator=generator)
        shape = rows, _ = self.weight_int.shape
        fraction = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        self.rule = Rounding(SCALING, SEED if dither == "noise" else None,
                             fraction.to(DEVICE) if dither == "fraction" else None, mean)
        self.dither = {"none": None, "fraction": fraction.tolist(), "noise": [
            [oracle.noise(SEED, i, j, cols) for j in range(cols)] for i in range(rows)]}[dither]
        self.want = oracle.rounded_merge(self.A, self.B, SCALING, self.weight_int, self.scales, self.g_idx, bits,
                                         self.dither, mean)
        self.want_mu = oracle.mean_of_group(self.A, self.B, SCALING, self.scales, self.g_idx,
                                            self.want - self.weight_int) if mean else None

    def arguments(self):
        return *self.adapter(), self.packed, self.rule


def test_fixed_point_by_hand():
    """The largest entry, 1, needs 2**-6: 64. The others round to the nearest 1/64, ties to even."""
    integers, exponent = fixed_point(torch.tensor([[1.0, -0.25], [2.5 / 64, 3.5 / 64]]))
    assert integers.tolist() == [[64, -16], [2, 4]] and exponent == -6
    assert fixed_point(torch.tensor([[127.0, 1.0]]))[0].tolist() == [[127, 1]]          # 127 itself fits
    assert fixed_point(torch.tensor([[127.4, 1.0]]))[0].tolist() == [[64, 0]]           # more does not: 2**1, 0.5 -> 0
    assert fixed_point(torch.zeros(2, 2))[0].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("seed", range(6))
def test_fixed_point_is_the_oracles_and_stays(seed):
    """The integers are the oracle's. Rounding what was rounded changes nothing, in bfloat16 neither."""
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) * 10.0**(seed - 3)
    matrix[seed % 7, 0] = matrix.abs().max() * (1 + seed / 40)
    integers, exponent = fixed_point(matrix)
    want, of_want = oracle.fixed_point(matrix)
    assert integers.tolist() == want and exponent == of_want and integers.abs().max() <= 127
    again = (integers * power_of_two(exponent)).bfloat16()
    for got, same in zip(fixed_point(again), (integers, exponent), strict=True):
        assert torch.equal(got, same)


def test_powers_of_two():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**e for e in exponents.tolist()]


def test_noise_is_the_oracles_and_uniform():
    """Every number as in plain Python, for seeds beyond int32 too, and a mean and a spread of uniform numbers."""
    for seed in (0, 1, SEED, 2**32 - 1):
        got = noise(seed, torch.tensor([0, 3, 2**31]), 17)
        assert got.tolist() == [[oracle.noise(seed, row, col, 17) for col in range(17)] for row in (0, 3, 2**31)]
    u = dither_value(noise(SEED, torch.arange(1000), 1000))
    assert abs(u.mean()) < 1e-3 and abs(u.var() - 1 / 12) < 1e-3 and u.abs().max() == 127.5 / 256
    neighbours = torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 5e-3
    other = dither_value(noise(layer_seed("model.layers.1.self_attn.q_proj"), torch.arange(1000), 1000))
    assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 5e-3


def test_fractions_are_kept_to_a_512th():
    fraction = torch.linspace(-0.498, 0.498, 2001)
    assert (dither_value(dither_from_fraction(fraction)) - fraction).abs().max() <= 1 / 512 + 1e-6
    assert dither_value(dither_from_fraction(torch.tensor([-3.0, 0.7]))).tolist() == [-127.5 / 256, 127.5 / 256]


def same_mu(got, want):
    return got is None if want is None else got.dtype == torch.float32 and torch.equal(got.cpu(), want)


@pytest.mark.parametrize("bits, layout, form, dither, mean, backend", pairwise(
    bits=SUPPORTED_BITS, layout=LAYOUTS, form=("gptq", "gptq_v2"), dither=DITHERS, mean=(False, True),
    backend=BACKENDS))
def test_the_integers_are_the_oracles(bits, layout, form, dither, mean, backend):
    """Merge, live weight, count and verification, each by itself, against arithmetic written out. So is mu."""
    case, module = RealCase(bits, layout, form, dither, mean=mean), BACKENDS[backend]
    moved = case.want != case.weight_int
    assert moved.float().mean() > 0.2 and (case.want - case.weight_int).abs().max() >= min(3, 2**bits - 1)
    merged, mu = merge(*case.arguments())
    assert same_mu(mu, case.want_mu) and torch.equal(merged.weight_int.cpu().long(), case.want)
    assert is_merge(*case.arguments()[:3], merged, mu, case.rule)
    assert not is_merge(*case.arguments()[:3], case.packed, mu, case.rule)
    assert not is_merge(*case.arguments()[:3], merged, mu * (1 + 2**-23) if mean else torch.zeros(1), case.rule)
    count, mu = module.count_steps(*case.arguments())
    assert count == moved.sum() and same_mu(mu, case.want_mu)
    weight, mu = module.adapted_weight(*case.arguments())
    assert same_mu(mu, case.want_mu)
    scales, zeros = case.scales.float()[case.g_idx], case.zeros.float()[case.g_idx]
    assert torch.equal(weight.cpu(), (case.want - zeros) * scales)


@pytest.mark.parametrize("dither, mean, backend", pairwise(dither=DITHERS, mean=(False, True), backend=BACKENDS))
def test_without_a_step_the_model_is_the_quantized_one(dither, mean, backend):
    """Where B is 0 no dither moves an integer."""
    case = RealCase(dither=dither, mean=mean)
    A, B, layer, rule = case.arguments()
    weight, _ = BACKENDS[backend].adapted_weight(A, torch.zeros_like(B), layer, rule)
    assert torch.equal(weight, ternary.dequantize(layer))


@pytest.mark.parametrize("rank", [1, 31, 64, 130, 1040])
def test_sums_of_any_rank_are_exact(rank):
    """All entries at the largest integer, so that the sums go up to r * 127**2, in both backends."""
    case = RealCase(8, rank=rank, dither="none", cols=16)
    case.A, case.B = case.A.sign() * 127 / 64, case.B.sign() * 2.0**-6 * 127 / rank
    case.A[0], case.B[:, 0] = 127 / 64, 127 * 2.0**-6 / rank
    case.rule.check(rank, 32)
    want = oracle.rounded_merge(case.A, case.B, SCALING, case.weight_int, case.scales, case.g_idx, 8, None)
    for module in BACKENDS.values():
        weight, _ = module.adapted_weight(*case.arguments())
        scales, zeros = case.scales.float()[case.g_idx], case.zeros.float()[case.g_idx]
        assert torch.equal(weight.cpu(), (want - zeros) * scales)


def test_a_rank_beyond_exactness_is_refused():
    Rounding(1.0).check(1040, 10**6)
    with pytest.raises(UserError, match="rank 1041 is too large"):
        Rounding(1.0).check(1041, 32)
    with pytest.raises(UserError, match="lora_alpha"):
        Rounding(0.0).check(8, 32)


class Ties(RealCase):
    """A third of all dW / s are exactly an integer and a half, in sums of eight terms of different size and sign.

    Scales are powers of two and every entry of A and B is a multiple of 2**-6, so nothing is rounded before the tie.
    """

    def __init__(self, bits=8):
        super().__init__(bits, "short last", dither="none", cols=64)
        generator = torch.Generator().manual_seed(1)
        self.scales = (2.0**torch.randint(0, 2, self.scales.shape, generator=generator)).half()
        self.packed.scales = self.packed.base_scales = self.scales.to(DEVICE)
        self.A = torch.randint(-3, 4, self.A.shape, generator=generator) / 2
        self.B = torch.randint(-9, 10, self.B.shape, generator=generator) * 2.0
        self.A[0, 0], self.B[0, 0] = 127 / 64, 126.0        # so the units are 2**-6 and 1
        self.rule = Rounding(0.5)
        self.exact = 0.5 * self.A.double() @ self.B.double() / self.scales.double()[self.g_idx.long()]
        self.want = (self.weight_int + torch.tensor([[round(v) for v in row] for row in self.exact.tolist()])).clamp(
            0, 2**bits - 1)


def test_ties_round_to_even_on_every_road():
    """Both backends, one thread and two, blocks of one group and of all, and the ranks in other orders."""
    case = Ties()
    assert ((case.exact % 1) == 0.5).double().mean() > 0.2
    scales, zeros = case.scales.float()[case.g_idx], case.zeros.float()[case.g_idx]
    want = (case.want - zeros) * scales
    A, B, layer, rule = case.arguments()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for entries in (1, 1 << 19):
                with patch.dict(packed.BLOCK_ENTRIES, {"cpu": entries, "cuda": entries}):
                    for order in (torch.arange(RANK), torch.arange(RANK).flip(0), torch.randperm(RANK)):
                        for module in BACKENDS.values():
                            weight, _ = module.adapted_weight(A[:, order], B[order], layer, rule)
                            assert torch.equal(weight.cpu(), want)
                        merged, _ = merge(A[:, order], B[order], layer, rule)
                        assert torch.equal(merged.weight_int.cpu().long(), case.want)
    finally:
        torch.set_num_threads(threads)


def test_mu_keeps_the_mean_of_a_group():
    """Whatever the rounding, the dither and the grid's ends do, W + s mu moves the mean of a group by that of dW."""
    case = RealCase(2, "short last", mean=True)
    (a, of_a), (b, of_b) = fixed_point(case.A), fixed_point(case.B)
    delta_w = SCALING * 2.0**(int(of_a) + int(of_b)) * (a.double() @ b.double())
    cut = (case.want - case.weight_int - delta_w / case.scales[case.g_idx.long()]).abs() > 1
    assert cut.double().mean() > 0.05                                       # the grid's ends took from many steps
    weight, mu = adapted_weight(*case.arguments())
    change = weight.cpu().double() - ternary.dequantize(case.packed).cpu().double()
    change += (mu.cpu().double() * case.scales.double())[case.g_idx.long()]
    means = (oracle.group_means(t, case.g_idx, len(case.scales)) for t in (change, delta_w))
    assert torch.allclose(*means, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout, dither, backend", pairwise(layout=LAYOUTS, dither=DITHERS, backend=BACKENDS))
def test_what_a_group_has_in_common_moves_no_integer(layout, dither, backend):
    """Where the rows of A are equal in each group, mu is dW / s and no weight steps, however large dW is."""
    case = RealCase(4, layout, dither=dither, mean=True)
    case.A = case.A[case.g_idx.long()]
    count, mu = BACKENDS[backend].count_steps(*case.arguments())
    first = [case.g_idx.tolist().index(group) for group in range(len(case.scales))]
    want = case.rule.grid_steps(case.rule.factors(*case.adapter()), torch.tensor(first, device=DEVICE), case.packed)
    assert count == 0 and mu.abs().max() > 2 and torch.allclose(mu, want, rtol=1e-6, atol=0)


def test_the_mean_of_a_wide_group_is_exact():
    """The sums of a group pass 2**24 by far, beyond which float32 would round them."""
    case = RealCase(4, "in pieces", rank=64, dither="none", mean=True)
    case.A[:], case.B[:] = 127 / 64, 127 / 128
    case.A[0, 0] -= 1 / 64
    sums = (case.rule.group_sums(case.rule.factors(*case.adapter()), case.packed).cpu() * case.scales.double())[0]
    want = (300 * 64 * 127**2 - 127) * SCALING / 64 / 128
    assert 300 * 64 * 127**2 > 2**28 and (sums - want).abs().max() < 1e-9


def test_noise_as_a_tensor_gives_the_same_steps():
    case = RealCase(3, "shuffled")
    kept = case.rule.with_dither(case.packed)
    assert kept.seed is None and kept.dither.tolist() == case.dither
    assert torch.equal(adapted_weight(*case.arguments())[0], adapted_weight(*case.arguments()[:3], kept)[0])
    assert count_steps(*case.arguments()[:3], kept)[0] == (case.want != case.weight_int).sum()


def test_a_group_of_scale_zero():
    """Its weights are 0 whatever steps are taken, and nothing becomes nan."""
    case = RealCase()
    case.packed.scales[0] = 0
    for module in BACKENDS.values():
        weight, _ = module.adapted_weight(*case.arguments())
        assert bool(weight.isfinite().all()) and not weight.cpu()[case.g_idx == 0].any()


@pytest.mark.parametrize("bits, layout, dither, mean, dtype, backend", pairwise(
    bits=SUPPORTED_BITS, layout=LAYOUTS, dither=DITHERS, mean=(False, True), dtype=TOLERANCE, backend=BACKENDS))
def test_forward_and_gradients_are_the_oracles(bits, layout, dither, mean, dtype, backend):
    """y and the gradients of x, A, B, mu and scale_change against float64 autograd, straight through the rounding.

    A mu that is the mean is a constant there, because W^ + mu as a whole stands for dW / s. It has no gradient.
    The learned scales are rounded to float16, which the oracle leaves out: half an ulp more.
    """
    case, generator = RealCase(bits, layout, dither=dither, mean=mean), torch.Generator().manual_seed(5)
    if dtype == torch.float32:          # as a model in float32 has them
        case.packed.scales = case.packed.base_scales = case.packed.scales.float()
    change = 0.1 * torch.randn(case.scales.shape, generator=generator)
    mu = case.want_mu if mean else torch.randn(case.scales.shape, generator=generator)
    x, grad = (torch.randn(6, n, generator=generator).to(dtype) for n in case.packed.shape)
    leaves = [t.detach().to(DEVICE).requires_grad_() for t in (x, *case.adapter(), mu, change)]
    y = GridLinear.apply(*leaves[:3], lambda: case.packed.rescaled(change.to(DEVICE)), case.rule, BACKENDS[backend],
                         None if mean else leaves[3], leaves[4])
    y.backward(grad.to(DEVICE))
    want = oracle.rounded_forward_and_gradients(x, grad, case.A, case.B, change, mu, SCALING, case.weight_int,
                                                case.scales, case.zeros, case.g_idx, bits, case.dither, mean)
    got = [y, *(leaves[i].grad for i in (0, 1, 2, 4, 3))]
    bound = TOLERANCE[dtype] * (2 if cut_off(dtype) else 1) + 2.0**-11
    assert torch.equal(case.packed.scales.cpu().half(), case.scales)
    for a, b in zip(got, want, strict=True):
        if a is None:
            assert mean and b is want[-1]
        else:
            assert (a.detach().double().cpu() - b).abs().max() <= bound * b.abs().max()
