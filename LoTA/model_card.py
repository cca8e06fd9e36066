"""The README.md of an exported folder: where the model comes from, how it was made, how to load it. Writes one file."""
from pathlib import Path

LOADING = {
    "gptq": """# transformers (pip install optimum gptqmodel)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")

# GPTQModel
from gptqmodel import GPTQModel
model = GPTQModel.load("{name}")

# vLLM, SGLang
#   vllm serve {name}
#   python -m sglang.launch_server --model-path {name}
""",
    "peft": """# PEFT on transformers (pip install optimum gptqmodel)
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}", device_map="auto"), "{name}/adapter")

# GPTQModel
from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Lora
model = GPTQModel.load("{name}", adapter=Lora(path="{name}/adapter", rank={rank}))
""",
    "gguf": """# llama.cpp, through llama-cpp-python
from llama_cpp import Llama
model = Llama("{name}/model-q4_1.gguf")

# llama.cpp itself
#   llama-cli -m {name}/model-q4_1.gguf

# transformers (pip install gguf): dequantizes
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", gguf_file="model-q4_1.gguf")
""",
    "dense": """# transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")

# vLLM
#   vllm serve {name}
""",
}
ROUNDING = {
    "gptq": "Nothing is rounded: these are the merged integers.",
    "peft": "Nothing is rounded: the integers are the merged ones, and `adapter/` holds the offset of every group in "
            "float32, as a LoRA whose rank is the number of groups.",
    "gguf": "Every integer is the merged model's. A block's scale is the group's; its minimum, s (mu - z), is rounded "
            "to float16. llama.cpp rounds the activations to 8 bits as it does with every quantized model.",
    "dense": "Every weight is rounded once, to the dtype of this folder.",
}


def write_model_card(folder, model, format, evaluation=None):
    """Writes README.md. model: the folder it was made from, with a LotaConfig as `lota`; evaluation: the content of a
    results file of mode 2, or None."""
    config = model.lota
    base = config.pretrained or config.quantized_model_dir or "unknown"
    lines = ["---", "library_name: " + ("gguf" if format == "gguf" else "transformers"),
             f"base_model: {Path(base).name if Path(base).is_absolute() else base}", "tags:", "- lota-qaf", "- gptq",
             "---", "", f"# {Path(base).name}, {model.bits} bits, fine-tuned with {config.method}", ""]
    rows = [("Method", f"{config.method} (https://arxiv.org/abs/2505.18724)" if config.method == "LoTA"
             else config.method),
            ("Base model", Path(base).name if Path(base).is_absolute() else base),
            ("Quantization", f"GPTQ, {model.bits} bits, group size {model.group_size}"),
            ("Rank", config.rank), ("Omega", config.omega),
            ("Offset", "yes" if config.residual else "no"),
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
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value is not None), "",
              ROUNDING[format], "", "## Load it", "", "```python",
              LOADING[format].format(name=folder_name(folder), rank=config.rank).rstrip(), "```", "",
              "The SHA-256 of every file is in `lota_export.json`.", ""]
    (folder / "README.md").write_text("\n".join(lines))


def folder_name(folder):
    """The name that the temporary `folder` will have: whole_folder adds .NAME.PID.tmp."""
    name = folder.name
    return name.removeprefix(".").rsplit(".", 2)[0] if name.endswith(".tmp") else name
