"""One data set, one export format, one bit width and one architecture are added, in the way of docs/extending.md."""
import json
import subprocess
import sys

import gguf as gguf_package
import oracle
import pytest
import torch
from conftest import LAYERS, ROOT, merge, parse, predictions, run_main
from random_gptq import write_gptq, write_lota_adapter
from safetensors.torch import load_file
from test_data import EOS, by_hand, char_tokenizer, write_rows
from test_eval import Stub

import gptq_quantize
import LoTA.export.__main__ as export_command
from data_print_save import TASKS, Task, find_measured, load_rows, prepare_dataset, read_messages
from evalGSV import evalgsv, is_correct
from LoTA import SUPPORTED_BITS, UserError, kernels
from LoTA.adapter_folder import PREFIX, LotaConfig
from LoTA.export import FORMATS, Format, gguf
from LoTA.export.run import export
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.packing import pack_rows, unpack_rows, unpack_zeros
from LoTA.settings import OMEGA_AND_SIGMA, omega_and_sigma
from LoTA.steps import Threshold
from LoTA.ternary import adapted_weight


def help_of(show, capsys):
    """What a command prints for --help, as one line."""
    with pytest.raises(SystemExit) as end:
        show()
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


# --- a data set ---------------------------------------------------------------------------------------------------

WEATHER = [{"report": f"Rain falls {i} days a week.", "code": f"rain {i}"} for i in range(10)]


def read_weather(row):
    return [{"role": "user", "content": row["report"]}], row["code"]


@pytest.fixture
def weather(monkeypatch, tmp_path):
    """The data set "weather" and a folder with its rows."""
    monkeypatch.setitem(TASKS, "weather", Task(
        hub=("somebody/weather", None, None), splits={"train": "train", "test": "validation"}, read=read_weather,
        score=lambda prediction, label: prediction.lower() == label))
    write_rows(tmp_path / "weather/train.csv", WEATHER[:7])
    write_rows(tmp_path / "weather/test.csv", WEATHER[7:])
    return tmp_path / "weather"


def test_a_new_data_set_is_offered(weather, capsys, monkeypatch):
    """--help of both scripts lists it. Mode 1, mode 2 and the calibration take its name."""
    text = help_of(lambda: parse("--help"), capsys)
    assert "The names: alpaca, gsm8k, sql, viggo, weather, chat, text, OWNER/NAME [alpaca]" in text
    assert "The names: gsm8k, sql, viggo, weather, chat, text, OWNER/NAME [none]" in text
    assert "viggo, weather" in help_of(lambda: run_main(gptq_quantize, "--help"), capsys)
    _, training, evaluation = parse("--training_data_name", "weather", "--ft_dataset_name", "weather")
    assert (training.training_data_name, evaluation.ft_dataset_name) == ("weather", "weather")


def test_a_new_data_set_is_read_trained_on_and_scored(weather, tmp_path):
    """Its rows, its prompts, its training rows and its scores."""
    rows = load_rows("weather", "test", str(weather))
    assert rows.to_list() == WEATHER[7:] and load_rows("weather", "train", str(weather)).to_list() == WEATHER[:7]
    assert read_messages("weather", rows[0]) == ([{"role": "user", "content": "Rain falls 7 days a week."}], "rain 7")
    with pytest.raises(UserError, match="do not look like 'weather': column 'report' is missing, found day"):
        read_messages("weather", {"day": 1})
    assert is_correct("RAIN 7", "rain 7", "weather") and not is_correct("rain 8", "rain 7", "weather")

    tokenizer = char_tokenizer(chat_template="{{ messages[-1].content }}>")
    trained = prepare_dataset("weather", tokenizer, data_dir=str(weather))
    assert trained[0]["input_ids"] == [*by_hand("Rain falls 0 days a week.>rain 0"), EOS] and len(trained) == 7
    stub = Stub({f"{row['report']}>": answer for row, answer in zip(WEATHER[7:], ("Rain 7", "sun", "rain 9"),
                                                                    strict=True)})
    base, _, evaluation = parse("--mode", 2, "--ft_dataset_name", "weather", "--data_dir", weather, "--output_path",
                                tmp_path)
    results = evalgsv(stub, tokenizer, base, evaluation)
    assert predictions(results) == ["Rain 7", "sun", "rain 9"] and (results["correct"], results["rows"]) == (2, 3)


def test_a_new_data_set_without_score_is_for_training_only(weather, monkeypatch):
    monkeypatch.setitem(TASKS, "weather", Task(hub=("somebody/weather", None, None), splits={"train": "train"},
                                               read=read_weather))
    assert parse("--training_data_name", "weather")[1].training_data_name == "weather"
    with pytest.raises(UserError, match="'weather' is for training only; choose from gsm8k, sql, viggo, chat, text"):
        find_measured("weather")
    with pytest.raises(ValueError, match="no scoring for data set 'weather'"):
        is_correct("rain", "rain", "weather")


def test_a_new_data_set_on_the_hub(weather, monkeypatch):
    """It is asked for by what its entry says."""
    from datasets import Dataset
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_list(WEATHER)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(load_rows("weather", "test")) == 10
    assert calls == [(("somebody/weather", None), {"revision": None, "split": "validation"})]


# --- an export format ---------------------------------------------------------------------------------------------

# Keeps the integers of every layer as text. check() reads them back.
TEXT_FORMAT = '''
def write(model, folder, dtype=None):
    for layer in model.modules:
        rows = model.packed(layer).weight_int.tolist()
        (folder / f"{layer}.txt").write_text("\\n".join(" ".join(map(str, row)) for row in rows))


def check(model, folder, dtype=None):
    for layer in model.modules:
        rows = [[int(n) for n in line.split()] for line in (folder / f"{layer}.txt").read_text().splitlines()]
        if rows != model.packed(layer).weight_int.tolist():
            raise RuntimeError(f"{layer}: the text differs from the merged model")
'''
ENTRY = {"module": "text_format", "summary": "the integers as text, and nothing else", "library": "numpy",
         "rounding": "The integers are written out. Scales and offsets are left out.",
         "loading": "import numpy\nnumpy.loadtxt('{name}/LAYER.txt')\n"}


@pytest.fixture
def text_format(monkeypatch, tmp_path):
    """The export format "text"."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/text_format.py").write_text(TEXT_FORMAT)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setitem(FORMATS, "text", Format(**ENTRY))
    yield tmp_path / "code/text_format.py"
    sys.modules.pop("text_format", None)


@pytest.fixture
def merged(tmp_path):
    """A random merged folder of 3 bits."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS, 3)
    merge(write_lota_adapter(tmp_path / "adapter", gptq, data_set="weather"), gptq, tmp_path / "merged")
    return tmp_path / "merged"


def test_a_new_format_is_exported_verified_and_described(text_format, merged, tmp_path):
    export(merged, "text", tmp_path / "out", verify=True)
    model = MergedFolder(merged)
    for layer in LAYERS:
        lines = (tmp_path / f"out/{layer}.txt").read_text().splitlines()
        assert [list(map(int, line.split())) for line in lines] == model.packed(layer).weight_int.tolist()
    card = (tmp_path / "out/README.md").read_text()
    for line in ("library_name: numpy", ENTRY["rounding"], "numpy.loadtxt('out/LAYER.txt')",
                 "| Training data | weather |", "GPTQ, 3 bits, group size 32"):
        assert line in card
    record = json.loads((tmp_path / "out/lota_export.json").read_text())
    assert record["format"] == "text" and record["verified"]
    assert set(record["sha256"]) == {"README.md", "lota_export.json", *(f"{layer}.txt" for layer in LAYERS)}


def test_a_new_format_whose_verification_fails_leaves_nothing(text_format, merged, tmp_path):
    text_format.write_text(TEXT_FORMAT.replace("map(str, row)", "map(str, reversed(row))"))
    with pytest.raises(RuntimeError, match="the text differs from the merged model"):
        export(merged, "text", tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_a_new_format_is_offered(text_format, merged, tmp_path, capsys):
    """By the command and, where the entry stands in the file, by --export of mode 2."""
    text = help_of(lambda: run_main(export_command, "--help"), capsys)
    assert "--format {gptq,peft,gguf,dense,text}" in text and "text the integers as text, and nothing else" in text
    run_main(export_command, merged, "--format", "text", "--output", tmp_path / "out", "--verify")
    assert capsys.readouterr().out == f"exported and verified: {tmp_path / 'out'}\n"
    # The settings read the formats when they are imported, so this needs a process of its own.
    code = f"""
from LoTA.export import FORMATS, Format
FORMATS["text"] = Format(**{ENTRY!r})
import LoTA_QAF_main
print(LoTA_QAF_main.parse_args(["--export", "text"])[2].export)
LoTA_QAF_main.parse_args(["--help"])
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.startswith("text\n") and "--export {gptq,peft,gguf,dense,text}" in out


def test_a_new_format_holds_no_lora_unless_it_says_so(text_format, merged, tmp_path):
    """The refusal names the formats that do."""
    config = json.loads((tmp_path / "adapter/lota_config.json").read_text())
    (tmp_path / "adapter/lota_config.json").write_text(json.dumps({**config, "method": "LoRA", "omega": None}))
    with pytest.raises(UserError, match="--format dense writes"):
        export(tmp_path / "adapter", "text", tmp_path / "out")


# --- a bit width --------------------------------------------------------------------------------------------------

BITS, RANK, OMEGA = 5, 8, 3.0


@pytest.fixture
def five_bits(monkeypatch):
    """5 bits are supported. What imported the numbers by name has them under its own name."""
    for module in ("LoTA", "LoTA.folders", "gptq_quantize"):
        monkeypatch.setattr(f"{module}.SUPPORTED_BITS", (*SUPPORTED_BITS, BITS))
    # LAYERS are parts of a model, and GPTQModel has no kernel for 5 bits, so neither can be opened.
    monkeypatch.setattr("LoTA.export.dense.what_does_not_fit", lambda folder: dict.fromkeys(
        ("missing", "unexpected", "mismatched"), []))
    monkeypatch.setattr("LoTA.export.dense.check_logits", lambda *arguments: None)


@pytest.mark.parametrize("rows", [32, 64, 70])
def test_a_new_bit_width_is_packed(rows):
    """32 values take 5 words, and 4 of them straddle two words. 70 values are filled up to 96."""
    values = torch.randint(0, 2**BITS, (rows, 9), generator=torch.Generator().manual_seed(rows))
    packed, want = pack_rows(values, BITS), oracle.pack_columns(values, BITS)
    assert packed.shape[0] == -(-rows // 32) * BITS and torch.equal(packed[:len(want)], want)
    assert not packed[len(want):].any()
    assert torch.equal(unpack_rows(packed, BITS, rows).long(), values)
    zeros = torch.randint(0, 2**BITS, (3, rows), generator=torch.Generator().manual_seed(rows))
    assert int(zeros.min()) == 0                    # stored as 31 where zeros are stored minus one
    for form, less in (("gptq", 1), ("gptq_v2", 0)):
        qzeros = pack_rows((zeros - less).t() % 2**BITS, BITS).t().contiguous()
        assert torch.equal(unpack_zeros(qzeros, BITS, rows, form).long(), zeros)


@pytest.mark.parametrize("desc_act", [False, True])
def test_a_new_bit_width_is_trained_merged_and_exported(five_bits, tmp_path, desc_act):
    """A random model of 5 bits: W', integers and mu are the oracle's, by torch and by the kernels."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS, BITS, desc_act=desc_act)
    adapter = write_lota_adapter(tmp_path / "adapter", gptq, rank=RANK, omega=OMEGA)
    merge(adapter, gptq, tmp_path / "merged")
    merged = MergedFolder(tmp_path / "merged")
    export(tmp_path / "merged", "dense", tmp_path / "dense", torch.float32, verify=True)
    dense, matrices = load_file(tmp_path / "dense/model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    source, threshold = GPTQFolder(gptq), Threshold(OMEGA, OMEGA)
    for name, (rows, cols) in LAYERS.items():
        lora_A, lora_B = (matrices[f"{PREFIX}{name}.lora_{letter}.weight"].t() for letter in "AB")
        weight_int = oracle.unpack_columns(source.tensor(f"{name}.qweight"), BITS, rows)
        zeros = oracle.unpack_columns(source.tensor(f"{name}.qzeros").t().contiguous(), BITS, cols).t() + 1
        scales, g_idx = source.tensor(f"{name}.scales"), source.tensor(f"{name}.g_idx")
        integers, mu = oracle.merge(lora_A, lora_B, weight_int, scales, g_idx, BITS, OMEGA, OMEGA)
        weight = oracle.adapted_weight(lora_A, lora_B, weight_int, scales, zeros, g_idx, BITS, OMEGA, OMEGA)
        packed = source.packed(name)
        assert int(weight_int.max()) == 2**BITS - 1 and 0 < int((integers != weight_int).sum()) < integers.numel()
        assert torch.equal(oracle.unpack_columns(merged.tensor(f"{name}.qweight"), BITS, rows), integers)
        torch.testing.assert_close(merged.offset(name).double(), mu, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(dense[f"{name}.weight"].t().double(), weight, rtol=1e-5, atol=1e-5)
        trained, trained_mu = adapted_weight(lora_A, lora_B, packed, threshold, torch.float32)
        whole = trained + (scales.float() * trained_mu)[g_idx.long()]
        torch.testing.assert_close(whole.double(), weight, rtol=1e-5, atol=1e-5)
        if not torch.cuda.is_available():               # else the kernels want tensors on the GPU: test_cuda.py
            moved, kernels_mu = kernels.count_steps(lora_A, lora_B, packed, threshold)
            on_kernels, _ = kernels.adapted_weight(lora_A, lora_B, packed, threshold)
            assert moved == (integers != weight_int).sum() and torch.equal(on_kernels, trained)
            torch.testing.assert_close(kernels_mu.double(), mu, rtol=1e-6, atol=1e-7)


def test_a_new_bit_width_is_taken_by_the_scripts(five_bits, tmp_path, capsys):
    """The quantizer offers it, and recipes take the row of 4 bits until there is one of 5."""
    assert "--bits {2,3,4,8,5}" in help_of(lambda: run_main(gptq_quantize, "--help"), capsys)
    assert all(omega_and_sigma(recipe, BITS) == OMEGA_AND_SIGMA[4][recipe] for recipe in OMEGA_AND_SIGMA[4])
    gptq = write_gptq(tmp_path / "gptq", LAYERS, BITS)
    assert GPTQFolder(gptq).bits == BITS


def test_without_its_entry_a_bit_width_is_refused(tmp_path):
    gptq = write_gptq(tmp_path / "gptq", LAYERS, BITS)
    with pytest.raises(UserError, match="has 5 bits; LoTA works on 2, 3, 4, 8"):
        GPTQFolder(gptq)


# --- an architecture ----------------------------------------------------------------------------------------------

def test_a_new_architecture_is_exported_as_gguf(quantize, monkeypatch, tmp_path):
    """A model of another type with Llama's layers: refused without its entry, and with it the tensors are Llama's."""
    gptq, merged = quantize(4), tmp_path / "merged"
    merge(write_lota_adapter(tmp_path / "adapter", gptq), gptq, merged)
    export(merged, "gguf", tmp_path / "llama", verify=True)
    config = json.loads((merged / "config.json").read_text())
    assert config["model_type"] == "llama"
    (merged / "config.json").write_text(json.dumps({**config, "model_type": "granite"}))
    LotaConfig(**{**vars(LotaConfig.load(merged / "lota")), "sha256": {}}).save(merged / "lota")
    with pytest.raises(UserError, match="GGUF export knows llama, mistral, qwen2, qwen3, not granite"):
        export(merged, "gguf", tmp_path / "granite")
    monkeypatch.setitem(gguf.ARCHITECTURES, "granite", gguf.ARCHITECTURES["llama"])
    export(merged, "gguf", tmp_path / "granite", verify=True)
    llama, granite = ({t.name: t.data.tobytes() for t in gguf_package.GGUFReader(
        tmp_path / name / gguf.GGUF_FILE).tensors} for name in ("llama", "granite"))
    assert granite == llama and len(llama) > 14


def test_rows_are_reordered_only_where_the_entry_says_so(quantize, monkeypatch, tmp_path):
    """The second half of an entry: llama.cpp's loader of Qwen keeps transformers' order of q and k."""
    gptq, merged = quantize(4), tmp_path / "merged"
    merge(write_lota_adapter(tmp_path / "adapter", gptq), gptq, merged)
    files = {}
    for reordered in (True, False):
        monkeypatch.setitem(gguf.ARCHITECTURES, "llama", (gguf_package.MODEL_ARCH.LLAMA, reordered))
        export(merged, "gguf", tmp_path / str(reordered), verify=True)
        files[reordered] = {t.name: t.data.tobytes() for t in gguf_package.GGUFReader(
            tmp_path / str(reordered) / gguf.GGUF_FILE).tensors}
    different = {name.split(".")[-2] for name in files[True] if files[True][name] != files[False][name]}
    assert different == {"attn_q", "attn_k"}


def test_a_new_pre_tokenizer(monkeypatch):
    """PRE_TOKENIZERS: the pattern by which a tokenizer cuts its text has a name in llama.cpp."""
    content = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\d|\p{L}+"}, "behavior": "Isolated"},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}
    with pytest.raises(UserError, match="byte-level BPE"):
        gguf.pre_tokenizer_name(content)
    monkeypatch.setitem(gguf.PRE_TOKENIZERS, r"\d|\p{L}+", "weather-bpe")
    assert gguf.pre_tokenizer_name(content) == "weather-bpe"
