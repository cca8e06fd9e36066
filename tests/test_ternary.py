"""LoTA.ternary and LoTA.packed against the float64 oracle: integers equal, floats to the rounding of their dtype."""
from dataclasses import dataclass, replace
from functools import cache

import oracle
import pytest
import torch
from pairs import pairwise

from LoTA import SUPPORTED_BITS, packed, ternary
from LoTA.adapter import LTA
from LoTA.packed import Groups, PackedLayer
from LoTA.packing import pack_rows
from LoTA.steps import Threshold, product_dtype, ternary_step
from LoTA.ternary import (
    GridLinear,
    adapted_weight,
    count_steps,
    dequantize,
    is_merge,
    layer_gradients,
    merge,
    ternarize_,
)

RANK, COLS = 8, 12
LAYOUTS = {                     # (rows of each group, whether their order is shuffled, as desc_act leaves it)
    "even": ([16] * 4, False),
    "one group": ([24], False),
    "short last": ([16, 16, 8], False),
    "shuffled": ([16] * 4, True),
    "shuffled short last": ([16, 16, 8], True),
    "uneven": ([5, 16, 9], False),
    "uneven shuffled": ([5, 16, 16, 9], True),
}
KAPPAS = (2.0, 1.0, None)       # omega's value, the paper's 1, and no offset
# Eq. 4's mean over a group depends on three things together: groups of unequal size, kappa and the road. So the dense
# road, which pairwise() chooses less often, takes these pairs as further cases.
UNEQUAL = [(layout, kappa) for layout, (sizes, _) in LAYOUTS.items() if len(set(sizes)) > 1 for kappa in (2.0, 1.0)]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}       # half an ulp, relative
ROADS = {"dense": -1, "sparse": 2}      # the SPARSE_SHARE that makes LoTA.ternary compute every weight, or the few


@pytest.fixture(params=ROADS)
def road(request, monkeypatch):
    """The road that LoTA.ternary takes: "dense" computes every weight, "sparse" only those that can step."""
    monkeypatch.setattr(ternary, "SPARSE_SHARE", ROADS[request.param])
    return request.param


def make_packed(weight_int, zeros, scales, g_idx, bits):
    """A PackedLayer of unpacked integers [in, out] and zero points [groups, out], packed by the oracle."""
    return PackedLayer(oracle.pack_columns(weight_int, bits), oracle.pack_columns(zeros.t(), bits).t().contiguous(),
                       scales, g_idx, bits, "gptq_v2")


def merged(*arguments):
    """merge() with its integers unpacked: (W_int' [in, out], mu)."""
    layer, mu = merge(*arguments)
    return layer.weight_int, mu


@dataclass
class Case:
    """One layer and its adapter, unpacked, as the oracle takes them."""
    A: torch.Tensor
    B: torch.Tensor
    weight_int: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    bits: int
    omega: float
    kappa: float | None

    def packed(self):
        return make_packed(self.weight_int, self.zeros, self.scales, self.g_idx, self.bits)

    def threshold(self):
        return Threshold(self.omega, self.kappa)

    def arguments(self):
        """What the functions of LoTA.ternary take: A, B, the packed layer and the threshold."""
        return self.A, self.B, self.packed(), self.threshold()

    def layer(self):
        """What the functions of the oracle take after A and B."""
        return self.weight_int, self.scales, self.zeros, self.g_idx, self.bits, self.omega, self.kappa

    def scales_of_rows(self):
        return self.scales.double()[self.g_idx.long()]

    def blocked(self):
        """(blocked at the grid's top, blocked at 0), bool [in, out]: the steps that would leave the grid."""
        delta_w = oracle.delta_w(self.A, self.B)
        return ((delta_w > self.omega) & (self.weight_int == 2**self.bits - 1),
                (delta_w < -self.omega) & (self.weight_int == 0))


@cache
def make_case(bits=4, layout="even", kappa=2.0, omega=2.0, seed=0):
    """A random layer. A third of its weights lie at the grid's ends, so that both ends block steps."""
    generator = torch.Generator().manual_seed(seed + 100 * bits)
    sizes, shuffled = LAYOUTS[layout]
    g_idx = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).int()
    if shuffled:
        g_idx = g_idx[torch.randperm(len(g_idx), generator=generator)]
    maxq, shape = 2**bits - 1, (len(g_idx), COLS)
    weight_int = torch.randint(0, maxq + 1, shape, generator=generator)
    where = torch.rand(shape, generator=generator)
    weight_int = weight_int.where(where > 1 / 6, 0).where(where < 5 / 6, maxq).to(torch.uint8)
    A = torch.randint(-1, 2, (len(g_idx), RANK), generator=generator).float()
    B = torch.randint(-1, 2, (RANK, COLS), generator=generator).float()
    scales = (torch.rand(len(sizes), COLS, generator=generator) * 0.02 + 0.002).half()
    zeros = torch.randint(0, maxq + 1, (len(sizes), COLS), generator=generator).to(torch.uint8)
    case = Case(A, B, weight_int, scales, zeros, g_idx, bits, omega, kappa)
    assert all(blocked.any() for blocked in case.blocked())
    step = oracle.ternary_step(oracle.delta_w(A, B), weight_int, omega, bits)
    assert (step == 1).any() and (step == -1).any()
    return case


some_cases = pytest.mark.parametrize("bits, layout, kappa", [
    (2, "shuffled short last", 2.0), (3, "even", 1.0), (4, "short last", 2.0), (4, "uneven shuffled", 1.0),
    (8, "shuffled", None), (2, "uneven", 2.0)])


def within(got, want, bound):
    """Every entry of `got` is finite and no further from `want` than `bound`."""
    assert got.shape == want.shape
    error = (got.double() - want).abs()
    assert bool((error <= bound).all()), f"largest error {error.max():.3g}, largest bound {bound.max():.3g}"


def weight_bound(case, dtype):
    """(W in float64, its rounding error): exact in float32, then rounded to float16, the scales' dtype, and `dtype`.

    s has 11 bits and W_int - z + W^ has at most 9.
    """
    exact = oracle.adapted_weight(case.A, case.B, *case.layer()[:-1], None)         # the oracle's W' without mu is W
    rounding = 0 if dtype == torch.float32 else UNIT[torch.float16] + UNIT[dtype]
    return exact, rounding * exact.abs() * 1.01


def gradients_of(case, x, grad, weight=None):
    """The gradients of A, B, mu and scale_change, by layer_gradients()."""
    return layer_gradients(x, grad, *case.arguments(), ternary, weight=weight, offset=merge(*case.arguments())[1])


# --- worked by hand -----------------------------------------------------------------------------------------------

def test_one_weight_by_hand():
    """Numbers worked by hand from the equations, for the code and the oracle alike.

    2 bits, omega = kappa = 2, one group of four rows, one column, s = 0.5, z = 1.
    Eq. 3: dW = 3, 3, -3, 2 on W_int = 1, 3, 2, 0. The first goes up. The second is at the grid's top and stays. The
    third goes down. The fourth is at omega and stays.
    Eq. 4: the offset matrix is 1, 3, -1, 2, its mean is 1.25, so mu = 0.625. W = 0.5 * (W_int' - 1), and W' has
    0.5 * 0.625 = 0.3125 more.
    """
    A = torch.tensor([[1, 1, 1], [1, 1, 1], [-1, -1, -1], [1, 1, 0]]).float()
    case = Case(A, torch.ones(3, 1), torch.tensor([[1], [3], [2], [0]], dtype=torch.uint8),
                torch.tensor([[0.5]]), torch.tensor([[1]]), torch.zeros(4, dtype=torch.int32), 2, 2.0, 2.0)
    integers, mu = merged(*case.arguments())
    assert integers.flatten().tolist() == [2, 3, 1, 0] and mu.flatten().tolist() == [0.625]
    by_hand = torch.tensor([[0.8125], [1.3125], [0.3125], [-0.1875]])
    weight, offset = adapted_weight(*case.arguments())
    assert torch.equal(weight, by_hand - 0.3125) and torch.equal(offset, mu)
    assert torch.equal(dequantize(merge(*case.arguments())[0], mu), by_hand)
    assert torch.equal(oracle.adapted_weight(case.A, case.B, *case.layer()).float(), by_hand)
    # x = 1, 0, 0, 2 and dL/dy = 1: H = s x = 0.5, 0, 0, 1. Its sum 1.5 over kappa n = 8 adds 0.1875 to every row.
    grad_A, grad_B, *_ = gradients_of(case, torch.tensor([[1.0, 0, 0, 2]]), torch.ones(1, 1))
    assert torch.equal(grad_A, torch.tensor([[0.6875], [0.1875], [0.1875], [1.1875]]).expand(4, 3))
    assert grad_B.flatten().tolist() == [1.875, 1.875, 0.6875]


# --- the parts ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ternarize(dtype):
    """In place: the oracle's values, all three of them, in the dtype of the weight."""
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    if dtype == torch.bfloat16:     # the threshold is rounded to bfloat16, so no value may lie near it
        delta = 0.75 * weight.double().abs().mean()
        weight[(weight.abs().double() / delta - 1).abs() < 0.02] = 0
    want = oracle.ternarized(weight)
    result = ternarize_(weight)
    assert result is weight and weight.dtype == dtype
    assert torch.equal(weight.float(), want) and set(weight.unique().tolist()) == {-1.0, 0.0, 1.0}


def test_ternarize_is_strict():
    """Entries equal to the threshold become 0. By hand: mean|w| = 2, so delta = 1.5."""
    assert ternarize_(torch.tensor([1.5, -1.5, 2.0, -3.0])).tolist() == [0, 0, 1, -1]


def test_the_range_of_the_threshold():
    """omega lies in the open interval (0, r). Rank times rows of a group goes up to 2**24. The error says which."""
    for rank, omega, largest in ((8, 0.01, 16), (8, 7.99, 16), (64, 48.0, 2**18)):
        Threshold(omega, None).check(rank, largest)
    for omega in (0, -1.0, 8, 9.5, float("nan")):
        with pytest.raises(ValueError, match="interval_point"):
            Threshold(omega, None).check(8, 16)
    with pytest.raises(ValueError, match="rank 64"):
        Threshold(48.0, None).check(64, 2**18 + 1)


@pytest.mark.parametrize("layout, block_entries", pairwise(layout=LAYOUTS, block_entries=(1, 2 * 16 * COLS, 1 << 18)))
def test_groups(layout, block_entries, monkeypatch):
    """Sizes, sums and blocks. A block is whole groups of one size within BLOCK_ENTRIES, and every row comes once."""
    monkeypatch.setitem(packed.BLOCK_ENTRIES, "cpu", block_entries)
    sizes, shuffled = LAYOUTS[layout]
    g_idx = make_case(layout=layout).g_idx
    groups = Groups(g_idx, len(sizes))
    assert groups.count == len(sizes) and groups.sizes.tolist() == sizes and groups.largest == max(sizes)
    assert (groups.order is not None) == shuffled
    assert groups.starts.tolist() == [sum(sizes[:g]) for g in range(len(sizes) + 1)]

    x = torch.randint(-9, 10, (len(g_idx), 5), generator=torch.Generator().manual_seed(1))
    sums = torch.stack([x[g_idx == g].sum(0) for g in range(len(sizes))])
    assert torch.equal(groups.sum(x), sums) and torch.equal(groups.sum(x.float()), sums.float())
    assert torch.equal(groups.sum_columns(x.t().float()), sums.t().float())

    seen, expected_first, blocks = [], 0, list(groups.blocks(COLS))
    for rows, first, last, size in blocks:
        assert first == expected_first < last
        expected_first = last
        indices = torch.arange(len(g_idx))[rows]
        assert sizes[first:last] == [size] * (last - first)
        assert g_idx[indices].tolist() == [g for g in range(first, last) for _ in range(size)]
        assert last - first == 1 or len(indices) * COLS <= block_entries
        seen += indices.tolist()
    assert expected_first == len(sizes) and sorted(seen) == list(range(len(g_idx)))
    if block_entries == 1:
        assert len(blocks) == len(sizes)
    if layout == "even":
        assert len(blocks) == {1: 4, 2 * 16 * COLS: 2, 1 << 18: 1}[block_entries]


@pytest.mark.parametrize("g_idx, count", [([0, 0, 2, 2], 3), ([0, 1, 2], 2), ([0, 0, 1], 3)])
def test_groups_refuses_what_the_scales_do_not_have(g_idx, count):
    """A group without rows is an error, and so are rows without a group. Neither divides by zero later."""
    with pytest.raises(ValueError, match="g_idx"):
        Groups(torch.tensor(g_idx), count)


def test_groups_to_returns_itself():
    """to() moves in place and returns the same object, whose indices stay."""
    groups = Groups(make_case(layout="shuffled").g_idx, 4)
    order = groups.order.clone()
    assert groups.to("cpu") is groups and torch.equal(groups.order, order)


@pytest.mark.parametrize("omega, dtype", pairwise(
    omega=(0.5, 2.0, 2.25, 6.0), dtype=(torch.float32, torch.bfloat16, torch.float64)))
def test_ternary_step(omega, dtype):
    """Every integer from -r to r, away from the grid's ends: the oracle's step, in float32. It is 0 at |dW| = omega."""
    delta_w = torch.arange(-RANK, RANK + 1).to(dtype)[:, None]
    step = ternary_step(delta_w.clone(), omega)
    assert step.dtype == torch.float32
    assert torch.equal(step.double(), oracle.ternary_step(delta_w, torch.ones_like(delta_w), omega, 2))
    if omega == int(omega):
        assert not step[delta_w.abs() == omega].any() and bool(step[delta_w.abs() == omega + 1].all())


@pytest.mark.parametrize("omega, kappa", pairwise(omega=(2.25, 5.6), kappa=(1.0, 2.25, 5.6)))
def test_offset_factor(omega, kappa):
    """(sum dW - omega sum W^) / (kappa n) to float32 rounding, with groups of unequal size."""
    generator = torch.Generator().manual_seed(2)
    delta_w_sum = torch.randint(-900, 900, (3, 7), generator=generator)
    step_sum = torch.randint(-16, 17, (3, 7), generator=generator)
    sizes = torch.tensor([16, 16, 5])
    got = Threshold(omega, kappa).offset(delta_w_sum.float(), step_sum.float(), sizes)
    want = (delta_w_sum.double() - omega * step_sum.double()) / (kappa * sizes[:, None])
    size_of_terms = (delta_w_sum.abs() + omega * step_sum.abs()) / (kappa * sizes[:, None])
    within(got, want, 4 * UNIT[torch.float32] * size_of_terms)


# --- merging and the adapted weight -------------------------------------------------------------------------------

@pytest.mark.parametrize("bits, layout, kappa, road", pairwise(
    bits=SUPPORTED_BITS, layout=LAYOUTS, kappa=KAPPAS, road=ROADS, also=[(3, *pair, "dense") for pair in UNEQUAL]),
                         indirect=["road"])
def test_merge(bits, layout, kappa, road):
    """The integers equal the oracle's. mu is the oracle's to a few ulps, because its numerator is exact.

    The layer that was merged into keeps its integers.
    """
    case = make_case(bits, layout, kappa)
    layer = case.packed()
    before = layer.qweight.clone()
    integers, mu = merged(case.A, case.B, layer, case.threshold())
    want_integers, want_mu = oracle.merge(case.A, case.B, case.weight_int, case.scales, case.g_idx, bits, case.omega,
                                          kappa)
    assert integers.dtype == torch.uint8 and torch.equal(integers.long(), want_integers)
    assert integers.max() <= 2**bits - 1 and torch.equal(layer.qweight, before)
    moved, counted_mu = count_steps(case.A, case.B, layer, case.threshold())
    assert moved == (want_integers != case.weight_int).sum() > 0 and torch.equal(layer.qweight, before)
    if kappa is None:
        assert mu is counted_mu is None
    else:
        assert mu.dtype == torch.float32 and bool(want_mu.any())
        within(mu, want_mu, 4 * UNIT[torch.float32] * want_mu.abs())
        assert torch.equal(counted_mu, mu)


@pytest.mark.parametrize("bits, layout, kappa, dtype, road", pairwise(
    bits=SUPPORTED_BITS, layout=LAYOUTS, kappa=KAPPAS, dtype=UNIT, road=ROADS,
    also=[(3, *pair, torch.bfloat16, "dense") for pair in UNEQUAL]), indirect=["road"])
def test_adapted_weight(bits, layout, kappa, dtype, road):
    """W is the oracle's, exactly in float32 and to the roundings of 16 bits. mu is the merge's."""
    case = make_case(bits, layout, kappa)
    got, mu = adapted_weight(*case.arguments(), dtype)
    assert got.dtype == dtype
    within(got, *weight_bound(case, dtype))
    assert mu is None if kappa is None else torch.equal(mu, merge(*case.arguments())[1])


@pytest.mark.parametrize("omega", [1.7, 3.0, 5.6])
def test_other_thresholds(omega, road):
    """float32 cannot hold 1.7 and 5.6, and only large |dW| pass 5.6: the integers and W are still the oracle's."""
    case = replace(make_case(4, "shuffled short last", omega, 2.0, seed=5), omega=omega)
    integers, _ = merged(*case.arguments())
    assert torch.equal(integers.long(), oracle.merge(case.A, case.B, case.weight_int, case.scales, case.g_idx,
                                                     case.bits, omega, omega)[0])
    assert not torch.equal(integers, case.weight_int)
    within(adapted_weight(*case.arguments())[0], *weight_bound(case, torch.float32))


@pytest.mark.parametrize("bits, layout, kappa, dtype, road", pairwise(
    bits=SUPPORTED_BITS, layout=LAYOUTS, kappa=KAPPAS, dtype=UNIT, road=ROADS), indirect=["road"])
def test_merging_is_lossless(bits, layout, kappa, dtype, road):
    """The layer's output is the merged layer's bit for bit, and not the output of the layer before.

    The merged layer multiplies as GPTQModel's kernel does, in the dtype of the scales, and LTA adds the offset.
    """
    case = make_case(bits, layout, kappa)
    after, mu = merge(*case.arguments())
    x = torch.randn(5, len(case.g_idx), generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(COLS, generator=torch.Generator().manual_seed(3)).to(dtype)

    def as_merged(layer):
        scales = case.scales if dtype != torch.float32 else case.scales.float()
        rows, integers = case.g_idx.long(), layer.weight_int.int() - layer.zeros.int()[case.g_idx.long()]
        out = torch.matmul(x, (scales[rows] * integers).to(dtype))
        out.add_(bias)
        if mu is not None:
            adapter = LTA()
            adapter.set_offset(mu, case.scales, case.g_idx)
            adapter.apply(x=x, out=out)
        return out

    live = GridLinear.apply(x, case.A, case.B, case.packed, case.threshold(), ternary, None, None, bias)
    assert torch.equal(live, as_merged(after)) and not torch.equal(live, as_merged(case.packed()))


@some_cases
def test_is_merge(bits, layout, kappa, road):
    """It knows a merge by every bit: not one integer may be off by one, and no entry of mu by an ulp."""
    case = make_case(bits, layout, kappa)
    after, mu = merge(*case.arguments())

    def accepts(layer, offset):
        return is_merge(case.A, case.B, case.packed(), layer, offset, case.threshold())

    assert accepts(after, mu) and not accepts(case.packed(), mu)
    for row, col in ((0, 0), (-1, -1)):
        integers = after.weight_int.clone()
        integers[row, col] += 1 if integers[row, col] == 0 else -1
        qweight = pack_rows(integers, bits)[:after.qweight.shape[0]]
        assert not accepts(after.with_integers(qweight), mu)
    if mu is None:
        assert not accepts(after, torch.zeros(case.scales.shape))
    else:
        other = mu.clone()
        other[-1, -1] = torch.nextafter(other[-1, -1], torch.tensor(torch.inf))
        assert not accepts(after, other) and not accepts(after, None)


@pytest.mark.parametrize("bits, layout, kappa, dtype, road", pairwise(
    bits=SUPPORTED_BITS, layout=LAYOUTS, kappa=KAPPAS, dtype=UNIT, road=ROADS), indirect=["road"])
def test_no_adapter_is_the_quantized_layer(bits, layout, kappa, dtype, road):
    """With B = 0 the weight and the output are exactly those of s (W_int - z), rounded to float16 in 16 bits.

    s has 11 bits and W_int - z has at most 9, so the product is exact in float32 and there is one right answer.
    """
    case = make_case(bits, layout, kappa)
    rows = case.g_idx.long()
    exact = case.scales_of_rows() * (case.weight_int.double() - case.zeros.double()[rows])
    quantized = exact.to(dtype) if dtype == torch.float32 else exact.half().to(dtype)
    B = torch.zeros_like(case.B)
    assert torch.equal(adapted_weight(case.A, B, case.packed(), case.threshold(), dtype)[0], quantized)
    assert torch.equal(dequantize(case.packed(), None, dtype), exact.to(dtype))
    x = torch.randn(3, len(rows), generator=torch.Generator().manual_seed(3)).to(dtype)
    assert torch.equal(GridLinear.apply(x, case.A, B, case.packed, case.threshold()), x @ quantized)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_both_ends_of_the_grid_block(bits, road):
    """A weight stays where its step would leave the grid, and mu takes all of its dW. Each end blocks several."""
    case = make_case(bits, "even", 2.0)
    delta_w, maxq = oracle.delta_w(case.A, case.B), 2**bits - 1
    integers, mu = merged(*case.arguments())
    top, bottom = case.blocked()
    assert int(top.sum()) > 5 and int(bottom.sum()) > 5
    assert bool((integers[top] == maxq).all()) and bool((integers[bottom] == 0).all())
    free = (delta_w.abs() > 2) & ~top & ~bottom
    assert torch.equal(integers.int() - case.weight_int.int(), (delta_w.sign() * free).int())
    kept = torch.where(free, delta_w - 2 * delta_w.sign(), delta_w)
    assert torch.equal(mu.double(), kept.view(4, 16, COLS).mean(1) / 2)      # sixteenths: exact in float32


@pytest.mark.parametrize("omega", [1.0, 2.0, 3.0])
def test_the_threshold_is_strict(omega, road):
    """Where |dW| is omega exactly nothing moves. A threshold just below omega would move these weights."""
    case = replace(make_case(4, "shuffled", None), omega=omega)
    ties = (oracle.delta_w(case.A, case.B).abs() == omega) & (case.weight_int > 0) & (case.weight_int < 15)
    assert int(ties.sum()) > 10
    moved = merged(*case.arguments())[0] != case.weight_int
    assert not moved[ties].any() and bool(moved.any())
    moved = merged(case.A, case.B, case.packed(), Threshold(omega - 0.01, None))[0] != case.weight_int
    assert bool(moved[ties].all())


@pytest.mark.parametrize("layout, block_entries, road", pairwise(
    layout=LAYOUTS, block_entries=(1, 2 * 16 * COLS), road=ROADS), indirect=["road"])
def test_blocks_change_no_bit(layout, block_entries, road, monkeypatch):
    """However the rows are cut, weights, integers and mu are the same bits, and gradients agree to float32 rounding."""
    case = make_case(3, layout, 2.0)
    generator = torch.Generator().manual_seed(4)
    x, grad = torch.randn(5, len(case.g_idx), generator=generator), torch.randn(5, COLS, generator=generator)

    def results():
        after, mu = merge(*case.arguments())
        weight, offset = adapted_weight(*case.arguments())
        return (weight, after.qweight, mu, offset, dequantize(after, mu)), gradients_of(case, x, grad, weight)

    whole, whole_gradients = results()
    monkeypatch.setitem(packed.BLOCK_ENTRIES, "cpu", block_entries)
    if len(LAYOUTS[layout][0]) > 1:
        assert len(list(case.packed().groups.blocks(COLS))) > 1
    cut, cut_gradients = results()
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    for a, b in zip(whole_gradients, cut_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


# --- forward and backward -----------------------------------------------------------------------------------------

def gradient_bounds(case, x, grad, unit):
    """(for A, for B): `unit` times the sum of the absolute values of all that is added up."""
    size_H = case.scales_of_rows() * (x.double().abs().t() @ grad.double().abs())
    size = size_H
    if case.kappa is not None:
        size = size + oracle.group_means(size_H, case.g_idx, case.scales.shape[0])[case.g_idx.long()] / case.kappa
    return unit * size @ case.B.double().abs().t(), unit * case.A.double().abs().t() @ size


@pytest.mark.parametrize("bits, layout, kappa, dtype, leading, road", pairwise(
    bits=SUPPORTED_BITS, layout=LAYOUTS, kappa=KAPPAS, dtype=(torch.float32, torch.bfloat16), leading=((5,), (2, 3)),
    road=ROADS, also=[(3, *pair, torch.float32, (5,), "dense") for pair in UNEQUAL]), indirect=["road"])
def test_forward_and_gradients(bits, layout, kappa, dtype, leading, road, monkeypatch):
    """y and the gradients of x [*leading, in], A and B, in blocks of at most two groups.

    The oracle takes them by float64 autograd through the straight-through form.
    """
    monkeypatch.setitem(packed.BLOCK_ENTRIES, "cpu", 2 * 16 * COLS)
    case = make_case(bits, layout, kappa)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(*leading, len(case.g_idx), generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(*leading, COLS, generator=generator).to(dtype)
    A, B = case.A.clone().requires_grad_(), case.B.clone().requires_grad_()
    y = GridLinear.apply(x, A, B, case.packed, case.threshold())
    y.backward(grad)

    flat_x, flat_grad = x.detach().flatten(0, -2), grad.flatten(0, -2)
    want_y, want_x, want_A, want_B = oracle.forward_and_gradients(flat_x, flat_grad, case.A, case.B, *case.layer())
    exact, rounding = weight_bound(case, dtype)
    sums = 2 * UNIT[torch.float32] * len(case.g_idx)            # adding up, in any order
    offsets = oracle.adapted_weight(case.A, case.B, *case.layer()) - exact          # s * mu of every weight
    # s * mu, the group sums, their product and the sum of both products are rounded to `dtype`.
    rounding = rounding + 4 * UNIT[dtype] * offsets.abs() + sums * (exact.abs() + offsets.abs())
    for got, want, factor, weights in ((y, want_y, flat_x.double(), (exact, offsets, rounding)),
                                       (x.grad, want_x, flat_grad.double(), (exact.t(), offsets.t(), rounding.t()))):
        roundings = (factor @ weights[0]).abs() + 2 * (factor @ weights[1]).abs() + want.abs()
        within(got.flatten(0, -2), want, factor.abs() @ weights[2] + UNIT[dtype] * roundings * 1.1)
    assert y.dtype == x.grad.dtype == dtype and y.shape == grad.shape and x.grad.shape == x.shape
    assert A.grad.dtype == B.grad.dtype == torch.float32
    bound_A, bound_B = gradient_bounds(case, flat_x, flat_grad, UNIT[dtype] * 1.1 + sums)
    within(A.grad, want_A, bound_A)
    within(B.grad, want_B, bound_B)


@some_cases
def test_gradients_do_not_stop_at_the_grids_ends(bits, layout, kappa):
    """The step is straight-through everywhere: x and dL/dy touch one blocked weight only, and its gradient is not 0."""
    case = make_case(bits, layout, kappa)
    top, bottom = case.blocked()
    i, j = (top | bottom).nonzero()[0].tolist()
    x, grad = torch.zeros(1, len(case.g_idx)), torch.zeros(1, COLS)
    x[0, i], grad[0, j] = 1.0, 1.0
    grad_A, *_ = gradients_of(case, x, grad)
    group = int(case.g_idx[i])
    per_row = 0 if kappa is None else 1 / (kappa * int((case.g_idx == group).sum()))
    want = float(case.scales[group, j]) * (1 + per_row) * case.B[:, j]
    assert bool(want.any())
    torch.testing.assert_close(grad_A[i], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_in_bfloat16(dtype):
    """bfloat16 holds -1, 0, 1 exactly: the output is the same, and gradients are those in float32, rounded once."""
    case = make_case(4, "shuffled short last", 2.0)
    x = torch.randn(5, len(case.g_idx), generator=torch.Generator().manual_seed(7)).to(dtype)
    results = []
    for adapter_dtype in (torch.float32, torch.bfloat16):
        A, B = (t.detach().to(adapter_dtype, copy=True).requires_grad_() for t in (case.A, case.B))
        y = GridLinear.apply(x, A, B, case.packed, case.threshold())
        y.float().square().sum().backward()
        assert A.grad.dtype == B.grad.dtype == adapter_dtype
        results.append((y, A.grad.bfloat16(), B.grad.bfloat16()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_adapters_in_bfloat16_are_exact_at_any_rank(road):
    """|dW| = 299 and 301 around omega = 300, though bfloat16 itself stops counting by one at 256."""
    A, B = torch.ones(2, 301).bfloat16(), torch.ones(301, 1).bfloat16()
    A[1, :2] = 0
    layer = make_packed(torch.tensor([[1], [1]]), torch.zeros(1, 1).int(), torch.ones(1, 1), torch.zeros(2).int(), 4)
    assert merged(A, B, layer, Threshold(300.0, None))[0].flatten().tolist() == [2, 1]
    assert merged(A, B, layer, Threshold(298.0, None))[0].flatten().tolist() == [2, 2]


@pytest.mark.parametrize("needed", ["x", "A", "B"])
def test_only_the_gradients_asked_for(needed):
    """A gradient that is asked for alone is the same bits as with the others, and the others stay None."""
    case = make_case(4, "short last", 2.0)
    x = torch.randn(5, len(case.g_idx), generator=torch.Generator().manual_seed(8))

    def gradients(names):
        leaves = {"x": x.clone(), "A": case.A.clone(), "B": case.B.clone()}
        for name in names:
            leaves[name].requires_grad_()
        GridLinear.apply(*leaves.values(), case.packed, case.threshold()).square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    alone, together = gradients([needed]), gradients(["x", "A", "B"])
    assert {name for name, g in alone.items() if g is not None} == {needed}
    assert torch.equal(alone[needed], together[needed])


def test_nothing_of_the_weights_size_is_kept():
    """Only x and the adapters are saved for the backward. The packed layer is loaded anew there."""
    case = make_case(4, "even", 2.0)
    loads = []

    def load_packed():
        loads.append(1)
        return case.packed()

    x, A, B = (t.clone().requires_grad_() for t in (torch.randn(2, len(case.g_idx)), case.A, case.B))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = GridLinear.apply(x, A, B, load_packed, case.threshold())
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, A, B)} and len(saved) == 3
    assert max(t.numel() for t in saved) < len(case.g_idx) * COLS
    kept = vars(y.grad_fn).values()
    assert load_packed in kept and not any(isinstance(value, torch.Tensor | PackedLayer) for value in kept)
    assert len(loads) == 1
    y.sum().backward()
    assert len(loads) == 2


def test_sums_of_a_large_group_are_exact(road):
    """One group of 70,000 8-bit weights near the grid's top: mu, whose numerator must be exact, is the oracle's.

    The sum of W_int passes 2**24, where float32 stops counting by one.
    """
    rows = 70_000
    Threshold(1.0, None).check(3, rows)
    generator = torch.Generator().manual_seed(9)
    A = torch.randint(-1, 2, (rows, 3), generator=generator).float()
    weight_int = torch.randint(250, 256, (rows, 2), generator=generator).to(torch.uint8)
    B = torch.tensor([[1.0, -1], [1, -1], [1, 0]])
    layer = make_packed(weight_int, torch.zeros(1, 2).int(), torch.ones(1, 2), torch.zeros(rows).int(), 8)
    _, mu = merge(A, B, layer, Threshold(1.0, 1.0))
    delta_w = oracle.delta_w(A, B)
    step = oracle.ternary_step(delta_w, weight_int, 1.0, 8)
    assert weight_int.long().sum(0).min() > 2**24
    want = (delta_w - step).mean(0, keepdim=True)
    within(mu, want, 4 * UNIT[torch.float32] * want.abs())


def test_product_dtype(monkeypatch):
    """bfloat16, which counts up to 256, multiplies up to that rank where the hardware has it. Else float32 does."""
    for device, capabilities, fast in (("cuda", {}, True), ("cpu", {}, False), ("cpu", {"avx512_bf16": True}, True),
                                       ("cpu", {"amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        for rank, want in ((256, torch.bfloat16 if fast else torch.float32), (257, torch.float32)):
            assert product_dtype(rank, torch.device(device)) == want


@pytest.mark.parametrize("rank", [256, 257, 600])
def test_products_at_the_edge_of_bfloat16(rank, road):
    """|dW| = r and r - 1 on both sides of omega: exact up to r = 256, where bfloat16 may multiply, and beyond."""
    A = torch.ones(16, rank)
    A[1, 0] = A[3, 0] = 0                       # dW = r - 1
    A[2:4] *= -1
    layer = make_packed(torch.ones(16, 4).int(), torch.zeros(1, 4).int(), torch.ones(1, 4), torch.zeros(16).int(), 2)
    for omega, first in ((rank - 1.0, [2, 1, 0, 1]), (rank - 0.25, [2, 1, 0, 1]), (rank - 1.25, [2, 2, 0, 0])):
        integers, _ = merged(A, torch.ones(rank, 4), layer, Threshold(omega, None))
        assert integers[:, 0].tolist() == first + [2] * 12


# --- a learned offset and learned scales --------------------------------------------------------------------------

@pytest.mark.parametrize("bits, layout, road", pairwise(bits=SUPPORTED_BITS, layout=LAYOUTS, road=ROADS),
                         indirect=["road"])
def test_a_learned_offset_and_learned_scales(bits, layout, road):
    """mu and scale_change as parameters: y and all five gradients are those of float64 autograd.

    The rounding of the scales to float16 is straight-through.
    """
    case = make_case(bits, layout, None)
    generator = torch.Generator().manual_seed(10)
    mu = torch.randn(case.scales.shape, generator=generator)
    change = 0.3 * torch.randn(case.scales.shape, generator=generator)
    change[0, 0] = -1                           # a scale of 0 becomes float16's smallest number
    x, grad = (torch.randn(5, n, generator=generator) for n in (len(case.g_idx), COLS))
    leaves = [t.clone().requires_grad_() for t in (x, case.A, case.B, mu, change)]
    y = GridLinear.apply(*leaves[:3], lambda: case.packed().rescaled(change), case.threshold(), ternary, *leaves[3:])
    y.backward(grad)

    wide = [t.double().requires_grad_() for t in (x, case.A, case.B, mu, change)]
    delta_w = wide[1] @ wide[2]
    step = oracle.ternary_step(delta_w.detach(), case.weight_int, case.omega, bits)
    scales = case.scales.double() * (1 + wide[4])
    rounded = (case.scales.float() * (1 + change)).half().double()
    assert rounded[0, 0] == 0
    rounded[0, 0] = 2**-24
    assert torch.equal(case.packed().rescaled(change).scales.double(), rounded)
    want = wide[0] @ oracle.weight(case.weight_int, delta_w + (step - delta_w).detach(), wide[3],
                                   scales + (rounded - scales).detach(), case.zeros, case.g_idx)
    want.backward(grad.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for leaf, other in zip(leaves, wide, strict=True):
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-5, atol=1e-5 * float(other.grad.abs().max()))
