"""The command line from end to end on a tiny GPTQ model: train, resume, interrupt, merge, evaluate, and refuse."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, run_main
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import LoTA_QAF_main
from LoTA import UserError
from LoTA.folders import GPTQFolder, LotaConfig, MergedFolder

TRAIN = ("--mode", 1, "--lota_qaf", True, "--training_data_name", "viggo", "--lora_r", 8, "--interval_point", 4,
         "--train_batch_size", 16, "--dtype", "float32", "--save_number", 2, "--logging_steps", 2)
EVALUATE = ("--mode", 2, "--ft_dataset_name", "viggo", "--dtype", "float32", "--max_new_tokens", 40,
            "--eval_batch_size", 16)


def main(*arguments):
    return run_main(LoTA_QAF_main, *arguments)


@pytest.fixture(scope="session")
def gptq(quantize):
    return quantize(2)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, gptq, base_model, demo_data):
    """An adapter folder made by mode 1, eight steps."""
    folder = tmp_path_factory.mktemp("adapters")
    main(*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data, "--max_steps", 8,
         "--adapter_path", folder)
    adapter, = folder.iterdir()
    return adapter


def evaluate(demo_data, output, *arguments):
    """Mode 2; the JSON file it wrote."""
    before = set(output.glob("*.json"))
    main(*EVALUATE, "--data_dir", demo_data, "--output_path", output, *arguments)
    file, = set(output.glob("*.json")) - before
    return json.loads(file.read_text())


def test_the_adapter_folder(trained, gptq):
    """Named as users know it; ternary matrices that training moved; everything recorded."""
    parts = trained.name.split("_")
    assert parts[1:7] == ["int2", "LoTA", "4", "0.950", "0.999", "viggo"] and parts[0].endswith("M")
    tensors = load_file(trained / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    assert all(set(t.unique().tolist()) <= {-1.0, 0.0, 1.0} for t in tensors.values())
    assert all(t.abs().sum() > 0 for n, t in tensors.items() if "lora_B" in n)      # B started at zero
    config = LotaConfig.load(trained)
    assert (config.method, config.omega, config.residual, config.rank, config.bits) == ("LoTA", 4.0, True, 8, 2)
    assert (config.group_size, config.offset_scale, config.seed, config.data_set) == (32, "omega", 42, "viggo")
    assert config.fingerprint == GPTQFolder(gptq).fingerprint()
    assert config.training["steps"] == 8 and 0 <= config.training["moved"]["all"] < 1
    assert json.loads((trained / "log_history.json").read_text())[-2]["sigma"] == 0.9999


def test_only_the_adapter_is_saved_and_checkpoints_are_whole(trained):
    names = sorted(p.name for p in trained.iterdir() if p.is_dir())
    assert names == ["checkpoint-4", "checkpoint-8"]
    for name in names:
        assert (trained / name / "lota_config.json").exists() and (trained / name / "optimizer.pt").exists()


def test_the_report_beside_the_adapter(trained, gptq, base_model, demo_data, tmp_path):
    """metrics.jsonl has a line for every logging step; its last numbers are those of the adapter that was saved (dW: of
    about 64 rows a layer); and a run in which nothing moves says so."""
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows[0]["loss"] > rows[-1]["loss"] > 0 and all(row["flips_B"] > 0 for row in rows)
    tensors, config = load_file(trained / "adapter_model.safetensors"), LotaConfig.load(trained)
    moved = config.training["moved"]
    assert rows[-1]["moved"] == moved["all"] > 0 and len(moved) == 8
    assert all(rows[-1][f"moved_{name}"] == share for name, share in moved.items() if name != "all")
    entries = sum(t.numel() for t in tensors.values())
    for value, name in ((-1, "minus"), (0, "zeros"), (1, "plus")):
        assert rows[-1][name] == pytest.approx(sum(int((t == value).sum()) for t in tensors.values()) / entries)
    largest = max(float((A.t()[::max(1, A.shape[1] // 64)].double() @ tensors[k.replace("lora_A", "lora_B")].t()
                         .double()).abs().max()) for k, A in tensors.items() if "lora_A" in k)
    assert rows[-1]["dW_max"] == pytest.approx(largest / 4) and 0 <= rows[-1]["dW_median"] < rows[-1]["dW_99"]
    assert rows[-1]["mu"] > 0 and "of the integer weights moved" in (trained / "report.md").read_text()
    assert (trained / "report.png").read_bytes().startswith(b"\x89PNG")

    main(*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data, "--max_steps", 3,
         "--adapter_path", tmp_path, "--interval_point", 7.5, "--save_strategy", "no")
    still, = tmp_path.iterdir()
    assert "No integer weight moved" in (still / "report.md").read_text()
    rows = [json.loads(line) for line in (still / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["moved"]) for row in rows] == [(2, 0.0), (3, 0.0)]        # the last step has its line


def test_resuming_goes_on_where_it_was(trained, tmp_path, gptq, base_model, demo_data):
    """A run resumed at step 4 ends with the very adapter and metrics of the run that was not interrupted: sigma,
    batches, all. At its end there is nothing to resume: Trainer would take a step too many."""
    home = tmp_path / "home"                    # a checkpoint may lie anywhere; nothing around it is touched
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    shutil.copytree(trained / "checkpoint-4", home / "checkpoint-4")
    arguments = (*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data,
                 "--max_steps", 8, "--adapter_path", tmp_path / "a", "--adapter_ckpt")
    main(*arguments, home / "checkpoint-4")
    assert sorted(p.name for p in home.iterdir()) == ["checkpoint-4", "thesis.txt"]
    resumed, = (tmp_path / "a").iterdir()
    one, two = load_file(trained / "adapter_model.safetensors"), load_file(resumed / "adapter_model.safetensors")
    at_4 = load_file(trained / "checkpoint-4/adapter_model.safetensors")
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], at_4[n]) for n in one)
    metrics = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
               for run in (resumed, trained)]
    assert metrics[0] == metrics[1]
    with pytest.raises(UserError, match="nothing to resume: the checkpoint is of step 8"):
        main(*arguments, trained / "checkpoint-8")


def test_a_checkpoint_that_is_not_whole_is_refused(trained, tmp_path, gptq, base_model, demo_data):
    broken = shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    (broken / "lota_config.json").unlink()
    with pytest.raises(UserError, match="not whole"):
        main(*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data,
             "--max_steps", 8, "--adapter_path", tmp_path, "--adapter_ckpt", broken)


@pytest.mark.parametrize("arguments, what", [
    (("--interval_point", 3), "omega"), (("--lora_r", 12), "rank"), (("--residual", False), "residual"),
    (("--offset_scale", "paper"), "offset_scale"), (("--lota_qaf", False), "method")])
def test_a_checkpoint_of_other_settings_is_refused(arguments, what, trained, tmp_path, gptq, base_model, demo_data):
    with pytest.raises(UserError, match=f"its {what} is"):
        main(*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data,
             "--max_steps", 8, "--adapter_path", tmp_path, "--adapter_ckpt", trained / "checkpoint-4", *arguments)


def test_a_checkpoint_of_another_base_is_refused(quantize, trained, tmp_path, base_model, demo_data):
    with pytest.raises(UserError, match="its bits is 2, not 4"):
        main(*TRAIN, "--quantized_model_dir", quantize(4, "--sym"), "--pretrained", base_model, "--data_dir", demo_data,
             "--max_steps", 8, "--adapter_path", tmp_path, "--adapter_ckpt", trained / "checkpoint-4")


def train_once(folder, gptq, base_model, demo_data, *arguments):
    main(*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data, "--max_steps", 8,
         "--save_strategy", "no", "--adapter_path", folder, *arguments)
    adapter, = folder.iterdir()
    return adapter


def test_gradient_checkpointing_changes_nothing(trained, tmp_path, gptq, base_model, demo_data):
    """The recomputed forward is the first one: the same adapter, entry by entry."""
    without = train_once(tmp_path, gptq, base_model, demo_data, "--gradient_checkpointing", False)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (trained, without))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_training_in_bfloat16_merges_what_it_trained(tmp_path, gptq, base_model, demo_data):
    """The default dtype: the layers multiply with the scales that are on disk, so the merge has the same weights."""
    from LoTA.adapter import load_live
    from LoTA.layer import CustomLoraLinear
    from LoTA.lota_merge import merge_folders
    from LoTA.ternary import dequantize
    adapter = train_once(tmp_path / "a", gptq, base_model, demo_data, "--dtype", "bfloat16", "--interval_point", 1)
    merge_folders(adapter, gptq, tmp_path / "merged")
    merged = MergedFolder(tmp_path / "merged")
    model = load_live(adapter, gptq, dtype=torch.bfloat16)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules()
              if isinstance(m, CustomLoraLinear)}
    assert len(layers) == 14 and model.dtype == torch.bfloat16
    for name, layer in layers.items():
        assert torch.equal(layer.adapted_weight(torch.float32), dequantize(merged.grid(name), merged.offset(name)))
    live = evaluate(demo_data, tmp_path, "--load_adapter", adapter, "--merge", False, "--dtype", "bfloat16")
    again = evaluate(demo_data, tmp_path, "--load_adapter", adapter, "--dtype", "bfloat16")
    same = sum(a["prediction"] == b["prediction"] for a, b in zip(live["predictions"], again["predictions"],
                                                                  strict=True))
    assert same >= 30                           # bfloat16 rounds the offset's product apart from the weight's


def test_published_adapter_through_mode_2(trained, demo_data, gptq, tmp_path):
    """No lota_config.json: a folder named as the published scripts name it, its checkpoint, and a renamed one."""
    named = tmp_path / "2M_int2_LoTA_4_0.950_0.999_viggo_1234_20480_05_101112"
    files = ("adapter_config.json", "adapter_model.safetensors")
    renamed = tmp_path / "best"
    for folder in (named, named / "checkpoint-4", renamed):
        folder.mkdir()
        for file in files:
            shutil.copy(trained / file, folder)
    want = [p["prediction"] for p in evaluate(demo_data, tmp_path, "--load_adapter", trained)["predictions"]]
    for folder, flags in ((named, ()), (named / "checkpoint-4", ()), (renamed, ("--load_ada_interval", 4))):
        got = evaluate(demo_data, tmp_path, "--load_adapter", folder, "--quantized_model_dir", gptq, *flags)
        assert [p["prediction"] for p in got["predictions"]] == want
    from LoTA.folders import read_adapter
    assert read_adapter(renamed).omega == 6.0 and read_adapter(named).omega == 4.0


def test_live_and_merged_give_the_same_predictions(trained, demo_data, tmp_path):
    live = evaluate(demo_data, tmp_path, "--load_adapter", trained, "--merge", False)
    merged = evaluate(demo_data, tmp_path, "--load_adapter", trained, "--merged_path", tmp_path / "merged")
    again = evaluate(demo_data, tmp_path / "again", "--load_adapter", tmp_path / "merged")
    with open(demo_data / "test.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    for results in (live, merged, again):
        assert [p["label"] for p in results["predictions"]] == [r["mr"] for r in rows]
        assert all(r["ref"] in p["prompt"] for p, r in zip(results["predictions"], rows, strict=True))
        assert results["accuracy"] == sum(p["correct"] for p in results["predictions"]) / 40
        assert results["settings"]["baseConfig"]["lora_r"] == (None if results is again else 8)
    texts = [[p["prediction"] for p in r["predictions"]] for r in (live, merged, again)]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 5
    assert merged["moved"] == LotaConfig.load(trained).training["moved"]


def test_models_without_adapter(gptq, base_model, demo_data, tmp_path):
    """The 16-bit model and the bare GPTQ model answer for themselves."""
    dense = evaluate(demo_data, tmp_path, "--auto_gptq", "none", "--pretrained", base_model)
    bare = evaluate(demo_data, tmp_path, "--quantized_model_dir", gptq)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    for item in dense["predictions"][:5]:
        ids = tokenizer(item["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip() == item["prediction"]
    assert [p["prediction"] for p in bare["predictions"]] != [p["prediction"] for p in dense["predictions"]]


def test_without_offset_the_merged_model_is_plain_gptq(gptq, base_model, demo_data, tmp_path):
    """--residual False with kappa as in the paper, from training to stock GPTQModel."""
    main(*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data, "--max_steps", 6,
         "--adapter_path", tmp_path / "a", "--residual", False, "--interval_point", 1, "--save_strategy", "no")
    adapter, = (tmp_path / "a").iterdir()
    live = evaluate(demo_data, tmp_path, "--load_adapter", adapter, "--merge", False)
    merged = evaluate(demo_data, tmp_path, "--load_adapter", adapter, "--merged_path", tmp_path / "merged")
    (tmp_path / "plain").mkdir()
    for file in (tmp_path / "merged").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / "plain")
    bare = evaluate(demo_data, tmp_path, "--quantized_model_dir", tmp_path / "plain")
    texts = [[p["prediction"] for p in r["predictions"]] for r in (live, merged, bare)]
    assert texts[0] == texts[1] == texts[2]
    assert merged["moved"]["all"] > 0 and not MergedFolder(tmp_path / "merged").offset_modules()


def test_lora_baseline(quantize, gptq, base_model, demo_data, tmp_path):
    """--lota_qaf False: a 16-bit LoRA on the GPTQ model, trained, saved, evaluated live, never merged."""
    main(*TRAIN, "--lota_qaf", False, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir",
         demo_data, "--max_steps", 4, "--adapter_path", tmp_path / "a", "--learning_rate", 1e-3)
    adapter, = (tmp_path / "a").iterdir()
    assert "_int2_LoRA_0.001_8_16_viggo_" in adapter.name
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert any(((t != 0) & (t.abs() != 1)).any() for t in tensors.values())
    with pytest.raises(UserError, match="2 bits"):
        evaluate(demo_data, tmp_path, "--load_adapter", adapter, "--quantized_model_dir", quantize(4, "--sym"))
    results = evaluate(demo_data, tmp_path, "--load_adapter", adapter)
    assert results["rows"] == 40 and results["settings"]["baseConfig"]["lota_qaf"] is False
    from LoTA.lota_merge import merge_folders
    with pytest.raises(UserError, match="LoRA adapter"):
        merge_folders(adapter, gptq, tmp_path / "merged")


def test_qalora_baseline_merges_and_exports(gptq, base_model, demo_data, tmp_path):
    """--method qalora, from training to an export with its evaluation in the card: live = merged = dense."""
    main(*TRAIN, "--lota_qaf", False, "--method", "qalora", "--quantized_model_dir", gptq, "--pretrained", base_model,
         "--data_dir", demo_data, "--max_steps", 4, "--adapter_path", tmp_path / "a", "--learning_rate", 1e-2)
    adapter, = (tmp_path / "a").iterdir()
    assert "_int2_QA-LoRA_0.01_8_16_viggo_" in adapter.name and LotaConfig.load(adapter).residual
    live = evaluate(demo_data, tmp_path, "--load_adapter", adapter, "--merge", False)
    merged = evaluate(demo_data, tmp_path, "--load_adapter", adapter, "--merged_path", tmp_path / "merged",
                      "--export", "dense", "--export_path", tmp_path / "dense")
    dense = evaluate(demo_data, tmp_path, "--auto_gptq", "none", "--pretrained", tmp_path / "dense")
    texts = [[p["prediction"] for p in r["predictions"]] for r in (live, merged)]
    assert texts[0] == texts[1] and merged["moved"]["all"] == 0
    assert sum(p["correct"] for p in dense["predictions"]) == pytest.approx(live["correct"], abs=4)    # bfloat16
    assert f"{merged['correct']} of 40 rows" in (tmp_path / "dense/README.md").read_text()


def test_learned_offsets_scales_and_momentum_merge_what_they_trained(gptq, base_model, demo_data, tmp_path):
    """--offset_scale learned --learned_scales --momentum, saved by PEFT, resumed from a checkpoint, live = merged, and
    the merged folder has the offsets and scales that were learned."""
    flags = (*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data,
             "--max_steps", 6, "--offset_scale", "learned", "--learned_scales", True, "--momentum", 0.9,
             "--offset_lr", 0.02, "--scale_lr", 0.05, "--interval_point", 2)
    main(*flags, "--adapter_path", tmp_path / "a", "--save_number", 3)
    adapter, = (tmp_path / "a").iterdir()
    main(*flags, "--adapter_path", tmp_path / "b", "--adapter_ckpt", adapter / "checkpoint-4", "--save_strategy", "no")
    resumed, = (tmp_path / "b").iterdir()
    one, other = (load_file(f / "adapter_model.safetensors") for f in (adapter, resumed))
    assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)
    offsets = {k: v for k, v in one.items() if k.endswith(".lora_offset")}
    assert len(offsets) * 4 == len(one) and all(v.abs().max() > 0.01 for v in offsets.values())
    live = evaluate(demo_data, tmp_path, "--load_adapter", adapter, "--merge", False)
    merged = evaluate(demo_data, tmp_path, "--load_adapter", adapter, "--merged_path", tmp_path / "merged")
    assert [p["prediction"] for p in live["predictions"]] == [p["prediction"] for p in merged["predictions"]]
    folder = MergedFolder(tmp_path / "merged")
    for name in folder.modules:
        assert torch.equal(folder.offset(name), offsets[f"base_model.model.{name}.lora_offset"])
        change, before = one[f"base_model.model.{name}.lora_scale"], GPTQFolder(gptq).tensor(f"{name}.scales")
        assert change.abs().max() > 0.01
        assert torch.equal(folder.tensor(f"{name}.scales"), (before.float() * (1 + change)).half())
    last = json.loads((adapter / "metrics.jsonl").read_text().splitlines()[-1])
    means = [v.abs().mean() for k, v in one.items() if k.endswith(".lora_scale")]
    assert last["scales"] == pytest.approx(float(sum(means)) / len(means), rel=1e-5)
    assert merged["moved"]["all"] > 0


def test_recipes_fill_in_what_is_not_given(monkeypatch):
    """Each recipe's settings; a flag that is given counts, its default too."""
    def parsed(name, *given):
        monkeypatch.setattr(sys, "argv", ["LoTA_QAF_main.py", "--recipe", name, *map(str, given)])
        base, training, _ = LoTA_QAF_main.parse_args()
        return (training.interval_point, training.momentum, training.filter_ratio, base.offset_scale, base.residual,
                base.learned_scales, training.offset_lr, training.scale_lr)
    assert parsed("published") == (None, 0.0, None, "omega", True, False, 0.007, 0.03)
    assert parsed("learned") == (None, 0.9, None, "learned", True, True, 0.007, 0.03)
    assert parsed("steps") == (None, 0.9, None, "omega", False, False, 0.007, 0.03)
    assert parsed("grid") == (None, 0.9, None, "omega", False, True, 0.007, 0.03)
    assert parsed("learned", "--momentum", 0.0, "--filter_ratio", 0.95, "--learned_scales", False, "--interval_point",
                  3.0, "--scale_lr", 0.5) == (3.0, 0.0, 0.95, "learned", True, False, 0.007, 0.5)


@pytest.mark.parametrize("recipe, bits, omega, sigma", [
    ("published", 2, 6.0, 0.95), ("published", 4, 6.0, 0.95), ("learned", 2, 2.4, 0.995), ("grid", 2, 2.4, 0.995),
    ("learned", 3, 1.6, 0.98), ("learned", 4, 1.2, 0.98), ("steps", 4, 0.8, 0.98),
    ("steps", 3, 1.2, 0.98), ("grid", 8, 1.2, 0.98)])
def test_recipes_say_omega_and_sigma_by_the_bits(gptq, monkeypatch, recipe, bits, omega, sigma):
    """omega as a share of the rank."""
    monkeypatch.setattr(sys, "argv", ["LoTA_QAF_main.py", "--recipe", recipe, "--lora_r", "8", "--max_steps", "1"])
    base, training, _ = LoTA_QAF_main.parse_args()
    base.lota_qaf, base.w_bits = True, bits
    LoTA_QAF_main.check_training(base, training, GPTQFolder(gptq))
    assert (training.interval_point, training.filter_ratio) == pytest.approx((omega, sigma))


def test_a_flag_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["LoTA_QAF_main.py", "--mode", "1", "--lora_rank", "8"])
    with pytest.raises(UserError, match="there is no flag --lora_rank"):
        LoTA_QAF_main.parse_args()


@pytest.mark.parametrize("method", [("--method", "lora"), ("--method", "qalora"), ()])
def test_a_recipe_without_ternary_adapters_is_refused(gptq, demo_data, method):
    with pytest.raises(UserError, match="--recipe learned is for ternary adapters"):
        main("--mode", 1, *method, "--recipe", "learned", "--quantized_model_dir", gptq, "--data_dir", demo_data,
             "--max_steps", 1)


def test_residual_reaches_an_adapter_without_record_evaluated_live(trained, demo_data, gptq, tmp_path):
    """An adapter folder without lota_config.json: --residual False leaves the offset out of its live layers too."""
    named = tmp_path / "2M_int2_LoTA_4_0.950_0.999_viggo_1s_1MB_01_000000"
    shutil.copytree(trained, named, ignore=shutil.ignore_patterns("lota_config.json", "checkpoint-*"))
    flags = ("--load_adapter", named, "--quantized_model_dir", gptq, "--residual", False)
    live = evaluate(demo_data, tmp_path, *flags, "--merge", False)
    merged = evaluate(demo_data, tmp_path, *flags)
    with_offset = evaluate(demo_data, tmp_path, *flags[:-2], "--merge", False)
    texts = [[p["prediction"] for p in r["predictions"]] for r in (live, merged, with_offset)]
    assert texts[0] == texts[1] != texts[2]


def test_lm_eval_on_a_local_task(gptq, trained, tmp_path, capsys):
    """A multiple-choice task in MMLU's shape, offline: accuracies as computed from the model's own likelihoods."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    questions = [{"question": f"What follows the number {n}?", "choice0": str(n - 1), "choice1": str(n + 1),
                  "choice2": str(n + 5), "choice3": str(2 * n), "answer": 1} for n in range(3, 15)]
    (tasks / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tasks / "local_mmlu.yaml").write_text(f"""
task: local_mmlu
dataset_path: json
dataset_kwargs:
  data_files:
    dev: {tasks}/questions.jsonl
    test: {tasks}/questions.jsonl
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
output_type: multiple_choice
doc_to_text: |-
  {{{{question}}}}
  A. {{{{choice0}}}}
  B. {{{{choice1}}}}
  C. {{{{choice2}}}}
  D. {{{{choice3}}}}
  Answer:
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""")
    main("--mode", 2, "--load_adapter", trained, "--tasks", "local_mmlu", "--include_path", tasks, "--num_fewshot", 1,
         "--dtype", "float32", "--output_path", tmp_path, "--eval_batch_size", 4)
    assert "local_mmlu" in capsys.readouterr().out
    saved = json.loads(next(tmp_path.glob("*local_mmlu_*.json")).read_text())
    got = saved["results"]["local_mmlu"]["acc,none"]

    from transformers import AutoTokenizer

    from LoTA.adapter import LTA
    model = LTA(path=str(trained)).load(dtype=torch.float32).model
    tokenizer, right = AutoTokenizer.from_pretrained(gptq), 0

    def text(q):
        return (f"{q['question']}\nA. {q['choice0']}\nB. {q['choice1']}\nC. {q['choice2']}\nD. {q['choice3']}\n"
                "Answer:")
    for q in questions:
        context = f"{text(questions[0])} B\n\n{text(q)}"
        scores = []
        for choice in "ABCD":
            ids = tokenizer(context + f" {choice}", add_special_tokens=False, return_tensors="pt")["input_ids"]
            start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
            with torch.inference_mode():
                logits = model(input_ids=ids).logits.log_softmax(-1)
            scores.append(sum(logits[0, i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
        right += scores.index(max(scores)) == 1
    assert got == right / len(questions)
    assert saved["n-shot"] == {"local_mmlu": 1}


def start(*arguments, **kwargs):
    return subprocess.Popen([sys.executable, "LoTA_QAF_main.py", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def test_ctrl_c_leaves_a_whole_checkpoint_to_resume_from(gptq, base_model, demo_data, tmp_path):
    """SIGINT in the middle of training: a checkpoint, one line that names it, status 1; and it resumes."""
    common = (*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data,
              "--adapter_path", tmp_path)
    process = start(*common, "--max_steps", 2000, "--save_number", 1)
    seen = []
    for line in process.stdout:                 # training has begun when the first metrics are there
        seen.append(line)
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, "".join(seen) + out + err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: interrupted at step ") and "Traceback" not in err
    checkpoint = last.split()[-1]
    assert os.path.exists(os.path.join(checkpoint, "lota_config.json"))
    done = int(checkpoint.rsplit("-", 1)[1])
    main(*common, "--max_steps", done + 1, "--adapter_ckpt", checkpoint)
    adapter, = tmp_path.glob("*MB_*")
    assert LotaConfig.load(adapter).training["steps"] == done + 1


def test_a_gradient_that_is_not_finite_stops_the_run_with_its_name(gptq, base_model, demo_data, tmp_path, monkeypatch):
    import t_signSGD
    step = t_signSGD.tSignSGD.step

    def poisoned(self, closure=None):
        self.param_groups[0]["params"][3].grad[0, 0] = float("nan")
        return step(self, closure)
    monkeypatch.setattr(t_signSGD.tSignSGD, "step", poisoned)
    with pytest.raises(FloatingPointError, match=r"layers\.0\..*lora_B\.default\.weight"):
        main(*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data,
             "--max_steps", 2, "--adapter_path", tmp_path)


@pytest.mark.parametrize("arguments, message", [
    (("--quantized_model_dir", "no_such_folder"), "no_such_folder is not a folder"),
    ((), "--quantized_model_dir is missing"),
    (("--quantized_model_dir", "{base}"), "not a GPTQ model"),
    (("--quantized_model_dir", "{gptq}", "--w_bits", 4), "--w_bits 4 contradicts"),
    (("--quantized_model_dir", "{gptq}", "--group_size", 64), "--group_size 64 contradicts"),
    (("--quantized_model_dir", "{gptq}", "--interval_point", 8), "must lie in"),
    (("--quantized_model_dir", "{gptq}", "--interval_point", -1), "must lie in"),
    (("--quantized_model_dir", "{gptq}", "--interval_point", 0), "must lie in"),
    (("--quantized_model_dir", "{gptq}", "--filter_ratio", 1.5), "--filter_ratio must lie in"),
    (("--quantized_model_dir", "{gptq}", "--lora_r", 0), "--lora_r must be"),
    (("--quantized_model_dir", "{gptq}", "--train_batch_size", 0), "--train_batch_size must be"),
    (("--quantized_model_dir", "{gptq}", "--dtype", "float16"), "float16 is not supported"),
    (("--quantized_model_dir", "{gptq}", "--device_map", "cuda:0"), "there is no GPU"),
    (("--quantized_model_dir", "{gptq}", "--report_to", "nowhere"), "--report_to nowhere is not installed"),
    (("--quantized_model_dir", "{gptq}", "--lr_scheduler_type", "zigzag"), "zigzag"),
    (("--quantized_model_dir", "{gptq}", "--lota_qaf", False, "--optimizer_type", "paged_adamw_32bit"), "bitsandbytes"),
    (("--quantized_model_dir", "{gptq}", "--lora_r", 2**20), "too large"),
    (("--quantized_model_dir", "{gptq}", "--lora_dropout", 0.1), "--lora_dropout must be 0"),
    (("--quantized_model_dir", "{gptq}", "--max_steps", -1), "nothing to train"),
    (("--quantized_model_dir", "{gptq}", "--training_data_name", "imdb"), "unknown data set 'imdb'"),
    (("--quantized_model_dir", "{gptq}", "--training_data_name", "gsm8k"), "do not look like 'gsm8k'"),
    (("--quantized_model_dir", "{gptq}", "--data_dir", "no_such_data"), "no_such_data does not exist"),
    (("--quantized_model_dir", "{gptq}", "--lora_target_modules", "c_attn"), "--lora_target_modules"),
    (("--quantized_model_dir", "{gptq}", "--adapter_ckpt", "nowhere"), "nowhere is not a folder"),
    (("--quantized_model_dir", "{gptq}", "--lota_qaf", False, "--optimizer_type", "int_sign_sgd"), "ternary adapters"),
    (("--quantized_model_dir", "{gptq}", "--momentum", 1), "--momentum must lie in"),
    (("--quantized_model_dir", "{gptq}", "--offset_scale", "learned", "--residual", False), "leaves out"),
    (("--quantized_model_dir", "{gptq}", "--lota_qaf", False, "--learned_scales", True), "beside ternary adapters"),
    (("--quantized_model_dir", "{gptq}", "--method", "lora"), "--lota_qaf True contradicts --method lora"),
    (("--mode", 2), "nothing to evaluate"),
    (("--mode", 2, "--export", "gguf"), "go together"),
    (("--mode", 2, "--export", "gguf", "--export_path", "out"), "--load_adapter"),
    (("--mode", 2, "--tasks", "mmlu", "--quantized_model_dir", "{gptq}", "--eval_batch_size", 0), "at least 1"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--auto_gptq", "none", "--pretrained", "./nowhere"), "does not exist"),
    (("--mode", 2, "--tasks", "mmlu", "--quantized_model_dir", "{gptq}", "--include_path", "nowhere"), "not a folder"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--load_adapter", "nowhere"), "nowhere is not a folder"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--load_adapter", "{base}"), "not an adapter folder"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--auto_gptq", "none"), "name it with --pretrained"),
    (("--mode", 2, "--tasks", "no_such_task", "--quantized_model_dir", "{gptq}"), "no_such_task"),
    (("--mode", 2, "--ft_dataset_name", "viggo", "--quantized_model_dir", "{gptq}", "--backend", "abacus",
      "--dtype", "bfloat16"), "--backend abacus"),
])
def test_mistakes_get_a_clear_error(arguments, message, gptq, base_model, demo_data, tmp_path):
    """A UserError that names what is wrong; nothing is written."""
    filled = [str(a).format(gptq=gptq, base=base_model) for a in arguments]
    defaults = (*TRAIN, "--data_dir", demo_data, "--max_steps", 2, "--adapter_path", tmp_path / "a", "--output_path",
                tmp_path / "e")
    with pytest.raises(UserError, match=message):
        main(*defaults, *filled)
    assert not list(tmp_path.iterdir())


def test_a_corrupt_adapter_is_one_line(trained, tmp_path):
    """A truncated safetensors file, as an interrupted copy leaves it."""
    broken = shutil.copytree(trained, tmp_path / "broken")
    content = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(content[:len(content) // 2])
    process = start("--mode", 2, "--load_adapter", broken, "--merged_path", tmp_path / "merged")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not (tmp_path / "merged").exists()


def test_mistakes_on_the_command_line_are_one_line_and_status_1(tmp_path):
    """No traceback, and it answers before anything heavy is imported."""
    begin = time.time()
    process = start("--mode", 1, "--lota_qaf", True, "--quantized_model_dir", tmp_path / "nowhere")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count("\n") == 1 and err.startswith("error: ") and "nowhere" in err
    assert time.time() - begin < 60


def test_help_explains_every_flag(capsys):
    """Every field of the three dataclasses, with its default in brackets."""
    with pytest.raises(SystemExit):
        main("--help")
    text = " ".join(capsys.readouterr().out.split())
    from dataclasses import fields
    for group in (LoTA_QAF_main.baseConfig, LoTA_QAF_main.trainingConfig, LoTA_QAF_main.evalConfig):
        for f in fields(group):
            assert f"--{f.name}" in text, f.name
            assert f.metadata["help"].rstrip().endswith("]"), f.name
    for symbol in ("omega", "sigma", "mu, Eq. 4", "rank (r)", "kappa"):
        assert symbol in text


def test_a_step_on_the_console_is_one_readable_line(gptq, base_model, demo_data, tmp_path, capsys, monkeypatch):
    """The line of a step has the numbers that metrics.jsonl has, with the share moved of every projection. Where
    looking inside at every logging step would be too often, the steps between have loss, sigma and flips. A tracker
    gets the same numbers."""
    monkeypatch.setattr("LoTA.monitor.LOOKS", 2)                    # of 8 steps: every 4
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    main(*TRAIN, "--quantized_model_dir", gptq, "--pretrained", base_model, "--data_dir", demo_data, "--max_steps", 8,
         "--adapter_path", tmp_path, "--save_strategy", "no", "--report_to", "tensorboard")
    adapter, = tmp_path.iterdir()
    rows = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [(row["step"], "moved" in row) for row in rows] == [(2, True), (4, False), (6, True), (8, True)]
    assert lines[1].startswith(f"step 4/8  loss {rows[1]['loss']:.4f}  ")
    assert lines[1].endswith(f"  sigma {rows[1]['sigma']:.5f}  flips A {rows[1]['flips_A']} B {rows[1]['flips_B']}")
    row, line = rows[-1], lines[-1]
    moved = " ".join(f"{name} {row[f'moved_{name}_proj']:.3%}" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert line.startswith("step 8/8  ") and f"loss {row['loss']:.4f}  " in line and "sigma 0.99990  " in line
    assert f"flips A {row['flips_A']} B {row['flips_B']}  " in line
    assert f"-1/0/1 {row['minus']:.0%}/{row['zeros']:.0%}/{row['plus']:.0%}  " in line
    assert f"|dW|/omega {row['dW_median']:.2f} {row['dW_99']:.2f} {row['dW_max']:.2f}  mu {row['mu']:.3f}  " in line
    assert "  scales 0.000  " in line
    assert line.endswith(f"moved {row['moved']:.3%} ({moved})")
    events, = adapter.rglob("events.out.tfevents*")
    tracked = EventAccumulator(str(events)).Reload()
    for name in row.keys() - {"step", "epoch"}:
        values = [(e.step, e.value) for e in tracked.Scalars(f"train/{name}")]
        assert values == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in rows if name in r]
