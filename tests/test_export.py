"""LoTA.export: each format opened by the engines it is for, and compared with the merged model by the oracle."""
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import oracle
import pytest
import torch
from conftest import LAYERS, ROOT, merge
from gptqmodel import GPTQModel
from gptqmodel.adapter.adapter import Lora
from gptqmodel.utils.backend import BACKEND
from peft import PeftModel
from random_gptq import write_gptq, write_lota_adapter
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTQConfig

from LoTA import UserError
from LoTA.adapter import LTA, load_gptq, load_live
from LoTA.adapter_folder import AdapterFolder, LotaConfig
from LoTA.check import check_folder
from LoTA.export import FORMATS, gguf
from LoTA.export.dense import check_logits, dense_tensors
from LoTA.export.run import export
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.storage import SAFETENSORS_NAMES, create_safetensors, overwrite_tensor, sha256

RANK = 8


@pytest.fixture(scope="module")
def merged(quantize, tmp_path_factory):
    """A function (bits, residual) -> a merged folder of the tiny model with a random adapter. Each is made once."""
    @cache
    def merged(bits, residual=True):
        folder, gptq = tmp_path_factory.mktemp("merged"), quantize(bits)
        adapter = write_lota_adapter(folder / "adapter", gptq, rank=RANK, omega=4.0, residual=residual, seed=bits,
                                     pretrained="some/base", data_set="viggo")
        merge(adapter, gptq, folder / "merged")
        return folder / "merged"
    return merged


def ids(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["inform(name[Portal 2], rating[good])", "Which game is it?"]
    return [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]


@torch.no_grad()
def logits(model, inputs):
    return torch.cat([model(input_ids=i).logits.float() for i in inputs], 1)


@cache
def live_logits(folder):
    """Logits of the merged folder, opened by LTA in float32."""
    return logits(LTA(path=str(folder)).load(dtype=torch.float32).model, ids(folder))


def oracle_weight(model, module):
    """s * (W_int - z + mu) in float64, unpacked by the oracle; [in, out]."""
    g_idx, scales = model.tensor(f"{module}.g_idx").long(), model.tensor(f"{module}.scales").double()
    integers = oracle.unpack_columns(model.tensor(f"{module}.qweight"), model.bits, len(g_idx))
    zeros = oracle.unpack_columns(model.tensor(f"{module}.qzeros").t().contiguous(), model.bits, scales.shape[1]).t()
    if model.checkpoint_format == "gptq":
        zeros = (zeros + 1) % 2**model.bits
    offset = model.offset(module)
    mu = torch.zeros_like(scales) if offset is None else offset.double()
    return scales[g_idx] * (integers - zeros[g_idx] + mu[g_idx])


# --- gptq ---------------------------------------------------------------------------------------------------------

def test_gptq_is_a_plain_checkpoint(merged, tmp_path):
    """Without offsets no file of ours is needed. transformers and two of GPTQModel's kernels give the same logits."""
    folder, out = merged(4, residual=False), tmp_path / "out"
    export(folder, "gptq", out, verify=True)
    assert not (out / "lota").exists()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq"
    inputs, want = ids(out), live_logits(folder)
    for kernel in (BACKEND.GPTQ_TORCH, BACKEND.GPTQ_TORCH_ATEN):
        model = GPTQModel.load(str(out), backend=kernel, device="cpu", dtype=torch.bfloat16).model
        torch.testing.assert_close(logits(model, inputs), want, rtol=0.1, atol=0.1)
    plain = load_gptq(out, dtype=torch.float32).model
    torch.testing.assert_close(logits(plain, inputs), want, rtol=1e-4, atol=2e-4)
    # The plain kernel, because GPTQModel's choice on a CPU would be compiled first, for minutes.
    model = AutoModelForCausalLM.from_pretrained(out, device_map="cpu", dtype=torch.bfloat16,
                                                 quantization_config=GPTQConfig(bits=4, backend="gptq_torch"))
    torch.testing.assert_close(logits(model, inputs), want, rtol=0.1, atol=0.1)


def test_offsets_do_not_fit_gptq(merged, tmp_path):
    with pytest.raises(UserError, match="peft, gguf or dense"):
        export(merged(4), "gptq", tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- peft ---------------------------------------------------------------------------------------------------------

def test_peft_adds_the_offset(merged, tmp_path):
    """PEFT on the plain GPTQ model, and GPTQModel's Lora, give the merged logits. The plain model alone does not."""
    folder, out = merged(4), tmp_path / "out"
    export(folder, "peft", out, verify=True)
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    model = MergedFolder(folder)
    ranks = {m: model.shape(f"{m}.scales")[0] for m in model.modules}
    assert {m: config["rank_pattern"].get(m, config["r"]) for m in ranks} == ranks and config["rank_pattern"]
    inputs, want = ids(folder), live_logits(folder)
    plain = load_gptq(out, dtype=torch.float32).model
    assert (logits(plain, inputs) - want).abs().max() > 0.01
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, str(out / "adapter")), inputs), want,
                               rtol=1e-4, atol=2e-4)
    with_lora = GPTQModel.load(str(out), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16,
                               adapter=Lora(path=str(out / "adapter"), rank=config["r"])).model.float()
    torch.testing.assert_close(logits(with_lora, inputs), want, rtol=1e-4, atol=2e-4)


# --- dense --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dense_weights_are_the_oracles(merged, tmp_path, bits, monkeypatch):
    """transformers opens the shards without GPTQModel and gives the merged model's logits."""
    monkeypatch.setattr("LoTA.export.dense.SHARD_BYTES", 100_000)
    folder, out = merged(bits), tmp_path / "out"
    export(folder, "dense", out, torch.float32, verify=True)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 3 and "quantization_config" not in json.loads((out / "config.json").read_text())
    model = MergedFolder(folder)
    for module in model.modules:
        with safe_open(out / index[f"{module}.weight"], "pt") as tensors:
            weight = tensors.get_tensor(f"{module}.weight")
        torch.testing.assert_close(weight.double().t(), oracle_weight(model, module), rtol=1e-6, atol=1e-6)
    dense = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(logits(dense, ids(out)), live_logits(folder), rtol=1e-4, atol=2e-4)


def test_dense_takes_the_models_dtype(merged, tmp_path):
    folder = merged(4)
    export(folder, "dense", tmp_path / "out", verify=True)
    own = json.loads((folder / "config.json").read_text())["dtype"]
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {str(t.dtype) for n, t in tensors.items() if "proj" in n} == {f"torch.{own}"}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == own


# --- gguf ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits, residual", [(2, True), (3, True), (4, True), (4, False)])
def test_gguf_in_transformers(merged, tmp_path, bits, residual):
    """transformers reads the oracle's weights out of the file, but for float16's rounding of the minimum.

    Its order of rows, its tokenizer and its logits are the merged model's.
    """
    folder, out = merged(bits, residual), tmp_path / "out"
    export(folder, "gguf", out, verify=True)
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file=gguf.GGUF_FILE, dtype=torch.float32)
    source = MergedFolder(folder)
    for module in source.modules:
        scales, g_idx = source.tensor(f"{module}.scales").double(), source.tensor(f"{module}.g_idx").long()
        weight, want = model.get_submodule(module).weight.double().t(), oracle_weight(source, module)
        bound = 2.0**-11 * scales[g_idx] * 2 * (2**bits + RANK) + 1e-6
        assert ((weight - want).abs() <= bound).all()
    torch.testing.assert_close(logits(model, ids(folder)), live_logits(folder), rtol=2e-2, atol=2e-2)
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=gguf.GGUF_FILE)
    text = "inform(name[Portal 2], rating[good])"
    assert tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


@pytest.mark.parametrize("heads, rows", [(2, 16), (1, 8), (4, 64)])
def test_the_order_of_rotary_rows(heads, rows):
    """Row j of a head's first half and row j of its second become neighbours. The inverse brings them back."""
    before = torch.arange(rows)
    after = gguf.permute(before, heads)
    half = rows // heads // 2
    want = [head * 2 * half + j + part * half for head in range(heads) for j in range(half) for part in (0, 1)]
    assert after.tolist() == want
    assert torch.equal(gguf.permute(after, heads, inverse=True), before)


def test_rope_factors_are_transformers():
    """Llama 3.1's divisors, against the frequencies that transformers computes from the same config."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2).double() / 128)
    torch.testing.assert_close(torch.from_numpy(gguf.rope_factors(config)).double(), plain / scaled.double(),
                               rtol=1e-5, atol=0)
    assert gguf.rope_factors(LlamaConfig()) is None


@pytest.mark.skipif(not find_spec("llama_cpp"), reason="needs llama-cpp-python: runs/deploy.sh installs it")
def test_gguf_in_llama_cpp(merged, tmp_path):
    """llama.cpp reads the file: the same tokens, and logits within its 8-bit rounding of the activations."""
    from llama_cpp import Llama
    folder, out = merged(4), tmp_path / "out"
    export(folder, "gguf", out)
    model = Llama(str(out / gguf.GGUF_FILE), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    text = "inform(name[Portal 2], rating[good])"
    tokens = model.tokenize(text.encode(), add_bos=False, special=True)
    assert tokens == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    model.eval(tokens)
    got = torch.tensor(model.scores[:len(tokens)])
    want = logits(LTA(path=str(folder)).load(dtype=torch.float32).model, [torch.tensor([tokens])])[0]
    assert (got - want).abs().max() < 0.05 * want.abs().max()


LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def random_model(folder, config, layers, **settings):
    """A random GPTQ model of an architecture, whole, with a LoTA adapter, as (folder, adapter).

    layers: {name: (in, out)} as GPTQModel keeps them, from the shapes of transformers' state_dict.
    """
    torch.manual_seed(0)
    tensors = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    layers = layers({name: tuple(t.shape) for name, t in tensors.items()})
    taken = {name.replace(part, "gate_up_proj") for name in layers for part in ("gate_proj", "up_proj")}
    # Numbers that float16 holds, because load_gptq() takes float32 models through it.
    others = {name: (t + 0.1 * torch.randn_like(t)).half().float() for name, t in tensors.items()
              if name.removesuffix(".weight") not in taken | set(layers) and name != "lm_head.weight"
              or name == "lm_head.weight" and not config.tie_word_embeddings}
    gptq = write_gptq(folder / "gptq", layers, checkpoint_format="gptq_v2", zeros=(6, 8), scales=(0.01, 0.03),
                      other_tensors=others, config={**config.to_dict(), "dtype": "float32"}, **settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):        # GPTQModel opens no model without a tokenizer
        shutil.copyfile(ROOT / "tests/fixtures/old/gptq" / name, gptq / name)
    return gptq, write_lota_adapter(folder / "adapter", gptq, rank=RANK, omega=4.0)


COMMON = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
          "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
SMALL = {"phi3": COMMON, "glm": {**COMMON, "head_dim": 32}, "llama": COMMON, "gpt2": {
    "vocab_size": 60, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}}


def layers_of(kind):
    """A function: the shapes of transformers' tensors -> {layer: (in, out)} as GPTQModel keeps them."""
    def layers(shapes):
        found = {}
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if module.endswith("gate_up_proj"):
                found |= {module.replace("gate_up", part): (shape[1], shape[0] // 2) for part in ("gate", "up")}
            elif len(shape) == 2 and (module.endswith("_proj") or ".h." in module):
                found[module] = shape if kind == "gpt2" else shape[::-1]
        return found
    return layers


@pytest.mark.parametrize("kind", ["phi3", "glm", "gpt2"])
def test_dense_is_in_transformers_layout(kind, tmp_path):
    """GPTQModel splits gate_up_proj, and turns GPT-2's Conv1D into linear layers. The weights are the oracle's.

    attn.c_proj of GPT-2 is square, so its shape says nothing about its layout.
    """
    gptq, adapter = random_model(tmp_path, AutoConfig.for_model(kind, **SMALL[kind]), layers_of(kind))
    merge(adapter, gptq, tmp_path / "merged")
    export(tmp_path / "merged", "dense", tmp_path / "out", verify=True)
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    source, seen = MergedFolder(tmp_path / "merged"), 0
    for name, layer in dense.named_modules():
        if name in source.modules:
            want = oracle_weight(source, name)
        elif name.endswith("gate_up_proj"):
            want = torch.cat([oracle_weight(source, name.replace("gate_up", part)) for part in ("gate", "up")], 1)
            seen += 1
        else:
            continue
        got = layer.weight.double()
        torch.testing.assert_close(got if kind == "gpt2" else got.t(), want, rtol=1e-6, atol=1e-6)
        seen += 1
    assert seen == len(source.modules)
    inputs = [torch.arange(5, 40)[None]]
    merged = LTA(path=str(tmp_path / "merged")).load(dtype=torch.float32).model
    torch.testing.assert_close(logits(dense, inputs), logits(merged, inputs), rtol=1e-4, atol=2e-4)


def test_a_layout_that_transformers_does_not_find_is_refused(tmp_path, monkeypatch):
    """As any layout that GPTQModel may come to keep: what transformers would fill at random is not exported.

    A right shape in a wrong order is found by the logits.
    """
    gptq, adapter = random_model(tmp_path, AutoConfig.for_model("gpt2", **SMALL["gpt2"]), layers_of("gpt2"))
    merge(adapter, gptq, tmp_path / "merged")
    export(tmp_path / "merged", "dense", tmp_path / "right", verify=True)
    file, name = tmp_path / "right/model.safetensors", "transformer.h.0.attn.c_proj.weight"
    overwrite_tensor(file, name, load_file(file)[name].t().contiguous())
    with pytest.raises(RuntimeError, match="the logits in transformers differ"):
        check_logits(MergedFolder(tmp_path / "merged"), tmp_path / "right", torch.float32)
    monkeypatch.setattr("LoTA.export.dense.transformers_layers", lambda model: {})
    with pytest.raises(UserError, match="would fill transformer.h.0.attn.c_attn.weight, .* at random"):
        export(tmp_path / "merged", "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not find_spec("llama_cpp"), reason="needs llama-cpp-python: runs/deploy.sh installs it")
@pytest.mark.parametrize("kind, extra", [("llama", {}), ("llama", {"rope_parameters": LLAMA3_ROPE}), ("mistral", {}),
                                         ("qwen2", {}), ("qwen3", {"head_dim": 32})])
def test_architectures_in_llama_cpp(kind, extra, base_model, tmp_path):
    """A random model of each architecture, with grouped queries.

    llama.cpp's logits on 100 tokens are those that transformers computes from the dense export, but for llama.cpp's
    8-bit rounding of the activations.
    """
    from llama_cpp import Llama
    from transformers import AutoConfig
    torch.manual_seed(0)
    vocabulary = len(AutoTokenizer.from_pretrained(base_model))
    config = AutoConfig.for_model(kind, **{
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": vocabulary, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "initializer_range": 0.3, **extra})
    tensors = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    layers = {name.removesuffix(".weight"): tuple(reversed(t.shape)) for name, t in tensors.items()
              if name.endswith("_proj.weight")}
    folder = write_gptq(tmp_path / "gptq", layers, checkpoint_format="gptq_v2", zeros=(6, 8), scales=(0.01, 0.03),
                        other_tensors={name: t + 0.3 * torch.randn_like(t) for name, t in tensors.items()
                                       if name.removesuffix(".weight") not in layers},
                        config={**config.to_dict(), "dtype": "float32"})
    shutil.copytree(base_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"),
                    dirs_exist_ok=True)
    adapter = write_lota_adapter(tmp_path / "adapter", folder, rank=RANK, omega=4.0)
    for format in ("dense", "gguf"):
        export(adapter, format, tmp_path / format, verify=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    tokens = torch.randint(5, vocabulary, (100,)).tolist()
    want = logits(dense, [torch.tensor([tokens])])[0]
    llama = Llama(str(tmp_path / "gguf" / gguf.GGUF_FILE), n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    llama.eval(tokens)
    got = torch.tensor(llama.scores[:len(tokens)])
    # Without the reordered rows, or with other rotary frequencies, single tokens fall below 0.1.
    cosine = torch.nn.functional.cosine_similarity(got, want)
    assert cosine.min() > 0.99 and cosine.mean() > 0.999


# --- what formats refuse ------------------------------------------------------------------------------------------

def tiny_merged(tmp_path, **settings):
    gptq = write_gptq(tmp_path / "gptq", LAYERS, **settings)
    merge(write_lota_adapter(tmp_path / "adapter", gptq), gptq, tmp_path / "merged")
    return tmp_path / "merged"


def test_gguf_refuses_8_bits(merged, tmp_path):
    with pytest.raises(UserError, match="up to 4 bits"):
        export(merged(8), "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_blocks_across_groups_are_refused(tmp_path):
    """GGUF's blocks cannot express desc_act, nor a group size that 32 does not divide. PEFT's indicator can."""
    for name, settings in (("desc_act", {"desc_act": True}), ("16", {"group_size": 16})):
        folder = tiny_merged(tmp_path / name, **settings)
        with pytest.raises(UserError, match="different groups"):
            gguf.check_blocks(MergedFolder(folder), next(iter(LAYERS)))
        export(folder, "peft", tmp_path / name / "out", verify=True)


def test_sharded_models(tmp_path):
    """A model in three shards with an index: the same dense weights and offsets as in one file."""
    for shards in (1, 3):
        folder = tmp_path / str(shards) / "merged"
        gptq, adapter = random_model(tmp_path / str(shards), AutoConfig.for_model("llama", **SMALL["llama"]),
                                     layers_of("llama"), shards=shards)
        merge(adapter, gptq, folder)
        for format in ("dense", "peft"):
            export(folder, format, tmp_path / f"{format}{shards}", verify=True)
    assert len(list((tmp_path / "peft3").glob("model-*-of-00003.safetensors"))) == 3
    for file in ("dense{}/model.safetensors", "peft{}/adapter/adapter_model.safetensors"):
        one, three = (load_file(tmp_path / file.format(shards)) for shards in (1, 3))
        assert set(one) == set(three) and all(torch.equal(one[k], three[k]) for k in one)


def test_other_architectures_and_tokenizers_are_refused(merged, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(merged(4), folder)
    LotaConfig(**{**vars(LotaConfig.load(folder / "lota")), "sha256": {}}).save(folder / "lota")    # it is changed here
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UserError, match="knows llama"):
        export(folder, "gguf", tmp_path / "out")
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": {
        "rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}))
    with pytest.raises(UserError, match="rotary"):
        export(folder, "gguf", tmp_path / "out")
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="byte-level"):
        export(folder, "gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2"])
def test_pre_tokenizers(name):
    """The three that llama.cpp names. Llama 3's and Qwen 2's cut numbers differently."""
    pattern = {v: k for k, v in gguf.PRE_TOKENIZERS.items()}[name]
    steps = [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": pattern is None}]
    if pattern:
        steps.insert(0, {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"})
    content = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    assert gguf.pre_tokenizer_name(content) == name


# --- verification, whole folders, cards ---------------------------------------------------------------------------

@pytest.mark.parametrize("format", ["gptq", "peft", "gguf", "dense"])
def test_the_verification_catches_damage(merged, tmp_path, format):
    """One bit that is flipped, in the middle or at the end of any file of weights, is found."""
    folder, out = merged(4, residual=format != "gptq"), tmp_path / "out"
    export(folder, format, out)
    model, check = MergedFolder(folder), FORMATS[format].load().check
    check(model, out)
    for file in [f for f in out.rglob("*") if f.suffix in (".safetensors", ".gguf")]:
        content = bytearray(file.read_bytes())
        for place in (len(content) // 2, len(content) - 1):
            content[place] ^= 1
            file.write_bytes(content)
            with pytest.raises(RuntimeError, match="differs"):
                check(model, out)
            content[place] ^= 1
        file.write_bytes(content)
    check(model, out)


@pytest.mark.parametrize("format, file, old, new", [
    ("gptq", "model.safetensors", b"model.norm.weight", b"model.norn.weight"),
    ("peft", "model.safetensors", b"model.norm.weight", b"model.norn.weight"),
    ("peft", "adapter/adapter_model.safetensors", b"0.mlp.down_proj.lora_A", b"0.mlp.down_proj.lora_C"),
    ("peft", "adapter/adapter_model.safetensors", b"0.mlp.down_proj.lora_B", b"0.mlp.down_prok.lora_B"),
    ("gguf", gguf.GGUF_FILE, b"output_norm.weight", b"output_norn.weight"),
    ("gguf", gguf.GGUF_FILE, b"blk.0.ffn_down.weight", b"blk.0.ffn_dowm.weight"),
    ("dense", "model.safetensors", b"model.norm.weight", b"model.norn.weight"),
    ("dense", "model.safetensors", b"0.mlp.down_proj.weight", b"0.mlp.down_prok.weight")])
def test_the_verification_catches_renamed_tensors(merged, tmp_path, format, file, old, new):
    """One changed letter in a name. The bytes of the tensor are right, and no engine would load it."""
    folder, out = merged(4, residual=format != "gptq"), tmp_path / "out"
    export(folder, format, out)
    content = (out / file).read_bytes()
    assert content.count(old) == 1
    (out / file).write_bytes(content.replace(old, new))
    with pytest.raises(RuntimeError, match="does not hold the merged model's"):
        FORMATS[format].load().check(MergedFolder(folder), out)


def test_an_export_checks_itself(merged, tmp_path):
    """A flipped bit, a missing and an added file in an exported folder."""
    export(merged(4), "peft", tmp_path / "out")
    assert check_folder(tmp_path / "out").findings == []
    file = tmp_path / "out/adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    (tmp_path / "out/tokenizer.json").unlink()
    (tmp_path / "out/more.json").write_text("{}")
    assert check_folder(tmp_path / "out").findings == [
        "adapter/adapter_model.safetensors has other bytes than those that were written", "tokenizer.json is missing",
        "more.json was not there when the folder was written"]


@pytest.mark.parametrize("format", ["peft", "gguf", "dense"])
def test_an_interrupted_export_leaves_nothing(merged, tmp_path, format, monkeypatch):
    """It is stopped while the card is written, after all weights. Not even a temporary folder is left."""
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr("LoTA.export.run.write_model_card", stop)
    with pytest.raises(KeyboardInterrupt):
        export(merged(4), format, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_others_is_not_replaced(merged, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("data")
    with pytest.raises(UserError, match="was not made by this project"):
        export(merged(4), "dense", tmp_path / "out")
    assert (tmp_path / "out/precious").read_text() == "data"
    export(merged(4), "peft", tmp_path / "ours")
    export(merged(4), "dense", tmp_path / "ours")            # our own export is
    assert not (tmp_path / "ours/adapter").exists()


def test_dense_reads_a_tensor_once(tmp_path, monkeypatch):
    """Shapes and dtypes come from the headers. Every dtype that a checkpoint's own tensors have is written."""
    others = {f"model.{dtype}": torch.ones(2, 3).to(dtype) for dtype in SAFETENSORS_NAMES}
    model = GPTQFolder(write_gptq(tmp_path / "gptq", LAYERS, other_tensors=others))
    monkeypatch.setattr("LoTA.export.dense.transformers_layers", lambda model: {})
    read, tensor = [], GPTQFolder.tensor
    monkeypatch.setattr(GPTQFolder, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    tensors = dense_tensors(model, torch.float32)
    assert read == []
    create_safetensors(tmp_path / "out.safetensors", {name: tensors[name][:2] for name in others})
    for name in others:
        overwrite_tensor(tmp_path / "out.safetensors", name, tensors[name][2]())
    written = load_file(tmp_path / "out.safetensors")
    assert read == list(others) and all(written[n].dtype == t.dtype and written[n].equal(t) for n, t in others.items())


def test_the_model_card(merged, tmp_path):
    """Where it comes from, what moved, its evaluation, and how to load it.

    lota_export.json has the checksum of every file, and one of its own content.
    """
    evaluation = {"data_set": "viggo", "accuracy": 0.5, "interval_95": [0.4, 0.6], "correct": 20, "rows": 40}
    for format, line in (("peft", "PeftModel.from_pretrained"), ("gguf", 'gguf_file="model-q4_1.gguf"'),
                         ("dense", "vllm serve out"), ("gptq", "GPTQModel.load(\"out\")")):
        export(merged(4, format != "gptq"), format, tmp_path / "out", evaluation=evaluation, verify=True)
        card = (tmp_path / "out/README.md").read_text()
        moved = MergedFolder(merged(4, format != "gptq")).lota.training["moved"]["all"]
        for text in (line, "base_model: some/base", "| Omega | 4.0 |", "| Training data | viggo |", f"{moved:.4%}",
                     "50.0% (40.0% to 60.0%), 20 of 40 rows", "4 bits, group size 32"):
            assert text in card, (format, text)
        record = json.loads((tmp_path / "out/lota_export.json").read_text())
        files = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()}
        assert set(record["sha256"]) == files and record["verified"]
        assert record["sha256"]["README.md"] == sha256(tmp_path / "out/README.md")


def test_a_source_that_is_no_model_is_refused(merged, tmp_path):
    for format in FORMATS:
        with pytest.raises(UserError, match="neither a merged folder nor an adapter folder"):
            export(tmp_path, format, tmp_path / "out")
    with pytest.raises(UserError, match="--format must be one of gptq, peft, gguf, dense, not 'zip'"):
        export(merged(4), "zip", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_that_are_open_already(merged, quantize, tmp_path):
    """export() takes a MergedFolder or an AdapterFolder too. `gptq` goes before the model that an adapter names."""
    adapter = shutil.copytree(merged(4).parent / "adapter", tmp_path / "adapter")
    LotaConfig(**{**vars(LotaConfig.load(adapter)), "quantized_model_dir": "gone"}).save(adapter)
    export(MergedFolder(merged(4)), "dense", tmp_path / "one")
    export(AdapterFolder(adapter), "dense", tmp_path / "two", gptq=quantize(4))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    record = json.loads((tmp_path / "one/lota_export.json").read_text())
    assert record["source"] == str(merged(4).resolve())


def test_the_command(merged, quantize, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "LoTA.export", *map(str, arguments)], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    done = run(merged(4), "--format", "gguf", "--output", tmp_path / "out", "--verify")
    assert done.returncode == 0 and done.stdout == f"exported and verified: {tmp_path / 'out'}\n", done.stderr
    failed = run(tmp_path / "nowhere", "--format", "dense", "--output", tmp_path / "out2")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    adapter = shutil.copytree(merged(4).parent / "adapter", tmp_path / "adapter")
    LotaConfig(**{**vars(LotaConfig.load(adapter)), "quantized_model_dir": "gone"}).save(adapter)
    moved = run(adapter, "--format", "dense", "--output", tmp_path / "out3")
    assert moved.returncode == 1 and moved.stderr.splitlines()[-1] == (
        "error: the GPTQ model gone is no folder here: name the folder that has it with --gptq")
    found = run(adapter, "--format", "dense", "--output", tmp_path / "out3", "--gptq", quantize(4))
    assert found.returncode == 0, found.stderr
    export(merged(4), "dense", tmp_path / "out4")
    assert sha256(tmp_path / "out3/model.safetensors") == sha256(tmp_path / "out4/model.safetensors")


# --- LoRA and QA-LoRA adapters ------------------------------------------------------------------------------------

def trained_with_peft(gptq, folder, **extra):
    """A PEFT adapter with random weights on a GPTQ folder, and its live logits in float32."""
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    model = get_peft_model(load_gptq(gptq, dtype=torch.float32).model, LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **extra))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.mul_(0.2)
    model.save_pretrained(folder)
    LotaConfig(method="QA-LoRA" if extra else "LoRA", rank=4, bits=4, quantized_model_dir=str(gptq)).save(folder)
    return logits(model.eval(), ids(gptq))


def test_qalora_merges_into_offsets(quantize, tmp_path):
    """Its merged logits are its live logits, no integer moves, and it exports like LoTA."""
    gptq = quantize(4)
    want = trained_with_peft(gptq, tmp_path / "adapter", use_qalora=True, qalora_group_size=32)
    moved = merge(tmp_path / "adapter", gptq, tmp_path / "merged")
    assert moved["all"] == 0
    inputs = ids(gptq)
    assert (logits(load_gptq(gptq, dtype=torch.float32).model, inputs) - want).abs().max() > 0.05
    merged = LTA(path=str(tmp_path / "merged")).load(dtype=torch.float32).model
    torch.testing.assert_close(logits(merged, inputs), want, rtol=1e-4, atol=2e-4)
    live = load_live(AdapterFolder(tmp_path / "adapter"), gptq, dtype=torch.float32)
    torch.testing.assert_close(logits(live, inputs), want, rtol=1e-4, atol=2e-4)
    export(tmp_path / "adapter", "dense", tmp_path / "dense", torch.float32, verify=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dense, inputs), want, rtol=1e-4, atol=2e-4)


def test_lora_becomes_dense_only(quantize, tmp_path):
    """The message says why it does not merge. dense writes the sum, whose logits are the live ones."""
    gptq = quantize(4)
    want = trained_with_peft(gptq, tmp_path / "adapter")
    for format in ("gptq", "peft", "gguf"):
        with pytest.raises(UserError, match="no low-bit grid holds; --format dense writes"):
            export(tmp_path / "adapter", format, tmp_path / "out")
    with pytest.raises(UserError, match="--format dense"):
        merge(tmp_path / "adapter", gptq, tmp_path / "out")
    export(tmp_path / "adapter", "dense", tmp_path / "out", torch.float32, verify=True)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(dense, ids(gptq)), want, rtol=1e-4, atol=2e-4)
