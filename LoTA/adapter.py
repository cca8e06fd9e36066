"""LTA: a merged folder, or a trained adapter on its base, on a live GPTQModel with any of its kernels.

Touches GPTQModel, through its own hook: a quantized layer calls `module.adapter.apply(x=..., out=...)` after its
kernel, and LTA adds the offset factor there. The integers are merged on disk before the kernel ever sees them, so
kernels that repack weights at loading work like the others.
"""
import json
import logging
import tempfile
from pathlib import Path

import torch
from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Adapter
from gptqmodel.utils.backend import BACKEND
from gptqmodel.utils.logger import setup_logger

from LoTA import UserError
from LoTA.folders import LOTA_FORMAT, QUANTIZE_CONFIG, MergedFolder, is_merged, read_adapter
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

        kwargs go to load_gptq (dtype, device, device_map, backend, ...).
        """
        if is_merged(self.path):
            return self._load_merged(MergedFolder(self.path), **kwargs)
        config, _ = read_adapter(self.path, self.threshold)
        base = base or config.quantized_model_dir
        if base is None:
            raise UserError(f"{self.path} does not name its GPTQ model; pass it as base")
        with tempfile.TemporaryDirectory() as folder:
            merged = Path(folder) / "merged"
            merge_folders(self.path, base, merged, self.threshold, verify=False)
            return self._load_merged(MergedFolder(merged), **kwargs)

    def _load_merged(self, merged, **kwargs):
        for mine, theirs, what in ((self.rank, merged.lota.rank, "rank"),
                                   (self.threshold, merged.lota.omega, "threshold"),
                                   (self.residual, merged.lota.residual, "residual")):
            if mine is not None and mine != theirs:
                raise UserError(f"{self.path} has {what} {theirs}, not {mine}")
        with tempfile.TemporaryDirectory() as view:
            model = load_gptq(_as_plain_gptq(merged, Path(view)), **kwargs)
        for module in merged.offset_modules():
            layer = LTA(merged.lota.rank, merged.lota.omega, True, self.path)
            layer.set_offset(merged.offset(module), merged.tensor(f"{module}.scales"),
                             merged.tensor(f"{module}.g_idx"))
            model.model.get_submodule(module).adapter = layer
        return model

    def set_offset(self, offset, scales, g_idx):
        """Gives this instance one layer's mu and scales [groups, out] and g_idx [in]."""
        self.groups = Groups(g_idx, scales.shape[0])
        self.offset = offset * scales.float()

    def apply(self, x, out):
        """out += (group sums of x) @ (s * mu): 1 / group_size of the layer's work. In place; x [..., in].

        Source: the paper's z' = z + s * mu, for integer `qzeros` kept beside them.
        """
        if self.offset.device != x.device or self.offset.dtype != x.dtype:
            self.offset, self.groups = self.offset.to(x.device, x.dtype), self.groups.to(x.device)
        sums = self.groups.sum_columns(x.reshape(-1, x.shape[-1]))
        return out.add_((sums @ self.offset).view(out.shape))


def load_gptq(path, dtype=torch.bfloat16, device=None, backend="auto", attn_implementation=None,
              trust_remote_code=False):
    """A GPTQ folder as a GPTQModel in evaluation mode.

    dtype float32, which no GPTQModel kernel is declared for, loads in float16, whose scales are those on disk, and
    widens afterwards; backend is then the plain torch one. device: None takes the GPU if there is one, "auto" spreads
    over several. backend: a name of gptqmodel's BACKEND; on a CPU "auto" is the plain torch one, since the others
    compile themselves for minutes first.
    """
    if device in (None, "auto"):
        place = {"device_map": "auto"} if torch.cuda.is_available() else {"device": "cpu"}
    else:
        place = {"device": device}
    if not torch.cuda.is_available():
        # TorchLinear compiles its dequantization at the first forward: 30 s on a CPU for nothing gained.
        torch.compiler.set_stance("force_eager")
        backend = "gptq_torch" if backend == "auto" else backend
    for logger in (setup_logger(), logging.getLogger("tokenicer")):
        logger.setLevel(logging.WARNING)
    wide = dtype == torch.float32
    try:
        kernel = BACKEND.GPTQ_TORCH if wide else BACKEND(backend.lower())
    except ValueError:
        raise UserError(f"--backend {backend} is none of GPTQModel's: {', '.join(b.value for b in BACKEND)}") from None
    model = GPTQModel.load(str(path), backend=kernel, dtype=torch.float16 if wide else dtype,
                           trust_remote_code=trust_remote_code, attn_implementation=attn_implementation, **place)
    if wide:
        model.model.float()
    model.model.config.use_cache = True      # quantization wrote False into config.json
    return model


def _as_plain_gptq(merged, view):
    """A folder of links to `merged` whose config files name the plain GPTQ format that the integers are in."""
    for item in merged.path.resolve().iterdir():
        if item.is_file():
            (view / item.name).symlink_to(item)
    for name in (QUANTIZE_CONFIG, "config.json"):
        if not (view / name).exists():
            continue
        content = json.loads((view / name).read_text())
        quantization = content.get("quantization_config", {}) if name == "config.json" else content
        if quantization.get("checkpoint_format") == LOTA_FORMAT:
            base_format = quantization.pop("lota_base_format")
            for key in ("checkpoint_format", "format"):
                if key in quantization:
                    quantization[key] = base_format
            (view / name).unlink()
            (view / name).write_text(json.dumps(content))
    return view
