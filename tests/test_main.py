"""The two modes from end to end on a tiny GPTQ model: train, resume, interrupt, merge, evaluate, and refuse."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import LAYERS, ROOT, parse, predictions
from random_gptq import write_gptq
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import LoTA_QAF_main
from data_print_save import get_Ada_path
from LoTA import UserError
from LoTA.adapter_folder import PREFIX, AdapterFolder, LotaConfig, check_resumable
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.lota_merge import merge_folders
from LoTA.trainer import Run


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def equal(one, other):
    """Whether two {name: tensor} hold the same numbers."""
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


# --- training -----------------------------------------------------------------------------------------------------

def test_the_adapter_folder(trained, gptq_2bit):
    """It is named as users know it. Its matrices are ternary and have moved. Its record says how it was trained."""
    parts = trained.name.split("_")
    assert parts[1:7] == ["int2", "LoTA", "4", "0.950", "0.999", "viggo"] and parts[0].endswith("M")
    tensors = tensors_of(trained)
    assert len(tensors) == 2 * 2 * 7
    assert all(set(t.unique().tolist()) <= {-1.0, 0.0, 1.0} for t in tensors.values())
    assert all(t.abs().sum() > 0 for name, t in tensors.items() if "lora_B" in name)    # B started at zero
    config = LotaConfig.load(trained)
    assert (config.method, config.omega, config.residual, config.rank, config.bits) == ("LoTA", 4.0, True, 8, 2)
    assert (config.group_size, config.offset_scale, config.seed, config.data_set) == (32, "omega", 42, "viggo")
    assert config.fingerprint == GPTQFolder(gptq_2bit).fingerprint()
    assert config.training["steps"] == 8 and 0 <= config.training["moved"]["all"] < 1
    assert config.settings["lora_alpha"] == 16 and config.settings["filter_ratio"] == 0.95
    assert json.loads((trained / "log_history.json").read_text())[-2]["sigma"] == 0.9999


def test_checkpoints_hold_only_the_adapter_and_are_whole(trained):
    names = sorted(p.name for p in trained.iterdir() if p.is_dir())
    assert names == ["checkpoint-4", "checkpoint-8"]
    for name in names:
        assert (trained / name / "lota_config.json").exists() and (trained / name / "optimizer.pt").exists()
        assert not (trained / name / "model.safetensors").exists()


def test_the_report_beside_the_adapter(trained):
    """metrics.jsonl has a line for every logging step. Its last numbers are those of the adapter that was saved."""
    rows, tensors = metrics_of(trained), tensors_of(trained)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows[0]["loss"] > rows[-1]["loss"] > 0 and all(row["flips_B"] > 0 for row in rows)
    moved = LotaConfig.load(trained).training["moved"]
    assert rows[-1]["moved"] == moved["all"] > 0 and len(moved) == 8
    assert all(rows[-1][f"moved_{name}"] == share for name, share in moved.items() if name != "all")
    entries = sum(t.numel() for t in tensors.values())
    for value, name in ((-1, "minus"), (0, "zeros"), (1, "plus")):
        assert rows[-1][name] == pytest.approx(sum(int((t == value).sum()) for t in tensors.values()) / entries)
    # dW is measured on about 64 rows of every layer.
    largest = max(float((A.t()[::max(1, A.shape[1] // 64)].double() @ tensors[k.replace("lora_A", "lora_B")].t()
                         .double()).abs().max()) for k, A in tensors.items() if "lora_A" in k)
    assert rows[-1]["dW_max"] == pytest.approx(largest / 4) and 0 <= rows[-1]["dW_median"] < rows[-1]["dW_99"]
    assert rows[-1]["mu"] > 0 and "of the integer weights moved" in (trained / "report.md").read_text()
    assert (trained / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_says_that_nothing_moved(train, tmp_path):
    """The last step has its line too, where --logging_steps leaves it out."""
    still = train(tmp_path, "--max_steps", 3, "--interval_point", 7.5, "--save_strategy", "no")
    assert "No integer weight moved" in (still / "report.md").read_text()
    assert [(row["step"], row["moved"]) for row in metrics_of(still)] == [(2, 0.0), (3, 0.0)]


def test_gradient_checkpointing_changes_nothing(trained, train, tmp_path):
    """The recomputed forward is the first one, so every entry of the adapter is equal."""
    without = train(tmp_path, "--save_strategy", "no", "--no_gradient_checkpointing")
    assert equal(tensors_of(trained), tensors_of(without))


def test_a_gradient_that_is_not_finite_stops_the_run_with_its_name(train, tmp_path, monkeypatch):
    import t_signSGD
    step = t_signSGD.tSignSGD.step

    def poisoned(self, closure=None):
        self.param_groups[0]["params"][3].grad[0, 0] = float("nan")
        return step(self, closure)
    monkeypatch.setattr(t_signSGD.tSignSGD, "step", poisoned)
    with pytest.raises(FloatingPointError, match=r"layers\.0\..*lora_B\.default\.weight"):
        train(tmp_path, "--max_steps", 2)


def test_a_step_on_the_console_is_one_readable_line(train, tmp_path, capsys, monkeypatch):
    """The line of a step has the numbers that metrics.jsonl has, and a tracker gets the same.

    Steps between two detailed ones have loss, sigma and flips only.
    """
    monkeypatch.setattr("LoTA.monitor.DETAILED_STEPS", 2)           # of 8 steps: every 4
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    adapter = train(tmp_path, "--save_strategy", "no", "--report_to", "tensorboard")
    rows = metrics_of(adapter)
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


# --- resuming -----------------------------------------------------------------------------------------------------

def test_resuming_goes_on_where_it_was(trained, train, tmp_path):
    """A run resumed at step 4 ends with the adapter and the metrics of the run that was not interrupted."""
    home = tmp_path / "home"                    # a checkpoint may lie anywhere; nothing around it is touched
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    shutil.copytree(trained / "checkpoint-4", home / "checkpoint-4")
    resumed = train(tmp_path / "a", "--adapter_ckpt", home / "checkpoint-4")
    assert sorted(p.name for p in home.iterdir()) == ["checkpoint-4", "thesis.txt"]
    assert equal(tensors_of(trained), tensors_of(resumed))
    assert not equal(tensors_of(trained), tensors_of(trained / "checkpoint-4"))
    assert metrics_of(resumed) == metrics_of(trained)


def test_nothing_is_resumed_at_the_end_of_a_run(trained, train, tmp_path):
    """Trainer would take a step too many."""
    with pytest.raises(UserError, match="nothing to resume: the checkpoint is of step 8"):
        train(tmp_path, "--adapter_ckpt", trained / "checkpoint-8")


def test_a_checkpoint_that_is_not_whole_is_refused(trained, train, tmp_path):
    broken = shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    (broken / "lota_config.json").unlink()
    with pytest.raises(UserError, match="not whole"):
        train(tmp_path, "--adapter_ckpt", broken)


def test_a_checkpoint_of_another_run_is_refused(trained, train, tmp_path):
    with pytest.raises(UserError, match="its omega is 4.0, not 3.0"):
        train(tmp_path / "a", "--adapter_ckpt", trained / "checkpoint-4", "--interval_point", 3)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("change", [
    {"omega": 3.0}, {"rank": 12}, {"residual": False}, {"offset_scale": "paper"}, {"method": "LoRA"}, {"bits": 4},
    {"learned_scales": True}, {"fingerprint": "0" * 32}], ids=lambda change: next(iter(change)))
def test_what_a_checkpoint_must_share_with_the_run(trained, change):
    """Each of these facts is named where it differs. tests/test_resume.py has the settings and the data."""
    config, checkpoint = LotaConfig.load(trained), trained / "checkpoint-4"
    check_resumable(checkpoint, replace(config, seed=1, data_set="sql"))
    (name, value), = change.items()
    with pytest.raises(UserError, match=f"its {name} is {getattr(config, name)}, not {value}"):
        check_resumable(checkpoint, replace(config, **change))


# --- evaluation ---------------------------------------------------------------------------------------------------

def test_live_and_merged_give_the_same_predictions(trained, demo_data, evaluate, tmp_path):
    """Live, merged, and the merged folder opened again. The results say what was evaluated, and how."""
    live = evaluate(tmp_path, "--load_adapter", trained, "--no_merge")
    merged = evaluate(tmp_path, "--load_adapter", trained, "--merged_path", tmp_path / "merged")
    again = evaluate(tmp_path / "again", "--load_adapter", tmp_path / "merged")
    with open(demo_data / "test.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    for results in (live, merged, again):
        assert [p["label"] for p in results["predictions"]] == [r["mr"] for r in rows]
        assert all(r["ref"] in p["prompt"] for p, r in zip(results["predictions"], rows, strict=True))
        assert results["accuracy"] == sum(p["correct"] for p in results["predictions"]) / 40
        assert results["adapter"] == {"method": "LoTA", "rank": 8, "omega": 4.0, "residual": True, "seed": 42,
                                      "offset_scale": "omega", "learned_scales": False, "dither": "none",
                                      "data_set": "viggo"}
        assert results["settings"]["baseConfig"]["lora_r"] is None      # no flag of this run said it
    texts = [predictions(results) for results in (live, merged, again)]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 5
    assert merged["moved"] == again["moved"] == LotaConfig.load(trained).training["moved"] and "moved" not in live


def test_what_evaluate_returns_is_what_it_saves(trained, demo_data, tmp_path):
    """{data set: results}, and with lm-eval's tasks {"lm_eval": results}."""
    base, _, evaluation = parse("--mode", 2, "--load_adapter", trained, "--ft_dataset_name", "viggo", "--dtype",
                                "float32", "--data_dir", demo_data, "--limit", 3, "--output_path", tmp_path)
    results = LoTA_QAF_main.evaluate(base, evaluation)
    file, = tmp_path.glob("*.json")
    saved = json.loads(file.read_text())
    assert set(results) == {"viggo"} and set(saved) - {"settings", "date"} == set(results["viggo"])
    assert predictions(saved) == predictions(results["viggo"]) and saved["rows"] == 3
    assert saved["settings"]["baseConfig"]["w_bits"] == 2 and base.w_bits is None


def test_training_in_bfloat16_merges_what_it_trained(train, gptq_2bit, evaluate, tmp_path):
    """The default dtype. The layers multiply with the scales that are on disk, so the merge has the same weights."""
    from LoTA.adapter import load_live
    from LoTA.layer import CustomLoraLinear
    from LoTA.ternary import dequantize
    adapter = train(tmp_path / "a", "--dtype", "bfloat16", "--interval_point", 1, "--save_strategy", "no")
    opened = AdapterFolder(adapter)
    merge_folders(opened, GPTQFolder(gptq_2bit), tmp_path / "merged")
    merged = MergedFolder(tmp_path / "merged")
    model = load_live(opened, gptq_2bit, dtype=torch.bfloat16)
    layers = {name.removeprefix(PREFIX): m for name, m in model.named_modules() if isinstance(m, CustomLoraLinear)}
    assert len(layers) == 14 and model.dtype == torch.bfloat16
    for name, layer in layers.items():
        weight, scaled = layer.evaluated(torch.bfloat16)
        packed, mu = merged.packed(name), merged.offset(name)
        assert torch.equal(weight, dequantize(packed, None, torch.float16).bfloat16())
        assert torch.equal(scaled, (packed.scales.float() * mu).bfloat16()) and mu.any()
    live = evaluate(tmp_path, "--load_adapter", adapter, "--no_merge", "--dtype", "bfloat16")
    again = evaluate(tmp_path, "--load_adapter", tmp_path / "merged", "--dtype", "bfloat16")
    assert predictions(live) == predictions(again)


def test_adapters_of_the_published_scripts(trained, evaluate, gptq_2bit, tmp_path):
    """No lota_config.json: a folder named as the published scripts name it, its checkpoint, and a renamed one."""
    named = tmp_path / "2M_int2_LoTA_4_0.950_0.999_viggo_1234_20480_05_101112"
    renamed = tmp_path / "best"
    for folder in (named, named / "checkpoint-4", renamed):
        folder.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(trained / file, folder)
    want = predictions(evaluate(tmp_path, "--load_adapter", trained))
    for folder, flags in ((named, ()), (named / "checkpoint-4", ()), (renamed, ("--load_ada_interval", 4))):
        got = evaluate(tmp_path, "--load_adapter", folder, "--quantized_model_dir", gptq_2bit, *flags)
        assert predictions(got) == want and got["adapter"]["omega"] == 4.0
    assert AdapterFolder(renamed).config.omega == 6.0 and AdapterFolder(named).config.omega == 4.0
    assert AdapterFolder(renamed, omega=5.0, residual=False).config.rule.kappa is None


def test_residual_reaches_an_adapter_without_record(trained, evaluate, gptq_2bit, tmp_path):
    """--no_residual leaves the offset out of its live layers and of its merge."""
    named = tmp_path / "2M_int2_LoTA_4_0.950_0.999_viggo_1s_1MB_01_000000"
    shutil.copytree(trained, named, ignore=shutil.ignore_patterns("lota_config.json", "checkpoint-*"))
    flags = ("--load_adapter", named, "--quantized_model_dir", gptq_2bit)
    live = evaluate(tmp_path, *flags, "--no_residual", "--no_merge")
    merged = evaluate(tmp_path, *flags, "--no_residual")
    with_offset = evaluate(tmp_path, *flags, "--no_merge")
    assert predictions(live) == predictions(merged) != predictions(with_offset)
    assert [results["adapter"]["residual"] for results in (live, merged, with_offset)] == [False, False, True]


def test_models_without_adapter(gptq_2bit, base_model, evaluate, tmp_path):
    """The 16-bit model and the bare GPTQ model answer for themselves."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    dense = evaluate(tmp_path, "--auto_gptq", "none", "--pretrained", base_model)
    bare = evaluate(tmp_path, "--quantized_model_dir", gptq_2bit)
    assert "adapter" not in dense and "adapter" not in bare
    assert bare["settings"]["baseConfig"]["w_bits"] == 2 and dense["settings"]["baseConfig"]["w_bits"] is None
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    for item in dense["predictions"][:5]:
        ids = tokenizer(item["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip() == item["prediction"]
    assert predictions(bare) != predictions(dense)


def test_without_offset_the_merged_model_is_plain_gptq(train, evaluate, tmp_path):
    """--residual False, from training to stock GPTQModel."""
    adapter = train(tmp_path / "a", "--max_steps", 6, "--residual", False, "--interval_point", 1, "--save_strategy",
                    "no")
    live = evaluate(tmp_path, "--load_adapter", adapter, "--merge", False)
    merged = evaluate(tmp_path, "--load_adapter", adapter, "--merged_path", tmp_path / "merged")
    (tmp_path / "plain").mkdir()
    for file in (tmp_path / "merged").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / "plain")
    bare = evaluate(tmp_path, "--quantized_model_dir", tmp_path / "plain")
    assert predictions(live) == predictions(merged) == predictions(bare)
    assert merged["moved"]["all"] > 0 and not MergedFolder(tmp_path / "merged").offset_modules()


# --- baselines, and what is learned beside the steps ----------------------------------------------------------------

def test_lora_baseline(train, quantize, gptq_2bit, evaluate, tmp_path):
    """--lota_qaf False: a 16-bit LoRA on the GPTQ model is trained, saved, evaluated live, and never merged."""
    adapter = train(tmp_path / "a", "--lota_qaf", False, "--max_steps", 4, "--learning_rate", 1e-3)
    assert "_int2_LoRA_0.001_8_16_viggo_" in adapter.name
    assert any(((t != 0) & (t.abs() != 1)).any() for t in tensors_of(adapter).values())
    with pytest.raises(UserError, match="2 bits"):
        evaluate(tmp_path, "--load_adapter", adapter, "--quantized_model_dir", quantize(4, "--sym"))
    results = evaluate(tmp_path, "--load_adapter", adapter)
    assert results["rows"] == 40 and results["adapter"]["method"] == "LoRA" and results["adapter"]["omega"] is None
    with pytest.raises(UserError, match="LoRA adapter"):
        merge_folders(AdapterFolder(adapter), GPTQFolder(gptq_2bit), tmp_path / "merged")


def test_qalora_baseline_merges_and_exports(train, evaluate, tmp_path):
    """--method qalora, from training to an export with its evaluation in the card: live = merged = dense."""
    adapter = train(tmp_path / "a", "--lota_qaf", False, "--method", "qalora", "--max_steps", 4, "--learning_rate",
                    1e-2)
    assert "_int2_QA-LoRA_0.01_8_16_viggo_" in adapter.name and LotaConfig.load(adapter).residual
    live = evaluate(tmp_path, "--load_adapter", adapter, "--no_merge")
    merged = evaluate(tmp_path, "--load_adapter", adapter, "--merged_path", tmp_path / "merged", "--export", "dense",
                      "--export_path", tmp_path / "dense")
    dense = evaluate(tmp_path, "--auto_gptq", "none", "--pretrained", tmp_path / "dense")
    assert predictions(live) == predictions(merged) and merged["moved"]["all"] == 0
    assert sum(p["correct"] for p in dense["predictions"]) == pytest.approx(live["correct"], abs=4)    # bfloat16
    assert f"{merged['correct']} of 40 rows" in (tmp_path / "dense/README.md").read_text()


def test_learned_offsets_and_scales_merge_what_they_trained(train, gptq_2bit, evaluate, tmp_path):
    """--offset_scale learned --learned_scales --momentum: saved, resumed, and merged into the folder's own numbers."""
    flags = ("--max_steps", 6, "--offset_scale", "learned", "--learned_scales", "--momentum", 0.9, "--offset_lr", 0.02,
             "--scale_lr", 0.05, "--interval_point", 2)
    adapter = train(tmp_path / "a", *flags, "--save_number", 3)
    resumed = train(tmp_path / "b", *flags, "--adapter_ckpt", adapter / "checkpoint-4", "--save_strategy", "no")
    learned = tensors_of(adapter)
    assert equal(learned, tensors_of(resumed))
    offsets = {k: v for k, v in learned.items() if k.endswith(".lora_offset")}
    assert len(offsets) * 4 == len(learned) and all(v.abs().max() > 0.01 for v in offsets.values())
    live = evaluate(tmp_path, "--load_adapter", adapter, "--no_merge")
    merged = evaluate(tmp_path, "--load_adapter", adapter, "--merged_path", tmp_path / "merged")
    assert predictions(live) == predictions(merged) and merged["moved"]["all"] > 0
    folder = MergedFolder(tmp_path / "merged")
    for name in folder.modules:
        assert torch.equal(folder.offset(name), offsets[f"{PREFIX}{name}.lora_offset"])
        change, before = learned[f"{PREFIX}{name}.lora_scale"], GPTQFolder(gptq_2bit).tensor(f"{name}.scales")
        assert change.abs().max() > 0.01
        assert torch.equal(folder.tensor(f"{name}.scales"), (before.float() * (1 + change)).half())
    means = [v.abs().mean() for k, v in learned.items() if k.endswith(".lora_scale")]
    assert metrics_of(adapter)[-1]["scales"] == pytest.approx(float(sum(means)) / len(means), rel=1e-5)


# --- lm-eval ------------------------------------------------------------------------------------------------------

def test_lm_eval_on_a_local_task(gptq_2bit, trained, tmp_path, capsys):
    """A multiple-choice task in MMLU's shape, offline: the accuracy computed from the model's own likelihoods."""
    from transformers import AutoTokenizer

    from LoTA.adapter import LTA
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
    base, _, evaluation = parse("--mode", 2, "--load_adapter", trained, "--tasks", "local_mmlu", "--include_path",
                                tasks, "--num_fewshot", 1, "--dtype", "float32", "--output_path", tmp_path,
                                "--eval_batch_size", 4)
    results = LoTA_QAF_main.evaluate(base, evaluation)
    assert set(results) == {"lm_eval"} and "local_mmlu" in capsys.readouterr().out
    saved = json.loads(next(tmp_path.glob("*local_mmlu_*.json")).read_text())
    assert saved["adapter"]["omega"] == 4.0 and saved["n-shot"] == {"local_mmlu": 1}
    got = saved["results"]["local_mmlu"]["acc,none"]

    model = LTA(path=str(trained)).load(dtype=torch.float32).model
    tokenizer, right = AutoTokenizer.from_pretrained(gptq_2bit), 0

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


# --- the folder of a run ------------------------------------------------------------------------------------------

NAME = partial(get_Ada_path, "8B", 4, "LoTA", 48.0, 0.95, 0.999, "alpaca")
BEGINNING = "8B_int4_LoTA_48_0.950_0.999_alpaca"


@pytest.fixture
def noon(monkeypatch):
    """Every run starts in the same second: on day 5 at 12:00:00."""
    class Noon(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 3, 5, 12, 0, 0)
    monkeypatch.setattr("LoTA.trainer.datetime", Noon)


def test_runs_of_the_same_second_have_folders_of_their_own(noon, tmp_path):
    """Also when both have ended in the same time with the same peak."""
    with Run(tmp_path, NAME) as one, Run(tmp_path, NAME) as two, Run(tmp_path, NAME) as three:
        runs = (one, two, three)
        names = [f"{BEGINNING}_05_120000", f"{BEGINNING}_05_120000-2", f"{BEGINNING}_05_120000-3"]
        assert [run.folder for run in runs] == [tmp_path / name for name in names]
        assert all(run.folder.is_dir() and run.writes for run in runs)
        for number, run in enumerate(runs):
            (run.folder / "number").write_text(str(number))
        ended = [run.finish(61.4, 2048.3) for run in runs]
    assert [folder.name for folder in ended] == [f"{BEGINNING}_61s_2048MB_05_120000{end}" for end in ("", "-2", "-3")]
    assert [(folder / "number").read_text() for folder in ended] == ["0", "1", "2"]
    assert set(tmp_path.iterdir()) == set(ended)


def test_the_final_name_is_a_rename(noon, tmp_path):
    """The same folder under another name: nothing is copied."""
    with Run(tmp_path, NAME) as run:
        (run.folder / "file").write_text("content")
        before = run.folder.stat().st_ino
        final = run.finish(1.0, 1.0)
    assert final.stat().st_ino == before and not run.folder.exists() and (final / "file").read_text() == "content"


@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_fails_at_once_leaves_nothing(tmp_path, existed):
    """Neither its folder nor the parent that it made. A parent that was there stays."""
    parent = tmp_path / "adapters"
    if existed:
        parent.mkdir()
    with pytest.raises(UserError, match="no data"), Run(parent, NAME) as run:
        assert run.folder.parent == parent
        raise UserError("no data")
    assert list(tmp_path.iterdir()) == ([parent] if existed else []) and (not existed or not list(parent.iterdir()))


def test_a_run_that_fails_later_keeps_what_it_wrote(tmp_path):
    """Its checkpoints are there to resume from, and a run beside it is not touched."""
    (tmp_path / "adapters/other").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), Run(tmp_path / "adapters", NAME) as run:
        (run.folder / "checkpoint-4").mkdir()
        raise KeyboardInterrupt
    assert set((tmp_path / "adapters").iterdir()) == {run.folder, tmp_path / "adapters/other"}
    assert (run.folder / "checkpoint-4").is_dir()


# --- as a command ---------------------------------------------------------------------------------------------------

def start(*arguments, **kwargs):
    return subprocess.Popen([sys.executable, "LoTA_QAF_main.py", *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def test_ctrl_c_leaves_a_whole_checkpoint_to_resume_from(train, gptq_2bit, base_model, demo_data, tmp_path):
    """SIGINT in the middle of training: a checkpoint, one line that names it, and status 1. A run resumes from it."""
    process = start("--mode", 1, "--lota_qaf", "--training_data_name", "viggo", "--lora_r", 8, "--interval_point", 4,
                    "--train_batch_size", 16, "--dtype", "float32", "--quantized_model_dir", gptq_2bit, "--pretrained",
                    base_model, "--data_dir", demo_data, "--adapter_path", tmp_path, "--max_steps", 2000,
                    "--save_number", 1)
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
    resumed = train(tmp_path, "--max_steps", done + 1, "--adapter_ckpt", checkpoint, "--save_strategy", "no")
    assert LotaConfig.load(resumed).training["steps"] == done + 1


def test_a_corrupt_adapter_is_one_line(trained, tmp_path):
    """A safetensors file that is cut off, as an interrupted copy leaves it."""
    broken = shutil.copytree(trained, tmp_path / "broken")
    content = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(content[:len(content) // 2])
    process = start("--mode", 2, "--load_adapter", broken, "--merged_path", tmp_path / "merged")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("flags, message", [
    (("--training_data_name", "imdb"), "unknown data set 'imdb'"),
    (("--training_data_name", "gsm8k"), "do not look like 'gsm8k'"),
    (("--data_dir", "no_such_data"), "no_such_data does not exist"),
    (("--report_to", "nowhere"), "--report_to nowhere is not installed"),
    (("--lr_scheduler_type", "zigzag"), "zigzag"),
    (("--device_map", "cuda:0"), "there is no GPU")])
def test_mistakes_found_while_training_begins(train, flags, message, tmp_path):
    """A UserError that names what is wrong, and nothing is written."""
    if "--device_map" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        train(tmp_path / "a", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [
    (("--ft_dataset_name", "viggo", "--backend", "abacus", "--dtype", "bfloat16"), "--backend abacus"),
    (("--ft_dataset_name", "none", "--tasks", "mmlu,no_such_task"), "knows no task named no_such_task;"),
    (("--ft_dataset_name", "sql"), "do not look like 'sql'")])
def test_mistakes_found_before_evaluation(evaluate, gptq_2bit, flags, message, tmp_path, monkeypatch):
    """A UserError that names what is wrong, and nothing is written."""
    # lm-eval takes seconds to list its tasks. test_lm_eval_on_a_local_task has the real list.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path: SimpleNamespace(all_tasks=["mmlu"]))
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, "--quantized_model_dir", gptq_2bit, *flags)
    assert not list(tmp_path.iterdir())


def test_mistakes_on_the_command_line_are_one_line_and_status_1(tmp_path):
    """No traceback."""
    folder = write_gptq(tmp_path / "gptq", LAYERS)
    process = start("--mode", 1, "--lota_qaf", True, "--quantized_model_dir", folder, "--w_bits", 3)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and err.count("\n") == 1 and err.startswith("error: --w_bits 3 contradicts")
