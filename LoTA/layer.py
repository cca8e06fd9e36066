"""CustomLoraLinear: the PEFT layer that trains an adapter whose product is a step on the grid of a GPTQModel layer.

Touches PEFT, whose LoraLayer it derives from, and GPTQModel, whose layer it wraps. PEFT learns of it through
LoraConfig._register_custom_module, so both libraries stay as they were released.
"""
import math
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import ModuleType

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from LoTA import UserError, ternary
from LoTA.packed import Groups, PackedLayer
from LoTA.steps import Rounding, Rule, fixed_point, layer_seed, power_of_two
from LoTA.ternary import GridLinear, layer_output, scaled_offset, ternarize_


class IntLinear(nn.Linear):
    """A ternary adapter matrix: a linear map without bias whose weight holds -1, 0, 1 in a float dtype."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)


class FixedPointLinear(nn.Linear):
    """An adapter matrix of Rounding: a linear map without bias whose float32 weight is used as integers * 2**exponent.

    A checkpoint has the float32 weight, from which training goes on. A finished adapter has the integers as int8. Both
    have the exponent, int32 [1, 1], and both load. Here the exponent is a name only, because PEFT loads what has one.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)
        self.register_buffer("exponent", torch.zeros(1, 1, dtype=torch.int32))
        self.register_load_state_dict_pre_hook(_float_weight)


def _float_weight(module: nn.Module, state: dict, prefix: str, *args) -> None:
    """Puts the float32 weight in the place of int8 integers, in a state dict that is loaded."""
    weight = state.get(f"{prefix}weight")
    if weight is not None and weight.dtype == torch.int8:
        state[f"{prefix}weight"] = weight.float() * power_of_two(state[f"{prefix}exponent"])


def backend_for(device: torch.device) -> ModuleType:
    """The module that computes on `device`: LoTA.kernels on a GPU where triton is installed, else LoTA.ternary."""
    if device.type == "cuda" and find_spec("triton"):
        from LoTA import kernels
        return kernels
    return ternary


class CustomLoraLinear(nn.Module, LoraLayer):
    """y = x @ (s * (W_int - z + W^)) + bias + (group sums of x) @ (s * mu) over a GPTQModel TorchLinear.

    Where the model is a merged one, its own mu is added to the adapter's. LoTA.ternary defines W^ and mu, and
    LoTA.steps the rule by which A and B become W^.

    Parameters of an adapter: lora_A.weight [r, in] and lora_B.weight [out, r], which are A and B transposed, as PEFT
    stores them. With learned_offset, lora_offset [groups, out] is mu and Eq. 4 is not used. With learned_scales,
    lora_scale [groups, out] is the scale_change of LoTA.ternary.

    rule: for all layers. A Rounding's scaling is replaced by this layer's alpha / r, and its seed by the layer's own.
    dither: "none", "noise" or "fraction". With the last one lora_dither, int8 [in, out], is a part of the adapter.

    PEFT passes `config` and keyword arguments. Raises UserError for variants of LoRA that do not merge.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_offset", "lora_scale")
    other_param_names = (*LoraLayer.other_param_names, "lora_dither")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1, *,
                 rule: Rule, dither: str = "none", learned_offset: bool = False, learned_scales: bool = False,
                 target_name: str = "", **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.lora_offset, self.learned_offset = nn.ParameterDict(), learned_offset
        self.lora_scale, self.learned_scales = nn.ParameterDict(), learned_scales
        if config.lora_dropout or config.use_dora or config.use_rslora or config.use_qalora:
            raise UserError("LoTA and LR-QAT have no lora_dropout, DoRA, rsLoRA or QA-LoRA variant: switch them off")
        self.lora_dither = nn.ParameterDict()
        if isinstance(rule, Rounding):
            rule = replace(rule, scaling=lora_alpha / r, seed=layer_seed(target_name) if dither == "noise" else None)
        self.rule, self.dither = rule, dither
        self._groups = self._rule_with_dither = self._base_offset = None
        self._evaluated = None          # (what it was made from, W, s * mu), see evaluated()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
        """Adds an adapter of rank r.

        Raises UserError where omega or the rank are out of range, and where an adapter beside it has another alpha / r.
        """
        if isinstance(self.rule, Rounding) and lora_alpha / r != self.rule.scaling:
            raise UserError(f"an adapter with alpha / r = {lora_alpha / r:g} cannot stand beside one with "
                            f"{self.rule.scaling:g}; load it on a model of its own")
        self.rule.check(r, self.groups().largest)
        self.r[adapter_name], self.lora_alpha[adapter_name], self.scaling[adapter_name] = r, lora_alpha, 1.0
        self.lora_dropout[adapter_name] = nn.Identity()
        matrix = FixedPointLinear if isinstance(self.rule, Rounding) else IntLinear
        self.lora_A[adapter_name] = matrix(self.in_features, r)
        self.lora_B[adapter_name] = matrix(r, self.out_features)
        if self.dither == "fraction":
            self.lora_dither[adapter_name] = nn.Parameter(
                # On its device at once, because PEFT would make it a parameter with a gradient when it moves it.
                torch.zeros(self.in_features, self.out_features, dtype=torch.int8,
                            device=self.get_base_layer().qweight.device), requires_grad=False)
        for learned, parameters in ((self.learned_offset, self.lora_offset), (self.learned_scales, self.lora_scale)):
            if learned:
                parameters[adapter_name] = nn.Parameter(torch.zeros(self.groups().count, self.out_features))
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool = True) -> None:
        """With Threshold A is Kaiming normal, then ternary. With Rounding A is Kaiming uniform, as PEFT's LoRA has it.

        Where the mean of dW goes into mu, the rows of A are equal in each group, so that mu learns at the rate of A and
        B. The mean of random rows would be near 0. The rows part as their gradients do.
        B is zero, so the first forward is the quantized model exactly. A learned mu and scale_change stay as they are.
        init_lora_weights is ignored.
        """
        if isinstance(self.rule, Rounding):
            weight = nn.init.kaiming_uniform_(self.lora_A[adapter_name].weight, a=math.sqrt(5)).data
            if self.rule.mean:
                weight.copy_(weight[:, self.groups().g_idx.to(weight.device)])
        else:
            nn.init.kaiming_normal_(self.lora_A[adapter_name].weight)
            ternarize_(self.lora_A[adapter_name].weight.data)
        nn.init.zeros_(self.lora_B[adapter_name].weight)

    # --- the integers -------------------------------------------------------------------------------------------------

    def groups(self) -> Groups:
        """The layer's groups of input rows. They are made once."""
        if self._groups is None:
            self._groups = self.base_packed().groups
        return self._groups

    def base_packed(self) -> PackedLayer:
        """The base layer's integers with the scales of the checkpoint.

        TorchLinear's qzeros hold z, as in gptq_v2, because GPTQModel adds the 1 to a folder in the format gptq when it
        loads it. Its qzero_format() says 1 of a folder that is in gptq_v2 on disk.
        """
        base = self.get_base_layer()
        if self._groups is not None:
            self._groups.to(base.qweight.device)
        return PackedLayer(base.qweight, base.qzeros, base.scales, base.g_idx, base.bits, "gptq_v2", self._groups,
                           self.base_offset())

    def base_offset(self) -> torch.Tensor | None:
        """mu of the base layer, float32 [groups, out] on its device, where it is a merged model's; else None."""
        base = self.get_base_layer()
        if self._base_offset is None and getattr(base, "adapter", None) is not None:
            self._base_offset = base.adapter.mu         # LoTA.adapter.LTA
        if self._base_offset is not None:
            self._base_offset = self._base_offset.to(base.qweight.device)       # moved once
        return self._base_offset

    def packed(self) -> PackedLayer:
        """The base layer's integers with learned scales, where the adapter has them."""
        scale_change = self.scale_change()
        return self.base_packed() if scale_change is None else self.base_packed().rescaled(scale_change)

    # --- the active adapter: one, or these raise ValueError -----------------------------------------------------------

    def adapter_pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [in, r], B [r, out])."""
        name, = self.active_adapters
        return self.lora_A[name].weight.t(), self.lora_B[name].weight.t()

    def offset(self) -> torch.Tensor | None:
        """The learned mu [groups, out], or None."""
        name, = self.active_adapters
        return self.lora_offset[name] if self.learned_offset else None

    def scale_change(self) -> torch.Tensor | None:
        """The learned relative change of the scales [groups, out], or None."""
        name, = self.active_adapters
        return self.lora_scale[name] if self.learned_scales else None

    def active_rule(self) -> Rule:
        """The rule with the dither as a tensor, where the adapter has it so or the device makes noise slowly.

        A GPU's kernels make noise on the way.
        """
        if not isinstance(self.rule, Rounding):
            return self.rule
        name, = self.active_adapters
        if self.dither == "fraction":
            return replace(self.rule, dither=self.lora_dither[name].data)
        packed = self.base_packed()
        if packed.qweight.device.type != "cpu":
            return self.rule
        if self._rule_with_dither is None:
            self._rule_with_dither = self.rule.with_dither(packed)
        return self._rule_with_dither

    # --- computing ----------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """y [..., out] for x [..., in]. Without gradients W is kept between calls, see evaluated()."""
        if self.disable_adapters:
            return self.base_layer(x)
        bias = self.get_base_layer().bias
        if torch.is_grad_enabled():
            self._evaluated = None
            return GridLinear.apply(x, *self.adapter_pair(), self.packed, self.active_rule(), backend_for(x.device),
                                    self.offset(), self.scale_change(), bias)
        weight, scaled = self.evaluated(x.dtype)
        return layer_output(x.flatten(0, -2), weight, bias, scaled, self.groups()).view(*x.shape[:-1], -1)

    def evaluated(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(W [in, out], s * mu [groups, out] or None) in `dtype`, kept until the adapter changes.

        Generation calls the layer for every token. They take the memory of the layer without quantization. A merged
        model does not need them.
        """
        (lora_A, lora_B), learned = self.adapter_pair(), self.offset()
        made_from = (*(None if p is None else p._version for p in (lora_A, lora_B, learned, self.scale_change())),
                     lora_A.data_ptr(), lora_A.device, dtype)
        if self._evaluated is None or self._evaluated[0] != made_from:
            packed, backend = self.packed(), backend_for(lora_A.device)
            weight, offset = backend.adapted_weight(lora_A, lora_B, packed, self.active_rule(), dtype)
            offset = packed.total_offset(offset if learned is None else learned.detach())
            self._evaluated = made_from, weight, None if offset is None else scaled_offset(offset, packed.scales, dtype)
        return self._evaluated[1:]

    @torch.no_grad()
    def sampled_delta_w(self, count: int) -> torch.Tensor:
        """dW in units of the grid, float32 [rows, out], of at least `count` evenly spaced rows, or of all of fewer."""
        packed, (lora_A, lora_B), rule = self.base_packed(), self.adapter_pair(), self.active_rule()
        rows = torch.arange(0, len(lora_A), max(1, len(lora_A) // count), device=lora_A.device)
        return rule.grid_steps(rule.factors(lora_A, lora_B), rows, packed)

    @torch.no_grad()
    def count_steps(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(how many integers a merge would move now, 0-dim int64; mu float32 [groups, out] or None)."""
        packed = self.base_packed()         # learned scales move no integer
        count, offset = backend_for(packed.qweight.device).count_steps(*self.adapter_pair(), packed, self.active_rule())
        return count, self.offset() if self.learned_offset else offset


def adapter_state(model: nn.Module, finished: bool = False) -> dict[str, torch.Tensor]:
    """The model's state dict with A and B as int8 where they are integers, for PEFT's save_pretrained().

    int8 holds them exactly and takes a quarter of float32's space. What loads the file copies it into floats.
    finished: whether fixed-point matrices are integers too. While training goes on, their float32 weights are needed.
    Raises FloatingPointError where a fixed-point matrix is not finite, because its integers would be.
    """
    state = model.state_dict()
    for name, layer in model.named_modules():
        if isinstance(layer, CustomLoraLinear):
            for key in ("lora_A", "lora_B"):
                for adapter, matrix in getattr(layer, key).items():
                    tensor = f"{name}.{key}.{adapter}"
                    if isinstance(matrix, IntLinear):
                        state[f"{tensor}.weight"] = matrix.weight.detach().to(torch.int8)
                    else:
                        if not bool(matrix.weight.isfinite().all()):
                            raise FloatingPointError(f"{tensor}.weight is not finite; take an earlier checkpoint")
                        integers, exponent = fixed_point(matrix.weight)
                        state[f"{tensor}.exponent"] = exponent.view(1, 1)
                        if finished:
                            state[f"{tensor}.weight"] = integers.to(torch.int8)
    return state


def register(lora_config: LoraConfig, rule: Rule, learned_offset: bool = False, learned_scales: bool = False,
             dither: str = "none") -> LoraConfig:
    """Makes PEFT wrap every targeted TorchLinear in a CustomLoraLinear. Changes lora_config in place and returns it."""
    lora_config._register_custom_module({TorchLinear: partial(
        CustomLoraLinear, rule=rule, dither=dither, learned_offset=learned_offset, learned_scales=learned_scales)})
    return lora_config
