"""The monitor's numbers against plain torch, and how often they make the CPU wait for a GPU, without one."""
import math
from collections import Counter

import monitor as benchmark
import pytest
import torch
from memory import Shape
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from LoTA import kernels, ternary
from LoTA.monitor import SAMPLE_ROWS, Monitor, quantile, to_host
from LoTA.ternary import merge
from t_signSGD import tSignSGD

SHAPE = Shape("random", 192, 320, 2, 6, 6, 100)
OMEGA = 6.4


@pytest.fixture
def watched():
    """A function (device="cpu") -> a Monitor of a model of two blocks with random adapters."""
    def watched(device="cpu"):
        torch.manual_seed(0)
        model = benchmark.ternary_model(SHAPE, SHAPE.layers, 2, OMEGA, device)
        optimizer = tSignSGD([p for p in model.parameters() if p.requires_grad])
        return Monitor(model, optimizer, OMEGA, 10)
    return watched


def test_a_look_has_the_numbers_that_plain_torch_has(watched):
    """Every number from whole tensors: float quantiles by kthvalue, the integers by merging each layer."""
    monitor = watched()
    layers = monitor.layers.values()
    row = monitor.detailed_metrics()
    entries = torch.cat([matrix.flatten() for layer in layers for matrix in layer.adapter_pair()])
    for name, value in (("minus", -1), ("zeros", 0), ("plus", 1)):
        assert row[name] == pytest.approx(float((entries == value).double().mean()), rel=1e-12)
    magnitudes = torch.cat([(A[::max(1, len(A) // SAMPLE_ROWS)].double() @ B.double()).abs().flatten()
                            for A, B in (layer.adapter_pair() for layer in layers)]).detach()
    for name, level in (("dW_median", 0.5), ("dW_99", 0.99), ("dW_max", 1.0)):
        entry = magnitudes.kthvalue(1 + math.floor(level * (len(magnitudes) - 1))).values
        assert row[name] == float(entry) / OMEGA
    assert monitor.histogram == torch.bincount(magnitudes.long(), minlength=benchmark.RANK + 1).tolist()
    moved, total, mus = Counter(), Counter(), []
    for name, layer in monitor.layers.items():
        after, mu = merge(*layer.adapter_pair(), layer.packed(), layer.rule)
        different = int((after.weight_int != layer.packed().weight_int).sum())
        assert monitor.moved.in_layer[name] == different / after.weight_int.numel()
        moved[name.rsplit(".", 1)[-1]] += different
        total[name.rsplit(".", 1)[-1]] += after.weight_int.numel()
        mus.append(mu.abs().flatten())
    assert row["mu"] == pytest.approx(float(torch.cat(mus).double().mean()), rel=1e-6)
    assert row["moved"] == moved.total() / total.total() > 0
    assert {name: row[f"moved_{name}"] for name in moved} == {name: moved[name] / total[name] for name in moved}


@pytest.mark.parametrize("steps, looks", [(1, 1), (8, 8), (50, 11), (100, 11), (400, 41), (1000, 101), (5000, 101)])
def test_looks_of_a_run(monkeypatch, steps, looks):
    """About 100 in a long run, about 10 in one of 100 steps, and one at the last step."""
    monitor = Monitor(torch.nn.Module(), tSignSGD([torch.nn.Parameter(torch.zeros(1))]), OMEGA, steps)
    monkeypatch.setattr(monitor, "detailed_metrics", lambda: {"moved": 0.0})
    taken = [step for step in range(1, steps + 1) if "moved" in monitor.metrics(step)]
    assert len(taken) == looks and taken[-1] == steps


@pytest.mark.parametrize("counts", [[1], [0, 0, 5], [3, 0, 1, 1], [50, 30, 19, 1], [0, 1] * 30])
def test_quantiles_of_a_histogram(counts):
    values = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for level in (0.0, 0.3, 0.5, 0.99, 1.0):
        assert quantile(counts, level) == values[math.floor(level * (len(values) - 1))]


def test_what_travels_to_the_host_arrives_unchanged():
    """Counts beyond float32, floats and vectors, in their order."""
    tensors = [torch.tensor(2**40 + 1), torch.tensor(0.1), torch.tensor([3, 2**31]), torch.tensor(1.5).half(),
               torch.tensor([0.2, -7.0])]
    assert to_host(iter(tensors)) == [tensor.tolist() for tensor in tensors]
    assert to_host([]) == []


class Transfers:
    """Stands for GPUs: tensors of the fake devices cuda:0 and cuda:1 have no values, so whatever reads one raises.

    devices: where each .tolist() happened. It gives zeros. A context manager.
    """

    def __init__(self, monkeypatch):
        self.devices, self.mode = [], FakeTensorMode(allow_non_fake_inputs=True)

        def tolist(tensor):
            self.devices.append(str(tensor.device))
            return [1] * tensor.numel()
        monkeypatch.setattr(FakeTensor, "tolist", tolist)
        monkeypatch.setattr("LoTA.layer.backend_for", lambda device: kernels)
        monkeypatch.setattr(kernels, "_step_kernel", NoKernel())
        monkeypatch.setattr("torch.cuda.device_of", lambda tensor: torch.no_grad())     # there is no GPU to choose

    def move(self, monitor):
        """Moves the two blocks of a model to the two fake devices."""
        for layer_name, layer in monitor.layers.items():
            device = f"cuda:{layer_name.split('.')[1]}"
            base = layer.get_base_layer()
            copied = type(base).__new__(type(base))             # blocks share their base layers
            copied.__dict__ = {**base.__dict__, "_buffers": {}}
            for name in ("qweight", "qzeros", "scales", "g_idx"):
                setattr(copied, name, getattr(base, name).to(device))
            layer.base_layer = copied
            for matrix in (layer.lora_A, layer.lora_B):
                p = matrix["default"].weight
                fake = torch.nn.Parameter(p.detach().to(device))
                monitor.matrix_of[id(fake)] = monitor.matrix_of[id(p)]
                matrix["default"].weight = fake
                monitor.optimizer.flipped[fake] = torch.zeros((), dtype=torch.int64, device=device)


class NoKernel:
    """A Triton kernel that is never run."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the fake devices would be it")
@pytest.mark.parametrize("backend", [kernels, ternary])
def test_the_cpu_waits_for_each_gpu_once(watched, monkeypatch, backend):
    """A logging step reads the flips of both GPUs in one transfer from each, and a look reads all it counts so.

    Any other read of a value, int(count) among them, raises.
    """
    monitor = watched()
    transfers = Transfers(monkeypatch)
    monkeypatch.setattr("LoTA.layer.backend_for", lambda device: backend)
    with transfers.mode:
        transfers.move(monitor)
        with pytest.raises(Exception, match="data-dependent|DataDependent|_local_scalar_dense"):
            int(next(iter(monitor.optimizer.flipped.values())))
        monitor.next_detailed = 5
        row = monitor.metrics(1)
        assert sorted(transfers.devices) == ["cuda:0", "cuda:1"] and "moved" not in row
        assert row["flips_A"] == row["flips_B"] == len(monitor.layers)
        transfers.devices.clear()
        assert "moved" in monitor.metrics(5)
        assert sorted(transfers.devices) == ["cuda:0"] * 2 + ["cuda:1"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the fake devices would be it")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_of_the_optimizer_makes_the_cpu_wait_for_nothing(watched, monkeypatch, momentum):
    """tSignSGD with a real optimizer on two GPUs, in the last phase too. The norms go to the host without waiting."""
    monitor = watched()
    transfers = Transfers(monkeypatch)
    sent = []
    monkeypatch.setattr("t_signSGD._to_host", lambda norms: (sent.append(norms.device), (torch.zeros(1), None))[1])
    monkeypatch.setattr(tSignSGD, "raise_unless_finite", lambda self: None)
    with transfers.mode:
        transfers.move(monitor)
        parameters = list(monitor.optimizer.flipped)
        real = torch.nn.Parameter(torch.zeros(3, device="cuda:1"))
        optimizer = tSignSGD(parameters, momentum=momentum, real_optimizer=torch.optim.AdamW([real]))
        optimizer.create_scheduler(4)
        for _ in range(4):
            for p in [*parameters, real]:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert transfers.devices == [] and len(sent) == 4
        assert set(optimizer.flipped) == set(parameters)
