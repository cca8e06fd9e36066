"""The PEFT layer and LTA on real GPTQModel models: against GPTQModel's own weights, the oracle, and each other."""
import copy
import json

import oracle
import pytest
import torch
from conftest import merge, run_main
from peft import LoraConfig, PeftModel, get_peft_model
from random_model import SHAPES, write_gptq_llama
from safetensors.torch import load_file

from LoTA import SUPPORTED_BITS, UserError
from LoTA.adapter import LTA, load_gptq, load_live
from LoTA.adapter_folder import PREFIX, AdapterFolder, LotaConfig
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.layer import CustomLoraLinear, adapter_state, register
from LoTA.lota_merge import merge_folders
from LoTA.packed import Groups
from LoTA.steps import Rounding, Threshold

RANK, OMEGA = 8, 2.0
MODELS = [(2,), (3, "--desc_act"), (4, "--sym"), (8,)]


@pytest.fixture(params=MODELS, ids=lambda p: "-".join(map(str, p)))
def gptq(request, quantize):
    """A GPTQ model of every number of bits. One has shuffled groups, one a symmetric grid."""
    return quantize(*request.param)


def load(folder):
    return load_gptq(folder, torch.float32, backend="gptq_torch").model


def with_adapter(folder, residual=True, randomize=True, **lora):
    """A live PEFT model on `folder` whose adapters hold random ternary entries."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj", "down_proj"], **lora)
    model = get_peft_model(load(folder), register(config, Threshold(OMEGA, OMEGA if residual else None)))
    if randomize:
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data.copy_(torch.randint(-1, 2, p.shape))
    return model.eval()


def save(model, folder, gptq, residual=True, state_dict=None):
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state_dict)
    source = GPTQFolder(gptq)
    LotaConfig(omega=OMEGA, residual=residual, bits=source.bits, group_size=source.group_size, rank=RANK,
               quantized_model_dir=str(gptq), fingerprint=source.fingerprint()).save(folder)
    return folder


def layers(model):
    return {name.removeprefix(PREFIX): m for name, m in model.named_modules() if isinstance(m, CustomLoraLinear)}


def logits(model):
    torch.manual_seed(1)
    ids = torch.randint(5, 300, (3, 17))
    with torch.inference_mode():
        return model(input_ids=ids).logits


def test_our_unpacking_is_gptqmodels(gptq):
    """s (W_int - z) of every layer, from disk and from the live module, equals GPTQModel's dequantization."""
    model, folder = load(gptq), GPTQFolder(gptq)
    for name in folder.modules:
        want = model.get_submodule(name).dequantize_weight().float()
        torch.testing.assert_close(folder.weight(name), want, rtol=1e-6, atol=0)


def test_the_first_forward_is_the_quantized_model(gptq):
    """B starts at zero, so the logits are the quantized model's, but for the rounding of sums in another order."""
    plain, fresh = load(gptq), with_adapter(gptq, randomize=False)
    assert all((m.lora_B["default"].weight == 0).all() for m in layers(fresh).values())
    A = next(iter(layers(fresh).values())).lora_A["default"].weight
    assert set(A.unique().tolist()) == {-1.0, 0.0, 1.0} and 0.3 < A.abs().mean() < 0.8
    torch.testing.assert_close(logits(fresh), logits(plain), rtol=1e-5, atol=1e-5)


def test_rows_of_A_begin_equal_in_a_group_where_the_mean_goes_into_mu(gptq):
    """Else they are random, each by itself. Both kinds are uniform up to 1 / sqrt(in)."""
    for mean in (True, False):
        torch.manual_seed(0)
        config = LoraConfig(r=RANK, target_modules=["q_proj", "down_proj"])
        for layer in layers(get_peft_model(load(gptq), register(config, Rounding(1.0, mean=mean)))).values():
            (A, B), g_idx = layer.adapter_pair(), layer.groups().g_idx
            groups = [A[g_idx == group].unique(dim=0) for group in range(layer.groups().count)]
            assert [len(rows) for rows in groups] == ([1] * len(groups) if mean else layer.groups().sizes.tolist())
            assert len(A.unique(dim=0)) == (len(groups) if mean else len(A)) and not B.any()
            bound = layer.in_features**-0.5
            assert 0.8 * bound < A.abs().max() <= bound and abs(A.mean()) < 0.2 * bound


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_a_folder_in_the_format_gptq_v2(tmp_path, bits):
    """The live layers take its zero points as they are, because GPTQModel does."""
    folder = write_gptq_llama(tmp_path / "gptq", SHAPES["tiny"], bits, 32)
    assert GPTQFolder(folder).checkpoint_format == "gptq_v2"
    torch.testing.assert_close(logits(with_adapter(folder, randomize=False)), logits(load(folder)), rtol=1e-5,
                               atol=1e-5)


def test_layer_against_the_oracle(gptq):
    """Output and gradients of a layer inside PEFT, from the integers that are on disk."""
    model, folder = with_adapter(gptq), GPTQFolder(gptq)
    for name, layer in layers(model).items():
        bits, qweight, g_idx = folder.bits, folder.tensor(f"{name}.qweight"), folder.tensor(f"{name}.g_idx")
        weight_int = oracle.unpack_columns(qweight, bits, len(g_idx))
        zeros = layer.packed().zeros                # checked by test_our_unpacking_is_gptqmodels
        x, grad = torch.randn(2, 5, len(g_idx), requires_grad=True), torch.randn(2, 5, qweight.shape[1])
        y = layer(x)
        y.backward(grad)
        want = oracle.forward_and_gradients(
            x.flatten(0, 1), grad.flatten(0, 1), layer.lora_A["default"].weight.t(), layer.lora_B["default"].weight.t(),
            weight_int, folder.tensor(f"{name}.scales"), zeros, g_idx, bits, OMEGA, OMEGA)
        got = (y.flatten(0, 1), x.grad.flatten(0, 1), layer.lora_A["default"].weight.grad.t(),
               layer.lora_B["default"].weight.grad.t())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
        with torch.no_grad():
            torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)       # as evaluation computes it


def test_evaluation_sees_a_changed_adapter(quantize):
    """The weight that is kept for evaluation is made anew when the adapter changes."""
    layer = next(iter(layers(with_adapter(quantize(2))).values()))
    x = torch.randn(4, layer.in_features)
    with torch.no_grad():
        before = layer(x)
        layer.lora_B["default"].weight.zero_()
        after = layer(x)
        want = layer.get_base_layer()(x)
    torch.testing.assert_close(after, want, rtol=1e-5, atol=1e-5)
    assert (before - after).abs().max() > 1e-2


@pytest.mark.parametrize("flags, residual", [*((flags, True) for flags in MODELS), (MODELS[1], False)],
                         ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else str(value))
def test_live_equals_merged(quantize, tmp_path, flags, residual):
    """The merged integers are the live layers', packed so that GPTQModel reads them. Logits are equal bit for bit.

    The merge verifies itself too.
    """
    gptq = quantize(*flags)
    model = with_adapter(gptq, residual)
    adapter = save(model, tmp_path / "adapter", gptq, residual)
    moved = merge(adapter, gptq, tmp_path / "merged")
    assert 0 < moved["all"] < 1
    merged = LTA(path=str(tmp_path / "merged")).load(dtype=torch.float32).model
    want, got = logits(model), logits(merged)
    assert (want - logits(load(gptq))).abs().max() > 0.01                   # the adapter does something
    assert torch.equal(got, want)
    for dtype in (torch.bfloat16, torch.float16):
        live = load_live(AdapterFolder(adapter), gptq, dtype=dtype)
        assert torch.equal(logits(LTA(path=str(tmp_path / "merged")).load(dtype=dtype).model), logits(live))
    folder = MergedFolder(tmp_path / "merged")
    for name, layer in layers(model).items():
        packed = folder.packed(name)
        module = merged.get_submodule(name)
        plain = module.dequantize_weight() / packed.scales.float()[packed.groups.g_idx] + packed.zeros[
            packed.groups.g_idx]
        assert torch.equal(plain.round().to(torch.uint8), packed.weight_int)
        assert (module.adapter is not None) == residual
        moved, mu = layer.count_steps()
        assert moved == (packed.weight_int != GPTQFolder(gptq).packed(name).weight_int).sum() > 0
        assert (mu is None) == (not residual) and (mu is None or torch.equal(mu, folder.offset(name)))
        weight, scaled = layer.evaluated(torch.float32)
        assert torch.equal(weight, module.dequantize_weight())
        assert not residual or torch.equal(scaled, folder.offset(name) * packed.scales.float())


def test_int8_matrices_are_read_as_the_float_ones(quantize, tmp_path):
    """A and B as int8: the same logits live and merged, and floats in memory. A plain PEFT LoRA reads them too."""
    gptq = quantize(2)
    model = with_adapter(gptq)
    floats = save(model, tmp_path / "floats", gptq)
    bytes_ = save(model, tmp_path / "bytes", gptq, state_dict=adapter_state(model))
    tensors, wide = (load_file(folder / "adapter_model.safetensors") for folder in (bytes_, floats))
    assert {t.dtype for t in tensors.values()} == {torch.int8} and {t.dtype for t in wide.values()} == {torch.float32}
    assert all(torch.equal(tensors[name].float(), wide[name]) for name in wide) and tensors.keys() == wide.keys()
    live = load_live(AdapterFolder(bytes_), gptq, dtype=torch.float32)
    assert {p.dtype for name, p in live.named_parameters() if "lora_" in name} == {torch.float32}
    assert torch.equal(logits(live), logits(model))
    files = []
    for folder in (bytes_, floats):
        merge(folder, gptq, tmp_path / f"merged_{folder.name}")
        files.append([f.read_bytes() for f in sorted((tmp_path / f"merged_{folder.name}").rglob("*.safetensors"))])
    assert files[0] == files[1]
    plain = PeftModel.from_pretrained(load(gptq), bytes_)
    for name, p in plain.named_parameters():
        if "lora_" in name:
            assert p.dtype == torch.float32 and torch.equal(p, wide[name.replace(".default", "")])


def test_lta_on_an_adapter_is_the_merged_folder(quantize, tmp_path):
    """LTA's path may be the adapter itself, which names its base. The logits are equal bit for bit."""
    gptq = quantize(2)
    adapter = save(with_adapter(gptq), tmp_path / "adapter", gptq)
    merge(adapter, gptq, tmp_path / "merged")
    one = LTA(path=str(tmp_path / "merged")).load(dtype=torch.float32).model
    two = LTA(rank=RANK, threshold=OMEGA, residual=True, path=str(adapter)).load(dtype=torch.float32).model
    assert torch.equal(logits(one), logits(two))
    with pytest.raises(UserError, match="rank"):
        LTA(rank=RANK + 1, path=str(adapter)).load()
    with pytest.raises(UserError, match="threshold"):
        LTA(threshold=3.0, path=str(tmp_path / "merged")).load()


@pytest.mark.parametrize("backend", ["auto", "gptq_torch_aten"])
def test_merged_on_gptqmodels_kernels_in_16_bit(quantize, tmp_path, backend):
    """4 bits in bfloat16, on the plain kernel and on one that repacks the integers for torch's int4 operator."""
    gptq = quantize(4, "--sym")
    model = with_adapter(gptq)
    merge(save(model, tmp_path / "adapter", gptq), gptq, tmp_path / "merged")
    merged = LTA(path=str(tmp_path / "merged")).load(dtype=torch.bfloat16, backend=backend).model
    want = logits(model)
    tolerance = 0.03 * want.abs().max()
    assert (logits(load(gptq)) - want).abs().max() > 2 * tolerance              # without the adapter it would not pass
    assert (logits(merged).float() - want).abs().max() < tolerance


def test_a_merged_folder_with_offsets_is_refused_by_stock_tools(quantize, tmp_path):
    """transformers and GPTQModel both raise, because they would leave the offset out."""
    from gptqmodel import GPTQModel
    from transformers import AutoModelForCausalLM
    gptq = quantize(2)
    merge(save(with_adapter(gptq), tmp_path / "adapter", gptq), gptq, tmp_path / "merged")
    with pytest.raises(ValueError, match="lota_gptq"):
        GPTQModel.load(str(tmp_path / "merged"), device="cpu")
    with pytest.raises(ValueError, match="lota_gptq"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")


def test_a_merged_folder_without_offsets_is_opened_by_stock_tools(quantize, tmp_path):
    """transformers and GPTQModel read it as any GPTQ model and compute what the live model computes."""
    from transformers import AutoModelForCausalLM, GPTQConfig
    gptq = quantize(2)
    model = with_adapter(gptq, residual=False)
    merge(save(model, tmp_path / "adapter", gptq, False), gptq, tmp_path / "merged")
    want = logits(model)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), want, rtol=1e-4, atol=2e-4)
    # The plain kernel, because GPTQModel's choice on a CPU would be compiled first, for minutes.
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu", dtype=torch.float16,
                                                 quantization_config=GPTQConfig(bits=2, backend="gptq_torch"))
    assert (logits(stock).float() - want).abs().max() < 0.01 * want.abs().max()        # float16's rounding


def test_an_adapter_survives_saving_and_loading(quantize, tmp_path):
    """PEFT reads it with a registered config. load_live() does the same."""
    gptq = quantize(2)
    model = with_adapter(gptq)
    adapter = save(model, tmp_path / "adapter", gptq)
    config = register(LoraConfig.from_pretrained(adapter), Threshold(OMEGA, OMEGA))
    again = PeftModel.from_pretrained(load(gptq), adapter, config=config).eval()
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load_live(AdapterFolder(adapter), gptq, dtype=torch.float32)), logits(model))


@pytest.mark.parametrize("shape, order", [((5, 70), "ordered"), ((2, 3, 70), "shuffled"), ((1, 70), "uneven")])
def test_apply_adds_group_sums_times_offset(shape, order):
    """The result is x @ (s mu)[g_idx], by the dense matrix. The last group is short."""
    torch.manual_seed(0)
    g_idx = torch.arange(70) // 32
    if order == "uneven":
        g_idx = torch.tensor([0] * 5 + [1] * 40 + [2] * 25)
    if order != "ordered":
        g_idx = g_idx[torch.randperm(70)]
    mu, scales, x, out = torch.randn(3, 12), torch.rand(3, 12), torch.randn(shape), torch.randn(*shape[:-1], 12)
    layer = LTA()
    layer.set_offset(mu, scales, g_idx)
    want = out.double() + x.double() @ (scales * mu).double()[g_idx]
    got = copy.deepcopy(layer).apply(x=x, out=out.clone())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_settings_out_of_range_are_refused(quantize):
    """omega outside (0, r), a rank beyond exact sums, variants of LoRA that cannot be merged."""
    model = load(quantize(2))
    for omega in (0.0, 8.0):
        with pytest.raises(ValueError, match="must lie in"):
            get_peft_model(copy.deepcopy(model), register(LoraConfig(r=8, target_modules=["q_proj"]),
                                                          Threshold(omega, 1.0)))
    with pytest.raises(ValueError, match="too large"):
        get_peft_model(copy.deepcopy(model), register(LoraConfig(r=2**20, target_modules=["q_proj"]),
                                                      Threshold(4.0, 1.0)))
    with pytest.raises(UserError, match="lora_dropout"):
        get_peft_model(copy.deepcopy(model), register(LoraConfig(r=8, target_modules=["q_proj"], lora_dropout=0.1),
                                                      Threshold(4.0, 1.0)))


def test_groups_refuse_an_index_that_does_not_fit():
    with pytest.raises(ValueError, match="g_idx"):
        Groups(torch.tensor([0, 0, 2, 2]), 3)


def test_quantize_names_and_marks_its_folder(quantize, base_model, tmp_path):
    """Bits and group size can be read off the folder's name. A folder that is not ours is not replaced."""
    import gptq_quantize
    folder = quantize(3, "--desc_act")
    assert folder.name == f"int3_32_{base_model.name}"
    read = GPTQFolder(folder)
    assert (read.bits, read.group_size, read.config["desc_act"], read.config["sym"]) == (3, 32, True, False)
    g_idx = read.tensor("model.layers.0.self_attn.q_proj.g_idx")
    assert not torch.equal(g_idx, g_idx.sort().values)                       # desc_act really shuffled the rows
    record = json.loads((folder / gptq_quantize.PROVENANCE).read_text())
    assert (record["samples"], record["short_samples_left_out"]) == (8, 0)
    theirs = tmp_path / folder.name
    theirs.mkdir()
    (theirs / "notes").write_text("mine")
    with pytest.raises(UserError, match="not made by this project"):
        run_main(gptq_quantize, "--model", base_model, "--bits", 3, "--group_size", 32, "--output_dir", tmp_path)


def test_one_group_for_all_rows(quantize, train, tmp_path):
    """--group_size -1 quantizes, trains and merges. A layer has one scale for an output, and its rows are in order."""
    gptq = GPTQFolder(quantize(4, "--group_size", -1))
    assert gptq.group_size == -1
    assert {gptq.shape(f"{module}.scales")[0] for module in gptq.modules} == {1}
    assert not any(gptq.tensor(f"{module}.g_idx").any() for module in gptq.modules)
    adapter = AdapterFolder(train(tmp_path / "adapters", "--quantized_model_dir", gptq.path))
    merge_folders(adapter, gptq, tmp_path / "merged")
    module, merged = gptq.modules[0], MergedFolder(tmp_path / "merged")
    delta_w = torch.matmul(*(matrix.double() for matrix in adapter.pair(module)))
    ternary = torch.where(delta_w.abs() > adapter.config.omega, delta_w.sign(), 0)
    mean = (delta_w - adapter.config.omega * ternary).mean(0, keepdim=True) / adapter.config.omega       # kappa = omega
    assert (merged.offset(module) - mean).abs().max() < 1e-6 and mean.abs().max() > 0
