"""Damaged files beside the weights, pickles and code of models, at every door: one line that names the file.

What is harmless works. A door is what a user calls. Each goes as far as the loading of the model here, unless a damage
shows only there.
"""
import json
import pickle
import shutil
from pathlib import Path

import pytest
from conftest import EVALUATE, TRAIN, parse, run_main
from random_gptq import write_lota_adapter

import evalGSV
import gptq_quantize
import LoTA_QAF_main
from LoTA import run_script
from LoTA.adapter import load_gptq
from LoTA.adapter_folder import AdapterFolder
from LoTA.export.run import export
from LoTA.folders import GPTQFolder
from LoTA.lota_merge import merge_folders


class Passed(BaseException):
    """A door let a folder in."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base_model, quantize, demo_data):
    """A folder with a base model, its GPTQ model, an adapter of it, both merged, and the data. No checksums."""
    folder = tmp_path_factory.mktemp("whole")
    for name, source in (("base", base_model), ("gptq", quantize(2)), ("data", demo_data)):
        shutil.copytree(source, folder / name)
    write_lota_adapter(folder / "adapter", folder / "gptq", rank=8, omega=4.0)
    merge_folders(AdapterFolder(folder / "adapter"), GPTQFolder(folder / "gptq"), folder / "merged")
    file = folder / "merged/lota/lota_config.json"
    record = json.loads(file.read_text())
    del record["sha256"], record["fingerprint_all"]
    file.write_text(json.dumps(record))
    return folder


@pytest.fixture
def doors(whole, tmp_path, monkeypatch):
    """{kind of folder: {name of a door: a function (folder) that goes in}}. A door that lets in raises Passed."""
    def passed(*args, **kwargs):
        raise Passed

    def load(base, config, folder):
        load_gptq(folder.path, device=base.device_map, trust_remote_code=base.trust_remote_code)
        raise Passed
    monkeypatch.setattr("LoTA.adapter.load_for_training", load)
    monkeypatch.setattr(evalGSV, "generate", passed)
    monkeypatch.setattr("gptqmodel.models.base.BaseQModel.quantize", passed)
    out, data = tmp_path / "out", ("--data_dir", whole / "data")

    def train(folder):
        base, training, _ = parse(*TRAIN, *data, "--quantized_model_dir", folder, "--pretrained", whole / "base",
                                  "--adapter_path", out / "train", "--debug_number", 2)
        LoTA_QAF_main.train(base, training)

    def evaluation(*flags):
        def evaluate(folder):
            base, _, evaluation = parse(*EVALUATE, *data, "--output_path", out / "evaluate", "--limit", 2,
                                        *(str(flag).format(folder) for flag in flags))
            LoTA_QAF_main.evaluate(base, evaluation)
        return evaluate

    def exporting(format):
        def run(folder):
            export(str(folder), format, out / format)
            raise Passed
        return run

    def merge(folder):
        merge_folders(AdapterFolder(whole / "adapter"), GPTQFolder(folder), out / "merge")
        raise Passed

    def quantize(folder):
        run_main(gptq_quantize, "--model", folder, "--bits", 2, "--group_size", 32, "--calibration", "viggo",
                 "--samples", 8, "--output_dir", out / "quantize", *data)
    return {"base": {"quantize": quantize,
                     "evaluate": evaluation("--load_adapter", "none", "--auto_gptq", "none", "--pretrained", "{}")},
            "gptq": {"train": train, "merge": merge,
                     "evaluate": evaluation("--load_adapter", "none", "--quantized_model_dir", "{}")},
            "merged": {"evaluate": evaluation("--load_adapter", "{}"), "export dense": exporting("dense"),
                       "export peft": exporting("peft")}}


@pytest.fixture
def stop_at_loading(monkeypatch):
    """Lets a folder in where its model would be loaded. A test that asks for it costs a tenth of a second."""
    def passed(*args, **kwargs):
        raise Passed
    for name in ("load_gptq", "load_16bit", "load_for_training", "check_described"):
        monkeypatch.setattr(f"LoTA.adapter.{name}", passed)


def line_at(door, folder):
    """What run_script() prints at a door, or None where the folder is let in. Any other error is raised."""
    try:
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: door(folder))
    except Passed:
        return None
    assert isinstance(stopped.value.code, str), stopped.value.code          # a text is exit status 1
    assert stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code
    return stopped.value.code


def changed(**entries):
    """A damage: other entries of a JSON file."""
    return lambda content: json.dumps({**json.loads(content or "{}"), **entries}).encode()


def test_whole_folders_are_let_in(whole, doors):
    for kind, ways in doors.items():
        for name, door in ways.items():
            assert line_at(door, whole / kind) is None, name


DAMAGES = {
    "cut early": lambda content: content[:len(content) // 10], "cut": lambda content: content[:len(content) // 2],
    "cut late": lambda content: content[:-3], "empty": lambda content: b"", "a list": lambda content: b"[]",
    "null": lambda content: b"null", "a text": lambda content: b'"text"', "a number": lambda content: b"5",
    "deep": lambda content: b"[" * 100_000, "deep and whole": lambda content: b'{"x":' + b"[" * 500 + b"]" * 500 + b"}",
    "no UTF-8": lambda content: b'{"\xff\xfe": 1}', "a huge number": lambda content: b'{"x": ' + b"9" * 5000 + b"}"}
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["base", "gptq", "merged"])
def test_what_is_no_json_object_is_refused_at_every_door(whole, doors, stop_at_loading, tmp_path, kind, file, damage):
    folder = shutil.copytree(whole / kind, tmp_path / "folder")
    before = (folder / file).read_bytes() if (folder / file).exists() else b'{"eos_token": "<|end|>"}'
    (folder / file).write_bytes(DAMAGES[damage](before))
    for name, door in doors[kind].items():
        line = line_at(door, folder)
        assert line and str(folder / file) in line, (name, line)
        assert not (tmp_path / "out").exists() or not any(p.is_file() for p in (tmp_path / "out").rglob("*"))


# Wrong entries of whole files. A merge copies some of them as they are, because it does not read them.
WRONG = [
    ("config.json", changed(model_type="nope")), ("config.json", changed(model_type=5)),
    ("config.json", changed(vocab_size="x")), ("config.json", changed(vocab_size=10**30)),
    ("config.json", changed(vocab_size=-1)), ("config.json", changed(num_hidden_layers="2")),
    ("config.json", changed(num_hidden_layers=3)), ("config.json", changed(architectures=5)),
    ("config.json", changed(hidden_act="nope")), ("config.json", changed(rope_parameters={"rope_type": "x"})),
    ("config.json", changed(num_attention_heads=0)), ("config.json", changed(max_position_embeddings="x")),
    ("config.json", lambda content: b"{}"),
    ("generation_config.json", changed(eos_token_id="x")), ("generation_config.json", changed(eos_token_id=-1)),
    ("generation_config.json", changed(eos_token_id=[2, "a"])), ("generation_config.json", changed(pad_token_id="x")),
    ("generation_config.json", changed(eos_token_id=10**30)), ("generation_config.json", changed(eos_token_id=2.5)),
    ("tokenizer.json", changed(model=[])), ("tokenizer.json", changed(model={"type": "Nope"})),
    ("tokenizer.json", changed(added_tokens={})), ("tokenizer.json", changed(normalizer=5)),
    ("tokenizer.json", changed(added_tokens=[{"id": 10**30}])), ("tokenizer.json", lambda content: b"{}"),
    ("tokenizer_config.json", changed(tokenizer_class=5)), ("tokenizer_config.json", changed(eos_token=5)),
    ("tokenizer_config.json", changed(eos_token=None)), ("tokenizer_config.json", changed(model_max_length="x")),
    ("tokenizer_config.json", changed(chat_template=5)), ("tokenizer_config.json", changed(padding_side=3)),
    ("tokenizer_config.json", changed(added_tokens_decoder={"x": 1})),
    ("tokenizer_config.json", changed(pad_token={"a": 1})), ("tokenizer_config.json", lambda content: b"{}"),
    ("special_tokens_map.json", changed(eos_token=5)), ("special_tokens_map.json", changed(eos_token=[])),
    ("special_tokens_map.json", changed(additional_special_tokens=5))]


@pytest.mark.parametrize("number", range(len(WRONG)), ids=lambda number: f"{WRONG[number][0]} {number}")
def test_wrong_entries_are_refused_where_they_are_read(whole, doors, tmp_path, number):
    file, damage = WRONG[number]
    for kind in ("base", "gptq"):
        folder = shutil.copytree(whole / kind, tmp_path / kind)
        (folder / file).write_bytes(damage((folder / file).read_bytes() if (folder / file).exists() else b""))
        for name, door in doors[kind].items():
            line = line_at(door, folder)
            assert line or name == "merge", (kind, name)
            assert not line or file in line, (kind, name, line)


def test_a_config_with_too_few_layers(whole, doors, tmp_path, capsys):
    """GPTQModel leaves the other layers out without a word. Of a 16-bit model a line says it."""
    for kind, name in (("gptq", "evaluate"), ("gptq", "train"), ("merged", "evaluate"), ("base", "evaluate"),
                       ("base", "quantize")):
        folder = shutil.copytree(whole / kind, tmp_path / kind / name)
        (folder / "config.json").write_bytes(changed(num_hidden_layers=1)((folder / "config.json").read_bytes()))
        line = line_at(doors[kind][name], folder)
        if kind == "base":
            assert line is None and "in no layer that its config.json describes, model.layers.1." in (
                capsys.readouterr().out)
        else:
            assert f"{folder / 'config.json'} describes another model: it has no model.layers.1." in line


def test_what_works(whole, doors, stop_at_loading, tmp_path):
    """Classes that transformers does not know, where tokenizer.json says all; code that nobody needs; templates."""
    for number, (file, damage) in enumerate((
            ("tokenizer_config.json", changed(tokenizer_class="NoSuchTokenizer")),
            ("tokenizer_config.json", changed(model_max_length=10**300)),
            ("config.json", changed(auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})),
            ("config.json", changed(architectures=["Nope"])), ("special_tokens_map.json", lambda content: b"{}"),
            ("generation_config.json", lambda content: b"{}"), ("chat_template.jinja", lambda content: content))):
        for kind in ("base", "gptq"):
            folder = shutil.copytree(whole / kind, tmp_path / f"{number} {kind}")
            before = (folder / file).read_bytes() if (folder / file).exists() else b"{}"
            (folder / file).write_bytes(damage(before))
            for name, door in doors[kind].items():
                assert line_at(door, folder) is None, (file, kind, name)


# --- code ---------------------------------------------------------------------------------------------------------

class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("file, entries", [
    ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}),
    ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.T", None]}})])
@pytest.mark.parametrize("kind", ["base", "gptq", "merged"])
def test_code_of_a_model_is_not_run_unasked(whole, doors, tmp_path, file, entries, kind):
    """One line names the remedy. A merge and --format peft need no code, and work."""
    folder = shutil.copytree(whole / kind, tmp_path / "folder")
    (folder / file).write_bytes(changed(**entries)((folder / file).read_bytes()))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name, door in doors[kind].items():
        line = line_at(door, folder)
        if name in ("merge", "export peft") or name == "export dense" and file != "config.json":
            assert line is None
        else:
            remedy = "--format gptq or peft" if "export" in name else "only with --trust_remote_code; read it first"
            assert str(folder / file) in line and remedy in line, (name, line)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["base", "gptq", "merged"])
def test_pickled_weights_are_not_read(whole, doors, tmp_path, kind):
    folder = shutil.copytree(whole / kind, tmp_path / "folder")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    (folder / "training_args.bin").write_bytes(b"")
    for name, door in doors[kind].items():
        line = line_at(door, folder)
        assert f"{folder / 'pytorch_model.bin'} is a pickle" in line and "safetensors" in line, name
    assert not (tmp_path / "ran").exists()


def test_pickled_adapters_are_not_read(whole, tmp_path):
    """By mode 2, by an export and by a merge."""
    folder = shutil.copytree(whole / "adapter", tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    base, _, evaluation = parse(*EVALUATE, "--data_dir", whole / "data", "--load_adapter", folder,
                                "--quantized_model_dir", whole / "gptq", "--output_path", tmp_path / "out")
    for door in (lambda folder: LoTA_QAF_main.evaluate(base, evaluation),
                 lambda folder: export(str(folder), "peft", tmp_path / "out", gptq=whole / "gptq"),
                 lambda folder: merge_folders(AdapterFolder(folder), GPTQFolder(whole / "gptq"), tmp_path / "out")):
        assert f"{folder / 'adapter_model.bin'} is a pickle" in line_at(door, folder)
    assert not (tmp_path / "ran").exists()
