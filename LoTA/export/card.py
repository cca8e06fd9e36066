"""The README.md of exports, merged models and adapters: what it came from, how it was made, how to load it."""
from pathlib import Path

from LoTA.adapter_folder import LotaConfig
from LoTA.export import Format
from LoTA.folders import LoraFolder, MergedFolder
from LoTA.storage import CARD

LOAD_MERGED = """\
# in a checkout of LoTA-QAF, after: pip install -e ".[train]"
from LoTA.adapter import LTA
model = LTA(path="{name}").load()
"""
LOAD_ADAPTER = """\
# in a checkout of LoTA-QAF, after: pip install -e ".[train]"
from LoTA.adapter import LTA
model = LTA(path="{name}").load(base="GPTQ_MODEL")      # merges it into the GPTQ model first
"""
LOAD_LORA = """\
# in a checkout of LoTA-QAF, after: pip install -e ".[train]"
from LoTA.adapter import load_live
from LoTA.adapter_folder import AdapterFolder
model = load_live(AdapterFolder("{name}"), "GPTQ_MODEL")
"""


def write_model_card(folder: Path, name: str, model: MergedFolder | LoraFolder, format: Format,
                     evaluation: dict | None = None) -> None:
    """Writes the README.md of an export into `folder`.

    name: what the folder will be called. evaluation: the content of a results file of mode 2, or None. Results of
    lm-eval are not quoted.
    """
    _write(folder, name, model.lota, model.bits, model.group_size, format.rounding, format.loading, format.library,
           "The SHA-256 of every file is in `lota_export.json`.", evaluation)


def write_merged_card(folder: Path, name: str, config: LotaConfig, bits: int, group_size: int) -> None:
    """Writes the README.md of a merged model into `folder`. name: what the folder will be called."""
    text = ("The integers are the merged ones, and `lota/` holds the offset of every group. Stock GPTQ tools refuse "
            "the folder, because they would drop the offsets; `python -m LoTA.export` writes other formats."
            if config.has_offsets else "It is a plain GPTQ checkpoint, which GPTQ engines open as it is.")
    _write(folder, name, config, bits, group_size, text, LOAD_MERGED, "gptqmodel",
           "The SHA-256 of every file is in `lota/lota_config.json`; `python -m LoTA.check` compares them.")


def write_adapter_card(folder: Path, config: LotaConfig) -> None:
    """Writes the README.md of an adapter into `folder`, in the place of PEFT's form."""
    text = ("It merges into its GPTQ model without loss: `python -m LoTA.lota_merge`." if config.method != "LoRA" else
            "It does not merge into a GPTQ model, because its sum is off the grid.")
    _write(folder, folder.name, config, config.bits, config.group_size, f"This is an adapter. {text}",
           LOAD_LORA if config.method == "LoRA" else LOAD_ADAPTER, "peft",
           "The SHA-256 of its files, its settings and the fingerprints of its GPTQ model are in `lota_config.json`; "
           "`python -m LoTA.check` compares them.")


def _write(folder: Path, name: str, config: LotaConfig, bits: int, group_size: int, text: str, loading: str,
           library: str, checksums: str, evaluation: dict | None = None) -> None:
    base = config.pretrained or config.quantized_model_dir or "unknown"
    base_name = Path(base).name
    public_base = base_name if Path(base).is_absolute() else base       # a path of this machine helps nobody else
    paper = {"LoTA": " (https://arxiv.org/abs/2505.18724)", "LR-QAT": " (after https://arxiv.org/abs/2406.06385)"}
    rows = [("Method", config.method + paper.get(config.method, "")),
            ("Base model", public_base),
            ("Quantization", f"GPTQ, {bits} bits, group size {group_size}"),
            ("Rank", config.rank), ("Omega", config.omega),
            ("Offset", "yes" if config.has_offsets and config.method != "LoRA" else "no"),
            ("Alpha", config.settings.get("lora_alpha") if config.method == "LR-QAT" else None),
            ("Dither", config.dither if config.method == "LR-QAT" else None),
            ("Learned scales", "yes" if config.learned_scales else None), ("Sigma", _sigma(config)),
            ("Tuned before", ", ".join(f"{record['method']} on {record['data_set'] or 'unknown data'}"
                                       for record in config.history) or None),
            ("Training data", config.data_set), ("Teacher", _teacher(config)),
            ("Optimizer steps", config.training.get("steps")), ("Seed", config.seed)]
    moved = (config.training.get("moved") or {}).get("all")
    if moved is not None:
        rows.append(("Integer weights moved by the merge", f"{moved:.4%}"))
    if evaluation and "accuracy" in evaluation:
        low, high = evaluation["interval_95"]
        rows.append((f"Accuracy on {evaluation['data_set']}",
                     f"{evaluation['accuracy']:.1%} ({low:.1%} to {high:.1%}), {evaluation['correct']} of "
                     f"{evaluation['rows']} rows"))
    lines = ["---", f"library_name: {library}", f"base_model: {public_base}", "tags:", "- lota-qaf", "- gptq",
             "---", "", f"# {base_name}, {bits} bits, fine-tuned with {config.method}", "",
             "| | |", "|---|---|", *(f"| {title} | {value} |" for title, value in rows if value is not None), "",
             text, "", "## Load it", "", "```python",
             loading.format(name=name).rstrip(), "```", "",
             checksums, ""]
    (folder / CARD).write_text("\n".join(lines))


def _teacher(config: LotaConfig) -> str | None:
    """The model that was distilled, its tokens and its share of the loss. None where there was none."""
    if config.settings.get("distill", "none") == "none":
        return None
    name = config.settings["distill_model"]
    name = Path(name).name if Path(name).is_absolute() else name
    return f"{name}, {config.settings['distill']}, weight {config.settings['distill_weight']}"


def _sigma(config: LotaConfig) -> str | None:
    """The share of entries that a step leaves alone: at the start, at 80 %, at the end. None where it had none."""
    values = [config.settings.get(name) for name in ("filter_ratio", "min_grad", "filter_upper")]
    return ", ".join(map(str, values)) if config.method == "LoTA" and None not in values else None
