"""--method lrqat through the scripts: train, resume, merge, evaluate, export, on a tiny GPTQ model."""
import json
import math

import pytest
import torch
from conftest import merge, parse, run_main
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_layer import logits
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import LoTA_QAF_main
from LoTA import UserError, check, lota_merge
from LoTA.adapter import load_gptq, load_live, load_merged
from LoTA.adapter_folder import LOTA_CONFIG, AdapterFolder, LotaConfig
from LoTA.export import run as export
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.layer import CustomLoraLinear, adapter_state
from LoTA.monitor import SAMPLE_ROWS, Monitor
from LoTA.packing import count_different
from LoTA.settings import LRQAT_RECIPES
from LoTA.steps import dither_value, fixed_point, layer_seed
from LoTA.ternary import GridLinear

LRQAT = ("--lota_qaf", False, "--method", "lrqat", "--learning_rate", 2e-2)
RECIPES = {"integers": (), "scales": ("--dither", "none"), "mean": (), "full": ("--dither", "fraction"),
           "learned": ("--recipe", "full", "--offset_scale", "learned")}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, train, quantize):
    """A function (recipe) -> the adapter folder of a run of eight steps at 4 bits, made once."""
    made = {}

    def adapters(recipe):
        if recipe not in made:
            named = ("--recipe", recipe) if recipe in LRQAT_RECIPES else ()
            made[recipe] = train(tmp_path_factory.mktemp(recipe), *LRQAT, *named, *RECIPES[recipe],
                                 "--quantized_model_dir", quantize(4))
        return made[recipe]
    return adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_live_is_merged_bit_for_bit(adapters, quantize, tmp_path, recipe, dtype):
    """Many integers move, and the merged model's logits are the live model's."""
    shares = merge(adapters(recipe), quantize(4), tmp_path / "merged")
    assert shares["all"] > 0.02
    live = load_live(AdapterFolder(adapters(recipe)), quantize(4), dtype=dtype)
    merged = load_merged(MergedFolder(tmp_path / "merged"), dtype=dtype, backend="gptq_torch").model
    assert torch.equal(logits(live), logits(merged))
    assert not torch.equal(logits(live), logits(load_gptq(quantize(4), dtype=dtype, backend="gptq_torch").model))


def test_what_the_run_records(adapters, quantize):
    """The report's share of moved integers is the merge's, and the record says how to read the adapter."""
    for recipe, dither, learned_scales, mu in (
            ("integers", "noise", False, None), ("scales", "none", True, None), ("mean", "noise", False, "mean"),
            ("full", "fraction", True, "mean"), ("learned", "noise", True, "learned")):
        folder = adapters(recipe)
        config = LotaConfig.load(folder)
        assert (config.method, config.dither, config.omega) == ("LR-QAT", dither, None)
        assert config.learned_offset == (mu == "learned") and config.residual == (mu is not None)
        assert config.learned_scales == learned_scales and config.rule.has_offset == (mu == "mean")
        assert config.settings["recipe"] == (recipe if recipe != "learned" else "full")
        assert config.settings["lr_scheduler_type"] == "linear"
        rows = [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
        assert rows[-1]["moved"] == config.training["moved"]["all"] > 0
        assert rows[0]["learning_rate"] > rows[-1]["learning_rate"] and "sigma" not in rows[0]
        assert (rows[-1]["scales"] > 0) == learned_scales and (rows[-1]["mu"] > 0) == config.residual
        report = (folder / "report.md").read_text()
        assert "in grid steps" in report and "omega" not in report and (folder / "report.png").exists()
        assert "_LR-QAT_0.02_8_16_viggo_" in folder.name
        assert "LR-QAT (after https://arxiv.org/abs/2406.06385)" in (folder / "README.md").read_text()
        assert check.check_folder(folder).findings == []


def test_the_finished_adapter_has_integers_and_a_checkpoint_has_floats(adapters, quantize, tmp_path):
    """int8 and an exponent stand for the same fixed-point numbers as the last checkpoint's float32 weights."""
    finished, checkpoint = adapters("integers"), adapters("integers") / "checkpoint-8"
    ints, floats = (load_file(folder / "adapter_model.safetensors") for folder in (finished, checkpoint))
    weights = [name for name in ints if name.endswith("weight")]
    assert sorted(ints) == sorted(floats) == sorted(weights + [w.replace("weight", "exponent") for w in weights])
    for name in weights:
        integers, exponent = fixed_point(floats[name])
        assert ints[name].dtype == torch.int8 and torch.equal(ints[name], integers.to(torch.int8))
        for tensors in (ints, floats):
            assert tensors[name.replace("weight", "exponent")].tolist() == [[int(exponent)]]
        assert floats[name].dtype == torch.float32
    assert any((floats[name] != floats[name].mul(64).round() / 64).any() for name in weights)
    for folder in (finished, checkpoint):
        merge(folder, quantize(4), tmp_path / folder.name)
    one, other = (MergedFolder(tmp_path / folder.name) for folder in (finished, checkpoint))
    for module in one.modules:
        assert count_different(one.tensor(f"{module}.qweight"), other.tensor(f"{module}.qweight"), 4) == 0


def test_the_integers_of_the_merge_by_hand(adapters, quantize, tmp_path):
    """One layer in float64 from the file: round(2 A B / s + u), where no value is near a tie."""
    merge(adapters("integers"), quantize(4), tmp_path / "merged")
    adapter, source, merged = AdapterFolder(adapters("integers")), GPTQFolder(quantize(4)), MergedFolder(
        tmp_path / "merged")
    adapter.check_match(source)
    name = "model.layers.1.mlp.down_proj"
    tensors = load_file(adapter.path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{name}.{m}.weight"].double() * 2.0**int(
        tensors[f"base_model.model.{name}.{m}.exponent"]) for m in ("lora_A", "lora_B"))
    before = source.packed(name)
    rule = adapter.rule(name)
    assert rule.scaling == 2 and rule.seed == layer_seed(name)
    u = dither_value(rule.with_dither(before).dither).double()
    value = 2 * (B @ A).t() / before.scales.double()[before.groups.g_idx] + u
    sure = ((value % 1) - 0.5).abs() > 1e-4
    want = (before.weight_int.double() + value.round()).clamp(0, 15)
    assert sure.double().mean() > 0.99 and torch.equal(merged.packed(name).weight_int.double()[sure], want[sure])


def test_the_fraction_is_what_gptq_rounded_away(adapters, quantize, base_model):
    """u is W / s + z - W_int of the 16-bit model, where that lies in (-1/2, 1/2)."""
    adapter, source = AdapterFolder(adapters("full")), GPTQFolder(quantize(4))
    adapter.check_match(source)
    original = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    for name in source.modules:
        packed, g_idx = source.packed(name), source.packed(name).groups.g_idx
        weight = original.get_submodule(name).weight.detach().t()
        fraction = weight / packed.scales.float()[g_idx] + packed.zeros.float()[g_idx] - packed.weight_int.float()
        u = dither_value(adapter.rule(name).dither)
        inside = fraction.abs() < 0.49
        # load_16bit() takes bfloat16, so a weight of 16 steps is known to 1/32 step
        assert inside.float().mean() > 0.5 and (u - fraction)[inside].abs().max() < 0.05
        assert torch.equal(u[fraction > 0.55], torch.full_like(u[fraction > 0.55], 127.5 / 256))


def test_a_merged_model_without_mu_is_plain_gptq_and_exports(adapters, quantize, tmp_path):
    """Stock GPTQModel loads it, and every format that needs no offset is written and verified."""
    merge(adapters("scales"), quantize(4), tmp_path / "merged")
    assert not (tmp_path / "merged" / "lota" / "offsets.safetensors").exists()
    load_gptq(tmp_path / "merged", dtype=torch.float32)
    for form in ("gptq", "gguf", "dense"):
        export.export(MergedFolder(tmp_path / "merged"), form, tmp_path / form, gptq=str(quantize(4)), verify=True)


def test_mode_2_scores_both_ways_alike(adapters, evaluate, tmp_path):
    live = evaluate(tmp_path, "--load_adapter", adapters("full"), "--merge", False, "--limit", 8)
    merged = evaluate(tmp_path, "--load_adapter", adapters("full"), "--limit", 8)
    assert live["predictions"] == merged["predictions"] and merged["adapter"]["method"] == "LR-QAT"


def damaged(adapters, tmp_path, change):
    """A copy of an adapter whose tensors went through `change`, without checksums."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name in ("adapter_config.json", LOTA_CONFIG):
        (folder / name).write_bytes((adapters("integers") / name).read_bytes())
    tensors = load_file(adapters("integers") / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = json.loads((folder / LOTA_CONFIG).read_text())
    for name in ("sha256", "fingerprint_all"):
        content.pop(name)
    (folder / LOTA_CONFIG).write_text(json.dumps(content))
    return folder


def test_half_an_adapter_is_refused(adapters, tmp_path):
    """An exponent that is missing would scale a layer by a power of two without a word."""
    folder = damaged(adapters, tmp_path, lambda tensors: tensors.pop(next(n for n in tensors if "B.exponent" in n)))
    with pytest.raises(UserError, match="lora_B.exponent is missing"):
        AdapterFolder(folder)
    (folder / LOTA_CONFIG).unlink()
    with pytest.raises(UserError):
        AdapterFolder(folder)


@pytest.mark.parametrize("flags, message", [
    (("--recipe", "ternary"), "--recipe ternary is none of --method lrqat's: integers, scales, mean, full"),
    (("--recipe", "published"), "--recipe published is none of --method lrqat's"),
    (("--residual", True), "--offset_scale omega is a mu of --method lota"),
    (("--offset_scale", "learned"), "trains the offset that --residual False leaves out"),
    (("--lora_dropout", 0.1), "--lora_dropout must be 0 with LR-QAT"),
    (("--lora_r", 1100), "rank 1100 is too large"),
    (("--lora_alpha", 0), "--lora_alpha must be positive"),
    (("--dither", "fraction", "--pretrained", "none"), "name the 16-bit model with --pretrained"),
    (("--optimizer_type", "int_sign_sgd"), "int_sign_sgd trains ternary adapters only")])
def test_refusals(train, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, *LRQAT, *flags)
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_the_other_method_is_refused():
    base, training, _ = parse("--mode", 1, "--method", "lota", "--recipe", "integers")
    with pytest.raises(UserError, match="--recipe integers is none of --method lota's: published"):
        LoTA_QAF_main.train(base, training)


def test_defaults_go_by_the_method():
    """A flag that is given wins over the method's and the recipe's defaults."""
    _, training, _ = parse("--method", "lrqat")
    assert (training.learning_rate, training.lr_scheduler_type, training.max_grad_norm) == (1e-3, "linear", 0.3)
    base, training, _ = parse("--method", "lrqat", "--recipe", "full", "--learning_rate", 5, "--residual", False)
    assert training.learning_rate == 5 and base.learned_scales and not base.residual
    _, training, _ = parse("--method", "lora")
    assert (training.learning_rate, training.lr_scheduler_type, training.max_grad_norm) == (1e-5, "constant", 0.3)


def test_another_16_bit_model_gives_no_fraction(train, quantize, tmp_path):
    """A model of other layers is refused before a step is made."""
    config = json.loads((quantize(4) / "config.json").read_text())
    small = LlamaForCausalLM(LlamaConfig(**{**config, "intermediate_size": 96, "quantization_config": None}))
    small.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="--dither fraction: the 16-bit model has no model.layers.0.mlp"):
        train(tmp_path / "run", *LRQAT, "--dither", "fraction", "--quantized_model_dir", quantize(4), "--pretrained",
              tmp_path / "other")


def test_the_script_says_what_moved(adapters, quantize, tmp_path, capsys):
    """python -m LoTA.lota_merge needs no flag but the folders."""
    run_main(lota_merge, "--adapter", adapters("integers"), "--output", tmp_path / "merged")
    said = capsys.readouterr().out
    assert "share of integer weights moved by the merge" in said and "merged and verified" in said


def test_the_report_measures_dw_in_grid_steps(adapters, quantize):
    """The quantiles of |dW| / s are those of the sampled rows, in float64, cut to sixteenths of a step."""
    model = load_live(AdapterFolder(adapters("integers")), quantize(4), dtype=torch.float32)
    monitor = Monitor(model, None, None, 10)
    row, values = monitor.detailed_metrics(), []
    for layer in monitor.layers.values():
        A, B = (matrix.detach().double() for matrix in layer.adapter_pair())
        packed, rows = layer.base_packed(), slice(None, None, max(1, len(A) // SAMPLE_ROWS))
        values.append((2 * A[rows] @ B / packed.scales.double()[packed.groups.g_idx[rows]]).abs().flatten())
    values = torch.cat(values).sort().values
    for name, level in (("dW_median", 0.5), ("dW_99", 0.99), ("dW_max", 1.0)):
        assert row[name] == math.floor(16 * values[math.floor(level * (len(values) - 1))] + 1e-5) / 16
    assert sum(monitor.histogram) == len(values) and row["dW_max"] > 0.25


def test_a_gradient_that_is_not_finite_ends_the_run(train, quantize, tmp_path, monkeypatch):
    """AdamW would make A and B nan, and their integers 0, so that the merged model were the quantized one."""
    plain = GridLinear.backward

    def broken(ctx, grad_output):
        grad_x, grad_A, *others = plain(ctx, grad_output)
        grad_A[0, 0] = torch.nan
        return grad_x, grad_A, *others
    monkeypatch.setattr(GridLinear, "backward", staticmethod(broken))
    with pytest.raises(FloatingPointError, match="the gradient of .*lora_A.* is not finite; lower --learning_rate"):
        train(tmp_path, *LRQAT, "--quantized_model_dir", quantize(4))
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_not_finite_is_not_written(adapters, quantize):
    model = load_live(AdapterFolder(adapters("integers")), quantize(4), dtype=torch.float32)
    layer = next(m for m in model.modules() if isinstance(m, CustomLoraLinear))
    layer.lora_B["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="lora_B.default.weight is not finite"):
        adapter_state(model, finished=True)


def test_a_second_adapter_of_another_scaling_is_refused(adapters, quantize):
    """The rule belongs to the layer, so its live steps would be those of the first adapter's alpha / r."""
    model = load_live(AdapterFolder(adapters("integers")), quantize(4), dtype=torch.float32)
    layer = next(m for m in model.modules() if isinstance(m, CustomLoraLinear))
    layer.update_layer("same", 4, 8, LoraConfig(r=4))
    with pytest.raises(UserError, match="alpha / r = 1 cannot stand beside one with 2"):
        layer.update_layer("other", 8, 8, LoraConfig(r=8))
