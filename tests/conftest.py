"""Shared by the tests: scripts run in this process, and a tiny model with its data, quantized and trained once."""
import os

# Before torch is imported: a second thread only adds contention on tensors this small.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import json
import sys
from pathlib import Path

import pytest
import torch

import LoTA_QAF_main
from LoTA.adapter_folder import AdapterFolder
from LoTA.folders import open_base
from LoTA.lota_merge import merge_folders

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"        # read when the kernels are defined, at import

ROOT = Path(__file__).resolve().parent.parent
# The layers of a random GPTQ model: names, inputs, outputs. The last group of down_proj is short.
LAYERS = {"model.layers.0.self_attn.q_proj": (64, 48), "model.layers.0.mlp.down_proj": (80, 64),
          "model.layers.1.self_attn.q_proj": (64, 48)}
TRAIN = ("--mode", 1, "--lota_qaf", True, "--training_data_name", "viggo", "--lora_r", 8, "--interval_point", 4,
         "--train_batch_size", 16, "--dtype", "float32", "--save_number", 2, "--logging_steps", 2, "--max_steps", 8)
EVALUATE = ("--mode", 2, "--ft_dataset_name", "viggo", "--dtype", "float32", "--max_new_tokens", 40,
            "--eval_batch_size", 16)


def run_main(module, *arguments):
    """Runs a script's main() in this process with a command line."""
    before = sys.argv
    sys.argv = [module.__name__, *map(str, arguments)]
    try:
        return module.main()
    finally:
        sys.argv = before


def parse(*arguments):
    """The settings that a command line asks for: (base, training, evaluation)."""
    return LoTA_QAF_main.parse_args(list(map(str, arguments)))


def merge(adapter, gptq, output):
    """merge_folders() by the folders' paths: {projection: share of integers moved}."""
    return merge_folders(AdapterFolder(adapter), open_base(gptq), output)


def predictions(results):
    """The generated texts in a results file."""
    return [item["prediction"] for item in results["predictions"]]


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """Takes what was imported out of the garbage collector's sight.

    GPTQModel calls gc.collect() several times while it loads a model. With all libraries in sight that is most of the
    time that a tiny model takes.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """The demo's data set, small: a folder with train.csv and test.csv."""
    import demo_data
    folder = tmp_path_factory.mktemp("data")
    run_main(demo_data, "--output", folder, "--train_rows", 1000, "--test_rows", 40)
    return folder


@pytest.fixture(scope="session")
def base_model(tmp_path_factory, demo_data):
    """A tiny Llama that has learned a little, saved as the script saves it."""
    import tiny_base
    folder = tmp_path_factory.mktemp("base")
    run_main(tiny_base, "--data_name", "viggo", "--data_dir", demo_data, "--output", folder, "--hidden_size", 64,
             "--intermediate_size", 160, "--layers", 2, "--heads", 2, "--vocab_size", 400, "--epochs", 4,
             "--batch_size", 16, "--learning_rate", 8e-3)
    return folder


@pytest.fixture(scope="session")
def quantize(tmp_path_factory, base_model, demo_data):
    """A function (bits, *flags) -> GPTQ folder made by gptq_quantize.py; every combination is made once."""
    import gptq_quantize
    made = {}

    def quantize(bits, *flags):
        if (bits, *flags) not in made:
            output = tmp_path_factory.mktemp("gptq")
            run_main(gptq_quantize, "--model", base_model, "--bits", bits, "--group_size", 32, "--calibration",
                     "viggo", "--data_dir", demo_data, "--samples", 8, "--output_dir", output, *flags)
            made[bits, *flags] = next(output.iterdir())
        return made[bits, *flags]
    return quantize


@pytest.fixture(scope="session")
def gptq_2bit(quantize):
    """The tiny model at 2 bits."""
    return quantize(2)


@pytest.fixture(scope="session")
def train(gptq_2bit, base_model, demo_data):
    """A function (folder, *flags) -> the adapter folder that mode 1 made in `folder`.

    The flags of TRAIN with the tiny model and its data; of two equal flags the last one counts.
    """
    def train(folder, *flags):
        base, training, _ = parse(
            *TRAIN, "--quantized_model_dir", gptq_2bit, "--pretrained", base_model, "--data_dir", demo_data,
            "--adapter_path", folder, *flags)
        return LoTA_QAF_main.train(base, training)
    return train


@pytest.fixture(scope="session")
def trained(tmp_path_factory, train):
    """An adapter folder: eight steps, with checkpoints at 4 and 8."""
    return train(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def evaluate(demo_data):
    """A function (output, *flags) -> the content of the JSON file that mode 2 wrote into `output`."""
    def evaluate(output, *flags):
        before = set(output.glob("*.json"))
        base, _, evaluation = parse(*EVALUATE, "--data_dir", demo_data, "--output_path", output, *flags)
        LoTA_QAF_main.evaluate(base, evaluation)
        file, = set(output.glob("*.json")) - before
        return json.loads(file.read_text())
    return evaluate


def forget_checksums(folder):
    """Makes a folder as it was before checksums were recorded."""
    content = json.loads((folder / "lota_config.json").read_text())
    content.pop("sha256")
    content.pop("fingerprint_all")
    (folder / "lota_config.json").write_text(json.dumps(content))
