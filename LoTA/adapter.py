"""Models in memory: 16-bit, GPTQ, GPTQ with an adapter on it, and a merged folder with its offsets (LTA).

Touches transformers, PEFT and GPTQModel. LTA uses GPTQModel's own hook: a quantized layer calls
`module.adapter.apply(x=..., out=...)` after its kernel, and LTA adds the offset there. The integers are merged on disk
before a kernel sees them, so kernels that repack the weights at loading work like the others.
"""
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory
from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Adapter
from gptqmodel.utils.backend import BACKEND
from gptqmodel.utils.logger import setup_logger
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from LoTA import UserError, processes
from LoTA.adapter_folder import PREFIX, AdapterFolder, LotaConfig
from LoTA.folders import GPTQFolder, MergedFolder, is_merged, open_base, reading, set_checkpoint_format
from LoTA.layer import CustomLoraLinear, register
from LoTA.lota_merge import merge_folders
from LoTA.packed import SMALLEST_SCALE, Groups
from LoTA.settings import baseConfig, target_layers
from LoTA.steps import dither_from_fraction
from LoTA.storage import read_json, temporary_folder
from LoTA.ternary import add_offset_, scaled_offset


class LTA(Adapter):
    """A merged folder, or an adapter folder, as an adapter of GPTQModel.

        model = LTA(path="MERGED or ADAPTER").load()

    rank, threshold (omega), residual: load() refuses a folder that records other values. Where an adapter folder of the
    published scripts records no omega and no residual, load() uses these.
    """

    def __init__(self, rank: int | None = None, threshold: float | None = None, residual: bool | None = None,
                 path: str | None = None):
        super().__init__(rank=rank, path=path)
        self.threshold, self.residual = threshold, residual

    @classmethod
    def name(cls) -> str:
        return "lota"

    @classmethod
    def parameter_keys(cls) -> list[str]:
        return ["offset"]

    def load(self, base: str | Path | None = None, check: bool = True, **kwargs):
        """The GPTQModel with the offsets on it.

        base: the GPTQ folder, for an adapter that does not name its own. kwargs go to load_gptq() (dtype, device,
        backend ...). An adapter folder is merged into a temporary folder first; TMPDIR says where.
        check: whether a merged folder's files are compared with their checksums, which reads them once more.
        """
        if is_merged(self.path):
            return self._load_checked(MergedFolder(self.path), check=check, **kwargs)
        adapter = AdapterFolder(self.path, self.threshold, self.residual)
        base = adapter.gptq_path(base, "base")
        with temporary_folder() as folder:
            merged = folder / "merged"
            merge_folders(adapter, open_base(base), merged, verify=False)
            return self._load_checked(MergedFolder(merged), check=False, **kwargs)      # written just now

    def _load_checked(self, merged: MergedFolder, **kwargs):
        for given, recorded, fact in ((self.rank, merged.lota.rank, "rank"),
                                      (self.threshold, merged.lota.omega, "threshold"),
                                      (self.residual, merged.lota.residual, "residual")):
            if given is not None and given != recorded:
                raise UserError(f"{self.path} has {fact} {recorded}, not {given}")
        return load_merged(merged, **kwargs)

    def set_offset(self, offset: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor) -> None:
        """Takes one layer's mu and scales, both [groups, out], and g_idx [in]."""
        self.groups = Groups(g_idx, scales.shape[0])
        self.mu, self.scales = offset, scales
        self._ready = None              # (device, dtype, s * mu on that device in that dtype)

    def apply(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out += (group sums of x) @ (s * mu), in place. x: [..., in]. out: [..., out]. Returns out."""
        if self._ready is None or self._ready[:2] != (x.device, x.dtype):
            with torch.inference_mode(False):       # a tensor that is made in this mode takes no part in a backward
                self.groups.to(x.device)
                scaled = scaled_offset(self.mu, self.scales, x.dtype)
                self._ready = x.device, x.dtype, scaled.to(x.device)
        add_offset_(out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), self._ready[2], self.groups)
        return out


def load_merged(merged: MergedFolder, check: bool = True, **kwargs):
    """A merged folder as a GPTQModel with the offsets on it. kwargs go to load_gptq().

    check: whether its files are compared with their checksums first.
    Raises UserError where a file was changed, and where GPTQModel's kernel would drop the offsets.
    """
    if check:
        merged.require_whole()
    with temporary_folder() as view:
        model = load_gptq(_as_plain_gptq(merged, view), named=merged.path, **kwargs)
    attached = {}
    for name in merged.offset_modules():
        layer = LTA(merged.lota.rank, merged.lota.omega, True, str(merged.path))
        layer.set_offset(merged.offset(name), merged.tensor(f"{name}.scales"), merged.tensor(f"{name}.g_idx"))
        module = model.model.get_submodule(name)
        module.adapter = layer
        attached[type(module)] = module
    for module in attached.values():
        _check_hook(module, model.model.dtype)
    return model


def load_base(folder: GPTQFolder, **kwargs):
    """The model of a GPTQ folder or of a merged folder, with its offsets, as a GPTQModel. kwargs go to load_gptq().

    A merged folder's files are not compared with their checksums again, because open_base() did it.
    """
    if not isinstance(folder, MergedFolder):
        return load_gptq(folder.path, **kwargs)
    loaded = load_merged(folder, check=False, **kwargs)
    loaded.model.name_or_path = loaded.model.config._name_or_path = str(folder.path)    # PEFT records it
    return loaded


def load_gptq(path: str | Path, dtype: torch.dtype = torch.bfloat16, device: str | None = None, backend: str = "auto",
              attn_implementation: str = "auto", trust_remote_code: bool = False, named: Path | None = None):
    """A GPTQ folder as a GPTQModel in evaluation mode.

    dtype: with float32 the model loads in float16 and is widened afterwards, because no GPTQModel kernel is declared
        for float32; the backend is then the plain torch one.
    device: None or "auto" takes the GPU, or all GPUs, or else the CPU. Of several processes each takes its own GPUs.
    backend: a value of GPTQModel's BACKEND. On a machine without a GPU "auto" is the plain torch one, because the
        others compile for minutes first. The plain torch kernel computes with the scales that are on disk.
    attn_implementation: a value of --flash_attn. named: what errors call the folder [path].

    Without a GPU it switches torch.compile off in this process. Raises UserError for an unknown backend, for attention
    that the model cannot run with, for a CUDA device where there is no GPU, and where config.json does not describe
    the model that is in the files.
    """
    if device in (None, "auto") or device == "cuda" and processes.count() > 1:
        place = own_device_map(path, trust_remote_code) if torch.cuda.is_available() else {"device": "cpu"}
    elif str(device).startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"there is no GPU for device {device}")
    else:
        place = {"device": device}
    if not torch.cuda.is_available():
        # TorchLinear would compile its dequantization at the first forward: 30 s on a CPU, and no gain.
        torch.compiler.set_stance("force_eager")
        backend = "gptq_torch" if backend == "auto" else backend
    setup_logger().setLevel(logging.WARNING)
    wide = dtype == torch.float32
    try:
        kernel = BACKEND.GPTQ_TORCH if wide else BACKEND(backend.lower())
    except ValueError:
        raise UserError(f"--backend {backend} is none of GPTQModel's: {', '.join(b.value for b in BACKEND)}") from None
    named, folder = named or Path(path), MergedFolder(path) if is_merged(path) else GPTQFolder(path)
    with reading(named, "config.json"), attention(attn_implementation, dtype, path,
                                                  trust_remote_code) as implementation:
        model = GPTQModel.load(str(path), backend=kernel, dtype=torch.float16 if wide else dtype,
                               trust_remote_code=trust_remote_code, attn_implementation=implementation, **place)
    layers = {name for name, _ in model.model.named_modules()}
    for name in folder.modules:
        if name not in layers:          # GPTQModel leaves it out without a word
            raise UserError(f"{named / 'config.json'} describes another model: it has no {name}, which the files have")
    if wide:
        model.model.float()
    elif kernel == BACKEND.GPTQ_TORCH:
        # Loading in bfloat16 rounds the scales to 8 bits. Training must compute with the scales that are merged.
        for name in folder.modules:
            module = model.model.get_submodule(name)
            module.scales = folder.tensor(f"{name}.scales").to(module.scales.device)
    model.model.config.use_cache = True      # quantization wrote False into config.json
    return model


def own_device_map(path: str | Path, trust_remote_code: bool = False) -> dict:
    """{"device" or "device_map": where a model of the folder `path` goes}, for GPTQModel or transformers, on GPUs.

    One process spreads a model over all GPUs. Of several, each has GPUs of its own: on one it has the whole model, over
    more it spreads neighbouring layers, an equal part of the weights on each.
    """
    if processes.count() == 1:
        return {"device_map": "auto"}
    own = processes.own_gpus(torch.cuda.device_count())
    if len(own) == 1:
        return {"device": f"cuda:{own[0]}"}
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    empty.tie_weights()
    # As if weights took a byte, because all fit then. What counts is that the parts are equal.
    common = {"no_split_module_classes": list(empty._no_split_modules or []), "dtype": torch.int8}
    room = get_balanced_memory(empty, {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in own}, **common)
    return {"device_map": {name: f"cuda:{gpu}" for name, gpu in
                           infer_auto_device_map(empty, room, **common).items()}}


def load_live(adapter: AdapterFolder, gptq: str | Path, backend: str = "gptq_torch", **kwargs) -> PeftModel:
    """A PEFT model in evaluation mode: the adapter, of any method, unmerged on its GPTQ folder or merged folder.

    kwargs go to load_gptq(). An adapter of LoTA or LR-QAT runs on the plain torch kernel's layers, whatever `backend`
    says. Raises UserError where a file of the adapter has other bytes than those that were written.
    """
    adapter.require_whole()
    config, lora_config = adapter.config, LoraConfig.from_pretrained(adapter.path)
    if config.in_grid:
        backend = "gptq_torch"
        register(lora_config, config.rule, config.learned_offset, config.learned_scales, config.dither)
    source = open_base(gptq)
    # PEFT only warns of tensors that it cannot place. None leaves it the model's own mapping.
    key_mapping = adapter.key_mapping(source) or None
    model = load_base(source, backend=backend, **kwargs).model
    # The layers in the file, because PEFT may have rewritten the names in adapter_config.json for another layout.
    lora_config.target_modules, lora_config.target_parameters = list(adapter.match_names(source)), None
    with layers_by_name(model):
        return PeftModel.from_pretrained(model, adapter.path, config=lora_config, key_mapping=key_mapping).eval()


def load_for_training(base: baseConfig, config: LotaConfig, folder: GPTQFolder) -> PeftModel:
    """The GPTQ model with a fresh adapter on every targeted layer, for completed settings and the run's record.

    Prints how many of the quantized layers get an adapter. Raises UserError where PEFT misses a targeted layer.
    """
    dtype = getattr(torch, base.dtype)
    model = load_base(folder, dtype=dtype, device=base.device_map, backend="gptq_torch",
                      attn_implementation=base.flash_attn, trust_remote_code=base.trust_remote_code).model
    model.config.use_cache = False
    targets = target_layers(base.lora_target_modules, folder.modules)
    pooling = {"use_qalora": True, "qalora_group_size": folder.group_size} if base.method == "qalora" else {}
    lora_config = LoraConfig(r=base.lora_r, lora_alpha=base.lora_alpha, lora_dropout=base.lora_dropout,
                             target_modules=targets, task_type=TaskType.CAUSAL_LM, **pooling)
    if config.in_grid:
        register(lora_config, config.rule, config.learned_offset, config.learned_scales, config.dither)
    with layers_by_name(model):
        model = get_peft_model(model, lora_config)
    adapted = {name.removeprefix(PREFIX) for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    missed = [name for name in targets if name not in adapted]
    if missed:
        raise UserError(f"PEFT puts no adapter on {missed[0]} ({len(missed)} of {len(targets)} layers): leave "
                        f"{missed[0].rsplit('.', 1)[-1]} out of --lora_target_modules")
    print(coverage(adapted, folder.modules))
    if config.dither == "fraction":
        set_fractions(model, load_16bit(base.pretrained, "cpu", trust_remote_code=base.trust_remote_code))
    return model


@torch.no_grad()
def set_fractions(model: PeftModel, original: PreTrainedModel) -> None:
    """Sets the dither of every layer to what GPTQ rounded away: W / s + z - W_int, cut to (-1/2, 1/2).

    original: the 16-bit model that `model` was quantized from. Raises UserError where it has no such layer.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, CustomLoraLinear):
            name = name.removeprefix(PREFIX)
            try:
                weight = original.get_submodule(name).weight
            except AttributeError:
                weight = None
            packed = layer.base_packed()
            if weight is None or tuple(weight.shape) != packed.shape[::-1]:
                raise UserError(f"--dither fraction: the 16-bit model has no {name} of {packed.shape[1]} x "
                                f"{packed.shape[0]}; name the model that was quantized with --pretrained")
            g_idx = packed.groups.g_idx
            scales = packed.scales.float().clamp(min=SMALLEST_SCALE)
            grid = weight.t().float().to(g_idx.device) / scales[g_idx] + packed.zeros.float()[g_idx]
            dither, = layer.lora_dither.values()
            dither.copy_(dither_from_fraction(grid - packed.weight_int.float()))


def coverage(adapted: set[str], quantized: Sequence[str]) -> str:
    """How many of the quantized layers get an adapter, and which do not, with * for the numbers in their names."""
    without = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in quantized if name not in adapted)
    text = f"{len(quantized) - without.total()} of {len(quantized)} quantized layers get an adapter"
    if without:
        names = [f"{name} ({count})" for name, count in sorted(without.items())]
        text += f"; without one: {', '.join(names[:8])}" + (f" and {len(names) - 8} more names" if names[8:] else "")
    return text


@contextmanager
def layers_by_name(model: torch.nn.Module) -> Iterator[None]:
    """While the block runs, PEFT takes the layers by the names that they have in the model.

    transformers 5 stacks the experts of a layer into one tensor, and PEFT rewrites the names of experts for that, by
    the model_type in the model's config. GPTQModel keeps every expert a layer of its own, as it is on disk. So the
    rewritten names would reach no expert, and the config has another model_type during the block.
    """
    config, model_type = model.config, model.config.model_type
    config.model_type = f"{model_type}_as_on_disk"
    try:
        yield
    finally:
        config.model_type = model_type


def load_16bit(name: str, device: str = "auto", dtype: torch.dtype = torch.bfloat16, attn_implementation: str = "auto",
               trust_remote_code: bool = False, **kwargs) -> PreTrainedModel:
    """The 16-bit model, a folder or a hub name. kwargs go to transformers. The rest is as in load_gptq()."""
    place = device
    if device == "auto" or device == "cuda" and processes.count() > 1:
        place, = own_device_map(name, trust_remote_code).values() if torch.cuda.is_available() else ["cpu"]
    with reading(name, "config.json"), attention(attn_implementation, dtype, name, trust_remote_code) as implementation:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, device_map=place, dtype=dtype, attn_implementation=implementation, use_safetensors=True,
            trust_remote_code=trust_remote_code, output_loading_info=True, **kwargs)
    _require_described(name, _unfit(found))
    return model


def check_described(folder: Path, trust_remote_code: bool = False) -> None:
    """Raises UserError unless the files of a 16-bit model have every tensor of the model that config.json describes.

    Prints what the files have beyond it. It reads no weight. What only code of its own describes is not checked.
    """
    with reading(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        unfit = what_does_not_fit(folder) if known else {}
    _require_described(folder, unfit)


def _require_described(name: str | Path, unfit: dict[str, list[str]]) -> None:
    wrong = [*unfit.get("missing", []), *unfit.get("mismatched", [])]
    if wrong:                           # transformers fills them at random
        raise UserError(f"{Path(name) / 'config.json'} describes another model: it has {wrong[0]}, which the files "
                        "have not, or in another shape")
    if unfit.get("unexpected"):
        print(f"{name}: {len(unfit['unexpected'])} tensors of the files are in no layer that its config.json "
              f"describes, {unfit['unexpected'][0]} for example")


def has_own_code(folder: Path) -> bool:
    """Whether the model's layers are in code that comes with it."""
    return "auto_map" in read_json(folder / "config.json")


def what_does_not_fit(folder: Path) -> dict[str, list[str]]:
    """{"missing", "unexpected", "mismatched": names of tensors}, as transformers sees the folder. It reads no weight.

    All are empty for a model whose layers are in code of its own, because only trusting that code would tell.
    """
    if has_own_code(folder):
        return {"missing": [], "unexpected": [], "mismatched": []}
    _, info = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "meta"}, ignore_mismatched_sizes=True,
                                                   output_loading_info=True)
    return _unfit(info)


def _unfit(info: dict) -> dict[str, list[str]]:
    """transformers' loading info as what_does_not_fit() has it."""
    return {"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
            "mismatched": sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])}


def attention_for(flash_attn: str, dtype: torch.dtype, model: str | Path,
                  trust_remote_code: bool = False) -> str | None:
    """The attention implementation that --flash_attn asks for, or None for the model's own default.

    "auto" is flash_attention_2 where it is installed and the model allows it, else the model's own default. model: a
    folder or a hub name, whose config.json is read where the answer depends on it.
    """
    if flash_attn != "auto":
        return flash_attn
    if not torch.cuda.is_available() or not find_spec("flash_attn"):
        return None
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if dtype != torch.float32 and getattr(architecture, "_supports_flash_attn", False):
        return "flash_attention_2"
    # The default by name, because GPTQModel would take None for flash_attention_2, which cannot run in float32.
    return "sdpa" if getattr(architecture, "_supports_sdpa", False) else "eager"


@contextmanager
def attention(flash_attn: str, dtype: torch.dtype, model: str | Path, trust_remote_code: bool) -> Iterator[str | None]:
    """attention_for(), for a model that the block loads. Raises UserError where it cannot run with the flag's."""
    try:
        yield attention_for(flash_attn, dtype, model, trust_remote_code)
    except (ValueError, ImportError) as error:
        if flash_attn == "auto" or not re.search("attention|attn", str(error), re.IGNORECASE):
            raise
        raise UserError(f"{model} does not run with --flash_attn {flash_attn}; leave it at auto "
                        f"({str(error).splitlines()[0][:200]})") from None


def _check_hook(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Raises UserError where a kernel does not call its adapter, because it would drop the offset silently."""
    called, layer = [], module.adapter
    apply = layer.apply

    def spy(x, out):
        called.append(True)
        return apply(x=x, out=out)
    layer.apply = spy
    try:
        with torch.inference_mode():
            module(torch.zeros(1, 1, module.in_features, dtype=dtype, device=module.runtime_device()))
    finally:
        del layer.apply
    if not called:
        raise UserError(f"GPTQModel's kernel {type(module).__name__} calls no adapter, and so cannot carry the offset; "
                        "choose another --backend")


def _as_plain_gptq(merged: MergedFolder, view: Path) -> Path:
    """Fills `view` with links to `merged`, and config files that name the GPTQ format of its integers. Returns it."""
    for item in merged.path.resolve().iterdir():
        if item.is_file():
            (view / item.name).symlink_to(item)
    set_checkpoint_format(view, merged.checkpoint_format)
    return view
