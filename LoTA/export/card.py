"""The README.md of an exported folder: what it came from, how it was made, how to load it. Writes one file."""
from pathlib import Path

from LoTA.export import Format
from LoTA.folders import LoraFolder, MergedFolder


def write_model_card(folder: Path, name: str, model: MergedFolder | LoraFolder, format: Format,
                     evaluation: dict | None = None) -> None:
    """Writes README.md into `folder`.

    name: what the folder will be called. evaluation: the content of a results file of mode 2, or None. Results of
    lm-eval are not quoted.
    """
    config = model.lota
    base = config.pretrained or config.quantized_model_dir or "unknown"
    base_name = Path(base).name
    public_base = base_name if Path(base).is_absolute() else base       # a path of this machine helps nobody else
    rows = [("Method", f"{config.method} (https://arxiv.org/abs/2505.18724)" if config.method == "LoTA"
             else config.method),
            ("Base model", public_base),
            ("Quantization", f"GPTQ, {model.bits} bits, group size {model.group_size}"),
            ("Rank", config.rank), ("Omega", config.omega),
            ("Offset", "yes" if config.residual and config.method != "LoRA" else "no"),
            ("Training data", config.data_set), ("Optimizer steps", config.training.get("steps")),
            ("Seed", config.seed)]
    moved = (config.training.get("moved") or {}).get("all")
    if moved is not None:
        rows.append(("Integer weights moved by the merge", f"{moved:.4%}"))
    if evaluation and "accuracy" in evaluation:
        low, high = evaluation["interval_95"]
        rows.append((f"Accuracy on {evaluation['data_set']}",
                     f"{evaluation['accuracy']:.1%} ({low:.1%} to {high:.1%}), {evaluation['correct']} of "
                     f"{evaluation['rows']} rows"))
    lines = ["---", f"library_name: {format.library}", f"base_model: {public_base}", "tags:", "- lota-qaf", "- gptq",
             "---", "", f"# {base_name}, {model.bits} bits, fine-tuned with {config.method}", "",
             "| | |", "|---|---|", *(f"| {title} | {value} |" for title, value in rows if value is not None), "",
             format.rounding, "", "## Load it", "", "```python",
             format.loading.format(name=name).rstrip(), "```", "",
             "The SHA-256 of every file is in `lota_export.json`.", ""]
    (folder / "README.md").write_text("\n".join(lines))
