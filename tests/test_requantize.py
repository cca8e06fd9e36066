"""experiments/requantize.py on a tiny model: GPTQModel really quantizes LoRA's sum, and the scales are really tuned."""
import json
import shutil

import oracle
import pytest
import requantize
import torch
from conftest import run_main
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import LoTA_QAF_main
from data_print_save import prepare_dataset
from LoTA import UserError
from LoTA.adapter import load_gptq, load_live
from LoTA.adapter_folder import PREFIX, AdapterFolder, LotaConfig
from LoTA.answer_loss import sum_answer_losses
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.prompts import read_chat_template

BITS = 4


@pytest.fixture(scope="module")
def adapter(quantize, train, tmp_path_factory):
    """A LoRA adapter on the tiny model at 4 bits."""
    return train(tmp_path_factory.mktemp("lora"), "--lota_qaf", False, "--quantized_model_dir", quantize(BITS),
                 "--learning_rate", 5e-3, "--max_steps", 40, "--save_strategy", "no")


@pytest.fixture(scope="module")
def made(adapter, tmp_path_factory):
    """The folder that the script fills, with tuned scales."""
    output = tmp_path_factory.mktemp("requantized")
    run_main(requantize, "--adapter", adapter, "--output", output, "--tune_scales", "--max_steps 20 --scale_lr 0.02")
    return output


@pytest.fixture(scope="module")
def dense(made):
    folder, = (made / "dense").iterdir()
    return folder


@pytest.fixture(scope="module")
def again(made):
    folder, = (made / "gptq").iterdir()
    return GPTQFolder(folder)


def integers_of(folder, module):
    """(integers [in, out], scales and zeros by input row, float64 [in, out]), unpacked by the oracle."""
    g_idx, scales = folder.tensor(f"{module}.g_idx").long(), folder.tensor(f"{module}.scales").double()
    zeros = oracle.unpack_columns(folder.tensor(f"{module}.qzeros").t().contiguous(), folder.bits, scales.shape[1]).t()
    zeros = (zeros + (folder.checkpoint_format == "gptq")) % 2**folder.bits
    integers = oracle.unpack_columns(folder.tensor(f"{module}.qweight"), folder.bits, len(g_idx))
    return integers, scales[g_idx], zeros[g_idx].double()


def loss_of(model, demo_data, tokenizer):
    """Nats per answer token on the first 64 training rows."""
    rows = prepare_dataset("viggo", tokenizer, debug_number=64, data_dir=str(demo_data))
    total = count = 0
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            part, n = sum_answer_losses(model, labels, input_ids=ids)
            total, count = total + part.item(), count + n
    return total / count


def test_the_sum_is_written_in_16_bits(dense, adapter, quantize):
    """Dequantized weights + alpha / r * A @ B, rounded once. All else is the GPTQ model's own."""
    source, tensors = GPTQFolder(quantize(BITS)), load_file(dense / "model.safetensors")
    matrices, moved = load_file(adapter / "adapter_model.safetensors"), []
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    for module in source.modules:
        A, B = (matrices[f"{PREFIX}{module}.lora_{letter}.weight"].double() for letter in "AB")
        integers, scales, zeros = integers_of(source, module)
        change = 16 / 8 * (B @ A)
        wanted, got = (scales * (integers - zeros)).t() + change, tensors.pop(f"{module}.weight")
        assert got.dtype.itemsize == 2
        torch.testing.assert_close(got.double(), wanted, rtol=2**-8, atol=1e-6)
        moved.append((change.abs() > scales.t() / 2).double().mean().item())
    assert max(moved) > 0.01                # so that the integers must differ
    for name, tensor in tensors.items():
        assert torch.equal(tensor, source.tensor(name))


def test_it_is_quantized_as_the_adapters_model_was(again, quantize, dense):
    """The same bits, group size, symmetry, and calibration: only the model and the place are others."""
    source = GPTQFolder(quantize(BITS))
    assert (again.bits, again.group_size, again.config.get("sym"), again.config.get("desc_act")) == (
        BITS, 32, source.config.get("sym"), source.config.get("desc_act"))
    own, other = (json.loads((folder.path / "lota_quantize.json").read_text()) for folder in (again, source))
    assert own["samples"] == other["samples"] == 8
    differ = {name for name in own["settings"] if own["settings"][name] != other["settings"][name]}
    assert differ == {"model", "output_dir"} and own["settings"]["model"] == str(dense)
    assert again.path.name == f"int4_32_{dense.name}" and dense.name.endswith("_lora")


def test_the_integers_are_gptqs(again, dense, demo_data, quantize):
    """In range, near the dense weights, and not only rounded: GPTQ's error behind real inputs is the smaller one.

    The inputs of the first layer are those of the dense model, because nothing before it is quantized.
    """
    tensors, tokenizer = load_file(dense / "model.safetensors"), AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    rows = prepare_dataset("viggo", tokenizer, debug_number=64, data_dir=str(demo_data))
    inputs, q_proj = [], model.model.layers[0].self_attn.q_proj
    q_proj.register_forward_hook(lambda layer, args, out: inputs.append(args[0][0].double()))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    X, errors, other = torch.cat(inputs), [0.0, 0.0], 0
    for module in again.modules:
        integers, scales, zeros = integers_of(again, module)
        weight = tensors[f"{module}.weight"].double().t()
        rounded = (weight / scales + zeros).round().clamp(0, 2**BITS - 1)
        assert 0 <= integers.min() and integers.max() <= 2**BITS - 1
        assert (integers == rounded).double().mean() > 0.3 and (integers - rounded).abs().double().mean() < 1
        found, nearest = scales * (integers - zeros), scales * (rounded - zeros)
        assert (found - weight).norm() < 0.15 * weight.norm()
        if module.startswith("model.layers.0.self_attn.") and not module.endswith("o_proj"):
            errors = [e + ((X @ (w - weight))**2).sum().item() for e, w in zip(errors, (found, nearest), strict=True)]
        other += (integers != integers_of(GPTQFolder(quantize(BITS)), module)[0]).sum().item()
    assert errors[0] < 0.9 * errors[1] and other > 100


def test_the_losses(made, again, dense, adapter, quantize, demo_data):
    """Dense is the live adapter in 16 bits. The requantized model is near it. Tuned scales lower the loss."""
    tokenizer = AutoTokenizer.from_pretrained(quantize(BITS))
    models = {
        "gptq": lambda: load_gptq(quantize(BITS), torch.float32).model,
        "live": lambda: load_live(AdapterFolder(adapter), quantize(BITS), dtype=torch.float32),
        "dense": lambda: AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32),
        "again": lambda: load_gptq(again.path, torch.float32).model,
        "tuned": lambda: load_gptq(made / "tuned", torch.float32).model}
    loss = {name: loss_of(load().eval(), demo_data, tokenizer) for name, load in models.items()}
    assert loss["dense"] == pytest.approx(loss["live"], rel=0.01) and loss["live"] < 0.98 * loss["gptq"]
    assert abs(loss["again"] - loss["dense"]) < 0.3 * (loss["gptq"] - loss["dense"])
    assert loss["tuned"] < loss["again"]


def test_the_tuned_scales(made, again):
    """The integers and zero points stay, and the merged model is a plain GPTQ checkpoint."""
    tuned = MergedFolder(made / "tuned")
    config = tuned.lota
    assert not tuned.offset_modules()
    assert config.training["moved"]["all"] == 0 and config.learned_scales and not config.residual
    assert (config.settings["max_steps"], config.settings["scale_lr"]) == (20, 0.02)
    assert (config.settings["train_batch_size"], config.settings["save_strategy"]) == (16, "no")    # the adapter's
    for module in again.modules:
        for part in ("qweight", "qzeros", "g_idx"):
            assert torch.equal(tuned.tensor(f"{module}.{part}"), again.tensor(f"{module}.{part}"))
        before, after = (folder.tensor(f"{module}.scales").float() for folder in (again, tuned))
        assert 0 < ((after - before).abs() / before.abs()).max() < 0.3


def test_flags_win_over_the_record(quantize):
    """And None and False are left out, because the quantizer's switches have no value."""
    flags = requantize.quantization_flags(GPTQFolder(quantize(BITS)))
    assert flags[flags.index("--bits") + 1] == "4" and flags[flags.index("--group_size") + 1] == "32"
    assert flags[flags.index("--calibration") + 1] == "viggo" and "--sym" not in flags and "--model" not in flags
    symmetric = requantize.quantization_flags(GPTQFolder(quantize(BITS, "--sym")))
    assert "--sym" in symmetric and "--desc_act" not in symmetric
    assert requantize.flags_of({"a": None, "b": ["x", "y"], "c": False}) == ["--b", "x", "y", "--c", "False"]


def test_a_folder_of_others_must_be_told_its_calibration(adapter, quantize, tmp_path):
    plain = shutil.copytree(quantize(BITS), tmp_path / "gptq")
    (plain / "lota_quantize.json").unlink()
    assert requantize.quantization_flags(GPTQFolder(plain)) == ["--bits", "4", "--group_size", "32"]
    with pytest.raises(UserError, match="does not say its calibration"):
        run_main(requantize, "--adapter", adapter, "--output", tmp_path / "out", "--gptq", plain)
    assert not (tmp_path / "out").exists()


def test_a_lota_adapter_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="merges into its GPTQ model without loss"):
        run_main(requantize, "--adapter", trained, "--output", tmp_path / "out")


def test_scales_alone_or_an_error(again, adapter, tmp_path):
    """Where an integer steps, the run is no tuning of scales."""
    with pytest.raises(RuntimeError, match="of the integers, and the scales alone were to be tuned"):
        requantize.tune_scales(again.path, LotaConfig.load(adapter), tmp_path,
                               ["--lora_r", "8", "--interval_point", "1", "--filter_ratio", "0.9", "--max_steps", "6"])


def test_scales_are_tuned_on_own_rows_as_the_adapter_was(tmp_path, monkeypatch):
    """How they are read comes from the record, which has the text of the chat template and not its file."""
    def train(base, training):
        raise RuntimeError(f"{base.data_columns} {training.training_data_name} {training.train_turns} "
                           f"{read_chat_template(base.chat_template)}")
    monkeypatch.setattr(LoTA_QAF_main, "train", train)
    trained = LotaConfig(settings={"training_data_name": "chat:a=1,text:b=2", "data_columns": "prompt=ask",
                                   "train_turns": "last", "chat_template": "{{ messages }}\u00e9", "max_steps": 3})
    with pytest.raises(RuntimeError) as asked:
        requantize.tune_scales(tmp_path / "gptq", trained, tmp_path / "out", [])
    assert str(asked.value) == "prompt=ask chat:a=1,text:b=2 last {{ messages }}\u00e9"
