"""The functions of LoTA.ternary and the optimizer on a GPU: integers are the CPU's, floats are to rounding."""
import pytest
import torch

from LoTA import SUPPORTED_BITS
from LoTA.packed import PackedLayer
from LoTA.packing import pack_rows
from LoTA.steps import Threshold
from LoTA.ternary import GridLinear, adapted_weight, dequantize, merge
from t_signSGD import tSignSGD

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_layer(bits, shuffled, rows=320, cols=256, rank=16, size=64):
    """(a function that makes the same PackedLayer on any device, A [rows, rank], B [rank, cols])."""
    generator = torch.Generator().manual_seed(bits)
    g_idx = torch.arange(rows) // size
    if shuffled:
        g_idx = g_idx[torch.randperm(rows, generator=generator)]
    groups = -(-rows // size)

    def packed(device):
        g = torch.Generator().manual_seed(bits)
        qweight = pack_rows(torch.randint(0, 2**bits, (rows, cols), generator=g), bits)
        qzeros = pack_rows(torch.randint(0, 2**bits, (cols, groups), generator=g), bits).t().contiguous()
        scales = torch.rand(groups, cols, generator=g).half()
        return PackedLayer(qweight.to(device), qzeros.to(device), scales.to(device), g_idx.to(device), bits, "gptq_v2")

    A, B = (torch.randint(-1, 2, shape, generator=generator).float() for shape in ((rows, rank), (rank, cols)))
    return packed, A, B


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_weights_and_merge_are_the_cpus(bits, shuffled):
    """The merged integers are the CPU's, mu and W' are to rounding, and the merged weight is the live one."""
    packed, A, B = random_layer(bits, shuffled)
    threshold = Threshold(4.0, 4.0)
    merged, offset = merge(A, B, packed("cpu"), threshold)
    on_gpu, offset_on_gpu = merge(A.cuda(), B.cuda(), packed("cuda"), threshold)
    assert torch.equal(on_gpu.qweight.cpu(), merged.qweight)
    torch.testing.assert_close(offset_on_gpu.cpu(), offset, rtol=1e-6, atol=0)
    want, _ = adapted_weight(A, B, packed("cpu"), threshold)
    live, live_offset = adapted_weight(A.cuda(), B.cuda(), packed("cuda"), threshold)
    torch.testing.assert_close(live.cpu(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(live, dequantize(on_gpu)) and torch.equal(live_offset, offset_on_gpu)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)])
def test_forward_and_gradients_are_the_cpus(dtype, tolerance):
    """y and the gradients of x, A and B are the CPU's, to a tolerance relative to the largest."""
    packed, A, B = random_layer(4, True)
    results = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        torch.manual_seed(0)
        x = torch.randn(70, len(A)).to(device, kind).requires_grad_()
        a, b = A.to(device).requires_grad_(), B.to(device).requires_grad_()
        layer = packed(device)
        y = GridLinear.apply(x, a, b, lambda layer=layer: layer, Threshold(4.0, 4.0))
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(device, kind))
        results.append([t.detach().float().cpu() for t in (y, x.grad, a.grad, b.grad)])
    for want, got in zip(*results, strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_the_optimizer_moves_the_same_entries():
    """After ten steps with a schedule every entry is the CPU's."""
    torch.manual_seed(0)
    start, gradients = torch.randint(-1, 2, (64, 300)).float(), torch.randn(10, 64, 300)
    ends = []
    for device in ("cpu", "cuda"):
        p = torch.nn.Parameter(start.to(device))
        optimizer = tSignSGD([p])
        optimizer.create_scheduler(10)
        for gradient in gradients:
            p.grad = gradient.to(device)
            optimizer.step()
        ends.append(p.detach().cpu())
    assert torch.equal(*ends)
