"""The experiment scripts: the cut of the data, the lists of runs, a run from end to end, and the README's figures."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import experiment
import experiment_data
import experiment_runs
import experiment_table
import pytest
from conftest import ROOT, run_main

from LoTA.folders import GPTQFolder

TRAIN = ["--training_data_name", "viggo", "--lora_r", 8, "--max_steps", 3, "--train_batch_size", 8, "--dtype",
         "float32", "--save_strategy", "no"]


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as f:
        return [(row["mr"], row["ref"]) for row in csv.DictReader(f)]


def test_the_cut_keeps_rows_apart(tmp_path):
    """Half, 40 % and 10 %, no row in two parts; the second base has no row of three functions; test rows are only where
    nothing is chosen. Turned: bases from the other half, and the meanings to be scored are in no other part."""
    functions = ("inform", *experiment_data.LACKING)
    train = [(f"{functions[i // 2 % 4]}(name[Game {i // 2}])", f"Text {i}.") for i in range(200)]
    test = [(f"inform(name[Test {i}])", f"Test {i}.") for i in range(7)]
    for name, rows in (("train", train), ("test", test)):
        with open(tmp_path / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([("mr", "ref"), *rows])
    run_main(experiment_data, "--data_dir", tmp_path, "--output", tmp_path / "cut")
    part = {name: rows_of(tmp_path / "cut" / name / "train.csv")
            for name in ("base_recovery", "base_task", "tune", "choose")}
    choosing = rows_of(tmp_path / "cut/choose/test.csv")
    assert (len(part["base_recovery"]), len(part["tune"]), len(choosing)) == (100, 80, 20)
    assert sorted(part["base_recovery"] + part["tune"] + choosing) == sorted(train)
    assert part["base_task"] == [row for row in part["base_recovery"] if row[0].startswith("inform(")]
    assert part["choose"] == part["tune"] and rows_of(tmp_path / "cut/tune/test.csv") == test
    assert not set(choosing) & set(test)

    run_main(experiment_data, "--data_dir", tmp_path, "--output", tmp_path / "turned", "--turned")
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
    """Stage test: every method, setting, number of bits and seed once, and scored on the test rows; choose: not."""
    def listed(*arguments):
        run_main(experiment_runs, "--work", tmp_path, "--output", tmp_path / "runs.json", *arguments)
        return json.loads((tmp_path / "runs.json").read_text())
    runs = listed("--stage", "test", "--settings", "recovery", "task", "--bits", 2, 3, 4)
    assert len({(run["name"], run["seed"]) for run in runs}) == len(runs) == 2 * (1 + 3 * (
        1 + 3 * len(experiment_runs.CHOSEN["test"])))
    assert all(run["evaluate"][run["evaluate"].index("--data_dir") + 1] == str(tmp_path / "data/tune") for run in runs)
    confirming = listed("--stage", "confirm", "--settings", "recovery", "task", "--bits", 2, 3, 4)
    lota, baselines = ([run for run in confirming if ("LoTA" in run["name"]) == which] for which in (True, False))
    assert lota == [run for run in runs if "LoTA" in run["name"]] and len(confirming) == len(runs)
    assert all(run["train"][run["train"].index("--lr_scheduler_type") + 1] == "linear" for run in baselines
               if "train" in run)
    for stage in ("choose", "ablation"):
        runs = listed("--stage", stage)
        assert len({(run["name"], run["seed"]) for run in runs}) == len(runs) > 10
        assert str(tmp_path / "data/tune") not in sum((run["evaluate"] for run in runs), [])
    elsewhere = {"offset_scale": "omega", "momentum": 0.0, "group": 32, "gradient_accumulation_steps": 1}
    for varied, own in experiment_runs.CENTRE.items():          # a centre's own value changes nothing in it
        for centre, value in own.items():
            of, bits, _ = experiment_runs.CENTRES[centre]
            settings = {**elsewhere, **experiment_runs.TRAIN, **experiment_runs.recipe(of, bits)}
            if varied != "trained beside A, B":
                assert experiment_runs.VARIED[varied][0](value).items() <= settings.items()
    runs = listed("--stage", "table1", "--model", "meta-llama/Llama-3.1-8B", "--bits", 4, 3, 2)
    assert len(runs) == 4 * (1 + 3 * (1 + len(experiment_runs.TABLE1_METHODS)))
    assert experiment_runs.named("LoRA, 0.001", ["LoRA"]) and not experiment_runs.named("QA-LoRA", ["LoRA"])
    assert experiment_runs.named("LoTA, learned", ["GPTQ", "learned"])
    published, = (run for run in runs if run["name"] == "viggo, 3 bits, LoTA, published")
    assert published["gptq"].endswith("gptq/int3_64_Llama-3.1-8B")
    assert published["train"][published["train"].index("--interval_point") + 1] == 56
    assert published["evaluate"][:2] == ["--ft_dataset_name", "viggo"]


def test_runs_from_end_to_end(quantize, demo_data, tmp_path):
    """GPTQ, LoTA and LoRA in one list: a line each, LoTA merged and live; a second start runs what is missing only; a
    run that fails leaves the others alone."""
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
        run_main(experiment, *arguments)
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
        run_main(experiment, *arguments)
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
        run_main(experiment, *arguments)
    changed = json.loads(results.read_text().splitlines()[-1])
    assert end.value.code == 0 and changed["name"] == "LoRA" and changed["loss"] != lora["loss"]


def test_table_1_of_the_paper_at_a_small_size(demo_data, tmp_path):
    """runs/table1_8b.sh from end to end: quantizes, runs every method, and adds a line for each. The settings are those
    of 8B, but for a tiny model, two steps, and the demo's rows for ViGGO's."""
    import tiny_base
    # Not base_model: QA-LoRA's pooling wants every input to be whole groups of 64, and that one has 160.
    run_main(tiny_base, "--data_name", "viggo", "--data_dir", demo_data, "--output", tmp_path / "tiny", "--hidden_size",
             64, "--intermediate_size", 128, "--layers", 1, "--heads", 2, "--vocab_size", 400, "--epochs", 1)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/viggo").symlink_to(demo_data)
    activate = tmp_path / "env/bin/activate"        # the environment is the one that the tests run in
    activate.parent.mkdir(parents=True)
    activate.touch()
    shutil.copy(ROOT / "requirements.txt", tmp_path / "env/requirements.installed")
    subprocess.run(["bash", ROOT / "runs/table1_8b.sh"], check=True, env={
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "LOTA_ENV": str(tmp_path / "env"),
        "MODEL": str(tmp_path / "tiny"), "WORK": str(tmp_path / "work"), "DATA": str(tmp_path / "data"), "BITS": "2",
        "SETS": "viggo", "TRAIN": "--max_steps 2 --dtype float32",
        "QUANTIZE": f"--calibration viggo --data_dir {demo_data} --samples 8",
        "EVALUATE": "--max_new_tokens 24 --dtype float32"})
    lines = [json.loads(line) for line in (tmp_path / "work/results.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines] == ["16-bit base", "GPTQ", *experiment_runs.TABLE1_METHODS]
    assert all(line["rows"] == 40 and line["loss"] > 0 for line in lines)
    assert [line["differ_from_live"] for line in lines if "differ_from_live" in line] == [0, 0, 0, 0]
    published = lines[4]["train"]
    assert published[published.index("--interval_point") + 1] == 56 and published[published.index("--lora_r") + 1] == 64


def test_ctrl_c_ends_an_experiment(quantize, demo_data, tmp_path):
    """Ctrl-C in a terminal reaches all processes: they end at once, none goes on with the next run. Also where this was
    started with & by a script: its shell has had the signal ignored."""
    runs = [{"name": f"LoTA, {i}", "seed": 1, "gptq": str(quantize(2)), "evaluate": [],
             "train": [*TRAIN, "--max_steps", 10_000, "--data_dir", str(demo_data), "--method", "lota"]}
            for i in range(3)]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen([sys.executable, ROOT / "runs/experiment.py", "--runs", tmp_path / "runs.json", "--work",
                                tmp_path, "--results", tmp_path / "results.jsonl"], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
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


def test_the_table_is_of_the_lines():
    """Means and standard deviations of the seeds, by setting, bits and method, beside the paper's own figures."""
    three = (0.5, 0.53, 0.59)
    lines = [line("16-bit base", 16, 0, 0.7, 0.05), line("GPTQ", 2, 0, 0.4, 0.2),
             *(line("LoTA, published", 2, i, a, 0.1 * i, train=[], moved=0.01 * i, adapter_mb=0.5, merged_mb=1.5,
                    train_s=10.0 * i, differ_from_live=i, gptq_mb=1.25) for i, a in enumerate(three, 1)),
             line("LoTA, published", 3, 1, 0.9, 0.1, train=[], differ_from_live=0),
             line("QA-LoRA, 3e-3", 2, 1, 0.25, 0.3, "task", train=[], differ_from_live=0)]
    text = experiment_table.table(lines, 12)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [["16", "the base"], ["3", "LoTA, as published"], ["2", "GPTQ"],
                                            ["2", "QA-LoRA"], ["2", "LoTA, as published"]]
    accuracy = f"{100 * mean(three):.1f} ± {100 * stdev(three):.1f}"
    assert rows[-1] == ["2", "LoTA, as published", accuracy, "0.200 ± 0.100", "", "", "2.000", "0.50", "1.50", "20",
                        "*28.49*", "*41.98*"]
    assert rows[4][:3] + rows[4][6:9] == ["2", "GPTQ", "40.0", "", "", "1.25"]
    assert rows[-2][2:6] == ["", "", "25.0", "0.300"] and rows[-2][-2:] == ["*26.56*", "*37.18*"]
    assert len({row.count("|") for row in text.splitlines() if row.startswith("|")}) == 1
    narrow = experiment_table.table(lines, 7).splitlines()[2:7]
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in narrow] == [row[:7] for row in rows[2:]]
    assert "Seeds 1, 2, 3" in text
    assert "In the 5 runs that merge, 500 answers were given merged and live: 6 differ" in text


def test_the_figures_are_drawn_of_what_is_there(tmp_path, monkeypatch):
    """Both figures from a few lines, whatever else is missing; every recipe and varied setting is in the ablation's."""
    monkeypatch.setattr(experiment_table, "ROOT", tmp_path)
    lines = [line("GPTQ", 2, 0, 0.4, 0.2), line("LoTA, published", 2, 1, 0.5, 0.19),
             line("LoRA", 2, 1, 0.6, 0.1, "task")]
    experiment_table.draw_results(lines, tmp_path / "results.svg")
    work = experiment_runs.ablation(experiment_runs.argparse.Namespace(work=tmp_path))
    lines = [{**run, "loss": 0.1, "accuracy": 0.5} for run in work if run["name"] != "ablation, learned"]
    experiment_table.draw_ablation(lines, tmp_path / "ablation.svg")
    for file in ("results.svg", "ablation.svg"):
        assert (tmp_path / file).stat().st_size > 10_000
    drawn = (tmp_path / "ablation.svg").read_text()
    for text in (*experiment_runs.VARIED, *experiment_runs.CENTRES):
        assert f"<!-- {text} -->" in drawn


def test_the_readme_has_the_tables_of_the_committed_lines():
    """No figure of the README's tables without a line of JSON behind it."""
    readme = (ROOT / "README.md").read_text()
    assert experiment_table.with_tables(readme) == readme
    for name in experiment_table.TABLES:
        lines = experiment_table.read_lines(experiment_table.RESULTS / name)
        assert sum("differ_from_live" in line for line in lines) > 30
        assert all(line["differ_from_live"] == 0 for line in lines if "differ_from_live" in line)
