"""The benchmarks: the memory table is what loaded models hold, its file is up to date, and every script starts."""
import os
import runpy
import subprocess
import sys

import memory
import memory_check
import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())
# The numbers of parameters that the model pages on the hub name.
PARAMETERS = {"1B": 1_235_814_400, "3B": 3_212_749_824, "8B": 8_030_261_248, "14B": 14_770_033_664,
              "32B": 32_763_876_352, "70B": 70_553_706_496}


@pytest.mark.parametrize("shape, bits, method", [
    ("Qwen 2", 4, "published"), ("Llama, tied", 2, "full"), ("Qwen 2", 3, "LoRA"), ("Llama, tied", 4, "merged"),
    ("Qwen 2", 3, "merged")])
def test_the_formula_is_what_a_model_holds(tmp_path, shape, bits, method):
    sizes = memory_check.compare(shape, bits, method, tmp_path)
    assert {part: measured for part, (_, measured) in sizes.items()} == {
        part: formula for part, (formula, _) in sizes.items()}
    assert sizes["everything"][1] > 0


def test_the_shapes_have_the_published_numbers_of_parameters():
    assert {name: shape.parameters() for name, shape in memory.MODELS.items()} == PARAMETERS


def test_memory_json_is_what_the_script_computes(tmp_path, monkeypatch, capsys):
    committed = memory.RESULT.read_text()
    monkeypatch.setattr(memory, "RESULT", tmp_path / "memory.json")
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    memory.main()
    assert memory.RESULT.read_text() == committed
    printed = capsys.readouterr().out
    assert memory.table() in printed and memory.short_table() in printed


def test_the_tables_have_a_cell_for_everything():
    for text, lines in ((memory.table(), len(memory.MODELS) * len(memory.BITS)),
                        (memory.short_table(), len(memory.MODELS))):
        rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
        assert len(rows) == 2 + lines and len({len(row) for row in rows}) == 1
        assert all(cell.strip() for row in rows for cell in row)
        assert "Activations are not counted." in text


def test_the_tables_need_no_torch():
    code = "import sys, memory; memory.table(), memory.short_table(); sys.exit('torch' in sys.modules)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


def test_a_batch_has_the_lengths_of_rows(demo_data):
    """Of the rows around the median: a prompt without labels, an answer with them, padding without a mask."""
    from train_step import viggo_batch
    batch = viggo_batch(5, 600, demo_data)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert ids.shape == labels.shape == mask.shape and ids.shape[0] == 5 and ids.shape[1] % 8 == 0
    answers = labels != -100
    assert (labels[answers] == ids[answers]).all() and (mask[answers] == 1).all() and not answers[:, 0].any()
    lengths = mask.sum(1)
    assert (lengths.diff() >= 0).all() and ids.shape[1] - 8 < lengths[-1] <= ids.shape[1]
    assert all(answers[i, length - 1] and (mask[i, :length] == 1).all() for i, length in enumerate(lengths))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    assert stopped.value.code == 0
    assert f"usage: {script}" in capsys.readouterr().out
