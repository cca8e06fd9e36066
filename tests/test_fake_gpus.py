"""The roads that only a GPU takes, walked on fake tensors: they have a device, a dtype and a shape, but no numbers.

A fake tensor raises where the CPU would have to wait for a number (.item(), int(), bool(), nonzero()), so what runs
here does not wait. An operator that mixes two devices raises too. The kernels are stood in for by a recorder, because
only Triton can launch them; test_kernels.py has their numbers.
"""
from collections import OrderedDict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

import t_signSGD
from LoTA import kernels, ternary
from LoTA.adapter import LTA
from LoTA.layer import register
from LoTA.packed import PackedLayer
from LoTA.steps import Rounding, Threshold
from LoTA.ternary import GridLinear
from t_signSGD import tSignSGD

ROWS, COLS, RANK, BITS = 96, 40, 8, 4
GPUS = ("cuda:0", "cuda:1")
LAYOUTS = {"even": torch.arange(ROWS) // 32, "shuffled": torch.arange(ROWS) % 3,
           "one group": torch.zeros(ROWS, dtype=torch.long)}


class Context:
    """Stands in for autograd, whose engine wants a real GPU."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


class Launches(list):
    """Stands in for a Triton kernel. Every launch is checked and kept as (grid, device of all its tensors)."""

    def __getitem__(self, grid):
        if isinstance(grid, int):
            return super().__getitem__(grid)

        def launch(*arguments, **constants):
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            devices = {t.device for t in tensors}
            assert len(devices) == 1 and all(isinstance(n, int) and n > 0 for n in grid), (devices, grid)
            assert all(isinstance(t, FakeTensor) for t in tensors)
            self.append(SimpleNamespace(grid=grid, device=devices.pop(), constants=constants))
        return launch


@pytest.fixture
def launches(monkeypatch):
    """The launches of both kernels."""
    step, gradient = Launches(), Launches()
    monkeypatch.setattr(kernels, "_step_kernel", step)
    monkeypatch.setattr(kernels, "_gradient_kernel", gradient)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    return SimpleNamespace(step=step, gradient=gradient)


@pytest.fixture
def fake():
    """A mode in which tensors are fake. What must know its numbers, such as Groups, is made before it is entered."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def real_layer(layout="even", scales=torch.float16):
    """A PackedLayer on the CPU with real numbers."""
    g_idx = LAYOUTS[layout]
    groups = int(g_idx.max()) + 1
    return PackedLayer(torch.zeros(ROWS * BITS // 32, COLS, dtype=torch.int32),
                       torch.zeros(groups, COLS * BITS // 32, dtype=torch.int32),
                       torch.ones(groups, COLS, dtype=scales), g_idx, BITS, "gptq")


def on(layer, mode, device):
    """The layer on a fake GPU."""
    move = {name: mode.from_tensor(getattr(layer, name)).to(device) for name in ("qweight", "qzeros", "scales")}
    groups = layer.groups
    for name in ("g_idx", "sizes", "starts", "order"):
        value = getattr(groups, name)
        setattr(groups, name, None if value is None else mode.from_tensor(value).to(device))
    return PackedLayer(*move.values(), groups.g_idx, layer.bits, layer.checkpoint_format, groups)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("backend", [kernels, ternary])
def test_forward_and_backward_of_a_layer(fake, launches, monkeypatch, layout, dtype, device, backend):
    """Both rules, published and learned: y has x's dtype, all gradients their parameter's, all on the layer's GPU."""
    real = real_layer(layout)
    for module in (ternary, kernels):           # out_dtype has no fake implementation
        monkeypatch.setattr(module, "float_product", lambda a, b: a.float() @ b.float())
    with fake:
        packed = on(real, fake, device)
        for rule, learned in ((Threshold(3.0, 3.0), False), (Threshold(3.0, None), True), (Rounding(2.0, 7), True),
                              (Rounding(2.0, mean=True), False)):
            context = Context()
            context.needs_input_grad = [True] * 3 + [False] * 3 + [learned] * 2 + [False]
            x = torch.empty(2, 5, ROWS, device=device, dtype=dtype)
            A, B = torch.empty(ROWS, RANK, device=device), torch.empty(RANK, COLS, device=device)
            mu, change = (torch.empty(packed.scales.shape, device=device) if learned else None for _ in range(2))
            y = GridLinear.forward(context, x, A, B, lambda: packed, rule, backend, mu, change,
                                   torch.empty(COLS, device=device, dtype=dtype))
            assert (y.dtype, y.shape, y.device) == (dtype, (2, 5, COLS), torch.device(device))
            gradients = GridLinear.backward(context, y)
            for leaf, grad in zip((x, A, B, mu, change), (*gradients[:3], *gradients[6:8]), strict=True):
                assert (leaf is None) == (grad is None)
                assert leaf is None or (grad.shape, grad.dtype, grad.device) == (leaf.shape, leaf.dtype, leaf.device)
    if backend is kernels:
        groups, pieces = packed.groups.count, -(-packed.groups.largest // kernels.MAX_ROWS)
        assert [launch.grid[0] for launch in (*launches.step, *launches.gradient)] == [groups * pieces] * 12
        assert {launch.device for launch in (*launches.step, *launches.gradient)} == {torch.device(device)}
        assert [launch.constants["WEIGHTED"] for launch in launches.gradient] == [False, True, True, False]
        assert [launch.constants["NOISE"] for launch in launches.step] == [False] * 4 + [True] * 2 + [False] * 2
    else:
        assert not launches.step and not launches.gradient


def test_the_recorder_sees_what_it_looks_for(fake, launches):
    """Two devices in one launch, or a number that the CPU waits for, raise."""
    with fake:
        with pytest.raises(AssertionError):
            kernels._step_kernel[1, 1](torch.empty(1, device="cuda:0"), torch.empty(1, device="cuda:1"))
        with pytest.raises(DataDependentOutputException):
            int(torch.empty(1, device="cuda:0"))


def peft_layer(mode, device):
    """A CustomLoraLinear inside PEFT, its tensors on a fake GPU."""
    module = TorchLinear(bits=BITS, group_size=32, sym=False, desc_act=False, in_features=ROWS, out_features=COLS,
                         bias=False)
    # The norm, because PEFT reads the device from a parameter. Real integers, because Groups must know them.
    model = torch.nn.Sequential(OrderedDict(proj=module, norm=torch.nn.LayerNorm(1)))
    module.g_idx.copy_(LAYOUTS["even"])
    config = register(LoraConfig(r=RANK, target_modules=["proj"]), Threshold(3.0, 3.0))
    layer = get_peft_model(model, config).base_model.model.proj
    layer.groups()
    for owner, names in ((module, ("qweight", "qzeros", "scales", "g_idx")), (layer.lora_A["default"], ("weight",)),
                         (layer.lora_B["default"], ("weight",))):
        for name in names:
            with mode:
                moved = mode.from_tensor(getattr(owner, name).detach()).to(device)
                setattr(owner, name, torch.nn.Parameter(moved) if name == "weight" else moved)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_evaluation_on_two_gpus(fake, launches, dtype):
    """Each layer computes on its own GPU, keeps W between calls, and counts its steps there."""
    layers = [peft_layer(fake, device) for device in GPUS]
    with fake, torch.no_grad():
        for layer, device in zip(layers, GPUS, strict=True):
            for _ in range(2):
                y = layer(torch.empty(3, ROWS, device=device, dtype=dtype))
                assert (y.shape, y.dtype, y.device) == ((3, COLS), dtype, torch.device(device))
            moved, mu = layer.count_steps()
            assert moved.device == mu.device == torch.device(device)
    assert [launch.device.index for launch in launches.step] == [0, 0, 1, 1]


def test_merged_evaluation_on_two_gpus(fake):
    """LTA adds the offset on the GPU of x, in the dtype of x."""
    layer = LTA()
    layer.set_offset(torch.ones(3, COLS), torch.ones(3, COLS), LAYOUTS["even"])
    with fake:
        for device in GPUS:
            out = torch.empty(2, 5, COLS, device=device, dtype=torch.bfloat16)
            got = layer.apply(x=torch.empty(2, 5, ROWS, device=device, dtype=torch.bfloat16), out=out)
            assert got is out


@pytest.mark.parametrize("momentum, learned", [(0.0, False), (0.9, True)])
def test_a_step_of_the_optimizer_on_two_gpus(fake, monkeypatch, momentum, learned):
    """It waits for no number, but hands the norms to the host once. They are judged in the next step."""
    handed = []

    monkeypatch.setattr(t_signSGD, "_to_host", lambda values: handed.append(values.device))
    monkeypatch.setattr(tSignSGD, "raise_unless_finite", lambda optimizer: None)
    with fake:
        def parameter(device, *shape):
            p = torch.nn.Parameter(torch.empty(shape, device=device))
            p.grad = torch.empty(shape, device=device)
            return p
        ternary_ones = [parameter(device, RANK, ROWS) for device in GPUS for _ in range(3)]
        real_ones = [parameter(device, 3, COLS) for device in GPUS]
        real = torch.optim.AdamW(real_ones, lr=0.1) if learned else None
        optimizer = tSignSGD(ternary_ones, momentum=momentum, real_optimizer=real)
        optimizer.create_scheduler(10)
        for _ in range(10):                     # the last phase included
            optimizer.step()
    assert handed == [torch.device(GPUS[0])] * 10 and len(optimizer.flipped) == len(ternary_ones)
    assert all(count.device == p.device for p, count in optimizer.flipped.items())


def test_a_dither_is_made_where_the_layer_is():
    """PEFT moves an adapter to the device of the layer, and would give int8 a gradient on the way. Meta shows it."""
    module = TorchLinear(bits=BITS, group_size=32, sym=False, desc_act=False, in_features=ROWS, out_features=COLS,
                         bias=False)
    module.g_idx.copy_(LAYOUTS["even"])
    module.qweight = module.qweight.to("meta")
    model = torch.nn.Sequential(OrderedDict(proj=module, norm=torch.nn.LayerNorm(1)))
    config = register(LoraConfig(r=RANK, target_modules=["proj"]), Rounding(1.0), dither="fraction")
    layer = get_peft_model(model, config).base_model.model.proj
    dither, = layer.lora_dither.values()
    assert (dither.device.type, dither.dtype, dither.shape) == ("meta", torch.int8, (ROWS, COLS))
    assert not dither.requires_grad and layer.active_rule().dither is not None and layer.rule.scaling == 8 / RANK
