"""LoTA.kernels against the float64 oracle and LoTA.ternary: on a GPU, or else under Triton's interpreter (conftest)."""
import json
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from pairs import pairwise

from LoTA import SUPPORTED_BITS, kernels, ternary
from LoTA.packed import PackedLayer
from LoTA.steps import Threshold
from LoTA.ternary import GridLinear, layer_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {                     # (rows of each group, whether their order is shuffled, as desc_act leaves it)
    "even": ([32] * 3, False),
    "short last": ([32, 32, 7], False),
    "shuffled": ([32, 32, 19], True),
    "uneven": ([5, 33, 9], False),
    "in pieces": ([300, 40], False),            # groups of more than kernels.MAX_ROWS rows
    "in pieces shuffled": ([300, 150], True),
}
OMEGA = 2.0
KAPPAS = (OMEGA, 1.0, None)
FORMATS = ("gptq", "gptq_v2")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}    # of y and gradients, of their maximum


class Case:
    """A random layer on DEVICE with a third of its weights at the grid's ends, and an adapter."""

    def __init__(self, bits, layout="even", checkpoint_format="gptq", rank=8, cols=70, seed=0):
        generator = torch.Generator().manual_seed(seed + bits)
        sizes, shuffled = LAYOUTS[layout]
        self.bits, rows, groups, maxq = bits, sum(sizes), len(sizes), 2**bits - 1
        self.g_idx = torch.repeat_interleave(torch.arange(groups), torch.tensor(sizes)).int()
        if shuffled:
            self.g_idx = self.g_idx[torch.randperm(rows, generator=generator)]
        where = torch.rand(rows, cols, generator=generator)
        self.weight_int = torch.randint(0, maxq + 1, (rows, cols), generator=generator)
        self.weight_int = self.weight_int.where(where > 1 / 6, 0).where(where < 5 / 6, maxq)
        self.zeros = torch.randint(0, maxq + 1, (groups, cols), generator=generator)
        self.scales = (torch.rand(groups, cols, generator=generator) + 0.1).half()
        self.A = torch.randint(-1, 2, (rows, rank), generator=generator).float()
        self.B = torch.randint(-1, 2, (rank, cols), generator=generator).float()
        self.packed = PackedLayer(oracle.pack_columns(self.weight_int, bits).to(DEVICE),
                                  self.stored_zeros(checkpoint_format).to(DEVICE), self.scales.to(DEVICE),
                                  self.g_idx.to(DEVICE), bits, checkpoint_format)

    def stored_zeros(self, checkpoint_format):
        """qzeros [groups, words]: z for gptq_v2, and z - 1 for gptq, as the published packing stores it."""
        words = oracle.pack_columns(self.zeros.t(), self.bits).t().contiguous()
        if checkpoint_format == "gptq_v2":
            return words
        if 32 % self.bits:                      # each value is wrapped by itself
            return oracle.pack_columns((self.zeros.t() - 1) % 2**self.bits, self.bits).t().contiguous()
        ones = sum(1 << shift for shift in range(0, 32, self.bits))         # a zero point of 0 borrows from the next
        return ((words.long() - ones + 2**31) % 2**32 - 2**31).int()

    def adapter(self):
        """A and B on DEVICE as a layer hands them over: transposed views."""
        return self.A.t().contiguous().to(DEVICE).t(), self.B.t().contiguous().to(DEVICE).t()

    def arguments(self, kappa):
        """What the functions of LoTA.kernels take: A, B, the packed layer and the threshold."""
        return *self.adapter(), self.packed, Threshold(OMEGA, kappa)

    def layer(self, kappa):
        """What the functions of the oracle take after A and B."""
        return self.weight_int, self.scales, self.zeros, self.g_idx, self.bits, OMEGA, kappa


def cut_off(dtype):
    """Whether float32 is cut off to `dtype`: Triton's interpreter does that with bfloat16. A GPU rounds to nearest."""
    return DEVICE == "cpu" and dtype == torch.bfloat16


def rounding(dtype):
    """The largest relative error of rounding to `dtype`."""
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    return 2 * unit if cut_off(dtype) else unit


@pytest.mark.parametrize("bits, layout, form, kappa", pairwise(
    bits=SUPPORTED_BITS, layout=LAYOUTS, form=FORMATS, kappa=KAPPAS))
def test_the_steps_are_the_oracles(bits, layout, form, kappa):
    """As many integers move as in the oracle's merge, mu is the oracle's to an ulp, and both are LoTA.ternary's bit
    for bit."""
    case = Case(bits, layout, form)
    moved, mu = kernels.count_steps(*case.arguments(kappa))
    want, want_mu = oracle.merge(case.A, case.B, case.weight_int, case.scales, case.g_idx, bits, OMEGA, kappa)
    assert moved == (want != case.weight_int).sum() > 0
    plain_moved, plain_mu = ternary.count_steps(*case.arguments(kappa))
    assert moved == plain_moved and moved.dtype == plain_moved.dtype == torch.int64
    if kappa is None:
        assert mu is None
    else:
        torch.testing.assert_close(mu.double().cpu(), want_mu, rtol=2.0**-23, atol=0)
        assert torch.equal(mu, plain_mu)


@pytest.mark.parametrize("bits, layout, form, kappa, dtype", pairwise(
    bits=SUPPORTED_BITS, layout=LAYOUTS, form=FORMATS, kappa=KAPPAS, dtype=TOLERANCE))
def test_the_weight_is_the_oracles(bits, layout, form, kappa, dtype):
    """W and mu are the oracle's to rounding. They are LoTA.ternary's bit for bit wherever both round to nearest.

    Without mu the oracle's weight is W. In 16 bits it is rounded to the float16 of the scales first.
    """
    case = Case(bits, layout, form)
    weight, mu = kernels.adapted_weight(*case.arguments(kappa), dtype)
    want = oracle.adapted_weight(case.A, case.B, *case.layer(None))
    assert weight.dtype == dtype
    assert ((weight.double().cpu() - want).abs() <= (rounding(dtype) + 2.0**-11 * (dtype != torch.float32)) * want.abs(
        )).all()
    want_weight, want_mu = ternary.adapted_weight(*case.arguments(kappa), dtype)
    assert cut_off(dtype) or torch.equal(weight, want_weight)
    assert mu is want_mu is None if kappa is None else torch.equal(mu, want_mu)
    if kappa is not None:
        assert torch.equal(mu, kernels.count_steps(*case.arguments(kappa))[1])


@pytest.mark.parametrize("rank", [3, 16, 70, 130])
def test_any_rank(rank):
    """Ranks below, at and beyond the kernel's block of BLOCK_RANK give the oracle's integers."""
    case = Case(4, rank=rank)
    weight, _ = kernels.adapted_weight(*case.arguments(OMEGA))
    want, _ = oracle.merge(case.A, case.B, case.weight_int, case.scales, case.g_idx, 4, OMEGA, OMEGA)
    integers = weight.cpu() / case.scales.float()[case.g_idx] + case.zeros[case.g_idx]
    assert torch.equal(integers.round().long(), want)
    assert kernels.count_steps(*case.arguments(OMEGA))[0] == (want != case.weight_int).sum()


def test_the_weight_goes_where_it_is_told():
    """adapted_weight() writes into `out`."""
    case = Case(4)
    out = torch.zeros(case.packed.shape, device=DEVICE, dtype=torch.float16)
    kernels.adapted_weight(*case.arguments(OMEGA), torch.float16, out)
    assert torch.equal(out, ternary.adapted_weight(*case.arguments(OMEGA), torch.float16)[0])


@pytest.mark.parametrize("bits, layout, form, kappa, dtype", pairwise(
    bits=SUPPORTED_BITS, layout=LAYOUTS, form=FORMATS, kappa=KAPPAS, dtype=TOLERANCE))
def test_forward_and_gradients_are_the_oracles(bits, layout, form, kappa, dtype):
    """y and the gradients of x, A and B against float64 autograd through the straight-through form."""
    case = Case(bits, layout, form)
    generator = torch.Generator().manual_seed(9)
    rows, cols = case.packed.shape
    x = torch.randn(2, 5, rows, generator=generator).to(dtype)
    grad_output = torch.randn(2, 5, cols, generator=generator).to(dtype)
    on_device = x.to(DEVICE).requires_grad_()
    A, B = (m.detach().requires_grad_() for m in case.adapter())
    y = GridLinear.apply(on_device, A, B, lambda: case.packed, Threshold(OMEGA, kappa), kernels)
    y.backward(grad_output.to(DEVICE))
    want_y, want_x, want_A, want_B = oracle.forward_and_gradients(
        x.flatten(0, 1), grad_output.flatten(0, 1), case.A, case.B, *case.layer(kappa))
    for got, want in ((y.flatten(0, 1), want_y), (on_device.grad.flatten(0, 1), want_x), (A.grad, want_A),
                      (B.grad, want_B)):
        assert (got.detach().double().cpu() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_learned_offset_and_learned_scales(layout):
    """With both as parameters W is LoTA.ternary's bit for bit, and all gradients are, to rounding."""
    case, threshold = Case(4, layout), Threshold(OMEGA, None)
    generator = torch.Generator().manual_seed(3)
    mu = torch.randn(case.scales.shape, generator=generator).to(DEVICE)
    layer = case.packed.rescaled(0.3 * torch.randn(case.scales.shape, generator=generator).to(DEVICE))
    weights = [m.adapted_weight(*case.adapter(), layer, threshold)[0] for m in (kernels, ternary)]
    assert torch.equal(*weights)
    x, grad = (torch.randn(6, n, generator=generator).to(DEVICE) for n in case.packed.shape)
    assert kernels.step_gradients(x, grad, *case.adapter(), layer.scales.float(), layer.groups)[2] is None
    for got, want in zip(*(layer_gradients(x, grad, *case.adapter(), layer, threshold, m, True, weights[0], mu)
                           for m in (kernels, ternary)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_the_kernels_compile_for_gpus():
    """The interpreter runs code that the compiler refuses, so the compiler has a test of its own. It needs no GPU."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env={
        **environment, "PYTHONPATH": str(script.parent.parent)})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 94 and all(row["shared_bytes"] <= 48 * 1024 for row in rows)
    assert [row for row in rows if row["spills"] or row["registers"] > 128] == []
    assert all(row["tensor_cores"] == (row["kernel"] == "_step_kernel") for row in rows)
