"""Adapter folders of others: what is read and from where, and what is refused by its name."""
import json
import re
import shutil

import pytest
import torch
from conftest import LAYERS
from random_gptq import write_gptq, write_lota_adapter
from safetensors.torch import load_file, save_file

from LoTA import UserError
from LoTA.adapter_folder import PREFIX, AdapterFolder, LotaConfig, PeftConfig
from LoTA.folders import GPTQFolder, LoraFolder, MergedFolder
from LoTA.lota_merge import merge_folders


@pytest.fixture
def gptq(tmp_path):
    """A random GPTQ model of 4 bits."""
    return write_gptq(tmp_path / "gptq", LAYERS)


@pytest.fixture
def adapter(tmp_path, gptq):
    """A random adapter of rank 8 with omega 3, without lota_config.json."""
    return write_lota_adapter(tmp_path / "adapter", gptq, with_config=False)


def change(file, **entries):
    """Changes entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def rename(folder, function):
    """Renames the tensors of an adapter."""
    file = folder / "adapter_model.safetensors"
    save_file({function(name): tensor for name, tensor in load_file(file).items()}, file)


def add(folder, name, tensor=None):
    """Adds a tensor to an adapter."""
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), name: torch.zeros(2, 2) if tensor is None else tensor}, file)


# --- names of layers ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rename_layer", [
    lambda name: name.replace(PREFIX, PREFIX + "model."),               # the published adapters
    lambda name: name.removeprefix(PREFIX),
    lambda name: name.replace(PREFIX + "model.", PREFIX)], ids=["one more model.", "no prefix", "one less"])
def test_layers_are_found_by_the_end_of_their_names(gptq, adapter, tmp_path, rename_layer):
    """The merge is that of the same adapter with PEFT's names."""
    other = shutil.copytree(adapter, tmp_path / "other")
    rename(other, rename_layer)
    change(other / "adapter_config.json", base_model_name_or_path=None)
    for folder in (adapter, other):
        merge_folders(AdapterFolder(folder, omega=3.0), GPTQFolder(gptq), tmp_path / f"merged_{folder.name}")
    one, two = (MergedFolder(tmp_path / f"merged_{name}") for name in ("adapter", "other"))
    assert two.offset_modules() == one.offset_modules() == sorted(LAYERS)
    for layer in LAYERS:
        assert torch.equal(two.offset(layer), one.offset(layer))
    assert two.fingerprint() == one.fingerprint() != GPTQFolder(gptq).fingerprint()


def test_names_that_could_be_two_layers_are_refused(gptq, tmp_path):
    """One layer of the adapter fits two of the model, two fit one, or none."""
    adapter = write_lota_adapter(tmp_path / "a", gptq, ["model.layers.0.self_attn.q_proj"], with_config=False)
    rename(adapter, lambda name: name.replace("model.layers.0.self_attn.", ""))
    with pytest.raises(UserError, match="adapts q_proj, which could be model.layers.0.self_attn.q_proj or model.lay"):
        AdapterFolder(adapter, 3.0).check_match(GPTQFolder(gptq))
    two = write_lota_adapter(tmp_path / "two", gptq, ["model.layers.0.self_attn.q_proj"], with_config=False)
    tensors = load_file(two / "adapter_model.safetensors")
    save_file(tensors | {name.replace("model.layers", "model.model.layers"): t.clone() for name, t in tensors.items()},
              two / "adapter_model.safetensors")
    with pytest.raises(UserError, match="which is model.layers.0.self_attn.q_proj there, as .* is"):
        AdapterFolder(two, 3.0).check_match(GPTQFolder(gptq))
    save_file(tensors | {name.removeprefix(PREFIX): t.clone() for name, t in tensors.items()},
              two / "adapter_model.safetensors")
    with pytest.raises(UserError, match="q_proj is there twice, with and without base_model.model."):
        AdapterFolder(two, 3.0)
    rename(adapter, lambda name: name.replace("q_proj", "xq_proj"))
    with pytest.raises(UserError, match="adapts xq_proj, which is no quantized layer there"):
        AdapterFolder(adapter, 3.0).check_match(GPTQFolder(gptq))


def test_published_names_load_live(train, evaluate, gptq_2bit, trained, tmp_path):
    """PEFT would leave the tensors out. Live and merged answers are those of the same adapter with PEFT's names."""
    published = tmp_path / "2M_int2_LoTA_4_0.950_0.999_viggo_1_2_3"
    shutil.copytree(trained, published, ignore=shutil.ignore_patterns("lota_config.json", "checkpoint-*"))
    rename(published, lambda name: name.replace(PREFIX, PREFIX + "model."))
    change(published / "adapter_config.json", base_model_name_or_path=None)
    flags = ("--quantized_model_dir", gptq_2bit)
    for live in (("--no_merge",), ()):
        want, got = (evaluate(tmp_path, "--load_adapter", folder, *flags, *live) for folder in (trained, published))
        assert [p["prediction"] for p in got["predictions"]] == [p["prediction"] for p in want["predictions"]]
    bare = evaluate(tmp_path, *flags)
    assert [p["prediction"] for p in got["predictions"]] != [p["prediction"] for p in bare["predictions"]]


# --- omega --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, bits, data_set", [
    ("8B_int4_LoTA_5.6_0.950_0.999_alpaca_1234_20480_05_101112", 4, "alpaca"),
    ("temp_int4_LoTA_5.6_0.950_0.999_gsm8k", 4, "gsm8k"), ("run1_8B_int4_LoTA_5.6_0.950_0.999_sql_1", 4, "sql"),
    ("14B_int4_lota_5.6_0.950_0.999_alpaca", 4, "alpaca"), ("8B_int4_LoTA_5.6_viggo", 4, "viggo"),
    ("int4_LoTA_5.6", 4, None), ("8B_int4_LoTA_5.6_0.950_0.999_alpaca/checkpoint-4", 4, "alpaca")])
def test_omega_is_read_from_names_that_differ(gptq, tmp_path, capsys, name, bits, data_set):
    """The line says which omega was taken and from where."""
    folder = write_lota_adapter(tmp_path / name, gptq, with_config=False)
    config = AdapterFolder(folder).config
    assert (config.method, config.omega, config.bits, config.data_set) == ("LoTA", 5.6, bits, data_set)
    assert capsys.readouterr().out == f"{folder}: omega is 5.6, from the folder's name {name.split('/')[0]}\n"


@pytest.mark.parametrize("name", ["my_lota_adapter", "8B_LoTA_5_0.95", "int4_LoTA_best_viggo", "LoTA_5/checkpoint-3"])
def test_a_name_that_says_lota_but_no_omega_wants_the_flag(gptq, tmp_path, capsys, name):
    folder = write_lota_adapter(tmp_path / name, gptq, with_config=False)
    with pytest.raises(UserError, match="omega cannot be read from the folder's name; give it with --load_ada_interv"):
        AdapterFolder(folder)
    assert AdapterFolder(folder, omega=5.0).config.omega == 5.0
    assert capsys.readouterr().out == f"{folder}: omega is 5, as given\n"


def test_the_origin_of_omega_is_said(gptq, adapter, tmp_path, capsys):
    """The record, the default, and nothing for a LoRA adapter. A flag that contradicts is refused."""
    recorded = write_lota_adapter(tmp_path / "recorded", gptq)
    assert AdapterFolder(recorded).config.omega == AdapterFolder(recorded, omega=3.0).config.omega == 3.0
    assert capsys.readouterr().out == f"{recorded}: omega is 3, from lota_config.json\n" * 2
    assert AdapterFolder(adapter).config.omega == 6.0
    assert capsys.readouterr().out.startswith(f"{adapter}: omega is 6, the default 0.75 r, because no lota_config.json")
    named = write_lota_adapter(tmp_path / "8B_int4_LoTA_4_viggo", gptq, with_config=False)
    for folder in (recorded, named):
        with pytest.raises(UserError, match=r"has omega [34] \(from .*\), not 5 as given"):
            AdapterFolder(folder, omega=5.0)
    add(adapter, f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight", torch.full((8, 80), 0.5))
    assert AdapterFolder(adapter, omega=5.0).config.omega is None and capsys.readouterr().out == ""


@pytest.mark.parametrize("name, size", [
    ("qwen_2.5_14B_Instruct", "14B"), ("Qwen2.5-7B-Instruct", "7B"), ("Llama-3.1-8B", "8B"), ("int4_70b_64", "70B"),
    ("qwen_2.5_0.5b", "0.5B")])
def test_the_size_is_read_from_the_name(gptq, name, size):
    assert GPTQFolder(gptq).model_size(name) == (size, float(size[:-1]) * 1e9)


# --- what is not understood ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("entries, message", [
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "bias 'all'"), ({"use_dora": True}, "use_dora"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"), ({"layer_replication": [[0, 2]]}, "layer_repl"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"use_bdlora": {"a": 1}}, "use_bdlora"), ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"invented_next_year": 0.5}, "invented_next_year"), ({"peft_type": "ADALORA"}, "peft_type ADALORA"),
    ({"alpha_pattern": {"(": 4}}, "no regular expression")])
def test_entries_of_the_config_that_would_be_left_out_are_refused(adapter, entries, message):
    change(adapter / "adapter_config.json", **entries)
    with pytest.raises(UserError, match=re.escape(message)):
        AdapterFolder(adapter)


def test_every_default_of_peft_is_understood(tmp_path):
    from peft import LoraConfig
    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian").save_pretrained(
        tmp_path)
    assert PeftConfig.load(tmp_path) == PeftConfig(4, rank_pattern={}, alpha_pattern={})


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.down_proj.lora_magnitude_vector",
    "model.layers.0.mlp.down_proj.lora_B.bias", "model.embed_tokens.token_adapter.trainable_tokens_delta"])
def test_tensors_of_no_known_kind_are_refused(adapter, name):
    add(adapter, PREFIX + name)
    with pytest.raises(UserError, match=re.escape(f"{PREFIX}{name} is not supported")):
        AdapterFolder(adapter, 3.0)


def test_tensors_that_do_not_belong_together_are_refused(gptq, adapter, tmp_path):
    """A without B, a vector, and what is learned without a record of it, or recorded and missing."""
    layer = f"{PREFIX}model.layers.0.mlp.down_proj"
    for name, tensor, message in ((f"{PREFIX}x.lora_A.weight", None, "x.lora_B.weight is missing"),
                                  (f"{layer}.lora_A.weight", torch.zeros(8), "is no matrix"),
                                  (f"{layer}.lora_offset", None, "says that it was learned")):
        folder = shutil.copytree(adapter, tmp_path / f"copy_{len(name)}_{tensor is None}")
        add(folder, name, tensor)
        with pytest.raises(UserError, match=message):
            AdapterFolder(folder, 3.0)
    recorded = write_lota_adapter(tmp_path / "recorded", gptq, learned_scales=True)
    rename(recorded, lambda name: name)
    tensors = load_file(recorded / "adapter_model.safetensors")
    del tensors[f"{layer}.lora_scale"]
    save_file(tensors, recorded / "adapter_model.safetensors")
    with pytest.raises(UserError, match="down_proj.lora_scale is missing"):
        AdapterFolder(recorded)
    add(recorded, f"{layer}.lora_scale")
    with pytest.raises(UserError, match="down_proj.lora_scale is not 3 x 64"):
        AdapterFolder(recorded).check_match(GPTQFolder(gptq))


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_of_rank_and_alpha_are_applied(gptq, tmp_path, rslora):
    """The weight is the quantized one + scaling * A @ B, each layer with its own rank and alpha, as in PEFT."""
    ranks = {"model.layers.0.self_attn.q_proj": 4, "model.layers.0.mlp.down_proj": 2,
             "model.layers.1.self_attn.q_proj": 8}
    alphas = dict(zip(ranks, (16, 64, 16), strict=True))
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer, (rows, cols) in LAYERS.items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = torch.randn(ranks[layer], rows, generator=generator)
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = torch.randn(cols, ranks[layer], generator=generator)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora/adapter_model.safetensors")
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({
        "r": 4, "lora_alpha": 16, "use_rslora": rslora, "alpha_pattern": {"down_proj": 64},
        "rank_pattern": {r"layers\.1\..*q_proj": 8, "down_proj": 2, "proj": 99}}))
    adapter, plain = AdapterFolder(tmp_path / "lora"), GPTQFolder(gptq)
    adapter.check_match(plain)
    model = LoraFolder(gptq, adapter)
    for layer, rank in ranks.items():
        scaling = alphas[layer] / (rank ** 0.5 if rslora else rank)
        product = tensors[f"{PREFIX}{layer}.lora_B.weight"] @ tensors[f"{PREFIX}{layer}.lora_A.weight"]
        torch.testing.assert_close(model.weight(layer), plain.weight(layer) + scaling * product.t())


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_mean_what_peft_means_by_them(tmp_path, rslora):
    """Rank and scaling of every layer are those of PEFT's own layers."""
    from peft import LoraConfig, get_peft_model
    from torch import nn
    model = nn.ModuleDict({name: nn.ModuleDict({"q_proj": nn.Linear(8, 8), "xq_proj": nn.Linear(8, 8)})
                           for name in ("a", "b")})
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "xq_proj"], use_rslora=rslora,
                        rank_pattern={"b.*": 2, "q_proj": 3}, alpha_pattern={"^a.q_proj": 5, "xq_proj": 7})
    peft = get_peft_model(model, config)
    config.save_pretrained(tmp_path)
    ours = PeftConfig.load(tmp_path)
    for name in ("a.q_proj", "a.xq_proj", "b.q_proj", "b.xq_proj"):
        layer = peft.base_model.model.get_submodule(name)
        assert (ours.rank_of(name), ours.scaling_of(name)) == (layer.r["default"], layer.scaling["default"]), name


# --- json of other types ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file, content, message", [
    ("adapter_config.json", {"r": "8"}, "adapter_config.json cannot be read: r is '8'; input should be a valid integ"),
    ("adapter_config.json", {"r": 0}, "r is 0; input should be greater than or equal to 1"),
    ("adapter_config.json", {"r": 8, "lora_alpha": [1]}, "lora_alpha is [1]"),
    ("adapter_config.json", {"r": 8, "rank_pattern": {"q_proj": "x"}}, "rank_pattern.q_proj is 'x'"),
    ("adapter_config.json", [8], "has no rank"), ("adapter_config.json", None, "has no rank"),
    ("lota_config.json", {"format_version": 1, "rank": 8, "omega": "3"}, "cannot be read: omega is '3'"),
    ("lota_config.json", {"format_version": 1, "rank": 8, "omega": None}, "without omega"),
    ("lota_config.json", {"format_version": 1, "rank": 8, "omega": 3, "method": "Lota"}, "method is 'Lota'"),
    ("lota_config.json", {"format_version": 1, "rank": 8, "omega": 3, "residual": "no"}, "residual is 'no'"),
    ("lota_config.json", {"format_version": 1, "rank": 8, "omega": 3, "settings": []}, "settings is []"),
    ("lota_config.json", [1], "format version None"), ("lota_config.json", "[" * 100_000, "nested too deeply"),
    ("adapter_config.json", '{"r":' * 100_000, "nested too deeply")])
def test_json_of_other_types_is_refused_by_file_and_field(adapter, file, content, message):
    (adapter / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        AdapterFolder(adapter, 3.0)
    assert file in str(error.value) and "\n" not in str(error.value)


def test_unknown_fields_of_a_record_are_left_out(tmp_path):
    (tmp_path / "lota_config.json").write_text('{"format_version": 1, "omega": 3, "of_a_later_version": [1]}')
    assert LotaConfig.load(tmp_path) == LotaConfig(omega=3.0)
