"""Which layers get an adapter, on tiny models of several architectures: all of them, trained, live and merged."""
import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import forget_checksums, parse, run_main
from transformers import AutoTokenizer

import gptq_quantize
import LoTA_QAF_main
from LoTA import UserError
from LoTA.adapter import attention_for, coverage, load_16bit, load_gptq, load_live, load_merged
from LoTA.adapter_folder import AdapterFolder
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.lota_merge import merge_folders
from LoTA.settings import check_training, complete_training, layer_names, target_layers
from LoTA.storage import read_json

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}
# {name: (class of the config, its settings, quantized layers, the last parts of their names)}
ARCHITECTURES = {
    "qwen3_moe": (transformers.Qwen3MoeConfig, SMALL | {
        "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 64,
        "decoder_sparse_step": 1}, 32, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "phi3": (transformers.Phi3Config, SMALL, 10, ["o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj"]),
    "opt": (transformers.OPTConfig, {
        "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 64,
        "max_position_embeddings": 512}, 12, ["q_proj", "k_proj", "v_proj", "fc1", "fc2", "out_proj"]),
    "starcoder2": (transformers.Starcoder2Config, SMALL, 12,
                   ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]),
    # Its attention has no sdpa, so the run needs the model's own default.
    "gemma2": (transformers.Gemma2Config, SMALL | {"head_dim": 32}, 14,
               ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])}
TRAIN = ("--mode", 1, "--training_data_name", "viggo", "--lora_r", 8, "--train_batch_size", 8, "--dtype", "float32",
         "--save_number", 2, "--max_steps", 4)
LOTA = ("--lota_qaf", True, "--interval_point", 1, "--filter_ratio", 0.5)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request, tmp_path_factory, base_model, demo_data):
    """A random tiny model of an architecture, quantized to 4 bits."""
    config, values, count, names = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **values))
    for p in model.parameters():
        if p.dim() > 1:
            p.data.mul_(2)              # so that the layers' outputs matter beside the residual stream
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    run_main(gptq_quantize, "--model", folder / "base", "--bits", 4, "--group_size", 32, "--calibration", "viggo",
             "--data_dir", demo_data, "--samples", 8, "--output_dir", folder / "gptq")
    return SimpleNamespace(name=request.param, gptq=next((folder / "gptq").iterdir()), count=count, names=names)


def train(case, folder, demo_data, *flags):
    """The adapter folder of mode 1."""
    base, training, _ = parse(*TRAIN, "--quantized_model_dir", case.gptq, "--data_dir", demo_data, "--adapter_path",
                              folder, *flags)
    return LoTA_QAF_main.train(base, training)


def logits(model):
    torch.manual_seed(1)
    with torch.inference_mode():
        return model(input_ids=torch.randint(5, 300, (4, 17))).logits


def test_every_quantized_layer_is_trained_and_live_is_merged(case, tmp_path, demo_data, capsys):
    adapter, folder = AdapterFolder(train(case, tmp_path / "adapters", demo_data, *LOTA)), GPTQFolder(case.gptq)
    assert f"{case.count} of {case.count} quantized layers get an adapter\n" in capsys.readouterr().out
    assert adapter.modules == folder.modules and len(folder.modules) == case.count
    assert adapter.config.settings["lora_target_modules"] == case.names == layer_names(folder.modules)
    untrained = [name for name in adapter.modules if not adapter.matrices(name)[1].any()]        # B begins at zero
    assert untrained == []
    merge_folders(adapter, folder, tmp_path / "merged")
    live = logits(load_live(adapter, case.gptq, dtype=torch.float32))
    merged = logits(load_merged(MergedFolder(tmp_path / "merged"), dtype=torch.float32).model)
    plain = logits(load_gptq(case.gptq, torch.float32).model)
    torch.testing.assert_close(live, merged, rtol=1e-4, atol=1e-4)
    assert (live - plain).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["qwen3_moe"], indirect=True)
class TestExperts:
    @pytest.mark.parametrize("flags", [LOTA, ("--method", "lora", "--learning_rate", 1e-2)], ids=["lota", "lora"])
    def test_resuming_gives_the_same_adapter(self, case, tmp_path, demo_data, flags):
        """Trainer loads the checkpoint's adapter into the model, where PEFT would also rewrite the experts' names."""
        whole = AdapterFolder(train(case, tmp_path / "whole", demo_data, *flags))
        resumed = AdapterFolder(train(case, tmp_path / "resumed", demo_data, *flags, "--adapter_ckpt",
                                      whole.path / "checkpoint-2"))
        assert whole.modules == resumed.modules == GPTQFolder(case.gptq).modules
        for module in whole.modules:
            for a, b in zip(whole.matrices(module), resumed.matrices(module), strict=True):
                assert torch.equal(a, b), module

    def test_an_adapter_without_the_experts_still_loads(self, case, tmp_path, demo_data, capsys):
        """As the code before made it, with the targets that PEFT had rewritten in its adapter_config.json."""
        adapter = train(case, tmp_path / "adapters", demo_data, *LOTA, "--lora_target_modules",
                        "self_attn.q_proj", "o_proj")
        out = capsys.readouterr().out
        assert ("4 of 32 quantized layers get an adapter; without one: model.layers.*.mlp.experts.*.down_proj (8), "
                "model.layers.*.mlp.experts.*.gate_proj (8), model.layers.*.mlp.experts.*.up_proj (8), "
                "model.layers.*.self_attn.k_proj (2), model.layers.*.self_attn.v_proj (2)\n") in out
        before = logits(load_live(AdapterFolder(adapter), case.gptq, dtype=torch.float32))
        config = read_json(adapter / "adapter_config.json")
        config |= {"target_parameters": ["gate_up_proj", "down_proj"], "rank_pattern": {r".*\.gate_up_proj": 16},
                   "alpha_pattern": {r".*\.gate_up_proj": 32}}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        forget_checksums(adapter)
        after = logits(load_live(AdapterFolder(adapter), case.gptq, dtype=torch.float32))
        assert torch.equal(before, after)


@pytest.mark.parametrize("targets, found", [
    (["q_proj"], ["a.0.q_proj", "a.1.q_proj"]), (["0.q_proj"], ["a.0.q_proj"]),
    (["a.1.up", "lm_head"], ["a.1.up", "lm_head"]),
    (["proj"], []), (["p"], []), ([], [])])
def test_targets_are_whole_parts_of_names(targets, found):
    assert target_layers(targets, ["a.0.q_proj", "a.1.q_proj", "a.1.up", "lm_head"]) == found


@pytest.mark.parametrize("case", ["gemma2"], indirect=True)
@pytest.mark.parametrize("flags", [("--flash_attn", "sdpa"), ("--flash_attn", "flash_attention_2")], ids=lambda f: f[1])
def test_attention_that_a_model_cannot_run_is_refused(case, tmp_path, demo_data, flags):
    if flags[1] == "flash_attention_2" and find_spec("flash_attn"):
        pytest.skip("it is installed")
    with pytest.raises(UserError, match=f"does not run with --flash_attn {flags[1]}; leave it at auto"):
        train(case, tmp_path, demo_data, *LOTA, *flags)
    base = case.gptq.parent.parent / "base"
    with pytest.raises(UserError, match=f"does not run with --flash_attn {flags[1]}; leave it at auto"):
        load_16bit(str(base), attn_implementation=flags[1])
    assert load_16bit(str(base)).config._attn_implementation == "eager"


@pytest.mark.parametrize("config, flash, dtype, gpu, want", [
    (transformers.LlamaConfig, True, torch.bfloat16, True, "flash_attention_2"),
    (transformers.LlamaConfig, True, torch.float32, True, "sdpa"),
    (transformers.Gemma2Config, True, torch.bfloat16, True, "flash_attention_2"),
    (transformers.Gemma2Config, True, torch.float32, True, "eager"),
    (transformers.BloomConfig, True, torch.bfloat16, True, "eager"),            # it has neither
    (transformers.LlamaConfig, False, torch.bfloat16, True, None),
    (transformers.LlamaConfig, True, torch.bfloat16, False, None)])
def test_automatic_attention(tmp_path, monkeypatch, config, flash, dtype, gpu, want):
    """flash_attention_2 where it is installed, a GPU is there, and dtype and model allow it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("LoTA.adapter.find_spec", lambda name: flash)
    config().save_pretrained(tmp_path)
    assert attention_for("auto", dtype, tmp_path) == want
    assert attention_for("eager", dtype, tmp_path) == "eager"


def test_long_lists_of_names_are_shortened():
    names = [f"model.layers.{i}.{chr(97 + j)}1.{k}" for i in range(3) for j in range(10) for k in range(2)]
    text = coverage({names[0]}, names)
    assert text.startswith("1 of 60 quantized layers get an adapter; without one: model.layers.*.a1.* (5), ")
    assert text.endswith("model.layers.*.h1.* (6) and 2 more names")
    assert coverage(set(names), names) == "60 of 60 quantized layers get an adapter"


def test_all_leaves_out_lm_head(gptq_2bit):
    """And a name that no layer has is refused, whatever the others are."""
    folder = GPTQFolder(gptq_2bit)
    folder.modules = [*folder.modules, "lm_head"]
    for flags, names in (((), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
                         (("--lora_target_modules", "lm_head,up_proj"), ["lm_head", "up_proj"])):
        base, training = complete_training(*parse(*TRAIN, *flags)[:2], folder)
        assert base.lora_target_modules == names
        check_training(base, training, folder)
    base, training = complete_training(*parse(*TRAIN, "--lora_target_modules", "q_proj", "c_attn", "c_fc")[:2], folder)
    with pytest.raises(UserError, match="c_attn c_fc: .* no such quantized layer; it has q_proj, k_proj, .*, lm_head$"):
        check_training(base, training, folder)
