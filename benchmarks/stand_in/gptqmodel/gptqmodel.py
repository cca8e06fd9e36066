"""Stands in for GPTQModel where it is not installed: its plain torch layer, and the names that this project imports.

runs/gpu.sh puts this folder on PYTHONPATH there. On a CPU the layer computes what GPTQModel's TorchLinear computes, bit
for bit; tests/test_gpu_script.py compares the two. On a GPU it is slower, because it unpacks with torch operators and
TorchLinear has a Triton kernel for that. The folder beside this file names a version, because PEFT asks for one.
"""
import json
import logging
import sys
from enum import Enum
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from LoTA.packing import pack_rows, unpack_zeros

WORD = 32                       # bits of a word
# One module has all names. So each module that is imported by name is this one.
for name in ("adapter", "adapter.adapter", "utils", "utils.backend", "utils.logger", "nn_modules",
             "nn_modules.qlinear", "nn_modules.qlinear.torch"):
    sys.modules[f"{__name__}.{name}"] = sys.modules[__name__]


class BACKEND(str, Enum):       # noqa: UP042, because GPTQModel's is such a class
    """Every backend is the plain torch layer."""
    AUTO = "auto"
    GPTQ_TORCH = "gptq_torch"


class Adapter:
    """What a layer calls behind its product."""

    def __init__(self, rank: int | None = None, path: str | None = None):
        self.rank, self.path = rank, path


def setup_logger() -> logging.Logger:
    return logging.getLogger(__name__)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` values of each column, int32 [count, cols]. words: int32 [n, cols], GPTQ's bit streams."""
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)[:, None]
        return (words[:, None] >> shifts).bitwise_and_(2**bits - 1).flatten(0, 1)[:count]
    bit = torch.arange(count, device=words.device)[:, None] * bits
    word = (bit // WORD).flatten()
    both = (words[word].long() & 2**WORD - 1) | words[(word + 1).clamp(max=len(words) - 1)].long() << WORD
    return (both >> bit % WORD & 2**bits - 1).int()


class BaseQuantLinear(nn.Module):
    """PEFT looks for this class."""


class TorchLinear(BaseQuantLinear):
    """x @ (s * (W_int - z)) + bias, and then its adapter. Its buffers have GPTQModel's names, shapes and dtypes."""

    def __init__(self, bits: int, group_size: int, sym: bool, desc_act: bool, in_features: int, out_features: int,
                 bias: bool = False):
        super().__init__()
        self.bits, self.group_size, self.sym, self.desc_act = bits, group_size, sym, desc_act
        self.in_features, self.out_features, self.adapter, self._format = in_features, out_features, None, 1
        size = in_features if group_size == -1 else group_size
        groups = -(-in_features // size)
        for buffer, shape, dtype in (("qweight", (in_features * bits // WORD, out_features), torch.int32),
                                     ("qzeros", (groups, out_features * bits // WORD), torch.int32),
                                     ("scales", (groups, out_features), torch.float16)):
            self.register_buffer(buffer, torch.zeros(shape, dtype=dtype))
        self.register_buffer("g_idx", torch.arange(in_features, dtype=torch.int32) // size)
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16) if bias else None)

    def qzero_format(self, format: int | None = None) -> int:
        """1 where qzeros holds z - 1, 2 where it holds z. Sets it where it is given."""
        self._format = format or self._format
        return self._format

    def runtime_device(self) -> torch.device:
        return self.qweight.device

    def dequantize_weight(self) -> torch.Tensor:
        """s * (W_int - z) [in, out] in the dtype of the scales. qzeros must hold z."""
        groups = self.g_idx.long()
        zeros = unpack(self.qzeros.t(), self.bits, self.out_features).t()
        return self.scales[groups] * unpack(self.qweight, self.bits, self.in_features).sub_(zeros[groups])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = (rows @ self.dequantize_weight().to(x.dtype)).view(*x.shape[:-1], self.out_features)
        if self.bias is not None:
            out.add_(self.bias.to(out.dtype))
        return self.adapter.apply(x=rows, out=out) if self.adapter else out


class GPTQModel:
    """A transformers model whose quantized layers are TorchLinear. model: that model, in evaluation mode."""

    def __init__(self, model: nn.Module):
        self.model = model

    @classmethod
    def load(cls, path: str, backend: BACKEND = BACKEND.AUTO, dtype: torch.dtype = torch.float16,
             device: str | None = None, device_map: str | None = None, trust_remote_code: bool = False,
             attn_implementation: str | None = None) -> "GPTQModel":
        """Reads a folder onto one device. The scales keep the dtype of the file.

        Raises ValueError where the files lack a tensor of the model.
        """
        quantization = json.loads(Path(path, "quantize_config.json").read_text())
        config = AutoConfig.from_pretrained(path)
        del config.quantization_config
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        with torch.device(place):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        tensors = {}
        for file in Path(path).glob("*.safetensors"):
            tensors |= load_file(file, device=place)
        for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
            model.set_submodule(name, _read_layer(name, tensors, quantization, dtype).to(place))
        absent = [key for key in model.load_state_dict(tensors, strict=False).missing_keys
                  if key != "lm_head.weight" or not config.tie_word_embeddings]
        wrong = [key for key in absent if key.rsplit(".", 1)[1] not in ("qweight", "qzeros", "scales", "g_idx", "bias")]
        if wrong:
            raise ValueError(f"{path} lacks {wrong[0]}")
        return cls(model.eval())


def _read_layer(name: str, tensors: dict, quantization: dict, dtype: torch.dtype) -> TorchLinear:
    """The layer of this name with its tensors, which it takes out of `tensors`."""
    own = {kind: tensors.pop(f"{name}.{kind}") for kind in ("qweight", "qzeros", "scales", "g_idx")}
    bias, bits = tensors.pop(f"{name}.bias", None), quantization["bits"]
    layer = TorchLinear(bits, quantization["group_size"], quantization["sym"], quantization["desc_act"],
                        len(own["g_idx"]), own["scales"].shape[1])
    if quantization["checkpoint_format"] == "gptq":
        zeros = unpack_zeros(own["qzeros"], bits, layer.out_features, "gptq")
        own["qzeros"] = pack_rows(zeros.t(), bits).t().contiguous()
    for kind, tensor in {**own, "bias": None if bias is None else bias.to(dtype)}.items():
        setattr(layer, kind, tensor)
    layer.qzero_format(format=2)
    return layer
