"""Models in memory: a GPTQ folder; a merged folder, or an adapter merged into its base (LTA); an adapter live.

Touches GPTQModel, through its own hook: a quantized layer calls `module.adapter.apply(x=..., out=...)` after its
kernel, and LTA adds the offset factor there. The integers are merged on disk before the kernel ever sees them, so
kernels that repack weights at loading work like the others. Touches PEFT for live adapters.
"""
import logging
import tempfile
from pathlib import Path

import torch
from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Adapter
from gptqmodel.utils.backend import BACKEND
from gptqmodel.utils.logger import setup_logger
from peft import LoraConfig, PeftModel

from LoTA import UserError
from LoTA.folders import GPTQFolder, MergedFolder, is_merged, read_adapter, set_checkpoint_format
from LoTA.layer import register
from LoTA.lota_merge import merge_folders
from LoTA.ternary import Groups


class LTA(Adapter):
    """A LoTA adapter for GPTQModel.

        model = LTA(path="MERGED or ADAPTER").load()

    rank, threshold (omega), residual: what the folder itself says where it says so; they are compared with it, and
    used where it is silent (a folder of the published scripts). path: a merged folder or an adapter folder.
    """

    def __init__(self, rank=None, threshold=None, residual=None, path=None):
        super().__init__(rank=rank, path=path)
        self.threshold, self.residual = threshold, residual

    @classmethod
    def name(cls):
        return "lota"

    @classmethod
    def parameter_keys(cls):
        return ["offset"]

    def load(self, base=None, **kwargs):
        """The GPTQModel with this adapter on it. base: the GPTQ folder, for an adapter that does not name its own.

        kwargs go to load_gptq (dtype, device, backend, ...). An adapter folder is merged into a temporary folder
        first (TMPDIR says where).
        """
        if is_merged(self.path):
            return self._load_merged(MergedFolder(self.path), **kwargs)
        config = read_adapter(self.path, self.threshold, self.residual)
        base = base or config.quantized_model_dir
        if base is None:
            raise UserError(f"{self.path} does not name its GPTQ model; pass it as base")
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder) / "merged"
            merge_folders(self.path, base, merged, self.threshold, self.residual, verify=False)
            return self._load_merged(MergedFolder(merged), **kwargs)

    def _load_merged(self, merged, **kwargs):
        for mine, theirs, what in ((self.rank, merged.lota.rank, "rank"),
                                   (self.threshold, merged.lota.omega, "threshold"),
                                   (self.residual, merged.lota.residual, "residual")):
            if mine is not None and mine != theirs:
                raise UserError(f"{self.path} has {what} {theirs}, not {mine}")
        with tempfile.TemporaryDirectory() as view:
            model = load_gptq(_as_plain_gptq(merged, Path(view)), **kwargs)
        attached = {}
        for name in merged.offset_modules():
            layer = LTA(merged.lota.rank, merged.lota.omega, True, self.path)
            layer.set_offset(merged.offset(name), merged.tensor(f"{name}.scales"), merged.tensor(f"{name}.g_idx"))
            module = model.model.get_submodule(name)
            module.adapter = layer
            attached[type(module)] = module
        for module in attached.values():
            _check_hook(module, model.model.dtype)
        return model

    def set_offset(self, offset, scales, g_idx):
        """Gives this instance one layer's mu and scales [groups, out] and g_idx [in]."""
        self.groups = Groups(g_idx, scales.shape[0])
        self.offset = offset * scales.float()
        self._ready = None              # (device, dtype, offset there)

    def apply(self, x, out):
        """out += (group sums of x) @ (s * mu): 1 / group_size of the layer's work. In place; x [..., in].

        Source: the paper's z' = z + s * mu, for integer `qzeros` kept beside them.
        """
        if self._ready is None or self._ready[:2] != (x.device, x.dtype):
            self.groups.to(x.device)
            self._ready = x.device, x.dtype, self.offset.to(x.device, x.dtype)
        sums = self.groups.sum_columns(x.reshape(-1, x.shape[-1]))
        return out.add_((sums @ self._ready[2]).view(out.shape))

def load_gptq(path, dtype=torch.bfloat16, device=None, backend="auto", attn_implementation=None,
              trust_remote_code=False):
    """A GPTQ folder as a GPTQModel in evaluation mode.

    dtype float32, which no GPTQModel kernel is declared for, loads in float16 and widens afterwards; backend is then
    the plain torch one. That kernel computes with the scales that are on disk, in whatever dtype. device: None or
    "auto" takes the GPU, or all of them, or the CPU. backend: a name of gptqmodel's BACKEND; on a CPU "auto" is the
    plain torch one, since the others compile themselves for minutes first. Without a GPU, torch.compile is switched
    off in this process.
    """
    if device in (None, "auto"):
        place = {"device_map": "auto"} if torch.cuda.is_available() else {"device": "cpu"}
    elif str(device).startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"there is no GPU for device {device}")
    else:
        place = {"device": device}
    if not torch.cuda.is_available():
        # TorchLinear compiles its dequantization at the first forward: 30 s on a CPU for nothing gained.
        torch.compiler.set_stance("force_eager")
        backend = "gptq_torch" if backend == "auto" else backend
    setup_logger().setLevel(logging.WARNING)
    wide = dtype == torch.float32
    try:
        kernel = BACKEND.GPTQ_TORCH if wide else BACKEND(backend.lower())
    except ValueError:
        raise UserError(f"--backend {backend} is none of GPTQModel's: {', '.join(b.value for b in BACKEND)}") from None
    model = GPTQModel.load(str(path), backend=kernel, dtype=torch.float16 if wide else dtype,
                           trust_remote_code=trust_remote_code, attn_implementation=attn_implementation, **place)
    if wide:
        model.model.float()
    elif kernel == BACKEND.GPTQ_TORCH:
        # Loading in bfloat16 rounds the scales to 8 bits. What trains must be what is merged: those on disk.
        folder = GPTQFolder(path)
        for name in folder.modules:
            module = model.model.get_submodule(name)
            module.scales = folder.tensor(f"{name}.scales").to(module.scales.device)
    model.model.config.use_cache = True      # quantization wrote False into config.json
    return model


def load_live(adapter, gptq, omega=None, residual=None, backend="gptq_torch", **kwargs):
    """A PEFT model in evaluation mode: the adapter folder, LoTA, LoRA or QA-LoRA, unmerged on its GPTQ folder.

    omega and residual are used only for an adapter that does not say its own; kwargs go to load_gptq. A LoTA adapter
    runs on the plain torch kernel's layers, whatever backend says.
    """
    config = read_adapter(adapter, omega, residual)
    lora_config = LoraConfig.from_pretrained(adapter)
    if config.method == "LoTA":
        backend = "gptq_torch"
        register(lora_config, config.threshold, config.learned_offset, config.learned_scales)
    return PeftModel.from_pretrained(load_gptq(gptq, backend=backend, **kwargs).model, adapter,
                                     config=lora_config).eval()


def _check_hook(module, dtype):
    """Raises UserError where a kernel does not call its adapter, and so would drop the offset silently."""
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


def _as_plain_gptq(merged, view):
    """A folder of links to `merged` whose config files name the plain GPTQ format that the integers are in."""
    for item in merged.path.resolve().iterdir():
        if item.is_file():
            (view / item.name).symlink_to(item)
    set_checkpoint_format(view, merged.checkpoint_format)
    return view
