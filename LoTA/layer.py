"""CustomLoraLinear: the PEFT layer that trains ternary adapters on a GPTQModel layer.

Touches PEFT (as the layer it derives from) and GPTQModel (as the layer it wraps); registered through
LoraConfig._register_custom_module, so both libraries stay as they were released.
"""
from functools import partial
from importlib.util import find_spec

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from LoTA import UserError, ternary
from LoTA.ternary import Grid, TernaryLinear, check_settings, ternarize_


class IntLinear(nn.Linear):
    """A ternary adapter matrix: a linear map without bias whose weight holds -1, 0, 1 in a float dtype."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)


def method_for(device):
    """The module that computes on `device`: LoTA.kernels on a GPU where triton is installed, else LoTA.ternary."""
    if device.type == "cuda" and find_spec("triton"):
        from LoTA import kernels
        return kernels
    return ternary


class CustomLoraLinear(nn.Module, LoraLayer):
    """y = x @ s * (W_int - z + W^ + mu) + bias over a GPTQModel TorchLinear.

    lora_A.weight [r, in], lora_B.weight [out, r]; see LoTA.ternary for W^ and mu. threshold: ternary.Threshold.
    PEFT hands over `config` and keyword arguments; lora_alpha is recorded, but no scaling enters the method.
    learned_offset: mu is a parameter of its own, lora_offset [groups, out], instead of Eq. 4's. learned_scales: so is
    the change of the scales, lora_scale [groups, out]: s * (1 + lora_scale).
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_offset", "lora_scale")

    def __init__(self, base_layer, adapter_name, config, r=0, lora_alpha=1, *, threshold, learned_offset=False,
                 learned_scales=False, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.lora_offset, self.learned_offset = nn.ParameterDict(), learned_offset
        self.lora_scale, self.learned_scales = nn.ParameterDict(), learned_scales
        if config.lora_dropout or config.use_dora or config.use_rslora or config.use_qalora:
            raise UserError("LoTA has no lora_dropout, DoRA, rsLoRA or QA-LoRA variant: they could not be merged")
        self.threshold = threshold
        self._groups = None
        self._evaluated = None          # (what it was made from, W'): see adapted_weight
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        check_settings(r, self.threshold.omega, self.groups().largest)
        self.r[adapter_name], self.lora_alpha[adapter_name], self.scaling[adapter_name] = r, lora_alpha, 1.0
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name] = IntLinear(self.in_features, r)
        self.lora_B[adapter_name] = IntLinear(r, self.out_features)
        for learned, parameters in ((self.learned_offset, self.lora_offset), (self.learned_scales, self.lora_scale)):
            if learned:
                parameters[adapter_name] = nn.Parameter(torch.zeros(self.groups().count, self.out_features))
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def reset_lora_parameters(self, adapter_name, init_lora_weights=True):
        """A: Kaiming normal, then ternarised; B: zeros. So the first forward is the quantized model, exactly."""
        nn.init.kaiming_normal_(self.lora_A[adapter_name].weight)
        ternarize_(self.lora_A[adapter_name].weight.data)
        nn.init.zeros_(self.lora_B[adapter_name].weight)

    def groups(self):
        if self._groups is None:
            self._groups = self.base_grid().groups
        return self._groups

    def grid(self):
        """The base layer's integers as a ternary.Grid, with learned scales where there are any."""
        change = self.scale_change()
        return self.base_grid() if change is None else self.base_grid().rescaled(change)

    def base_grid(self):
        """The base layer's integers and scales as a ternary.Grid."""
        base = self.get_base_layer()
        if self._groups is not None:
            self._groups.to(base.qweight.device)
        return Grid(base.qweight, base.qzeros, base.scales, base.g_idx, base.bits,
                    "gptq" if base.qzero_format() == 1 else "gptq_v2", self._groups)

    def forward(self, x, *args, **kwargs):
        if self.disable_adapters:
            return self.base_layer(x)
        if torch.is_grad_enabled():
            self._evaluated = None
            out = TernaryLinear.apply(x, *self.adapter_pair(), self.grid, self.threshold, method_for(x.device),
                                      self.offset(), self.scale_change())
        else:
            out = x @ self.adapted_weight(x.dtype)
        bias = self.get_base_layer().bias
        return out if bias is None else out + bias.to(out.dtype)

    def adapter_pair(self):
        """(A [in, r], B [r, out]) of the active adapter."""
        name, = self.active_adapters
        return self.lora_A[name].weight.t(), self.lora_B[name].weight.t()

    def offset(self):
        """The learned mu [groups, out] of the active adapter, or None."""
        name, = self.active_adapters
        return self.lora_offset[name] if self.learned_offset else None

    def scale_change(self):
        """The learned change of the scales [groups, out] of the active adapter, or None."""
        name, = self.active_adapters
        return self.lora_scale[name] if self.learned_scales else None

    def adapted_weight(self, dtype):
        """W' for evaluation, kept from call to call until the adapter changes: generating a text is many calls.

        It is as large as the 16-bit layer; to evaluate in the memory of the quantized model, merge.
        """
        (lora_A, lora_B), offset = self.adapter_pair(), self.offset()
        made_from = (*(None if p is None else p._version for p in (lora_A, lora_B, offset, self.scale_change())),
                     lora_A.data_ptr(), lora_A.device, dtype)
        if self._evaluated is None or self._evaluated[0] != made_from:
            method = method_for(lora_A.device)
            self._evaluated = made_from, method.adapted_weight(lora_A, lora_B, self.grid(), self.threshold, dtype,
                                                               learned=offset)
        return self._evaluated[1]

    @torch.no_grad()
    def merged_grids(self):
        """(before, after, mu): the layer's ternary.Grid, what the adapter makes of it, and the offset or None."""
        grid = self.grid()
        after, offset = method_for(grid.qweight.device).merge(*self.adapter_pair(), grid, self.threshold)
        return grid, after, self.offset() if self.learned_offset else offset


def register(lora_config: LoraConfig, threshold, learned_offset=False, learned_scales=False):
    """Makes PEFT put a CustomLoraLinear on every targeted GPTQModel layer; returns the config."""
    lora_config._register_custom_module({TorchLinear: partial(
        CustomLoraLinear, threshold=threshold, learned_offset=learned_offset, learned_scales=learned_scales)})
    return lora_config
