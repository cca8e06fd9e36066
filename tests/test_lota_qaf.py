"""lota_qaf, the project from Python: the same as the scripts, with objects; and the notebook docs/tour.ipynb runs."""
import contextlib
import inspect
import io
import json
import typing
from dataclasses import fields

import pytest
from conftest import ROOT, parse

import lota_qaf
import LoTA_QAF_main
from LoTA.settings import baseConfig, evalConfig, from_given, trainingConfig
from lota_qaf import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory, base_model, demo_data):
    """What the functions return, one after the other, and what they printed."""
    folder, printed = tmp_path_factory.mktemp("python"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        gptq = lota_qaf.quantize(base_model, folder / "gptq", bits=4, group_size=32, calibration="viggo",
                                 data_dir=demo_data, samples=8)
        adapter = lota_qaf.train(gptq, method="lrqat", training_data_name="viggo", data_dir=demo_data, lora_r=8,
                                 train_batch_size=16, dtype="float32", max_steps=4, learning_rate=2e-2,
                                 pretrained=base_model, adapter_path=folder / "adapters", logging_steps=2)
        merged = lota_qaf.merge(adapter, folder / "merged")
        exported = lota_qaf.export(merged, "gptq", folder / "exported")
    return gptq, adapter, merged, exported, printed.getvalue()


def test_the_objects_say_what_was_made(made):
    gptq, adapter, merged, exported, printed = made
    assert (gptq.path.name, gptq.bits, gptq.group_size) == ("int4_32_" + gptq.path.name.split("_", 2)[2], 4, 32)
    assert adapter.config.method == "LR-QAT" and adapter.config.training["steps"] == 4
    assert [row["step"] for row in adapter.log] == [2, 4, 4] and adapter.loss == adapter.log[-1]["train_loss"]
    assert merged.moved == adapter.moved and merged.moved["all"] > 0.005
    assert exported.format == "gptq" and "model.safetensors" in exported.files
    assert str(merged) == str(merged.path) and printed == ""


def test_python_trains_what_the_command_line_trains(made, base_model, demo_data, tmp_path):
    """The same settings, and so the same tensors bit for bit."""
    gptq, adapter, *_ = made
    base, training, _ = parse("--mode", 1, "--method", "lrqat", "--quantized_model_dir", gptq.path, "--pretrained",
                              base_model, "--training_data_name", "viggo", "--data_dir", demo_data, "--lora_r", 8,
                              "--train_batch_size", 16, "--dtype", "float32", "--max_steps", 4, "--learning_rate", 2e-2,
                              "--logging_steps", 2, "--adapter_path", tmp_path)
    other = LoTA_QAF_main.train(base, training)
    name = "adapter_model.safetensors"
    assert (other / name).read_bytes() == (adapter.path / name).read_bytes()
    settings = {**adapter.config.settings, "adapter_path": str(tmp_path)}
    assert lota_qaf.TrainedAdapter(other, adapter.config.load(other), []).config.settings == settings


def test_every_kind_of_model_is_measured(made, base_model, demo_data, tmp_path):
    """Live and merged answers are the same. A 16-bit model, a GPTQ model and an export are told by their folders."""
    gptq, adapter, merged, exported, _ = made
    measure = {"ft_dataset_name": "viggo", "data_dir": demo_data, "dtype": "float32", "limit": 6, "answer_loss": True,
               "max_new_tokens": 30, "output_path": tmp_path}
    of_merged, live = lota_qaf.evaluate(merged, **measure), lota_qaf.evaluate(adapter, merge=False, **measure)
    assert of_merged.predictions == live.predictions and len(live.predictions) == live.rows == 6
    assert of_merged.accuracy == of_merged.correct / 6 == live.accuracy and of_merged.loss == live.loss
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 2 and {kind for kind in ("_live_", "_merged_") for name in names if kind in name} == {
        "_live_", "_merged_"}
    loss_alone = {**measure, "generate": False}
    of_gptq, of_base, of_export = (lota_qaf.evaluate(model, **loss_alone) for model in (gptq, base_model, exported))
    assert of_export.loss == pytest.approx(live.loss, abs=1e-6) and of_gptq.loss != live.loss != of_base.loss
    assert of_gptq.accuracy is None and of_gptq.predictions == []


def test_verbose_prints_what_the_scripts_print(made, demo_data, tmp_path, capsys):
    gptq, *_ = made
    lota_qaf.evaluate(gptq, verbose=True, ft_dataset_name="viggo", data_dir=demo_data, limit=2, generate=False,
                      answer_loss=True, output_path=tmp_path)
    assert "viggo: mean loss of the answers' tokens" in capsys.readouterr().out


def test_the_signatures_have_every_setting():
    """help() shows each setting of the mode with its type and default, those that the function sets itself apart."""
    signature = inspect.signature(lota_qaf.train)
    want = {f.name for config in (baseConfig, trainingConfig) for f in fields(config)} - {"mode"} | {"verbose"}
    assert set(signature.parameters) == want
    assert signature.parameters["logging_steps"].default == trainingConfig().logging_steps
    assert signature.parameters["lora_r"].annotation == typing.get_type_hints(baseConfig)["lora_r"]
    want = {f.name for config in (baseConfig, evalConfig) for f in fields(config)}
    assert set(inspect.signature(lota_qaf.evaluate).parameters) == want - {"mode", "load_adapter", "auto_gptq"} | {
        "model", "verbose"}
    assert inspect.signature(lota_qaf.quantize).parameters["bits"].default == 4


@pytest.mark.parametrize("call, message", [
    (lambda: lota_qaf.train("gptq", bit=4), "there is no setting bit; python LoTA_QAF_main.py --help lists all"),
    (lambda: lota_qaf.quantize("base", bit=4), "there is no setting bit; python gptq_quantize.py --help lists all"),
    (lambda: lota_qaf.quantize("base", bits=5), "--bits must be one of 2, 3, 4, 8, not 5"),
    (lambda: lota_qaf.quantize("base", group_size=7), "--group_size must be one of -1, 16, "),
    (lambda: lota_qaf.train("gptq", max_steps="8"), "--max_steps must be int, not '8'"),
    (lambda: lota_qaf.train("gptq", max_steps=True), "--max_steps must be int, not True"),
    (lambda: lota_qaf.train("gptq", gradient_checkpointing=0), "--gradient_checkpointing must be bool, not 0"),
    (lambda: lota_qaf.train("gptq", seed=None), "--seed must be int, not None"),
    (lambda: lota_qaf.train("gptq", lora_target_modules=3), "--lora_target_modules must be names, not 3"),
    (lambda: lota_qaf.train("gptq", method="lotta"), "--method must be one of lota, lrqat, lora, qalora, not 'lotta'"),
    (lambda: lota_qaf.train("gptq", recipe="fuller"), "--recipe must be one of "),
    (lambda: lota_qaf.evaluate("nowhere"), "nothing to evaluate: give --tasks, --ft_dataset_name")])
def test_mistakes_are_refused_in_one_line(call, message):
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_settings_from_python_are_those_of_the_flags(capsys):
    """Recipes and methods fill in the same defaults. Names come as a list or as a text. Old names of recipes work."""
    given = {"mode": 1, "method": "lota", "recipe": "grid", "lora_target_modules": ["q_proj", "down_proj"],
             "offset_lr": 1, "tasks": ("mmlu", "piqa"), "quantized_model_dir": ROOT}
    flags = ("--mode", 1, "--method", "lota", "--recipe", "grid", "--lora_target_modules", "q_proj", "down_proj",
             "--offset_lr", 1, "--tasks", "mmlu", "piqa", "--quantized_model_dir", ROOT)
    assert from_given(given) == parse(*flags)
    assert from_given(given)[0].learned_scales and from_given(given)[2].tasks == "mmlu,piqa"
    assert from_given({"method": "lrqat"}) == parse("--method", "lrqat")
    assert from_given({}) == parse() == (baseConfig(), trainingConfig(), evalConfig())
    capsys.readouterr()
    from_given({"method": "lora", "momentum": 0.9})
    assert capsys.readouterr().out == "without effect with --method lora: --momentum\n"


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    """Its cells, in order, in one namespace. It shows what it says, and its outputs name no folder of a machine."""
    monkeypatch.chdir(ROOT / "docs")
    file = ROOT / "docs" / "tour.ipynb"
    notebook, namespace = json.loads(file.read_text()), {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "tour.ipynb", "exec"), namespace)
    before, after = namespace["before"], namespace["after"]
    assert namespace["same"] and after.loss < 0.7 * before.loss and after.accuracy > before.accuracy
    assert (namespace["old"] != namespace["new"]).any() and "model-q4_1.gguf" in namespace["gguf"].files
    assert "/tmp/" not in file.read_text() and "/home/" not in file.read_text() and "/root/" not in file.read_text()
