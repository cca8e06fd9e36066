"""Tuning on: a merged folder is a base again. Its offsets stay exact, live is merged, and the records are kept."""
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import LAYERS, merge, parse, predictions
from oracle import delta_w, group_means
from random_gptq import write_gptq, write_lota_adapter
from safetensors.torch import load_file, save_file
from test_layer import logits
from transformers import AutoModelForCausalLM

from LoTA import UserError, check, settings, ternary
from LoTA.adapter import load_base, load_gptq, load_live, load_merged
from LoTA.adapter_folder import PREFIX, AdapterFolder, LotaConfig
from LoTA.export.run import export
from LoTA.folders import GPTQFolder, MergedFolder, open_base
from LoTA.lota_merge import layer_merger, verify_folders
from LoTA.packed import PackedLayer
from LoTA.ternary import GridLinear, dequantize
from LoTA.trainer import config_of_run

LRQAT = ("--lota_qaf", False, "--method", "lrqat", "--learning_rate", 2e-2)
METHODS = {"published": ("--interval_point", 4), "full": ("--recipe", "full", "--interval_point", 2),
           "integers": (*LRQAT, "--recipe", "integers"),
           "qalora": ("--lota_qaf", False, "--method", "qalora", "--learning_rate", 1e-2)}


@pytest.fixture(scope="module")
def rounds(tmp_path_factory, train, quantize):
    """A function (methods...) -> (the adapter folders of such runs, [the GPTQ folder, the merged folders]).

    Each run trains on what the one before it was merged into, at 4 bits.
    """
    made = {}

    def rounds(*methods):
        if not methods:
            return [], [quantize(4)]
        if methods not in made:
            adapters, bases = rounds(*methods[:-1])
            folder = tmp_path_factory.mktemp("_".join(methods))
            adapter = train(folder, *METHODS[methods[-1]], "--quantized_model_dir", bases[-1], "--max_steps", 6)
            merge(adapter, bases[-1], folder / "merged")
            made[methods] = [*adapters, adapter], [*bases, folder / "merged"]
        return made[methods]
    return rounds


CHAINS = [("published", "published"), ("full", "full"), ("integers", "integers"), ("qalora", "published"),
          ("published", "integers"), ("full", "integers")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_live_is_merged_bit_for_bit_in_the_second_round(rounds, chain, dtype):
    """The second adapter on the first merged model, live and merged."""
    adapters, bases = rounds(*chain)
    live = load_live(AdapterFolder(adapters[1]), bases[1], dtype=dtype)
    merged = load_merged(MergedFolder(bases[2]), dtype=dtype, backend="gptq_torch").model
    got = logits(live)
    assert torch.equal(got, logits(merged))
    torch.manual_seed(1)
    assert torch.equal(live(input_ids=torch.randint(5, 300, (3, 17))).logits, got)      # as training computes it
    before = logits(load_base(open_base(bases[1]), dtype=dtype, backend="gptq_torch").model)
    assert not torch.equal(got, before)
    with live.disable_adapter():        # what is left is the first merged model, its offsets too
        assert torch.equal(logits(live), before)
    assert not torch.equal(before, logits(load_gptq(bases[0], dtype=dtype, backend="gptq_torch").model))


@pytest.mark.parametrize("first", ["full", "qalora"])
def test_qalora_in_the_second_round_is_merged_to_rounding(rounds, first):
    """PEFT computes it live, in another order. The base's offsets are in both."""
    adapters, bases = rounds(first, "qalora")
    live = load_live(AdapterFolder(adapters[1]), bases[1], dtype=torch.float32)
    merged = load_merged(MergedFolder(bases[2]), dtype=torch.float32).model
    torch.testing.assert_close(logits(live), logits(merged), rtol=1e-4, atol=2e-4)
    before = logits(load_base(open_base(bases[1]), dtype=torch.float32).model)
    assert (logits(live) - before).abs().max() > 0.02


@pytest.mark.parametrize("chain", [*CHAINS, ("full", "qalora"), ("qalora", "qalora")], ids="-".join)
def test_offsets_add_up_exactly(rounds, chain):
    """mu of the second merge is mu of the first plus the adapter's, in float32. Without either there is none."""
    adapters, bases = rounds(*chain)
    first, second, adapter = MergedFolder(bases[1]), MergedFolder(bases[2]), AdapterFolder(adapters[1])
    adapter.check_match(first)
    tensors = load_file(adapter.file)
    alone = layer_merger(adapter)
    assert bool(second.offset_modules()) == (chain != ("integers", "integers"))
    for name in second.modules:
        packed = first.packed(name)
        bare = PackedLayer(packed.qweight, packed.qzeros, packed.scales, packed.groups.g_idx, packed.bits,
                           packed.checkpoint_format)
        old, total = first.offset(name), second.offset(name)
        new = tensors[f"{PREFIX}{name}.lora_offset"] if chain[1] == "full" else alone(name, bare)[1]
        assert (new is None) == (chain[1] == "integers")
        if old is None or new is None:
            assert total is old if old is None else torch.equal(total, old)
            continue
        assert new.abs().max() > 0 and old.abs().max() > 0 and total.dtype == torch.float32
        assert torch.equal(total, old + new)


def test_eq_4_of_the_second_round_by_hand(tmp_path):
    """Random layers in float64: mu is the old one plus the group means of dW - omega W^ over omega."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS, 3)
    merge(write_lota_adapter(tmp_path / "one", gptq, seed=1), gptq, tmp_path / "m1")
    adapter = write_lota_adapter(tmp_path / "two", tmp_path / "m1", seed=2)
    merge(adapter, tmp_path / "m1", tmp_path / "m2")
    one, two, tensors = MergedFolder(tmp_path / "m1"), MergedFolder(tmp_path / "m2"), load_file(
        adapter / "adapter_model.safetensors")
    moved = 0
    for name in LAYERS:
        dw = delta_w(tensors[f"{PREFIX}{name}.lora_A.weight"].t(), tensors[f"{PREFIX}{name}.lora_B.weight"].t())
        before, after = (folder.packed(name).weight_int.double() for folder in (one, two))
        g_idx = one.tensor(f"{name}.g_idx")
        mu = group_means(dw - 3 * (after - before), g_idx, int(g_idx.max()) + 1) / 3
        torch.testing.assert_close(two.offset(name).double(), one.offset(name).double() + mu, rtol=1e-6, atol=1e-6)
        assert torch.equal(after - before, torch.where(dw.abs() > 3, dw.sign(), 0).clamp(-before, 7 - before))
        moved += int((after != before).sum())
    assert moved > 0


def test_learned_scales_scale_the_old_offset_as_the_zero_point(tmp_path):
    """The weight is s' (W_int - z + mu_old + mu_new), where s' are the new scales."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS, 4)
    merge(write_lota_adapter(tmp_path / "one", gptq, seed=1), gptq, tmp_path / "m1")
    adapter = write_lota_adapter(tmp_path / "two", tmp_path / "m1", seed=2, offset_scale="learned", learned_scales=True)
    merge(adapter, tmp_path / "m1", tmp_path / "m2")
    one, two = MergedFolder(tmp_path / "m1"), MergedFolder(tmp_path / "m2")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in LAYERS:
        s = (one.tensor(f"{name}.scales").double() * (1 + tensors[f"{PREFIX}{name}.lora_scale"].double())).half()
        g_idx = one.tensor(f"{name}.g_idx").long()
        mu = one.offset(name).double() + tensors[f"{PREFIX}{name}.lora_offset"].double()
        packed = two.packed(name)
        want = s.double()[g_idx] * (packed.weight_int.double() - packed.zeros.double()[g_idx] + mu[g_idx])
        torch.testing.assert_close(two.weight(name).double(), want, rtol=2e-3, atol=1e-3)
        assert (two.tensor(f"{name}.scales") != one.tensor(f"{name}.scales")).double().mean() > 0.9


def test_gradients_with_an_old_offset(tmp_path):
    """x, a learned mu and learned scales get the gradients of y = x @ (s' (W_int - z + mu_old + mu_new)) in float64."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS, 4)
    merge(write_lota_adapter(tmp_path / "one", gptq, seed=1), gptq, tmp_path / "m1")
    name = "model.layers.0.mlp.down_proj"
    packed, source = MergedFolder(tmp_path / "m1").packed(name), MergedFolder(tmp_path / "m1")
    rule = AdapterFolder(tmp_path / "one").rule(name)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5, n, generator=generator) for n in packed.shape)
    lora_A, lora_B = torch.zeros(packed.shape[0], 8), torch.zeros(8, packed.shape[1])
    change = 0.1 * torch.randn(packed.scales.shape, generator=generator)
    for with_mu in (True, False):
        own = 0.2 * torch.randn(packed.scales.shape, generator=generator) if with_mu else None
        inputs = [x.clone().requires_grad_(), change.clone().requires_grad_()] + (
            [own.clone().requires_grad_()] if with_mu else [])
        y = GridLinear.apply(inputs[0], lora_A, lora_B, lambda: packed.rescaled(change), replace(rule, kappa=None),
                             ternary, inputs[2] if with_mu else None, inputs[1])
        got = torch.autograd.grad(y, inputs, grad)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        g_idx = packed.groups.g_idx
        rounded = packed.rescaled(change).scales.double()
        s = packed.scales.double() * (1 + exact[1])
        s = s + (rounded - s).detach()
        mu = source.offset(name).double() + (exact[2] if with_mu else 0)
        weight = s[g_idx] * (packed.weight_int.double() - packed.zeros.double()[g_idx] + mu[g_idx])
        want_y = exact[0] @ weight
        torch.testing.assert_close(y.double(), want_y, rtol=1e-4, atol=1e-3)
        for ours, theirs in zip(got, torch.autograd.grad(want_y, exact, grad.double()), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-2)


def test_layers_without_a_new_adapter_keep_their_offset(tmp_path):
    """Three layers: one with the old offset alone, one with the new alone, one with both."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS)
    both, old, new = LAYERS
    merge(write_lota_adapter(tmp_path / "one", gptq, [both, old]), gptq, tmp_path / "m1")
    adapter = write_lota_adapter(tmp_path / "two", tmp_path / "m1", [both, new], seed=3)
    merge(adapter, tmp_path / "m1", tmp_path / "m2")
    one, two = MergedFolder(tmp_path / "m1"), MergedFolder(tmp_path / "m2")
    assert one.offset_modules() == sorted([both, old]) and two.offset_modules() == sorted(LAYERS)
    assert torch.equal(two.offset(old), one.offset(old)) and not torch.equal(two.offset(both), one.offset(both))
    assert two.offset(new).abs().max() > 0
    opened, offset = AdapterFolder(adapter), MergedFolder.offset
    opened.check_match(one)
    changed = {old: "an offset that the merge must not touch", both: "differ from the trained ones"}
    for name, message in changed.items():
        broken = MergedFolder(tmp_path / "m2")
        broken.offset = lambda module, name=name: offset(two, module) + (module == name)
        with pytest.raises(RuntimeError, match=message):
            verify_folders(opened, one, broken, layer_merger(opened))
    verify_folders(opened, one, two, layer_merger(opened))


def test_offsets_stay_where_the_second_adapter_has_none(tmp_path):
    """--residual False on a base with offsets: the integers move, the offsets stay, and stock tools refuse it still."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS)
    merge(write_lota_adapter(tmp_path / "one", gptq), gptq, tmp_path / "m1")
    adapter = write_lota_adapter(tmp_path / "two", tmp_path / "m1", residual=False, seed=3)
    assert merge(adapter, tmp_path / "m1", tmp_path / "m2")["all"] > 0
    one, two = MergedFolder(tmp_path / "m1"), MergedFolder(tmp_path / "m2")
    assert not two.lota.residual and two.lota.has_offsets and two.offset_modules() == sorted(LAYERS)
    assert all(torch.equal(one.offset(name), two.offset(name)) for name in LAYERS)
    assert json.loads((tmp_path / "m2/quantize_config.json").read_text())["checkpoint_format"] == "lota_gptq"
    assert "| Offset | yes |" in (tmp_path / "m2/README.md").read_text()
    with pytest.raises(UserError, match="has offsets"):
        export(tmp_path / "m2", "gptq", tmp_path / "out")


# --- records ------------------------------------------------------------------------------------------------------

def test_the_history_is_kept(rounds, quantize):
    """The records of the merges before, oldest first. An adapter of the last base has its fingerprint, not theirs."""
    adapters, bases = rounds("qalora", "published")
    first, second = (LotaConfig.load(base / "lota") for base in bases[1:])
    assert first.history == [] and [record["method"] for record in second.history] == ["QA-LoRA"]
    record, = second.history
    assert record["fingerprint"] == first.fingerprint == GPTQFolder(bases[0]).fingerprint()
    assert record["settings"] == json.loads(json.dumps(first.settings)) and record["training"] == first.training
    assert "sha256" not in record and "history" not in record
    assert second.method == "LoTA" and second.fingerprint == MergedFolder(bases[1]).fingerprint() != first.fingerprint
    assert second.quantized_model_dir == str(bases[1].resolve())
    assert LotaConfig.load(adapters[1]).history == []
    assert "| Tuned before | QA-LoRA on viggo |" in (bases[2] / "README.md").read_text()
    third = MergedFolder(bases[2]).history()
    assert [record["method"] for record in third] == ["QA-LoRA", "LoTA"]


def test_three_rounds(tmp_path):
    """Each merge adds one record and one offset."""
    base, total = write_gptq(tmp_path / "gptq", LAYERS), None
    for i in range(3):
        adapter = write_lota_adapter(tmp_path / f"a{i}", base, seed=i, data_set=f"set{i}", offset_scale="learned")
        merge(adapter, base, tmp_path / f"m{i}")
        base, name = tmp_path / f"m{i}", next(iter(LAYERS))
        own = load_file(adapter / "adapter_model.safetensors")[f"{PREFIX}{name}.lora_offset"]
        total = own if total is None else total + own
        assert torch.equal(MergedFolder(base).offset(name), total)
    assert [record["data_set"] for record in MergedFolder(base).lota.history] == ["set0", "set1"]
    assert check.check_folder(base).findings == []


def test_the_fingerprint_has_the_offsets(tmp_path):
    """Two bases that differ in one offset only: an adapter of one does not fit the other."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS)
    merge(write_lota_adapter(tmp_path / "one", gptq), gptq, tmp_path / "m1")
    adapter = write_lota_adapter(tmp_path / "two", tmp_path / "m1")
    before = MergedFolder(tmp_path / "m1").fingerprints()
    offsets = load_file(tmp_path / "m1/lota/offsets.safetensors")
    offsets[f"{next(iter(LAYERS))}.offset"][0, 0] += 1
    save_file(offsets, tmp_path / "m1/lota/offsets.safetensors")
    after = MergedFolder(tmp_path / "m1").fingerprints()
    assert before[0] != after[0] and before[1] != after[1]
    assert before[0] == AdapterFolder(adapter).config.fingerprint
    with pytest.raises(UserError, match="offsets.safetensors"):
        open_base(tmp_path / "m1")
    record = MergedFolder(tmp_path / "m1").lota
    replace(record, sha256={}).save(tmp_path / "m1/lota")
    with pytest.raises(UserError, match="trained on other GPTQ weights"):
        merge(adapter, tmp_path / "m1", tmp_path / "m2")
    finding, = check.check_folder(adapter).findings
    assert "trained on other GPTQ weights" in finding


def test_without_offsets_the_fingerprint_is_that_of_the_plain_folder(tmp_path):
    """A merged folder without offsets is the same model with and without its subfolder lota."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS)
    merge(write_lota_adapter(tmp_path / "one", gptq, residual=False), gptq, tmp_path / "m1")
    plain = shutil.copytree(tmp_path / "m1", tmp_path / "plain", ignore=shutil.ignore_patterns("lota"))
    assert GPTQFolder(plain).fingerprints() == MergedFolder(tmp_path / "m1").fingerprints()


def test_check_finds_a_changed_base(rounds, tmp_path):
    """python -m LoTA.check compares the second round's adapter and merged model with the first merged model."""
    adapters, bases = rounds("full", "full")
    for folder in (adapters[1], bases[2]):
        report = check.check_folder(folder)
        assert report.findings == [] and not any("is not here" in note for note in report.notes)
    moved = shutil.copytree(bases[2], tmp_path / "merged")
    config = json.loads((moved / "lota/lota_config.json").read_text())
    config["quantized_model_dir"] = str(bases[0])
    (moved / "lota/lota_config.json").write_text(json.dumps(config))
    assert any("other GPTQ weights" in finding for finding in check.check_folder(moved).findings)


# --- the roads ----------------------------------------------------------------------------------------------------

def test_mode_2_on_a_merged_base(rounds, evaluate, tmp_path):
    """The base alone, the adapter live, and merged: the answers of the last two are equal."""
    adapters, bases = rounds("full", "full")
    flags = ("--limit", 8, "--answer_loss", True)
    live = evaluate(tmp_path, "--load_adapter", adapters[1], "--no_merge", *flags)
    merged = evaluate(tmp_path, "--load_adapter", adapters[1], *flags)
    base = evaluate(tmp_path, "--quantized_model_dir", bases[1], *flags)
    first = evaluate(tmp_path, "--load_adapter", bases[1], *flags)
    assert predictions(live) == predictions(merged) and live["loss"] == merged["loss"]
    assert base["loss"] == pytest.approx(first["loss"]) != live["loss"]


def test_training_resumes_on_a_merged_base(rounds, train, tmp_path):
    """A resumed second round ends as the run that was not interrupted, bit for bit."""
    _, bases = rounds("full")
    flags = (*METHODS["full"], "--quantized_model_dir", bases[1], "--max_steps", 4)
    whole = train(tmp_path / "a", *flags)
    resumed = train(tmp_path / "b", *flags, "--adapter_ckpt", whole / "checkpoint-2")
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(UserError, match="its fingerprint is"):
        train(tmp_path / "c", *flags, "--quantized_model_dir", bases[0], "--adapter_ckpt", whole / "checkpoint-2")


def test_the_first_loss_is_the_merged_models(rounds, train, tmp_path):
    """Training begins at the merged model, not at its integers alone: the loss of step 1 is lower than the base's."""
    _, bases = rounds("full")
    losses = [json.loads((train(tmp_path / str(i), *METHODS["published"], "--quantized_model_dir", base, "--max_steps",
                                1, "--logging_steps", 1, "--save_strategy", "no") / "log_history.json").read_text()
                         )[0]["loss"] for i, base in enumerate(bases)]
    assert losses[1] < losses[0] - 0.01


def test_lora_on_a_merged_base_keeps_its_offsets(rounds, train, tmp_path):
    """Live, and as dense weights: the merged model's offsets are in both."""
    _, bases = rounds("full")
    adapter = train(tmp_path / "a", "--lota_qaf", False, "--method", "lora", "--learning_rate", 1e-2,
                    "--quantized_model_dir", bases[1], "--max_steps", 2, "--save_strategy", "no")
    live = logits(load_live(AdapterFolder(adapter), bases[1], dtype=torch.float32))
    export(adapter, "dense", tmp_path / "dense", torch.float32, verify=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dense), live, rtol=1e-4, atol=2e-4)
    plain = logits(load_gptq(bases[0], dtype=torch.float32).model)
    assert (live - plain).abs().max() > 0.05
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(bases[1])


@pytest.mark.parametrize("format", ["peft", "gguf", "dense"])
def test_a_second_merge_exports(rounds, tmp_path, format):
    """Every format that holds offsets is written and verified. dense has the sum of both offsets in its weights."""
    _, bases = rounds("full", "full")
    export(bases[2], format, tmp_path / "out", torch.float32 if format == "dense" else None, verify=True)
    if format == "dense":
        merged, name = MergedFolder(bases[2]), "model.layers.1.mlp.down_proj"
        want = dequantize(merged.packed(name), MergedFolder(bases[1]).offset(name) + load_file(
            rounds("full", "full")[0][1] / "adapter_model.safetensors")[f"{PREFIX}{name}.lora_offset"])
        assert torch.equal(load_file(tmp_path / "out/model.safetensors")[f"{name}.weight"], want.t())


def test_refusals(rounds, train, tmp_path, base_model):
    _, bases = rounds("full")
    with pytest.raises(UserError, match="was tuned after that: give --dither noise or none"):
        train(tmp_path, *LRQAT, "--quantized_model_dir", bases[1], "--dither", "fraction")
    assert not list(tmp_path.iterdir())
    gptq = write_gptq(tmp_path / "gptq", LAYERS)
    merge(write_lota_adapter(tmp_path / "one", gptq), gptq, tmp_path / "m1")
    adapter = write_lota_adapter(tmp_path / "two", tmp_path / "m1")
    with pytest.raises(UserError, match="is the model to merge into, which would be replaced"):
        merge(adapter, tmp_path / "m1", tmp_path / "m1")
    assert MergedFolder(tmp_path / "m1").offset_modules() == sorted(LAYERS)


def test_config_of_run_records_the_merged_base(rounds):
    """The paths and fingerprints of a run are those of the merged folder."""
    _, bases = rounds("full")
    folder = open_base(bases[1])
    base, training, _ = parse("--mode", 1, "--method", "lota", "--quantized_model_dir", bases[1], "--max_steps", 1)
    base, training = settings.complete_training(base, training, folder)
    config = config_of_run(base, training, folder)
    assert config.quantized_model_dir == str(bases[1].resolve())
    assert (config.fingerprint, config.fingerprint_all) == folder.fingerprints()
