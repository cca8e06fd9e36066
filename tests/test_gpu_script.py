"""runs/gpu.sh: its stand-in for GPTQModel computes the same, and its parts run where little is installed."""
import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version

import common
import matplotlib
import plot
import pytest
import torch
from conftest import ROOT
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from pairs import pairwise

from LoTA import SUPPORTED_BITS
from LoTA.adapter import LTA, load_gptq
from LoTA.packing import pack_rows
from LoTA.storage import read_json, write_json

STAND_IN = ROOT / "benchmarks" / "stand_in"
OLD = ROOT / "tests" / "fixtures" / "old" / "gptq"         # a GPTQ model in the format gptq
# What a machine for GPU work may lack.
HIDDEN = ("gptqmodel", "optimum", "pydantic", "xxhash", "datasets", "pytest", "allpairspy", "matplotlib", "pandas",
          "lm_eval", "logbar", "tensorboard")
# Python runs sitecustomize.py at its start. Of the hidden packages Python then finds the stand-ins only.
SITECUSTOMIZE = f"""
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    if path is None and name in {HIDDEN}:
        path = [folder for folder in sys.path if "stand_in" in folder]
    return find(name, path, target)
PathFinder.find_spec = find_spec
"""


@pytest.fixture(scope="module")
def stand_in():
    """The stand-in as a module of another name, because GPTQModel is imported too."""
    spec = importlib.util.spec_from_file_location("stand_in_gptqmodel", STAND_IN / "gptqmodel" / "gptqmodel.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == spec.name]:
        del sys.modules[name]


@pytest.mark.parametrize("bits, dtype, bias, shuffled", pairwise(
    bits=SUPPORTED_BITS, dtype=(torch.float32, torch.bfloat16, torch.float16), bias=(False, True),
    shuffled=(False, True)))
def test_the_layer_is_gptqmodels(stand_in, bits, dtype, bias, shuffled):
    """Weights and outputs are equal bit for bit, in training and evaluation, with an adapter behind them."""
    rows, cols, size = 96, 64, 32
    torch.manual_seed(bits)
    g_idx = torch.arange(rows, dtype=torch.int32) // size
    scales = torch.rand(rows // size, cols).half()
    tensors = {"qweight": pack_rows(torch.randint(0, 2**bits, (rows, cols)), bits),
               "qzeros": pack_rows(torch.randint(0, 2**bits, (cols, rows // size)), bits).t().contiguous(),
               "scales": scales.float() if dtype == torch.float32 else scales,
               "g_idx": g_idx[torch.randperm(rows)] if shuffled else g_idx,
               "bias": torch.randn(cols).to(dtype) if bias else None}
    layers = []
    for kind in (TorchLinear, stand_in.TorchLinear):
        layer = kind(bits=bits, group_size=size, sym=False, desc_act=shuffled, in_features=rows, out_features=cols,
                     bias=bias)
        for name, tensor in tensors.items():
            fresh = getattr(layer, name)
            assert (fresh is None) == (tensor is None)
            if tensor is not None:
                assert (fresh.shape, fresh.is_floating_point()) == (tensor.shape, tensor.is_floating_point())
            setattr(layer, name, tensor)
        assert layer.qzero_format() == 1
        layer.qzero_format(format=2)
        layer.adapter = LTA()
        layer.adapter.set_offset(torch.randn(scales.shape, generator=torch.Generator().manual_seed(1)), scales, g_idx)
        layers.append(layer)
    x = torch.randn(2, 5, rows).to(dtype)
    for training in (True, False):
        theirs, ours = (layer.train(training) for layer in layers)
        assert torch.equal(theirs.dequantize_weight(), ours.dequantize_weight())
        assert torch.equal(theirs(x), ours(x)) and ours(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_gptqmodels(stand_in, dtype):
    """The logits of a folder in the format gptq are equal bit for bit. A folder without a tensor is refused."""
    model = stand_in.GPTQModel.load(str(OLD), dtype=dtype).model
    for module in model.modules():
        if dtype == torch.float32 and isinstance(module, stand_in.TorchLinear):
            module.scales = module.scales.float()
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_gptq(OLD, dtype, "cpu").model(ids).logits)


def test_a_folder_without_a_tensor_is_refused(stand_in, tmp_path):
    for file in OLD.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="lacks model.embed_tokens.weight"):
        stand_in.GPTQModel.load(str(tmp_path))


def run_script(*arguments, **environment):
    """runs/gpu.sh as a process. It returns the finished process."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET", "PARTS")}
    return subprocess.run(["bash", ROOT / "runs" / "gpu.sh", *arguments], capture_output=True, text=True,
                          env={**kept, "PYTHON": sys.executable, **environment})


def test_the_rehearsal_runs_where_little_is_installed(tmp_path):
    """The kernels' tests and the training run, with stand-ins for what is missing. It writes nothing."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    done = run_script("--rehearse", PYTHONPATH=str(tmp_path), OUT=str(tmp_path), PARTS="gpu_check gpu_train")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert set(re.findall(r"(\w+) is not installed", done.stdout)) == {path.name for path in STAND_IN.iterdir()}
    assert re.findall(r"^(\w+): passed, \d+ s$", done.stdout, re.MULTILINE) == ["gpu_check", "gpu_train"]
    assert re.findall(r"would write (\w+)_cpu.json", done.stdout) == ["gpu_check", "gpu_train"]
    assert [path.name for path in tmp_path.iterdir()] == ["sitecustomize.py"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    done = run_script(PARTS="none")
    assert done.returncode == 1 and "error: torch finds no GPU; --rehearse runs on a CPU" in done.stderr


def test_a_part_that_fails_is_named_and_the_next_one_runs(tmp_path):
    """A Python that cannot import the benchmarks' libraries fails in every part."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncase $1 in -u) exit 3 ;; *) exec {sys.executable} \"$@\" ;; esac\n")
    python.chmod(0o755)
    done = run_script("--rehearse", PYTHON=str(python), PARTS="optimizer generate")
    assert done.returncode == 1
    assert re.findall(r"^(\w+): FAILED", done.stdout, re.MULTILINE) == ["optimizer", "generate"]


def test_results_go_where_out_says(tmp_path, monkeypatch):
    """They name the device and GPTQModel's version."""
    monkeypatch.setenv("OUT", str(tmp_path))
    common.save("some", [{"a": 1}], quick=True)
    assert not list(tmp_path.iterdir())
    common.save("some", [{"a": 1}], quick=False)
    file, = tmp_path.iterdir()
    content = read_json(file)
    assert content["rows"] == [{"a": 1}] and content["gptqmodel"] == version("gptqmodel") and content["device"]


def test_the_stand_in_is_named(monkeypatch):
    monkeypatch.syspath_prepend(STAND_IN / "gptqmodel")
    assert common.gptqmodel_version() == "stand-in"


def test_every_device_with_results_is_drawn(tmp_path, monkeypatch):
    """The figures of the CPU and of a GPU, whose training steps are in files of their own."""
    for name, to in (("layer_cpu", "layer_cpu"), ("layer_cpu", "layer_NVIDIA_H100"),
                     ("train_step_cpu", "train_step_8B_NVIDIA_H100"), ("layer_half_cpu", "layer_half_cpu")):
        write_json(tmp_path / f"{to}.json", read_json(plot.RESULTS / f"{name}.json"))
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py"])
    with matplotlib.rc_context():
        plot.main()
    drawn = {path.stem: path.read_text() for path in tmp_path.glob("*.svg")}
    assert set(drawn) == {"performance_cpu", "performance_NVIDIA_H100"}
    assert len(drawn["performance_NVIDIA_H100"]) > len(drawn["performance_cpu"])
