"""QA-LoRA adapters that PEFT alone trained: the merge against the live PEFT model, and what is refused."""
import json
import shutil

import pytest
import torch
from conftest import LAYERS, merge, predictions, run_main
from gptqmodel import GPTQModel
from gptqmodel.utils.backend import BACKEND
from peft import LoraConfig, get_peft_model
from random_gptq import write_gptq, write_lota_adapter
from safetensors.torch import load_file, save_file
from test_layer import logits
from transformers import AutoModelForCausalLM

from LoTA import UserError, check, lota_merge
from LoTA.adapter import load_gptq, load_live, load_merged
from LoTA.adapter_folder import PREFIX, AdapterFolder
from LoTA.export.run import export
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.regroup import regroup

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# {name: LoraConfig's settings}. "defaults" is what LoraConfig(use_qalora=True) does: rank 8, alpha 8, pools of 16.
SETTINGS = {
    "defaults": {},
    "group_size": {"qalora_group_size": 32, "r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
    "rslora": {"qalora_group_size": 32, "r": 4, "lora_alpha": 4, "use_rslora": True},
    "patterns": {"qalora_group_size": 32, "r": 4, "lora_alpha": 4, "rank_pattern": {"down_proj": 2, r"1\..*q_proj": 6},
                 "alpha_pattern": {"o_proj": 16, r"layers\.0\..*v_proj": 1}},
    "both": {"qalora_group_size": 16, "r": 4, "use_rslora": True, "rank_pattern": {"down_proj": 2},
             "alpha_pattern": {"up_proj": 3}},
    "pools_of_two_groups": {"qalora_group_size": 64, "target_modules": ["q_proj", "gate_proj"]}}


def train_with_peft(gptq, folder, **settings):
    """Six steps of AdamW with PEFT on GPTQModel's own layers, saved. Returns the live logits, float32. No code of ours.

    The model is loaded in float16, because GPTQModel's kernels take no float32, and widened.
    """
    torch.compiler.set_stance("force_eager")
    torch.manual_seed(0)
    model = GPTQModel.load(str(gptq), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model.float()
    model = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "use_qalora": True,
                                                "target_modules": ALL_LINEAR, **settings}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model.train()
    ids, losses = torch.randint(5, 300, (4, 24)), []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval().save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_merged_model_is_the_live_peft_model(quantize, tmp_path, settings, capsys):
    """The command needs the adapter alone, because PEFT names the model. No integer moves."""
    gptq = quantize(4)
    live = train_with_peft(gptq, tmp_path / "adapter", **SETTINGS[settings])
    run_main(lota_merge, "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    said = capsys.readouterr().out
    assert "merged and verified" in said
    assert ("the merged model gets groups of 16" in said) == (settings in ("defaults", "both"))
    merged = MergedFolder(tmp_path / "merged")
    got = logits(load_merged(merged, dtype=torch.float32).model)
    torch.testing.assert_close(got, live, rtol=1e-4, atol=2e-4)
    before = logits(load_gptq(gptq, dtype=torch.float32).model)
    assert (live - before).abs().max() > 0.2
    assert merged.lota.method == "QA-LoRA" and merged.lota.training["moved"]["all"] == 0
    assert merged.group_size == (16 if settings in ("defaults", "both") else 32)
    source = GPTQFolder(gptq)
    for name in source.modules:
        assert torch.equal(merged.tensor(f"{name}.qweight"), source.tensor(f"{name}.qweight"))
    assert check.check_folder(tmp_path / "merged").findings == []


def test_peft_itself_does_not_merge(quantize, tmp_path):
    """Which is why this project does."""
    torch.compiler.set_stance("force_eager")
    model = GPTQModel.load(str(quantize(4)), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    model = get_peft_model(model, LoraConfig(use_qalora=True, target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()


def test_offsets_by_hand(tmp_path):
    """mu = scaling * pools / size * (A B)[pool] / s, for pools of a part of a group, of one, and of two groups."""
    for pool, size, group in ((8, None, 32), (16, 16, 32), (32, 32, 32), (64, 32, 32), (48, 16, 32), (32, 32, -1)):
        folder, layers = tmp_path / f"{pool}_{group}", {"layer.q_proj": (192, 48)}
        gptq = write_gptq(folder / "gptq", layers, 3, group)
        adapter = write_qalora(folder / "adapter", gptq, pool)
        if size is None:
            with pytest.raises(UserError, match=r"pools 8 inputs, and .* has groups of 32: .* needs groups of 8"):
                merge(adapter, gptq, folder / "merged")
            continue
        merge(adapter, gptq, folder / "merged")
        tensors, merged, source = load_file(adapter / "adapter_model.safetensors"), MergedFolder(
            folder / "merged"), GPTQFolder(gptq)
        name, = layers
        shift = 2 * (192 // pool) / pool * (tensors[f"{PREFIX}{name}.lora_B.weight"].double()
                                            @ tensors[f"{PREFIX}{name}.lora_A.weight"].double()).t()
        assert merged.group_size == (size if group != -1 or pool == 32 else group)
        rows = torch.arange(192) // pool
        torch.testing.assert_close(merged.weight(name).double(), source.weight(name).double() + shift[rows],
                                   rtol=1e-5, atol=1e-5)


def write_qalora(folder, gptq, pool, rank=4, **config):
    """A random QA-LoRA adapter as PEFT saves it, with alpha / r of 2."""
    source, tensors = GPTQFolder(gptq), {}
    generator = torch.Generator().manual_seed(pool)
    for name in source.modules:
        (rows,), (_, cols) = source.shape(f"{name}.g_idx"), source.shape(f"{name}.scales")
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, rows // pool, generator=generator)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(cols, rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "r": rank, "lora_alpha": 2 * rank, "peft_type": "LORA", "use_qalora": True, "qalora_group_size": pool,
        "base_model_name_or_path": str(gptq), **config}))
    return folder


def test_finer_groups_have_the_same_weights(tmp_path):
    """Bits that split words, a short last group, both formats, several files: the weights are equal bit for bit."""
    layers = {**LAYERS, "model.layers.1.mlp.up_proj": (100, 48)}
    for bits, form, shards in ((2, "gptq", 1), (3, "gptq_v2", 2), (4, "gptq", 3), (8, "gptq", 1)):
        gptq = write_gptq(tmp_path / f"{bits}", layers, bits, 64, checkpoint_format=form, shards=shards, other_tensors={
            "model.norm.weight": torch.randn(64), "model.layers.0.mlp.down_proj.bias": torch.randn(64)})
        source, finer = GPTQFolder(gptq), regroup(GPTQFolder(gptq), 16, tmp_path / f"{bits}_finer")
        assert finer.group_size == 16 and finer.checkpoint_format == form and finer.bits == bits
        assert json.loads((finer.path / "config.json").read_text())["quantization_config"]["group_size"] == 16
        for name, (rows, cols) in layers.items():
            assert finer.shape(f"{name}.scales") == (-(-rows // 16), cols)
            assert torch.equal(finer.tensor(f"{name}.g_idx"), torch.arange(rows, dtype=torch.int32) // 16)
            assert torch.equal(finer.weight(name), source.weight(name))
        for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.bias"):
            assert torch.equal(finer.tensor(name), source.tensor(name))
        assert {name: file.name for name, file in finer.file_of.items()} == {
            name: file.name for name, file in source.file_of.items()}


def test_layers_without_adapter_get_finer_groups_too(quantize, tmp_path):
    """The group size is one for the whole model. The layers that PEFT did not adapt compute what they did."""
    gptq = quantize(4)
    live = train_with_peft(gptq, tmp_path / "adapter", target_modules=["v_proj", "down_proj"])
    merge(tmp_path / "adapter", gptq, tmp_path / "merged")
    merged, source = MergedFolder(tmp_path / "merged"), GPTQFolder(gptq)
    torch.testing.assert_close(logits(load_merged(merged, dtype=torch.float32).model), live, rtol=1e-4, atol=2e-4)
    assert {name.rsplit(".", 1)[-1] for name in merged.offset_modules()} == {"v_proj", "down_proj"}
    other = "model.layers.1.mlp.gate_proj"
    assert merged.offset(other) is None and torch.equal(merged.weight(other), source.weight(other))
    assert merged.shape(f"{other}.scales")[0] == 2 * source.shape(f"{other}.scales")[0]


def test_mode_2_and_the_exports_take_it(quantize, evaluate, tmp_path):
    """Live and merged answers are equal. The exports of finer groups verify, and dense computes the live logits."""
    gptq = quantize(4)
    want = train_with_peft(gptq, tmp_path / "adapter", qalora_group_size=16)
    torch.testing.assert_close(logits(load_live(AdapterFolder(tmp_path / "adapter"), gptq, dtype=torch.float32)), want,
                               rtol=1e-4, atol=2e-4)
    flags = ("--load_adapter", tmp_path / "adapter", "--limit", 8)
    live, merged = evaluate(tmp_path, *flags, "--no_merge"), evaluate(tmp_path, *flags)
    assert predictions(live) == predictions(merged) and merged["adapter"]["method"] == "QA-LoRA"
    for form in ("peft", "dense"):
        export(tmp_path / "adapter", form, tmp_path / form, torch.float32 if form == "dense" else None, verify=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dense), want, rtol=1e-4, atol=2e-4)
    with pytest.raises(UserError, match="different groups"):
        export(tmp_path / "adapter", "gguf", tmp_path / "gguf", verify=True)


def test_training_goes_on_after_it(quantize, train, tmp_path):
    """The merged model, with its finer groups, is a base for --method lota. Live is merged bit for bit."""
    gptq = quantize(4)
    train_with_peft(gptq, tmp_path / "adapter")
    merge(tmp_path / "adapter", gptq, tmp_path / "m1")
    adapter = train(tmp_path / "a", "--quantized_model_dir", tmp_path / "m1", "--max_steps", 4, "--save_strategy", "no")
    merge(adapter, tmp_path / "m1", tmp_path / "m2")
    live = load_live(AdapterFolder(adapter), tmp_path / "m1", dtype=torch.bfloat16)
    merged = load_merged(MergedFolder(tmp_path / "m2"), dtype=torch.bfloat16, backend="gptq_torch").model
    assert torch.equal(logits(live), logits(merged))
    record, = MergedFolder(tmp_path / "m2").lota.history
    assert record["method"] == "QA-LoRA" and record["quantized_model_dir"] == str(gptq.resolve())


# --- what it refuses ----------------------------------------------------------------------------------------------

def test_refusals(tmp_path):
    """One line each, with both sizes where sizes are what is wrong."""
    layers = {"layer.q_proj": (192, 48)}
    shuffled = write_gptq(tmp_path / "shuffled", layers, desc_act=True)
    for pool, message in ((16, "pools 16 inputs, and .* has groups of 32 in another order"),
                          (32, "pools 32 inputs in their order, and a GPTQ group of 32 inputs has some of several")):
        with pytest.raises(UserError, match=message):
            merge(write_qalora(tmp_path / f"s{pool}", shuffled, pool), shuffled, tmp_path / "out")
    merge(write_qalora(tmp_path / "whole", shuffled, 192), shuffled, tmp_path / "out")      # one pool has all inputs
    gptq = write_gptq(tmp_path / "gptq", layers)
    adapter = write_qalora(tmp_path / "other", gptq, 32)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, message in (({"qalora_group_size": 16}, "is 192 x 48, its adapter 96 x 48"),
                            ({"qalora_group_size": 0}, "qalora_group_size is 0"),
                            ({"use_dora": True}, "use_dora True is not supported"),
                            ({"base_model_name_or_path": "owner/model"}, "owner/model is no folder here: name the "
                                                                         "folder that has it with --gptq")):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message) as error:
            run_main(lota_merge, "--adapter", adapter, "--output", tmp_path / "no")
        assert "\n" not in str(error.value)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"{PREFIX}layer.q_proj.lora_B.weight"][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="an offset is not finite"):
        merge(adapter, gptq, tmp_path / "no")
    merge(write_lota_adapter(tmp_path / "lota", gptq), gptq, tmp_path / "m1")
    fine = shutil.copytree(write_qalora(tmp_path / "fine", gptq, 16), tmp_path / "fine2")
    with pytest.raises(UserError, match="pools 16 inputs, and .* has groups of 32 with offsets from a merge before"):
        merge(fine, tmp_path / "m1", tmp_path / "no")
    assert not (tmp_path / "no").exists()
