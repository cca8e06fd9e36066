"""The formats in which other engines open a merged model. Each is one entry of FORMATS.

This file imports the standard library only, because --help shows the formats and must not wait for torch. A format's
own module is imported when the format is used. LoTA.export.run does the exporting.
"""
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class Format:
    """One format.

    module: the name of the module that has
        write(model, folder, dtype)  writes the model into the folder. Raises UserError where the format cannot hold it.
        check(model, folder, dtype)  reads the folder back. Raises RuntimeError where it differs from the model.
      model: a LoTA.folders.MergedFolder, or a LoraFolder where holds_lora. folder: the output folder. dtype: the torch
      dtype of dense weights, or None.
    summary: what the format is and what it rounds, for --help.
    rounding: the same for the model card.
    loading: the lines of Python that load it, for the model card. {name} is the folder's name.
    holds_lora: whether it can hold the dequantized weights plus a LoRA, which are off the grid.
    library: the model card's library_name.
    """
    module: str
    summary: str
    rounding: str
    loading: str
    holds_lora: bool = False
    library: str = "transformers"

    def load(self) -> ModuleType:
        """The format's module."""
        return import_module(self.module)


FORMATS = {
    "gptq": Format(
        module="LoTA.export.gptq",
        summary="a plain GPTQ checkpoint, for models without offset; nothing is rounded",
        rounding="Nothing is rounded: these are the merged integers.",
        loading="""\
# transformers (pip install optimum gptqmodel)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")

# GPTQModel
from gptqmodel import GPTQModel
model = GPTQModel.load("{name}")

# vLLM, SGLang
#   vllm serve {name}
#   python -m sglang.launch_server --model-path {name}
"""),
    "peft": Format(
        module="LoTA.export.peft_adapter",
        summary="a plain GPTQ checkpoint, and in its subfolder adapter the offset as a float32 LoRA whose rank is the "
                "number of groups; nothing is rounded",
        rounding="Nothing is rounded: the integers are the merged ones, and `adapter/` holds the offset of every group "
                 "in float32, as a LoRA whose rank is the number of groups.",
        loading="""\
# PEFT on transformers (pip install optimum gptqmodel)
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}", device_map="auto"), "{name}/adapter")

# GPTQModel
import json
from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Lora
rank = json.load(open("{name}/adapter/adapter_config.json"))["r"]
model = GPTQModel.load("{name}", adapter=Lora(path="{name}/adapter", rank=rank))
"""),
    "gguf": Format(
        module="LoTA.export.gguf",
        summary="Q4_1 blocks for llama.cpp, for 2 to 4 bits: d * integer + m; the integers are kept, and d = s and "
                "m = s * (mu - z) are float16",
        rounding="Every integer is the merged model's. A block's scale is the group's; its minimum, s (mu - z), "
                 "is rounded to float16. llama.cpp rounds the activations to 8 bits, as with every quantized model.",
        loading="""\
# llama.cpp, through llama-cpp-python
from llama_cpp import Llama
model = Llama("{name}/model-q4_1.gguf")

# llama.cpp itself
#   llama-cli -m {name}/model-q4_1.gguf

# transformers (pip install gguf): dequantizes
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", gguf_file="model-q4_1.gguf")
""",
        library="gguf"),
    "dense": Format(
        module="LoTA.export.dense",
        summary="weights without quantization; each is rounded to --dtype",
        rounding="Every weight is rounded once, to the dtype of this folder.",
        loading="""\
# transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")

# vLLM
#   vllm serve {name}
""",
        holds_lora=True),
}
