"""Folders that the code wrote before it was refactored: read, evaluated, merged and resumed with the same results.

tests/fixtures/make.sh made tests/fixtures/old. expected.json there has what the old code answered.
"""
import json
import shutil

import pytest
import torch
from conftest import ROOT, parse, predictions
from safetensors.torch import load_file

import LoTA_QAF_main
from LoTA.adapter_folder import AdapterFolder, LotaConfig
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.lota_merge import merge_folders
from LoTA.storage import sha256

OLD = ROOT / "tests/fixtures/old"
EXPECTED = json.loads((OLD / "expected.json").read_text())
COMMON = ("--data_dir", OLD / "data", "--dtype", "float32", "--quantized_model_dir", OLD / "gptq", "--device_map",
          "cpu")
EVALUATE = ("--mode", 2, "--ft_dataset_name", "viggo", "--max_new_tokens", 24, "--answer_loss", True)
# There is no folder "base" any more. The tokenizer is in the GPTQ folder.
TRAIN = ("--mode", 1, "--pretrained", "base", "--training_data_name", "viggo", "--report_to", "none", "--lora_r", 4,
         "--train_batch_size", 8, "--max_steps", 8, "--logging_steps", 2, "--gradient_checkpointing", False, "--seed",
         42)
PUBLISHED = ("--lota_qaf", True, "--interval_point", 2, "--save_number", 2)
# The prompts of that time. A resumed run and mode 2 find them by themselves.
LAYOUT = ("--prompt_layout", "system")
FLAGS = {"published": PUBLISHED,
         "learned": ("--method", "lota", "--recipe", "learned", "--interval_point", 1, "--save_strategy", "no"),
         "qalora": ("--method", "qalora", "--learning_rate", 1e-2, "--save_strategy", "no"),
         "lora": ("--method", "lora", "--learning_rate", 1e-2, "--save_strategy", "no"),
         "residual_false": ("--method", "lota", "--residual", False, "--interval_point", 1, "--save_strategy", "no")}
MERGED = {"published": "merged_published", "learned": "merged_learned", "residual_false": "merged_plain"}

same_cpu = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != EXPECTED["cpu"],
    reason=f"equal bytes need the kernels that torch has for {EXPECTED['cpu']}")


@pytest.fixture(scope="module", autouse=True)
def old_folders_stay():
    """No test writes into the old folders."""
    def content():
        return {file: sha256(file) for file in sorted(OLD.rglob("*")) if file.is_file()}
    before = content()
    yield
    assert content() == before


def evaluate(output, *flags):
    """The content of the results file of mode 2."""
    base, _, evaluation = parse(*EVALUATE, *COMMON, "--output_path", output, *flags)
    LoTA_QAF_main.evaluate(base, evaluation)
    file, = output.glob("*.json")
    return json.loads(file.read_text())


def train(folder, *flags):
    """The adapter folder of mode 1."""
    base, training, _ = parse(*TRAIN, *COMMON, "--adapter_path", folder, *flags)
    return LoTA_QAF_main.train(base, training)


def metrics_of(folder):
    """The lines of metrics.jsonl. A resumed run has the same in another order of keys."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_adapter(new, old):
    """A and B are equal; so is all else where there is no mu. The old code had mu inside the weight, and rounded so.

    It wrote ternary matrices as float32.
    """
    tensors, before = (load_file(folder / "adapter_model.safetensors") for folder in (new, old))
    assert tensors.keys() == before.keys()
    for name, tensor in tensors.items():
        if "lora_offset" in name or "lora_scale" in name:
            torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(tensor.float(), before[name]), name


def assert_same_metrics(new, old):
    """Equal to float32's rounding."""
    for row, before in zip(metrics_of(new), metrics_of(old), strict=True):
        assert row == pytest.approx(before, rel=1e-5)


def check(results, name):
    """Whether results are those that expected.json has under `name`."""
    expected = EXPECTED["results"][name]
    assert predictions(results) == expected["predictions"]
    assert results["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert results.get("moved") == expected["moved"]


@pytest.mark.parametrize("name, flags", [
    ("gptq", LAYOUT),
    ("published_live", ("--load_adapter", OLD / "published", "--merge", False)),
    ("published_merged", ("--load_adapter", OLD / "published")),
    ("learned_live", ("--load_adapter", OLD / "learned", "--merge", False)),
    ("residual_false_live", ("--load_adapter", OLD / "residual_false", "--merge", False)),
    ("qalora_live", ("--load_adapter", OLD / "qalora", "--merge", False)),
    ("qalora_merged", ("--load_adapter", OLD / "qalora")),
    ("lora_live", ("--load_adapter", OLD / "lora")),
    # The merged folders. Their recorded shares are those that the old merge printed.
    ("published_merged", ("--load_adapter", OLD / "merged_published")),
    ("learned_merged", ("--load_adapter", OLD / "merged_learned")),
    ("residual_false_merged", ("--load_adapter", OLD / "merged_plain"))])
def test_old_folders_answer_as_they_did(tmp_path, name, flags):
    check(evaluate(tmp_path, *flags), name)


def test_a_merged_folder_without_offsets_is_still_a_plain_gptq_model(tmp_path):
    """Opened as any GPTQ model, without its subfolder of ours."""
    plain = shutil.copytree(OLD / "merged_plain", tmp_path / "plain", ignore=shutil.ignore_patterns("lota"))
    results = evaluate(tmp_path, "--quantized_model_dir", plain, *LAYOUT)
    assert predictions(results) == EXPECTED["results"]["residual_false_merged"]["predictions"]


@pytest.mark.parametrize("name", MERGED)
def test_merging_again_gives_the_same_bytes(tmp_path, name):
    """All files of tensors are equal, and so are the shares that moved."""
    moved = merge_folders(AdapterFolder(OLD / name), GPTQFolder(OLD / "gptq"), tmp_path / "merged")
    old = OLD / MERGED[name]
    before, after = ({file.relative_to(folder): sha256(file) for file in folder.rglob("*.safetensors")}
                     for folder in (old, tmp_path / "merged"))
    assert before == after and len(before) == (1 if name == "residual_false" else 2)
    assert moved == EXPECTED["results"][f"{name}_merged"]["moved"] == MergedFolder(old).lota.training["moved"]


@pytest.mark.parametrize("name", FLAGS)
def test_old_records_are_read(name):
    """Every field of the old lota_config.json, and the adapter fits the model that it was trained on."""
    adapter, record = AdapterFolder(OLD / name), json.loads((OLD / name / "lota_config.json").read_text())
    assert vars(adapter.config) == vars(LotaConfig(**record)) and adapter.config.quantized_model_dir == "gptq"
    adapter.check_match(GPTQFolder(OLD / "gptq"))
    assert len(adapter.modules) == 7


@same_cpu
def test_resuming_from_an_old_checkpoint_gives_the_same_adapter(tmp_path):
    adapter = train(tmp_path, *PUBLISHED, "--adapter_ckpt", OLD / "published/checkpoint-4")
    assert_same_adapter(adapter, OLD / "published")
    # What was logged before the checkpoint is in it, so the metrics are those of the whole run.
    assert_same_metrics(adapter, OLD / "published")


@same_cpu
@pytest.mark.parametrize("name", FLAGS)
def test_training_from_scratch_gives_the_same_adapter(tmp_path, name):
    """The same adapter, in a folder of the same name but for the run's time and memory, with the same checkpoint."""
    adapter = train(tmp_path, *FLAGS[name], *LAYOUT)
    assert_same_adapter(adapter, OLD / name)
    assert adapter.name.split("_")[:7] == EXPECTED["names"][name].split("_")[:7]
    old, new = LotaConfig.load(OLD / name), LotaConfig.load(adapter)
    for fact in ("method", "omega", "residual", "offset_scale", "learned_scales", "bits", "group_size", "rank",
                 "fingerprint", "data_set", "seed"):
        assert getattr(new, fact) == getattr(old, fact), fact
    assert new.training["moved"] == old.training["moved"] if "moved" in old.training else "moved" not in new.training
    if name == "published":
        assert_same_adapter(adapter / "checkpoint-4", OLD / "published/checkpoint-4")
        assert_same_metrics(adapter, OLD / "published")
