"""The experiment scripts: the cut of the data, the lists of runs, a run from end to end, the tables of the pages."""
import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import compare
import data
import deploy
import plan
import plan_smollm2
import pytest
import run
import scoring
import smollm2
import tables
import tiny_base
import torch
import two_steps
from conftest import ROOT, merge, run_main
from transformers import AutoModelForCausalLM

from LoTA import UserError
from LoTA.adapter_folder import LotaConfig
from LoTA.export.gguf import GGUF_FILE
from LoTA.export.run import export
from LoTA.folders import GPTQFolder

TRAIN = ["--training_data_name", "viggo", "--lora_r", 8, "--max_steps", 3, "--train_batch_size", 8, "--dtype",
         "float32", "--save_strategy", "no"]


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as f:
        return [(row["mr"], row["ref"]) for row in csv.DictReader(f)]


def test_the_cut_keeps_rows_apart(tmp_path):
    """The parts are half, 40 % and 10 % of the rows, and no row is in two of them.

    The second base has no row of three functions. Test rows are only where nothing is chosen. Turned, the bases have
    the other half, and the meanings to be scored are in no other part.
    """
    functions = ("inform", *data.LACKING)
    train = [(f"{functions[i // 2 % 4]}(name[Game {i // 2}])", f"Text {i}.") for i in range(200)]
    test = [(f"inform(name[Test {i}])", f"Test {i}.") for i in range(7)]
    for name, rows in (("train", train), ("test", test)):
        with open(tmp_path / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([("mr", "ref"), *rows])
    run_main(data, "--data_dir", tmp_path, "--output", tmp_path / "cut")
    part = {name: rows_of(tmp_path / "cut" / name / "train.csv")
            for name in ("base_recovery", "base_task", "tune", "choose")}
    choosing = rows_of(tmp_path / "cut/choose/test.csv")
    assert (len(part["base_recovery"]), len(part["tune"]), len(choosing)) == (100, 80, 20)
    assert sorted(part["base_recovery"] + part["tune"] + choosing) == sorted(train)
    assert part["base_task"] == [row for row in part["base_recovery"] if row[0].startswith("inform(")]
    assert part["choose"] == part["tune"] and rows_of(tmp_path / "cut/tune/test.csv") == test
    assert not set(choosing) & set(test)

    run_main(data, "--data_dir", tmp_path, "--output", tmp_path / "turned", "--turned")
    turned = {name: rows_of(tmp_path / "turned" / name / "train.csv")
              for name in ("base_recovery", "base_task", "tune")}
    scored = rows_of(tmp_path / "turned/tune/test.csv")
    assert sorted(turned["base_recovery"]) == sorted(part["tune"] + choosing)
    assert turned["base_task"] == [row for row in turned["base_recovery"] if row[0].startswith("inform(")]
    assert sorted(turned["tune"] + scored) == sorted(part["base_recovery"]) and len(scored) > 10
    known = {meaning for meaning, _ in turned["base_recovery"]}
    assert {meaning for meaning, _ in turned["tune"]} <= known and not {meaning for meaning, _ in scored} & known
    assert all(rows_of(tmp_path / "turned" / name / "test.csv") == scored for name in turned)
    assert not (tmp_path / "turned/choose").exists()


def test_the_lists_of_runs(tmp_path):
    """Stage test has every method, setting, number of bits and seed once. It alone is scored on the test rows."""
    def listed(*arguments):
        run_main(plan, "--work", tmp_path, "--output", tmp_path / "runs.json", *arguments)
        return json.loads((tmp_path / "runs.json").read_text())
    runs = listed("--stage", "test", "--settings", "recovery", "task", "--bits", 2, 3, 4)
    assert len({(run["name"], run["seed"]) for run in runs}) == len(runs) == 2 * (1 + 3 * (
        1 + 3 * len(plan.CHOSEN["test"])))
    assert all(run["evaluate"][run["evaluate"].index("--data_dir") + 1] == str(tmp_path / "data/tune") for run in runs)
    confirming = listed("--stage", "confirm", "--settings", "recovery", "task", "--bits", 2, 3, 4)
    lota, baselines = ([run for run in confirming if ("LoTA" in run["name"]) == which] for which in (True, False))
    assert lota == [run for run in runs if "LoTA" in run["name"]] and len(confirming) == len(runs) + 2 * 3 * 3 * 2
    assert all(run["train"][run["train"].index("--lr_scheduler_type") + 1] == "linear" for run in baselines
               if "train" in run)
    for stage in ("choose", "ablation"):
        runs = listed("--stage", stage)
        assert len({(run["name"], run["seed"]) for run in runs}) == len(runs) > 10
        assert str(tmp_path / "data/tune") not in sum((run["evaluate"] for run in runs), [])
    defaults = {"offset_scale": "omega", "momentum": 0.0, "group": 32, "gradient_accumulation_steps": 1}
    for varied, (settings_of, centres) in plan.VARIED.items():      # a centre's own value changes nothing in it
        for centre, (own, *others) in centres.items():
            name, bits, _ = plan.CENTRES[centre]
            assert others and own not in others
            if varied != "trained beside A, B":
                settings = {**defaults, **plan.TRAIN, **plan.recipe(name, bits)}
                assert settings_of(own).items() <= settings.items()
    runs = listed("--stage", "table1", "--model", "meta-llama/Llama-3.1-8B", "--bits", 4, 3, 2)
    assert len(runs) == 4 * (1 + 3 * (1 + len(plan.TABLE1_METHODS)))
    assert plan.named("LoRA, 0.001", ["LoRA"]) and not plan.named("QA-LoRA", ["LoRA"])
    assert plan.named("LoTA, full", ["GPTQ", "full"]) and plan.named("LoTA, full", ["learned"])
    published, = (run for run in runs if run["name"] == "viggo, 3 bits, LoTA, published")
    assert published["gptq"].endswith("gptq/int3_64_Llama-3.1-8B")
    assert published["train"][published["train"].index("--interval_point") + 1] == 56
    assert published["evaluate"][:2] == ["--ft_dataset_name", "viggo"]


def test_runs_from_end_to_end(quantize, demo_data, tmp_path):
    """GPTQ, LoTA and LoRA in one list give a line each, and LoTA is scored merged and live.

    A second start runs only what is missing. A run that fails leaves the others alone.
    """
    gptq, results = str(quantize(2)), tmp_path / "results.jsonl"
    evaluate = ["--ft_dataset_name", "viggo", "--max_new_tokens", 24, "--eval_batch_size", 40, "--dtype", "float32",
                "--answer_loss", True, "--data_dir", str(demo_data)]
    train = [*TRAIN, "--data_dir", str(demo_data)]
    runs = [{"name": "GPTQ", "seed": 0, "evaluate": [*evaluate, "--quantized_model_dir", gptq]},
            {"name": "LoTA, a", "seed": 1, "gptq": gptq, "train": [*train, "--method", "lota", "--interval_point", 4],
             "evaluate": evaluate},
            {"name": "wrong", "seed": 1, "gptq": gptq, "train": [*train, "--lora_r", "x"], "evaluate": evaluate},
            {"name": "LoRA", "seed": 1, "gptq": gptq, "train": [*train, "--method", "lora"], "evaluate": evaluate}]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    arguments = ("--runs", tmp_path / "runs.json", "--work", tmp_path / "work", "--results", results, "--jobs", 2)
    with pytest.raises(SystemExit, match="1 runs failed"):
        run_main(run, *arguments)
    lines = {line["name"]: line for line in map(json.loads, results.read_text().splitlines())}
    assert set(lines) == {"GPTQ", "LoTA, a", "LoRA"}
    assert all(line["rows"] == 40 and 0 <= line["accuracy"] <= 1 and line["loss"] > 0 for line in lines.values())
    lota, lora = lines["LoTA, a"], lines["LoRA"]
    assert lota["differ_from_live"] == 0 and lota["live_accuracy"] == lota["accuracy"] and lota["merged_mb"] > 0
    assert "differ_from_live" not in lora and lora["adapter_mb"] > 0 and lora["train_s"] > 0
    assert lota["loss"] != lines["GPTQ"]["loss"] and str(tmp_path) not in results.read_text()
    assert lota["fingerprint"] == lora["fingerprint"] == GPTQFolder(gptq).fingerprint()
    assert lota["train"][:2] == TRAIN[:2] and gptq not in results.read_text()

    # Without the line of LoRA, and with GPTQ scored on fewer rows: LoRA's adapter is there, LoTA stays as it is.
    before = results.read_text().splitlines(keepends=True)
    results.write_text("".join(text for text in before if json.loads(text)["name"] != "LoRA"))
    runs[0]["evaluate"] = [*runs[0]["evaluate"], "--limit", 8]
    (tmp_path / "runs.json").write_text(json.dumps([runs[0], runs[1], runs[3]]))
    trained = (tmp_path / "work/adapters").glob("LoRA*/*/adapter_model.safetensors")
    times = [file.stat().st_mtime_ns for file in trained]
    with pytest.raises(SystemExit) as end:
        run_main(run, *arguments)
    again = [json.loads(text) for text in results.read_text().splitlines()]
    assert end.value.code == 0 and len(times) == 1
    assert [file.stat().st_mtime_ns for file in (tmp_path / "work/adapters").glob("LoRA*/*/*.safetensors")] == times
    assert sorted((line["name"], line["rows"]) for line in again) == [
        ("GPTQ", 8), ("GPTQ", 40), ("LoRA", 40), ("LoTA, a", 40)]
    assert next(line for line in again if line["name"] == "LoRA")["loss"] == lora["loss"]

    # Other flags of training: no adapter of the run's old self is taken.
    runs[3]["train"] = [*runs[3]["train"], "--learning_rate", 1e-2]
    (tmp_path / "runs.json").write_text(json.dumps([runs[3]]))
    with pytest.raises(SystemExit) as end:
        run_main(run, *arguments)
    changed = json.loads(results.read_text().splitlines()[-1])
    assert end.value.code == 0 and changed["name"] == "LoRA" and changed["loss"] != lora["loss"]


def this_environment(folder):
    """Variables with which a script of runs/ takes the environment that the tests run in, and installs nothing."""
    (folder / "env/bin").mkdir(parents=True)
    (folder / "env/bin/activate").touch()
    (folder / "env/requirements.installed").write_text(
        f"{ROOT}\n{(ROOT / 'requirements.txt').read_text()}{(ROOT / 'pyproject.toml').read_text()}")
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LOTA_ENV": str(folder / "env")}


def test_table_1_of_the_paper_at_a_small_size(demo_data, tmp_path):
    """runs/table1_8b.sh from end to end: it quantizes, runs every method, and adds a line for each.

    The settings are those of 8B, but the model is tiny, trains two steps, and has the demo's rows for ViGGO's.
    """
    # base_model does not serve here, because QA-LoRA needs whole groups of 64 inputs and it has layers of 160.
    run_main(tiny_base, "--data_name", "viggo", "--data_dir", demo_data, "--output", tmp_path / "tiny", "--hidden_size",
             64, "--intermediate_size", 128, "--layers", 1, "--heads", 2, "--vocab_size", 400, "--epochs", 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/viggo").symlink_to(demo_data)
    subprocess.run(["bash", ROOT / "runs/table1_8b.sh"], check=True, env={
        **this_environment(tmp_path), "MODEL": str(tmp_path / "tiny"), "WORK": str(tmp_path / "work"),
        "DATA": str(tmp_path / "data"), "BITS": "2", "SETS": "viggo", "TRAIN": "--max_steps 2 --dtype float32",
        "QUANTIZE": f"--calibration viggo --data_dir {demo_data} --samples 8",
        "EVALUATE": "--max_new_tokens 24 --dtype float32"})
    lines = [json.loads(line) for line in (tmp_path / "work/results.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["16-bit base", "GPTQ", *plan.TABLE1_METHODS]
    assert all(line["rows"] == 40 and line["loss"] > 0 for line in lines)
    assert [line["differ_from_live"] for line in lines if "differ_from_live" in line] == [0, 0, 0, 0]
    published = lines[4]["train"]
    assert published[published.index("--interval_point") + 1] == 56 and published[published.index("--lora_r") + 1] == 64


def test_ctrl_c_ends_an_experiment(quantize, demo_data, tmp_path):
    """Ctrl-C in a terminal reaches all processes. They end at once, and none goes on with the next run.

    It is so even where a script started the experiment with &, and its shell ignores the signal.
    """
    runs = [{"name": f"LoTA, {i}", "seed": 1, "gptq": str(quantize(2)), "evaluate": [],
             "train": [*TRAIN, "--max_steps", 10_000, "--data_dir", str(demo_data), "--method", "lota"]}
            for i in range(3)]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen([sys.executable, ROOT / "experiments/run.py", "--runs", tmp_path / "runs.json", "--work",
                                tmp_path, "--results", tmp_path / "results.jsonl"], stdout=subprocess.PIPE, text=True,
                               start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    signal.signal(signal.SIGINT, before)
    log = wait_for(lambda: next((tmp_path / "logs").glob("LoTA_0*.log"), None))
    wait_for(lambda: "step 1/10000" in log.read_text())
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and out.splitlines()[-1].startswith("stopped; ")

    def all_gone():
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
    wait_for(all_gone, seconds=30)
    assert len(list((tmp_path / "logs").iterdir())) == 1 and not (tmp_path / "results.jsonl").exists()


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def line(method, bits, seed, accuracy, loss, setting="recovery", **more):
    return {"method": method, "bits": bits, "seed": seed, "accuracy": accuracy, "loss": loss, "setting": setting,
            "rows": 100, **more}


def smol(data_set, method, bits, seed, accuracy=None, loss=None, **more):
    """A line of stage test on SmolLM2."""
    figures = {key: value for key, value in (("accuracy", accuracy), ("loss", loss)) if value is not None}
    return {"setting": data_set, "method": method, "bits": bits, "seed": seed, "rows": 160, **figures, **more}


def cells_of(text):
    """The rows of a Markdown table, as lists of cells."""
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_long_table_is_of_the_lines():
    """Means and standard deviations of the seeds, by setting, bits and method, beside the paper's own figures."""
    three = (0.5, 0.53, 0.59)
    lines = [line("16-bit base", 16, 0, 0.7, 0.05), line("GPTQ", 2, 0, 0.4, 0.2),
             *(line("LoTA, published", 2, i, a, 0.1 * i, train=[], moved=0.01 * i, adapter_mb=0.5, merged_mb=1.5,
                    train_s=10.0 * i, differ_from_live=i, gptq_mb=1.25) for i, a in enumerate(three, 1)),
             line("LoTA, published", 3, 1, 0.9, 0.1, train=[], differ_from_live=0),
             line("QA-LoRA, 3e-3", 2, 1, 0.25, 0.3, "task", train=[], differ_from_live=0)]
    text = tables.long_table(lines)
    rows = cells_of(text)
    assert [row[:2] for row in rows[2:]] == [["16", "the base"], ["3", "LoTA, published"], ["2", "GPTQ"],
                                            ["2", "QA-LoRA"], ["2", "LoTA, published"]]
    accuracy = f"{100 * mean(three):.1f} ± {100 * stdev(three):.1f}"
    assert rows[-1] == ["2", "LoTA, published", accuracy, "0.200 ± 0.100", "", "", "2.000", "0.50", "1.50", "20",
                        "*28.49*", "*41.98*"]
    assert rows[4][:3] + rows[4][6:9] == ["2", "GPTQ", "40.0", "", "", "1.25"]
    assert rows[-2][2:6] == ["", "", "25.0", "0.300"] and rows[-2][-2:] == ["*26.56*", "*37.18*"]
    assert cells_of(tables.long_table(lines, 7)) == [row[:7] for row in rows]
    assert "Seeds 1, 2, 3: mean ± standard deviation. " in text
    assert "In the 5 runs that merge, 500 answers were given merged and live: 6 differ" in text
    two = [line("LoRA", 2, seed, 0.5, 0.1, train=[]) for seed in (1, 2)]
    assert "0.0 (2)" in tables.long_table(two) and "with (2) of two of them" in tables.long_table(two)


def test_the_gap_recovered_is_a_share_of_loras_gain():
    """A method half way between GPTQ and LoRA has recovered half of the gap, and one below GPTQ a negative share."""
    plain = ["--residual", False]
    lines = [line("16-bit base", 16, 0, 0.7, 0.05), line("GPTQ", 2, 0, 0.4, 0.4), line("GPTQ", 2, 0, 0.3, 0.4, "task"),
             *(line("LoRA, 0.001", 2, seed, a, 0.2, train=[]) for seed, a in ((1, 0.55), (2, 0.65))),
             line("LoRA, 0.001", 2, 1, 0.309, 0.1, "task", train=[]),           # a gain of 0.9 points is no gain
             *(line("QA-LoRA", 2, seed, a, 0.35, train=[], merged_mb=1) for seed, a in ((1, 0.45), (2, 0.55))),
             line("LoTA, scales", 2, 1, 0.35, 0.45, train=plain, merged_mb=1),
             line("LoTA, scales", 2, 1, 0.9, 0.01, "task", train=plain, merged_mb=1),
             line("LoTA, full", 3, 1, 0.5, 0.3, train=[], merged_mb=1)]         # LoRA was not run at 3 bits
    header, _, *rows = cells_of(tables.results_table(lines))
    assert len(header) == 7 and "Scored on 100 rows" in tables.results_table(lines)
    assert rows == [["16", "the base", "70.0", "", "", "", ""],
                    ["3", "LoTA, full", "50.0", "", "", "", "GPTQ and offsets"],
                    ["2", "GPTQ", "40.0", "30.0", "0 / –", "0 / –", ""],
                    ["2", "LoRA, its adapter kept", "60.0 ± 7.1 (2)", "30.9", "100 / –", "100 / –", "cannot merge"],
                    ["2", "QA-LoRA", "50.0 ± 7.1 (2)", "", "50 / –", "25 / –", "GPTQ and offsets"],
                    ["2", "LoTA, scales", "35.0", "90.0", "-25 / –", "-25 / –", "plain GPTQ"]]


def test_old_names_of_recipes_are_read_as_new_ones():
    """The committed lines say steps, grid and learned, the tables ternary, scales and full."""
    assert tables.new_names("ablation, learned, 4 bits, task, steps 80") == "ablation, full, 4 bits, task, steps 80"
    assert tables.new_names("LoTA, grid, 0.03") == "LoTA, scales, 0.03"
    assert tables.new_names("LoTA, learned offset alone, 0.03") == "LoTA, learned offset alone, 0.03"
    for name in ("test", "confirm", "choose"):
        lines = tables.read_lines(tables.RESULTS / f"{name}.jsonl")
        assert {tables.method_of(line) for line in lines} <= {tables.BASE, *tables.METHODS}
    lines = tables.read_lines(tables.RESULTS / "ablation.jsonl")
    assert {line["centre"] for line in lines} == set(plan.CENTRES)
    assert {line["varied"] for line in lines if "varied" in line} == set(plan.VARIED)


def test_the_figures_are_drawn_of_what_is_there(tmp_path, monkeypatch):
    """Both figures from a few lines. The ablation's has every centre and every changed setting."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    lines = [line("GPTQ", 2, 0, 0.4, 0.2), line("LoTA, published", 2, 1, 0.5, 0.19),
             line("LoRA", 2, 1, 0.6, 0.1, "task")]
    tables.draw_results(lines, tmp_path / "results.svg")
    runs = plan.ablation(argparse.Namespace(work=tmp_path))
    lines = [{**run, "loss": 0.1, "accuracy": 0.5} for run in runs if run["name"] != "ablation, full"]
    tables.draw_ablation(lines, tmp_path / "ablation.svg")
    for file in ("results.svg", "ablation.svg"):
        assert (tmp_path / file).stat().st_size > 10_000
    drawn = (tmp_path / "ablation.svg").read_text()
    for text in (*plan.VARIED, *plan.CENTRES):
        assert f"<!-- {text} -->" in drawn


def test_the_committed_figures_have_the_names_of_their_lines():
    """A figure that was drawn before a recipe got its new name would show the old one."""
    for file in ("experiments/results/results.svg", "experiments/results/confirm.svg"):
        drawn, lines = (ROOT / file).read_text(), tables.read(tables.FIGURES[file].files[0])
        for method in {tables.method_of(line) for line in lines}:
            label = method if method == tables.BASE else tables.LABELS.get(method, method)
            assert f"<!-- {label} -->" in drawn, f"{file} does not show {label}"
    drawn = (ROOT / "experiments/results/ablation.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in (*plan.VARIED, *plan.CENTRES))


@pytest.fixture
def small_site(tmp_path, monkeypatch):
    """A root with the committed data, the index and another table in pages of docs/, and one figure on the first page.

    Returns the page with the other table.
    """
    for name in ("experiments", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("The first page.\n\n![a figure](experiments/results/results.svg)\n")
    (tmp_path / "docs/README.md").write_text("<!-- table index: x -->\n<!-- end of table index -->\n")
    page = tmp_path / "docs/speed.md"
    page.write_text("Before.\n\n<!-- table speed_layer: made somehow -->\nold\n<!-- end of table speed_layer -->\n\n"
                    "After.\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    file = "experiments/results/results.svg"            # it is not drawn, because that would draw the committed file
    monkeypatch.setattr(tables, "FIGURES", {file: replace(tables.FIGURES[file], draw=None)})
    return page


def test_tables_are_written_between_their_marks(small_site, capsys):
    """--check names a table that differs, and --write mends it and nothing else."""
    with pytest.raises(SystemExit, match="docs/speed.md: table speed_layer differs from its data") as end:
        run_main(tables, "--check")
    assert end.value.code
    run_main(tables, "--write")
    text = small_site.read_text()
    assert text.startswith("Before.\n\n<!-- table speed_layer: made by experiments/tables.py from "
                           "benchmarks/results/layer_cpu.json -->\n| layer |")
    assert text.endswith(".\n<!-- end of table speed_layer -->\n\nAfter.\n") and "old" not in text
    with pytest.raises(SystemExit) as end:
        run_main(tables, "--check")
    assert end.value.code == 0 and small_site.read_text() == text
    small_site.write_text(text.replace("| 2048 x 2048 | 4 |", "| 2048 x 2048 | 5 |"))        # edited by hand
    with pytest.raises(SystemExit, match="speed_layer differs"):
        run_main(tables, "--check")
    index = {row[0]: row[2:] for row in cells_of((tables.ROOT / "docs/README.md").read_text())}
    assert index["speed_layer"] == ["docs/speed.md", "experiments/tables.py", "`benchmarks/results/layer_cpu.json`",
                                    "`python benchmarks/layer.py`"]
    assert index["[results.svg](../experiments/results/results.svg)"][0] == "README.md"
    run_main(tables)
    assert "<!-- table memory: made by" in capsys.readouterr().out


def test_marks_that_are_wrong_are_refused(small_site):
    """A mark without its partner, and a table that is not in the list."""
    whole = small_site.read_text()
    for wrong in (whole.replace("<!-- end of table speed_layer -->\n", ""), f"{whole}\n<!-- end of table test -->\n",
                  whole + whole):
        small_site.write_text(wrong)
        with pytest.raises(UserError, match="^docs/speed.md: the marks of table (speed_layer|test) are not one pair"):
            tables.differing()
    small_site.write_text(whole.replace("speed_layer", "speed_layers"))
    with pytest.raises(UserError, match="there is no table speed_layers, only results, "):
        tables.differing()


def test_the_pages_have_the_tables_of_the_committed_data():
    """No figure of a page's tables without data behind it, and no table that stands in no page."""
    assert [f"{page.name}: {name}" for page, name in tables.differing()] == []
    assert {name for page in tables.pages() for name in tables.tables_in(page)} == set(tables.TABLES)
    assert all(map(tables.pages_with_figure, tables.FIGURES))


def test_the_index_names_files_that_exist():
    for entry in (*tables.TABLES.values(), *tables.FIGURES.values()):
        for file in (*entry.files, *re.findall(r"\S+/\S+\.(?:sh|py)", entry.command.replace("NAME", "layer"))):
            assert list(ROOT.glob(file)), file
    assert all((ROOT / file).exists() and (ROOT / figure.script).exists() for file, figure in tables.FIGURES.items())


def test_no_committed_run_differs_from_live():
    for name, runs in (("test", 30), ("confirm", 30), ("confirm_lrqat", 10)):
        lines = tables.read_lines(tables.RESULTS / f"{name}.jsonl")
        assert sum("differ_from_live" in line for line in lines) > runs
        assert all(line["differ_from_live"] == 0 for line in lines if "differ_from_live" in line)


def mode_2(correct, predictions, **more):
    """What a comparison reads of mode 2's JSON."""
    return {"accuracy": correct / 4, "interval_95": [0.1, 0.9], "correct": correct, "rows": 4,
            "predictions": [{"prediction": text} for text in predictions], **more}


def test_a_comparison_reads_the_newest_results_of_its_adapter(tmp_path):
    """Older files and those of another adapter are left alone, and a kind without a file is named."""
    for age, (name, correct) in enumerate((("base_16bit_viggo_1", 0), ("base_16bit_viggo_2", 4), ("x_gptq_viggo_1", 2),
                                           ("A_live_viggo_1", 3), ("B_live_viggo_1", 1))):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"correct": correct}))
        os.utime(file, (age, age))
    with pytest.raises(UserError, match="no results of mode 2 for: merged"):
        compare.read_results(tmp_path, "adapter/A")
    (tmp_path / "A_merged_viggo_1.json").write_text(json.dumps({"correct": 3}))
    found = compare.read_results(tmp_path, "adapter/A")
    assert {kind: results["correct"] for kind, results in found.items()} == {"16bit": 4, "gptq": 2, "live": 3,
                                                                            "merged": 3}


def test_a_comparison_shows_the_loss_where_it_was_measured(capsys):
    for more, shown in (({}, []), ({"loss": 0.1234}, ["loss", "0.123", "0.123", "0.123", "0.123"])):
        results = {kind: mode_2(3, "abcx", moved={"all": 0.5}, **more) for kind in compare.KINDS}
        compare.print_comparison(compare.comparison(results, LotaConfig(omega=4.0, rank=8, bits=2), 0.0, 1.0, 3, "abc"))
        rows = cells_of(capsys.readouterr().out)
        assert [row[4] for row in rows if len(row) > 4 and "-" not in row[4]] == shown


def test_two_comparisons_make_one_table():
    """The 16-bit and the GPTQ model, which both have, are one row each."""
    results = {"16bit": mode_2(4, "abcd"), "gptq": mode_2(1, "xxxx"), "live": mode_2(3, "abcx"),
               "merged": mode_2(3, "abcy", moved={"all": 0.00125})}
    first, second = (compare.comparison(results, LotaConfig(omega=omega, rank=16, bits=2), difference, 20.0, 3, "abc")
                     for omega, difference in ((12.0, 1e-5), (8.0, 2e-5)))
    text = tables.comparison_table(first, json.loads(json.dumps(second)))
    rows = cells_of(text)
    assert [row[0] for row in rows[2:]] == ["16-bit model", "GPTQ model, 2 bits", "LoTA, ω = 0.75 r, live",
                                            "LoTA, ω = 0.75 r, merged", "LoTA, ω = 0.5 r, live",
                                            "LoTA, ω = 0.5 r, merged"]
    assert rows[3][1:] == ["25.0", "10.0 to 90.0", "1 of 4", ""] and rows[-1][-2:] == ["3 of 4", "0.1250"]
    assert "2 of 8 answers differ. On the first 3 rows their logits differ by at most 2.0e-05" in text
    assert "commit abc." in text
    assert compare.names_of(LotaConfig(method="QA-LoRA", rank=8, bits=4))["live"] == "QA-LoRA, live"


SMOLLM2_LINES = [
    smol("sql", "16-bit base", 16, 0, 0.1, 1.2, other={"gsm8k": {"loss": 1.5}}),
    smol("sql", "16-bit, tuned", 16, 1, 0.75, 0.1, train=["--max_steps", 40]),
    smol("sql", "GPTQ", 4, 0, 0.05, 1.1), smol("viggo", "GPTQ", 4, 0, 0.0, 0.5),
    *(smol("sql", "LoRA", 4, seed, 0.7, loss, train=["--max_steps", 40]) for seed, loss in ((1, 0.2), (2, 0.4))),
    smol("viggo", "LoRA", 4, 1, 0.5, 0.495, train=["--max_steps", 40]),
    *(smol("sql", "LoTA, full", 4, seed, 0.6, 0.5, train=["--max_steps", 40], moved=0.001, merged_mb=90.0, offsets=True,
           differ_from_live=1, live_rows=40) for seed in (1, 2)),
    smol("viggo", "LoTA, scales", 2, 1, 0.4, train=["--max_steps", 40, "--recipe", "scales"], merged_mb=80.0,
         moved=0.02, other={"python_docs": {"lm_eval": {"python_docs": {"word_perplexity,none": 21.25}}},
                            "gsm8k": {"loss": 1.75}})]


def test_the_table_of_smollm2_is_of_its_lines():
    """Exact match, loss, both gaps, and a dash wherever something was not run, or where a gap is too small."""
    text = tables.smollm2_table(SMOLLM2_LINES)
    rows = {tuple(row[:2]): row[2:] for row in cells_of(text)[2:]}
    assert list(rows) == [("16", "the model"), ("16", "the model, tuned by LoRA"), ("4", "GPTQ"),
                          ("4", "LoRA, its adapter kept"), ("4", "LoTA, full"), ("2", "LoTA, scales")]
    assert rows["16", "the model"] == ["10.0", "1.200", "–", "–", "", "", "", ""]
    assert rows["4", "LoRA, its adapter kept"][:2] == ["70.0 ± 0.0 (2)", "0.300 ± 0.141 (2)"]
    # SQL: (1.1 - 0.5) / (1.1 - 0.3) and / (1.1 - 0.1). On ViGGO LoRA's own gain is below the least one.
    assert rows["4", "LoTA, full"][2:] == ["–", "–", "75.0 / –", "60.0 / –", "0.100 / –", "GPTQ and offsets"]
    assert rows["4", "LoRA, its adapter kept"][4:] == ["100.0 / –", "80.0 / –", "", "cannot merge"]
    assert rows["2", "LoTA, scales"] == ["–", "–", "40.0", "–", "– / –", "– / –", "– / 2.000", "plain GPTQ"]
    assert "SQL on 160, ViGGO on 160 test rows" in text and "1 or 2 runs a cell, seeds 1, 2, 40 steps" in text
    assert "Answers that differ merged and live: 2 of 80 of LoTA." in text
    other = {tuple(row[:2]): row[2:] for row in cells_of(tables.smollm2_other_table(SMOLLM2_LINES))[2:]}
    assert other == {("16", "the model"): ["–", "1.500", "–", "–"], ("2", "LoTA, scales"): ["–", "–", "21.2", "1.750"]}
    for empty in ([], SMOLLM2_LINES[:1]):
        assert "Mean" in tables.smollm2_table(empty) and tables.smollm2_other_table(empty)


def test_the_tables_of_smollm2_are_printed_from_any_file(tmp_path, capsys):
    (tmp_path / "lines.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in SMOLLM2_LINES))
    run_main(tables, "--smollm2", tmp_path / "lines.jsonl")
    assert capsys.readouterr().out == (f"{tables.smollm2_table(SMOLLM2_LINES)}\n"
                                       f"{tables.smollm2_other_table(SMOLLM2_LINES)}\n")
    assert set(tables.SMOLLM2_METHODS) == {tables.BASE, "GPTQ", tables.SCALES_AFTER, plan_smollm2.TUNED_16,
                                           plan_smollm2.REQUANTIZED, *plan_smollm2.METHODS_TRIED}


def test_the_rows_of_smollm2_are_kept_apart(demo_data, tmp_path):
    """Rows for tuning, choosing and testing share nothing, are drawn alike each time, and the text is a task."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/viggo").symlink_to(demo_data)
    with pytest.raises(UserError, match="has no folder sql or viggo"):
        run_main(smollm2, "rows", "--data_dir", demo_data, "--output", tmp_path / "none")
    for output in ("a", "b"):
        run_main(smollm2, "rows", "--data_dir", tmp_path / "data", "--output", tmp_path / output)
    files = sorted(file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.jsonl"))
    assert all((tmp_path / "a" / file).read_text() == (tmp_path / "b" / file).read_text() for file in files)
    parts = {name: (tmp_path / "a/viggo" / name).read_text().splitlines()
             for name in ("tune/train.jsonl", "tune/test.jsonl", "choose/train.jsonl", "choose/test.jsonl")}
    assert parts["tune/train.jsonl"] == parts["choose/train.jsonl"]
    apart = [parts[name] for name in ("tune/train.jsonl", "tune/test.jsonl", "choose/test.jsonl")]
    assert all(apart) and len(set().union(*apart)) == sum(map(len, apart))
    assert sorted(apart[0] + apart[2]) == sorted(
        json.dumps(dict(zip(("mr", "ref"), row, strict=True))) for row in rows_of(demo_data / "train.csv"))
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=str(tmp_path / "a/tasks"))
    assert smollm2.TEXT_TASK in manager.all_tasks


def test_a_model_comes_out_of_a_package(trained, gptq_2bit, evaluate, tmp_path, monkeypatch):
    """The GGUF file in a wheel becomes a 16-bit folder that computes what the file does, if it answers sensibly.

    llama.cpp's answers from the same file are compared with those of mode 2.
    """
    merge(trained, gptq_2bit, tmp_path / "merged")
    export(tmp_path / "merged", "gguf", tmp_path / "gguf")
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(tmp_path / "gguf" / GGUF_FILE, "package/model.gguf")
    arguments = ("model", "--package", wheel, "--output", tmp_path / "base")
    with pytest.raises(UserError, match="was read wrongly: it does not say Paris"):
        run_main(smollm2, *arguments)
    assert not (tmp_path / "base").exists()
    monkeypatch.setattr(smollm2, "ANSWER", "")
    run_main(smollm2, *arguments)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file=GGUF_FILE, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert not hasattr(ours.config, "quantization_config")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())
    with zipfile.ZipFile(wheel, "a") as file:
        file.writestr("package/other.gguf", "")
    with pytest.raises(UserError, match="has 2 GGUF files, and one is wanted"):
        run_main(smollm2, *arguments)

    pytest.importorskip("llama_cpp")
    results = evaluate(tmp_path / "results", "--load_adapter", tmp_path / "merged", "--limit", 4)
    file, = (tmp_path / "results").glob("*.json")
    run_main(smollm2, "ask", "--gguf", tmp_path / "gguf" / GGUF_FILE, "--tokenizer", tmp_path / "merged",
             "--results", file)
    for item in results["predictions"]:
        item["prediction"] = "something else"
    with pytest.raises(UserError, match="answers otherwise in llama.cpp"):
        smollm2.ask(tmp_path / "gguf" / GGUF_FILE, str(tmp_path / "merged"), results, 4)


@pytest.fixture
def plan_of(tmp_path, capsys):
    """(arguments) -> the runs of a stage on SmolLM2, and what was printed."""
    def listed(*arguments):
        run_main(plan_smollm2, "--work", tmp_path, "--output", tmp_path / "runs.json", *arguments)
        return json.loads((tmp_path / "runs.json").read_text()), capsys.readouterr().out
    return listed


def test_every_method_has_as_many_tries_on_smollm2(plan_of, tmp_path):
    """They are scored on rows of the train split, and every flag is one of mode 1 or 2."""
    runs, said = plan_of("--stage", "choose")
    for method in plan_smollm2.METHODS_TRIED:
        for data_set in plan_smollm2.SETS:
            for bits in plan_smollm2.BITS:
                tried = [one for one in runs
                         if (one["setting"], one["bits"], one["method"]) == (data_set, bits, method)]
                assert len({one["name"] for one in tried}) == len(tried) == plan_smollm2.TRIES
    assert f"{len(runs)} runs" in said and "hours" in said
    assert all(tables.flag_of(one["evaluate"], "--data_dir").endswith("/choose") for one in runs)
    for one in runs[::7]:
        assert run.parse(1, one["train"])[1].max_steps == plan_smollm2.TRAIN["max_steps"]
        assert not run.parse(2, one["evaluate"])[2].generate


def test_the_lowest_loss_is_what_is_tested_on_smollm2(plan_of, tmp_path):
    """A try counts where it ran on every set. A number of bits without tries takes the choice at more bits."""
    chosen, said = plan_of("--stage", "test")
    assert {one["method"] for one in chosen} == {"16-bit base", "GPTQ"} and "has no loss of them" in said
    tries, _ = plan_of("--stage", "choose", "--bits", 4, "--only", "LoRA", "16-bit", "full")
    losses = {one["try"]: i for i, one in enumerate(tries)}         # LoRA's and full's first tries are the best ...
    lines = [{**run.without_paths(one), "loss": losses[one["try"]] + (one["setting"] == "viggo")} for one in tries]
    lines = [line for line in lines if line["name"] != "viggo, 4 bits, LoRA, learning_rate 0.0003"]     # ... but one
    (tmp_path / "choose.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    chosen, said = plan_of("--stage", "test", "--bits", 4, 2)
    assert "QA-LoRA at 4 bits" in said and "LoRA at 2 bits" not in said.replace("QA-LoRA", "")
    tuned = [one for one in chosen if "train" in one]
    assert {(one["bits"], one["try"]) for one in tuned if one["method"] == "LoRA"} == {
        (4, "LoRA, learning_rate 0.001"), (2, "LoRA, learning_rate 0.001")}
    full = next(one for one in tuned if one["method"] == "LoTA, full")
    assert full["try"] == "LoTA, full, offset_lr 0.0001, scale_lr 0.0004" and full["live_rows"] == 20
    assert run.parse(1, full["train"])[1].offset_lr == 0.0001
    # 2 sets: the base and GPTQ at 2 numbers of bits once; LoRA, LoRA requantized and both methods' full at both, and
    # the tuned base, with 3 seeds.
    assert len(chosen) == 2 * (1 + 2) + 2 * 3 * (2 * 4 + 1)
    assert len({(one["name"], one["seed"]) for one in chosen}) == len(chosen)
    assert [one["seed"] for one in chosen] == sorted(one["seed"] for one in chosen)
    assert all(("also" in one) == (one["seed"] < 2) for one in chosen)
    assert all(tables.flag_of(one["evaluate"], "--data_dir").endswith("/tune") for one in chosen)
    with pytest.raises(UserError, match="no run is left"):
        plan_of("--stage", "choose", "--only", "nothing")


def test_the_stages_of_smollm2_at_a_small_size(demo_data, tmp_path):
    """runs/smollm2.sh --stage, from rows to lines, with a tiny model in SmolLM2's place: it chooses and then tests."""
    run_main(tiny_base, "--data_name", "viggo", "--data_dir", demo_data, "--output", tmp_path / "work/SmolLM2-135M",
             "--hidden_size", 64, "--intermediate_size", 128, "--layers", 1, "--heads", 2, "--vocab_size", 400,
             "--epochs", 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/viggo").symlink_to(demo_data)
    environment = {**this_environment(tmp_path), "LOTA_WORK": str(tmp_path / "work")}
    for stage in ("choose", "test"):
        subprocess.run(["bash", ROOT / "runs/smollm2.sh", "--stage", stage, tmp_path / "data", "--bits", "2", "--only",
                        "published", "--steps", "2", "--seeds", "1"], check=True, env=environment)
    choose, test = ([json.loads(line) for line in (tmp_path / f"work/{stage}.jsonl").read_text().splitlines()]
                    for stage in ("choose", "test"))
    assert len({line["try"] for line in choose}) == len(choose) == plan_smollm2.TRIES
    assert [line["method"] for line in test] == ["16-bit base", "GPTQ", "LoTA, published"]
    assert test[-1]["try"] == min(choose, key=lambda line: line["loss"])["try"] and test[-1]["differ_from_live"] == 0
    assert all(line["other"]["python_docs"]["lm_eval"]["python_docs"]["word_perplexity,none"] > 1 for line in test)
    assert "GPTQ and offsets" in tables.smollm2_table(test) and str(tmp_path) not in json.dumps(choose + test)


def test_a_dry_run_only_counts(tmp_path, capsys):
    run_main(plan_smollm2, "--work", tmp_path, "--output", tmp_path / "runs.json", "--stage", "choose", "--dry_run",
             "--step_s", 3600, "--steps", 2, "--sets", "sql", "--bits", 4, "--only", "QA-LoRA")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == plan_smollm2.TRIES + 1 and said[0].endswith("QA-LoRA, learning_rate 0.0003, seed 1")
    assert "4 runs, about 8." in said[-1] and not (tmp_path / "runs.json").exists()


def test_runs_that_measure_the_loss_alone_and_other_things_too(quantize, demo_data, base_model, tmp_path):
    """A run without answers, one that scores a second data set too, and a tuned 16-bit model."""
    gptq, data_dir = str(quantize(2)), ["--data_dir", str(demo_data)]
    loss = ["--ft_dataset_name", "viggo", "--answer_loss", True, "--no_generate", "--dtype", "float32", *data_dir]
    answers = [*loss, "--generate", True, "--max_new_tokens", 8, "--limit", 6]
    train = [*TRAIN, *data_dir, "--learning_rate", 1e-3]
    also = {"few": ["--limit", 3, "--no_generate"]}
    runs = [{"name": "loss", "seed": 1, "gptq": gptq, "train": [*train, "--method", "lota"], "evaluate": loss,
             "live_rows": 0},
            {"name": "some live", "seed": 1, "gptq": gptq, "train": [*train, "--method", "lota"], "evaluate": answers,
             "live_rows": 2, "also": also},
            {"name": "16 bits", "seed": 1, "base": str(base_model), "train": train, "evaluate": loss, "also": also},
            {"name": "untuned", "seed": 0, "evaluate": [*loss, "--auto_gptq", "none", "--pretrained", str(base_model)]}]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    arguments = ("--runs", tmp_path / "runs.json", "--work", tmp_path / "work", "--results", tmp_path / "results.jsonl")
    for _ in range(2):          # the second start finds nothing missing
        with pytest.raises(SystemExit) as end:
            run_main(run, *arguments)
        assert end.value.code == 0
        lines = {line["name"]: line for line in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
        assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4
    alone, live, tuned, untuned = (lines[one["name"]] for one in runs)
    assert alone["loss"] > 0 and alone["offsets"] is True and not {"accuracy", "live_accuracy", "other"} & alone.keys()
    assert live["differ_from_live"] == 0 and live["rows"] == 6 and live["other"]["few"]["rows"] == 3
    assert "accuracy" not in live["other"]["few"] and live["also"] == also
    assert tuned["loss"] < untuned["loss"] and tuned["other"]["few"]["loss"] > 0 and tuned["train_s"] > 0
    assert str(tmp_path) not in (tmp_path / "results.jsonl").read_text()


def test_a_requantized_run_takes_the_adapter_of_lora(quantize, demo_data, tmp_path, monkeypatch):
    """It trains nothing where the run of LoRA has its adapter already, and scores the folder of requantize()."""
    gptq, asked = str(quantize(2)), []
    monkeypatch.setitem(sys.modules, "requantize", SimpleNamespace(
        requantize=lambda adapter, folder, output, flags: asked.append((adapter.config.method, output)) or folder))
    data_dir = ["--data_dir", str(demo_data)]
    evaluate = ["--ft_dataset_name", "viggo", "--answer_loss", True, "--no_generate", "--dtype", "float32", *data_dir]
    lora = {"name": "LoRA", "seed": 1, "gptq": gptq, "train": [*TRAIN, *data_dir, "--method", "lora"],
            "evaluate": evaluate}
    other = {**lora, "name": "LoRA, requantized", "requantize": True, "adapter_of": "LoRA"}
    first, second = run.perform(lora, tmp_path), run.perform(other, tmp_path)
    assert len(list((tmp_path / "adapters").iterdir())) == 1 and first["train_s"] == second["train_s"]
    assert asked == [("LoRA", tmp_path / "requantized" / run.file_name(other))] and second["offsets"] is False
    assert second["loss"] == run.perform({"evaluate": [*evaluate, "--quantized_model_dir", gptq]}, tmp_path)["loss"]


def test_runs_holds_shell_scripts_that_name_what_exists():
    """Everything that runs/*.sh calls is there. The parse of bash finds what no other test starts."""
    scripts = sorted((ROOT / "runs").iterdir())
    assert all(script.suffix == ".sh" for script in scripts)
    called = set()
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        called |= set(re.findall(r"\bpython (\S+\.py)", script.read_text()))
    assert all((ROOT / file).exists() for file in called)
    assert {Path(module.__file__) for module in (compare, data, deploy, plan, run, tiny_base)} <= {
        ROOT / file for file in called}
    assert two_steps.RANK == plan.RANK


def test_an_environment_is_made_again_when_its_requirements_change(tmp_path):
    """runs/environment.sh installs requirements and project once, and again after a change of either file."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    calls, python = tmp_path / "calls.txt", tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\necho "$*" >> {calls}\n')         # says what it was asked, and does nothing
    python.chmod(0o755)
    (python.parent / "activate").touch()

    def installs():
        """What sourcing the script makes pip install; and PYTHONPATH afterwards."""
        calls.write_text("")
        environment = {name: value for name, value in os.environ.items() if name not in ("LOTA_ENV", "PYTHONPATH")}
        out = subprocess.run(["bash", "-euo", "pipefail", "-c", 'source runs/environment.sh; echo "$PYTHONPATH"'],
                             cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
        assert out.splitlines()[-1] == str(tmp_path)
        return [call.split()[-2:] for call in calls.read_text().splitlines() if "install" in call]
    everything = [["-r", "requirements.txt"], ["-e", "."]]
    assert installs() == everything and installs() == []
    for name in ("requirements.txt", "pyproject.toml"):
        with open(tmp_path / name, "a") as f:
            f.write("# a change\n")
        assert installs() == everything and installs() == []
    (tmp_path / ".venv/requirements.installed").write_text("half\n")
    assert installs() == everything


@pytest.mark.parametrize("data_set, prediction, label, here, published", [
    ("gsm8k", "5 - 2 = 3\n#### 3", "#### 3", True, True), ("gsm8k", "#### 1,000", "#### 1000", True, False),
    ("gsm8k", "#### $3.00", "#### 3", True, False), ("gsm8k", "3", "#### 3", False, True),
    ("viggo", "inform(a[x, y], b[z])", "inform(b[z], a[x, y])", True, True),
    ("viggo", "inform(a[x,y])", "inform(a[x, y])", False, True),
    ("viggo", "inform(a[x])", "inform(a[y])", False, False),
    ("sql", "SELECT a ", "SELECT a", True, True)])
def test_two_rules_of_scoring(data_set, prediction, label, here, published):
    """By this project's rule and by the published scripts'."""
    found = scoring.count({"data_set": data_set, "predictions": [{"prediction": prediction, "label": label}]})
    assert found == {"rows": 1, "both": here and published, "here": here and not published,
                     "published": published and not here}


def test_only_three_data_sets_have_a_published_rule():
    with pytest.raises(UserError, match="no score for 'None'; they have gsm8k, sql, viggo"):
        scoring.count({"predictions": []})
