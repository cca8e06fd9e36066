"""The merge of folders: its integers and offsets against the oracle, what it refuses, what it leaves behind."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from conftest import LAYERS, ROOT, merge, parse
from oracle import merge as oracle_merge
from oracle import unpack_columns
from pairs import pairwise
from random_gptq import write_gptq, write_lota_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import LoTA_QAF_main
from LoTA import UserError, lota_merge
from LoTA.adapter import LTA
from LoTA.adapter_folder import PREFIX, AdapterFolder
from LoTA.export.run import export
from LoTA.export.shared import copy_files
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.lota_merge import merge_folders
from LoTA.packed import PackedLayer
from LoTA.storage import (
    clear_leftovers,
    overwrite_tensor,
    rewrite_safetensors,
    sha256,
    temporary_folder,
    whole_folder,
)


@pytest.fixture
def gptq(tmp_path):
    """A random GPTQ model of 4 bits."""
    return write_gptq(tmp_path / "gptq", LAYERS)


@pytest.fixture
def adapter(tmp_path, gptq):
    """A random adapter of rank 8 with omega 3 for it."""
    return write_lota_adapter(tmp_path / "adapter", gptq)


# --- what it computes ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits, group_size, desc_act, shards, checkpoint_format", pairwise(
    bits=[2, 3, 4, 8], group_size=[32, -1], desc_act=[False, True], shards=[1, 3],
    checkpoint_format=["gptq", "gptq_v2"]))
def test_merge_is_the_oracles(tmp_path, bits, group_size, desc_act, shards, checkpoint_format):
    """Integers are equal, and mu is to float32 rounding. Every other tensor and file is as it was."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS, bits, group_size, desc_act=desc_act, shards=shards,
                      checkpoint_format=checkpoint_format)
    adapter = write_lota_adapter(tmp_path / "adapter", gptq)
    moved = merge(adapter, gptq, tmp_path / "merged")
    source, merged = GPTQFolder(gptq), MergedFolder(tmp_path / "merged")
    assert merged.checkpoint_format == checkpoint_format
    matrices = load_file(adapter / "adapter_model.safetensors")
    changed = total = 0
    for name, (rows, _) in LAYERS.items():
        before = unpack_columns(source.tensor(f"{name}.qweight"), bits, rows)
        want, mu = oracle_merge(matrices[f"{PREFIX}{name}.lora_A.weight"].t(),
                                matrices[f"{PREFIX}{name}.lora_B.weight"].t(), before, source.tensor(f"{name}.scales"),
                                source.tensor(f"{name}.g_idx"), bits, 3.0, 3.0)
        got = unpack_columns(merged.tensor(f"{name}.qweight"), bits, rows)
        assert torch.equal(got, want)
        torch.testing.assert_close(merged.offset(name).double(), mu, rtol=1e-6, atol=1e-7)
        changed, total = changed + int((got != before).sum()), total + got.numel()
    assert 0 < changed < total and moved["all"] == changed / total
    for name, file in source.file_of.items():
        if not name.endswith("qweight"):
            assert torch.equal(source.tensor(name), merged.tensor(name)), name
        assert merged.file_of[name].name == file.name
    assert all((tmp_path / "merged" / f.name).exists() for f in gptq.iterdir())


def test_originals_are_not_touched(gptq, adapter, tmp_path):
    before = {f: f.read_bytes() for folder in (gptq, adapter) for f in folder.iterdir()}
    merge(adapter, gptq, tmp_path / "merged")
    assert {f: f.read_bytes() for folder in (gptq, adapter) for f in folder.iterdir()} == before


def test_without_offset_it_is_a_plain_gptq_folder(gptq, tmp_path):
    """Config files byte for byte as they were, no offsets file."""
    adapter = write_lota_adapter(tmp_path / "adapter", gptq, residual=False)
    merge(adapter, gptq, tmp_path / "merged")
    for name in ("quantize_config.json", "config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (gptq / name).read_bytes()
    assert not list(tmp_path.glob("merged/lota/*.safetensors"))


def test_with_offset_both_config_files_name_our_format(gptq, adapter, tmp_path):
    merge(adapter, gptq, tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "lota_gptq"
    assert json.loads((tmp_path / "merged/quantize_config.json").read_text())["checkpoint_format"] == "lota_gptq"


@pytest.mark.parametrize("residual", [True, False])
def test_learned_scales_become_the_checkpoints_own(tmp_path, residual):
    """The merged scales are s * (1 + change) in float16. Integers, zeros and offsets do not change.

    Without an offset the folder is a plain GPTQ checkpoint.
    """
    gptq = write_gptq(tmp_path / "gptq", LAYERS, 3, shards=2)
    plain = write_lota_adapter(tmp_path / "plain", gptq, residual=residual)
    learned = write_lota_adapter(tmp_path / "learned", gptq, residual=residual, learned_scales=True)
    tensors, folders = load_file(learned / "adapter_model.safetensors"), []
    for adapter in (plain, learned):
        folders.append(tmp_path / f"merged_{adapter.name}")
        assert merge(adapter, gptq, folders[-1])["all"] > 0
    before, (plain, learned) = GPTQFolder(gptq), map(MergedFolder, folders)
    for name in before.modules:
        change = tensors[f"{PREFIX}{name}.lora_scale"].double()
        want = (before.tensor(f"{name}.scales").double() * (1 + change)).half()
        got = learned.tensor(f"{name}.scales")
        assert got.dtype == torch.float16 and torch.allclose(got.double(), want.double(), rtol=1e-3)
        assert not torch.equal(got, plain.tensor(f"{name}.scales"))
        for t in ("qweight", "qzeros", "g_idx"):
            assert torch.equal(learned.tensor(f"{name}.{t}"), plain.tensor(f"{name}.{t}"))
        assert not residual or torch.equal(learned.offset(name), plain.offset(name))
    config = json.loads((folders[1] / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == ("lota_gptq" if residual else "gptq")


def test_a_learned_offset_takes_the_place_of_eq_4s(gptq, adapter, tmp_path):
    learned = write_lota_adapter(tmp_path / "learned", gptq, offset_scale="learned")
    for folder in (adapter, learned):
        merge(folder, gptq, tmp_path / f"merged_{folder.name}")
    merged, tensors = MergedFolder(tmp_path / "merged_learned"), load_file(learned / "adapter_model.safetensors")
    for name in LAYERS:
        assert torch.equal(merged.offset(name), tensors[f"{PREFIX}{name}.lora_offset"])
        assert not torch.equal(merged.offset(name), MergedFolder(tmp_path / "merged_adapter").offset(name))


def test_a_layer_without_adapter_stays(gptq, tmp_path):
    """Its integers are the source's, and it has no offset."""
    adapted, other = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    adapter = write_lota_adapter(tmp_path / "adapter", gptq, [adapted])
    assert set(merge(adapter, gptq, tmp_path / "merged")) == {"down_proj", "all"}
    source, merged = GPTQFolder(gptq), MergedFolder(tmp_path / "merged")
    assert merged.offset_modules() == [adapted] and merged.offset(other) is None
    assert torch.equal(merged.tensor(f"{other}.qweight"), source.tensor(f"{other}.qweight"))
    assert not torch.equal(merged.tensor(f"{adapted}.qweight"), source.tensor(f"{adapted}.qweight"))


def test_adapters_of_the_published_scripts_are_read_by_their_name(gptq, adapter, tmp_path):
    """No lota_config.json: bits, omega and method come from the folder's name."""
    named = write_lota_adapter(tmp_path / "8B_int4_LoTA_3_0.950_0.999_alpaca_1234_20480_05_101112", gptq,
                               with_config=False)
    merge(adapter, gptq, tmp_path / "one")
    merge(named, gptq, tmp_path / "two")
    one, two = MergedFolder(tmp_path / "one"), MergedFolder(tmp_path / "two")
    assert (two.lota.method, two.lota.omega, two.lota.bits, two.lota.data_set) == ("LoTA", 3.0, 4, "alpaca")
    assert one.fingerprint() == two.fingerprint() != GPTQFolder(gptq).fingerprint()
    wrong_bits = write_lota_adapter(tmp_path / "8B_int2_LoTA_3_0.950_0.999_alpaca_1_2_3", gptq, with_config=False)
    with pytest.raises(UserError, match="2 bits"):
        merge(wrong_bits, gptq, tmp_path / "three")


def test_zeros_of_the_packed_layer_are_the_files(tmp_path):
    """The format "gptq" stores zeros minus one, "gptq_v2" as they are."""
    name = "model.layers.0.self_attn.q_proj"
    for form, plus in (("gptq", 1), ("gptq_v2", 0)):
        folder = GPTQFolder(write_gptq(tmp_path / form, LAYERS, checkpoint_format=form))
        tensors = [folder.tensor(f"{name}.{t}") for t in ("qweight", "qzeros", "scales", "g_idx")]
        stored = unpack_columns(tensors[1].t().contiguous(), 4, 48).t()
        assert torch.equal(PackedLayer(*tensors, 4, form).zeros.long(), stored + plus)
        assert torch.equal(folder.packed(name).zeros.long(), stored + plus)


# --- what it refuses ----------------------------------------------------------------------------------------------

def test_another_gptq_model_is_refused_by_its_fingerprint(gptq, adapter, tmp_path):
    """One integer of one layer differs: same shapes, same names, another model."""
    other = shutil.copytree(gptq, tmp_path / "other")
    name = "model.layers.0.mlp.down_proj.qweight"
    qweight = GPTQFolder(other).tensor(name)
    qweight[0, 0] ^= 1
    overwrite_tensor(other / "model.safetensors", name, qweight)
    with pytest.raises(UserError, match="fingerprint"):
        merge(adapter, other, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_does_not_belong_together_is_refused(gptq, adapter, tmp_path):
    with pytest.raises(UserError, match="trained on 4 bits"):
        merge(adapter, write_gptq(tmp_path / "other_bits", LAYERS, 2), tmp_path / "m")
    with pytest.raises(UserError, match="trained on 32 rows in a group"):
        merge(adapter, write_gptq(tmp_path / "other_groups", LAYERS, 4, 16), tmp_path / "m")
    with pytest.raises(UserError, match="no quantized layer there"):
        merge(adapter, write_gptq(tmp_path / "other_layers", {"layer": (64, 48)}), tmp_path / "m")
    with pytest.raises(UserError, match="is 96 x 48, its adapter 64 x 48 of rank 8"):
        merge(adapter, write_gptq(tmp_path / "other_shape", dict.fromkeys(LAYERS, (96, 48)) | {
            "model.layers.0.mlp.down_proj": (80, 64)}), tmp_path / "m")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(UserError, match="rank"):
        merge(adapter, gptq, tmp_path / "m")
    with pytest.raises(UserError, match="not an adapter folder"):
        merge(gptq, gptq, tmp_path / "m")
    with pytest.raises(UserError, match="not a model folder"):
        merge(write_lota_adapter(tmp_path / "a2", gptq), tmp_path, tmp_path / "m")


def test_merging_twice_is_refused(gptq, tmp_path):
    """An adapter of the GPTQ model does not fit the merged one, which is a base for adapters of its own."""
    adapter = write_lota_adapter(tmp_path / "adapter", gptq, residual=False)
    merge(adapter, gptq, tmp_path / "merged")
    with pytest.raises(UserError, match="trained on other GPTQ weights"):
        merge(adapter, tmp_path / "merged", tmp_path / "again")


def test_an_adapter_that_is_not_ternary_is_refused(gptq, adapter, tmp_path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = 0.5
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not ternary"):
        merge(adapter, gptq, tmp_path / "merged")


def test_an_output_folder_that_is_not_ours_is_refused_and_ours_is_replaced(gptq, adapter, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not made by this project"):
        merge(adapter, gptq, theirs)
    assert (theirs / "thesis.txt").read_text() == "years of work"
    for _ in range(2):
        merge(adapter, gptq, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "gptq", "merged", "theirs"]


@pytest.mark.parametrize("change, message", [
    ({"bits": 5}, "5 bits"), ({"quant_method": "awq"}, "not a GPTQ model"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"), ({"pack_dtype": "int8"}, "pack_dtype"),
    ({"dynamic": {"lm_head": {}}}, "dynamic")])
def test_folders_of_other_kinds_are_refused(gptq, change, message):
    config = json.loads((gptq / "quantize_config.json").read_text())
    (gptq / "quantize_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        GPTQFolder(gptq)


def test_a_missing_shard_is_refused(tmp_path):
    gptq = write_gptq(tmp_path / "gptq", LAYERS, shards=2)
    (gptq / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        GPTQFolder(gptq)


def test_format_counts_like_checkpoint_format(tmp_path):
    """GPTQModel's newer name alone. Two names that differ are refused."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS, checkpoint_format="gptq_v2")
    config, name = json.loads((gptq / "quantize_config.json").read_text()), "model.layers.0.self_attn.q_proj"
    want = GPTQFolder(gptq).packed(name).zeros
    config["format"] = config.pop("checkpoint_format")
    (gptq / "quantize_config.json").write_text(json.dumps(config))
    folder = GPTQFolder(gptq)
    assert folder.checkpoint_format == "gptq_v2" and torch.equal(folder.packed(name).zeros, want)
    merge(write_lota_adapter(tmp_path / "adapter", gptq), gptq, tmp_path / "merged")
    assert MergedFolder(tmp_path / "merged").checkpoint_format == "gptq_v2"
    with pytest.raises(UserError, match="merged LoTA folder"):
        GPTQFolder(tmp_path / "merged")
    (gptq / "quantize_config.json").write_text(json.dumps({**config, "checkpoint_format": "gptq"}))
    with pytest.raises(UserError, match="checkpoint_format gptq and format gptq_v2"):
        GPTQFolder(gptq)


@pytest.mark.parametrize("change, message", [
    ({"bits": "4"}, "bits is '4'; input should be a valid integer"),
    ({"group_size": 32.5}, "group_size is 32.5"), ({"group_size": 0}, "has group_size 0; it must be positive"),
    ({"sym": "no"}, "sym is 'no'"), ({"meta": [1]}, "meta is [1]"), ({"format": ["gptq"]}, "format is ['gptq']"),
    ({"pack_dtype": 32}, "pack_dtype is 32")])
@pytest.mark.parametrize("file", ["quantize_config.json", "config.json"])
def test_settings_of_other_types_are_refused_by_file_and_field(gptq, file, change, message):
    content = json.loads((gptq / file).read_text())
    if file == "config.json":
        (gptq / "quantize_config.json").unlink()
        content["quantization_config"].update(change)
    else:
        content.update(change)
    (gptq / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        GPTQFolder(gptq)
    assert "\n" not in str(error.value) and str(gptq) in str(error.value)
    for broken in ("[1]", "null", "[" * 100_000):
        (gptq / file).write_text(broken)
        with pytest.raises(UserError, match=f"{file} (cannot be read: it is no JSON object|is nested too deeply)"):
            GPTQFolder(gptq)


def test_what_autogptq_wrote_with_sym_false_is_refused(gptq):
    """Its zero points of 0 are lost. sym true, gptq_v2 and GPTQModel's own writer are read."""
    config = json.loads((gptq / "quantize_config.json").read_text())
    for change, message in (
            ({"meta": None}, "quantize again with gptq_quantize.py"),
            ({"meta": {"quantizer": "auto_gptq:0.7.1"}}, "quantize again"),
            ({"meta": {"quantizer": ["gptqmodel:0.8.9"]}}, "quantize again"),
            ({"meta": None, "checkpoint_format": None}, "quantize again"),
            ({"meta": {"quantizer": "GPTQModel:0.9.0"}}, None), ({"meta": None, "sym": True}, None),
            ({"meta": None, "checkpoint_format": "gptq_v2"}, None),
            ({"meta": {"quantizer": ["optimum:1.2", "gptqmodel:10.0.1"]}}, None)):
        (gptq / "quantize_config.json").write_text(json.dumps({**config, **change}))
        if message:
            with pytest.raises(UserError, match=message):
                GPTQFolder(gptq)
        else:
            assert GPTQFolder(gptq).bits == 4


@pytest.mark.parametrize("kind, tensor, message", [
    ("qweight", torch.zeros(8, 48), "its dtype is F32, not I32"),
    ("qweight", torch.zeros(7, 48, dtype=torch.int32), "its shape is (7, 48), not (8, 48), which 64 inputs"),
    ("qweight", torch.zeros(8, dtype=torch.int32), "its shape is (8,), not that of a filled matrix"),
    ("qzeros", torch.zeros(2, 5, dtype=torch.int32), "its shape is (2, 5), not (2, 6)"),
    ("qzeros", torch.zeros(3, 6, dtype=torch.int32), "its shape is (3, 6), not (2, 6)"),
    ("qzeros", torch.zeros(2, 6, dtype=torch.int64), "its dtype is I64"),
    ("scales", torch.ones(2, 47).half(), "its shape is (2, 47), not (2, 48)"),
    ("scales", torch.ones(1, 48).half(), "its shape is (1, 48), not (2, 48)"),
    ("scales", torch.ones(2, 48, dtype=torch.int32), "its dtype is I32, not F16 or BF16 or F32"),
    ("g_idx", torch.arange(64).float() // 32, "its dtype is F32"),
    ("g_idx", torch.empty(0).int(), "not that of a filled vector"),
    ("g_idx", torch.full((64,), 2**31 - 1, dtype=torch.int32), "it names 2147483647"),
    ("g_idx", torch.full((64,), -1, dtype=torch.int32), "it names -1"),
    ("g_idx", torch.full((64,), 2**62), "it names 4611686018427387904"),
    ("g_idx", torch.zeros(64, dtype=torch.int32), "it names 1 groups up to 0")])
def test_wrong_tensors_are_refused_by_name_at_the_door(gptq, kind, tensor, message):
    """A number of a group that is out of range takes no memory."""
    name = f"model.layers.0.self_attn.q_proj.{kind}"
    tensors = load_file(gptq / "model.safetensors")
    save_file({**tensors, name: tensor}, gptq / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        GPTQFolder(gptq)
    assert f"model.safetensors: {name} is wrong: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, tensor, message", [
    ("model.layers.0.self_attn.q_proj.offset", torch.zeros(1, 48), "F32 of shape (1, 48), not F32 of shape (2, 48)"),
    ("model.layers.0.self_attn.q_proj.offset", torch.zeros(2, 48).half(), "F16 of shape (2, 48)"),
    ("model.layers.9.self_attn.q_proj.offset", torch.zeros(2, 48), "is no offset of a quantized layer")])
def test_wrong_offsets_of_a_merged_folder_are_refused_by_name(gptq, adapter, tmp_path, name, tensor, message):
    """One row would count for all groups, and the offset of an unknown layer for none."""
    merge(adapter, gptq, tmp_path / "merged")
    file = tmp_path / "merged/lota/offsets.safetensors"
    save_file({**load_file(file), name: tensor}, file)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        MergedFolder(tmp_path / "merged")
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/{folder}/model.safetensors", "sub/model.safetensors",
                                  "..", "", "sub\\model.safetensors"])
def test_an_index_that_leads_out_of_the_folder_is_refused(gptq, name):
    name = name.replace("/{folder}", str(gptq))
    (gptq / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="a name without a path is wanted"):
        GPTQFolder(gptq)


@pytest.mark.parametrize("content, message", [
    ([], "the content is []"), ({}, "weight_map is {}; field required"), ({"weight_map": []}, "weight_map is []"),
    ({"weight_map": {"a": 1}}, "weight_map.a is 1; input should be a valid string")])
def test_an_index_of_other_types_is_refused(gptq, content, message):
    (gptq / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(f"model.safetensors.index.json cannot be read: {message}")):
        GPTQFolder(gptq)


def test_links_that_lead_out_of_the_folder_are_not_copied(gptq, adapter, tmp_path):
    """Merge and export refuse them by name. A link inside and the hub's cache, whose files are links, are copied."""
    (tmp_path / "secret").write_text("a key")
    (gptq / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="notes.txt is a link to a file outside"):
        merge(adapter, gptq, tmp_path / "merged")
    with pytest.raises(UserError, match="notes.txt is a link to a file outside"):
        copy_files(GPTQFolder(gptq), tmp_path)
    assert not (tmp_path / "merged").exists()
    (gptq / "notes.txt").unlink()
    (gptq / "notes.txt").symlink_to("config.json")
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    (tmp_path / "models--a--b/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in gptq.iterdir():
        shutil.copyfile(file, tmp_path / "models--a--b/blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    merge(adapter, snapshot, tmp_path / "merged")
    copy = tmp_path / "merged/notes.txt"
    assert copy.read_bytes() == (gptq / "config.json").read_bytes() and not copy.is_symlink()


# --- what it leaves behind ----------------------------------------------------------------------------------------

def test_a_failure_in_the_middle_leaves_the_old_folder_and_no_rest(gptq, adapter, tmp_path, monkeypatch):
    """As when the disk is full: the second layer's write fails."""
    merge(adapter, gptq, tmp_path / "merged")
    before = {f: f.read_bytes() for f in (tmp_path / "merged").rglob("*") if f.is_file()}
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr("LoTA.storage.overwrite_tensor", full)
    with pytest.raises(OSError, match="No space left"):
        merge(adapter, gptq, tmp_path / "merged")
    assert {f: f.read_bytes() for f in (tmp_path / "merged").rglob("*") if f.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "gptq", "merged"]


@pytest.mark.parametrize("damage, message", [
    ("integer", "differ"), ("offset", "differ"), ("learned offset", "differ"), ("scales", "must not touch"),
    ("learned scales", "differ")])
def test_the_verification_catches_damage(gptq, tmp_path, damage, message):
    """A merged folder with one number changed does not pass."""
    adapter = AdapterFolder(write_lota_adapter(tmp_path / "adapter", gptq, learned_scales=damage == "learned scales",
                                               offset_scale="learned" if damage == "learned offset" else "omega"))
    folder, source, name = tmp_path / "merged", GPTQFolder(gptq), "model.layers.0.mlp.down_proj"
    lota_merge.merge_folders(adapter, source, folder)
    merged, merge_layer = MergedFolder(folder), lota_merge.layer_merger(adapter)
    lota_merge.verify_folders(adapter, source, merged, merge_layer)
    if damage == "integer":
        qweight = merged.tensor(f"{name}.qweight")
        qweight[3, 3] ^= 1
        overwrite_tensor(folder / "model.safetensors", f"{name}.qweight", qweight)
    elif damage.endswith("offset"):
        offset = merged.offset(name)
        offset[0, 0] += 1e-3
        overwrite_tensor(folder / "lota/offsets.safetensors", f"{name}.offset", offset)
    else:
        scales = merged.tensor(f"{name}.scales")
        scales[0, 0] *= 2
        overwrite_tensor(folder / "model.safetensors", f"{name}.scales", scales)
    with pytest.raises(RuntimeError, match=message):
        lota_merge.verify_folders(adapter, source, MergedFolder(folder), merge_layer)


@pytest.mark.parametrize("file, old, new", [
    ("model.safetensors", "model.norm.weight", "model.norn.weight"),
    ("model.safetensors", "model.layers.0.mlp.down_proj.qzeros", "model.layers.0.mlp.down_proj.qzeror"),
    ("lota/offsets.safetensors", "model.layers.0.mlp.down_proj.offset", "model.layers.0.mlp.down_prok.offset")])
def test_the_verification_catches_renamed_tensors(tmp_path, file, old, new):
    """One changed letter: the tensor is there, and nothing would load it."""
    gptq = write_gptq(tmp_path / "gptq", LAYERS, other_tensors={"model.norm.weight": torch.ones(64)})
    adapter, source = AdapterFolder(write_lota_adapter(tmp_path / "adapter", gptq)), GPTQFolder(gptq)
    lota_merge.merge_folders(adapter, source, tmp_path / "merged")
    merged, merge_layer = MergedFolder(tmp_path / "merged"), lota_merge.layer_merger(adapter)
    path = tmp_path / "merged" / file
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises((RuntimeError, UserError), match=f"{old}|{new}"):
        lota_merge.verify_folders(adapter, source, MergedFolder(merged.path), merge_layer)


def test_whole_folder_replaces_only_at_the_end(tmp_path):
    target = tmp_path / "target"
    with whole_folder(target, "marker") as folder:
        (folder / "marker").write_text("1")
        assert not target.exists()
    assert (target / "marker").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), whole_folder(target, "marker") as folder:
        (folder / "marker").write_text("2")
        raise KeyboardInterrupt
    assert (target / "marker").read_text() == "1" and [p.name for p in tmp_path.iterdir()] == ["target"]


KILLED = """
import os, signal, sys
from pathlib import Path
import LoTA.storage
from LoTA.storage import whole_folder

def kill(*names):
    os.kill(os.getpid(), signal.SIGKILL)

with whole_folder(sys.argv[1], "marker") as folder:
    (folder / "marker").write_text("new")
    if sys.argv[2] == "writing":
        kill()
    rename = os.rename
    os.rename = lambda source, target: kill() if Path(target) == Path(sys.argv[1]) else rename(source, target)
"""


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_the_next_run_clears_what_a_killed_one_left(tmp_path, capsys, there, moment):
    """Killed between the two renames, the old folder is nowhere else, so it is brought back."""
    target = tmp_path / "out"
    if there:
        target.mkdir()
        (target / "marker").write_text("old")
    process = subprocess.run([sys.executable, "-c", KILLED, target, moment], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    assert target.exists() == (there and moment == "writing") and list(tmp_path.glob(".out.*.tmp"))
    clear_leftovers(target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] * there
    assert not there or (target / "marker").read_text() == "old"
    out = capsys.readouterr().out
    assert "removed" in out and ("brought back" in out) == (there and moment == "renaming")


def test_what_is_no_leftover_stays(tmp_path):
    """A folder of a living process, those of other outputs, and a user's."""
    names = [".out.more.abcdefgh.tmp", ".outer.abcdefgh.tmp", ".out.tmp", ".out.123.tmp"]
    for name in names:
        (tmp_path / name / "old").mkdir(parents=True)
    with whole_folder(tmp_path / "out", "marker") as first, whole_folder(tmp_path / "out", "marker") as second:
        for folder in (first, second):
            (folder / "marker").write_text(folder.parent.name)
        clear_leftovers(tmp_path / "out")
        assert first.exists() and second.exists()
    assert (tmp_path / "out/marker").read_text() == first.parent.name               # the last to finish
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "out"])


def test_a_folder_without_a_lock_is_cleared_and_made_again(tmp_path, monkeypatch):
    """It is what a process leaves that is killed before it has a lock. A living one makes another."""
    (tmp_path / ".out.aaaaaaaa.tmp").mkdir()
    clear_leftovers(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    make, made = tempfile.mkdtemp, []

    def taken(**kwargs):
        made.append(make(**kwargs))
        if len(made) == 1:
            clear_leftovers(tmp_path / "out")
        return made[-1]
    monkeypatch.setattr("LoTA.storage.tempfile.mkdtemp", taken)
    with whole_folder(tmp_path / "out", "marker") as folder:
        assert len(made) == 2 and str(folder.parent) == made[1]
        (folder / "marker").write_text("1")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def dead():
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def tomorrow(monkeypatch):
    now = time.time_ns()
    monkeypatch.setattr("LoTA.storage.time.time_ns", lambda: now + 25 * 3600 * 10**9)


def leave(folder):
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/marker").write_text(folder.name)


@pytest.mark.parametrize("there", [False, True])
def test_what_older_versions_left_is_cleared(tmp_path, monkeypatch, capsys, dead, there):
    """By age and process id. The only copy of the output is brought back."""
    target = tmp_path / "out"
    leave(tmp_path / f".out.{dead}.tmp")
    leave(tmp_path / f".out.{dead}.old")
    (tmp_path / f".out.{dead + 1}.tmp").write_text("a file")
    if there:
        leave(target)
    monkeypatch.setattr("LoTA.storage._lives", lambda process: False)
    clear_leftovers(target)
    assert len(list(tmp_path.iterdir())) == 3 + there and capsys.readouterr().out == ""     # of today
    tomorrow(monkeypatch)
    clear_leftovers(target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target / "deep/marker").read_text() == ("out" if there else f".out.{dead}.old")
    out = capsys.readouterr().out
    assert out.count("removed") == (3 if there else 2) and ("brought back" in out) == (not there)


def test_old_names_that_say_too_little_stay(tmp_path, monkeypatch, dead):
    """Of a living process, of another user's living process, of other outputs, and what has no process id."""
    names = [f".out.{os.getpid()}.tmp", ".out.1.old", f".out.more.{dead}.tmp", f".outer.{dead}.old", ".out.0.tmp",
             f".out.{dead}.bak", ".out.notes.tmp", ".out.123456789.tmp"]
    for name in names:
        leave(tmp_path / name)
    (tmp_path / f".out.{dead}.tmp").symlink_to(tmp_path / ".out.notes.tmp")
    tomorrow(monkeypatch)
    clear_leftovers(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {*names, f".out.{dead}.tmp"}


def test_of_two_old_outputs_the_later_one_is_brought_back(tmp_path, monkeypatch, dead):
    """The earlier one may be half removed, because a process was killed while it removed it."""
    for number in (2, 1):
        leave(tmp_path / f".out.{number}.old")
        time.sleep(0.02)                        # the clock of a file system is coarse
    monkeypatch.setattr("LoTA.storage._lives", lambda process: False)
    tomorrow(monkeypatch)
    clear_leftovers(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/deep/marker").read_text() == ".out.1.old"


def killed_within(call):
    """Runs `call` in a child process that must be killed in it."""
    child = os.fork()
    if not child:
        try:
            call()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("way", ["evaluation", "export", "LTA"])
def test_the_next_run_removes_the_merged_model_of_a_killed_one(adapter, gptq, tmp_path, monkeypatch, capsys, way):
    """It is in TMPDIR. Folders of living processes, of other users and of other programs stay."""
    place = tmp_path / "tmpdir"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))

    def merge_and_die(*args, **kwargs):
        merge_folders(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    for module in ("LoTA.lota_merge", "LoTA.export.run", "LoTA.adapter"):
        monkeypatch.setattr(f"{module}.merge_folders", merge_and_die)
    base, _, evaluation = parse("--mode", 2, "--load_adapter", adapter, "--quantized_model_dir", gptq, "--export",
                                "gptq", "--export_path", tmp_path / "out")
    killed_within({"evaluation": lambda: LoTA_QAF_main.evaluate(base, evaluation),
                   "export": lambda: export(adapter, "gptq", tmp_path / "out", gptq=gptq),
                   "LTA": lambda: LTA(path=str(adapter)).load(gptq)}[way])
    left, = place.iterdir()
    assert (left / "new/merged/lota/lota_config.json").exists()
    others = shutil.copytree(left, place / "lota_qaf.aaaaaaaa.tmp"), shutil.copytree(left, place / "tmpabcdefgh")
    own = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: own + 1)
    with temporary_folder() as folder:
        assert left.exists() and others[0].exists()
        monkeypatch.setattr("os.getuid", lambda: own)
        shutil.rmtree(others[0])
        with temporary_folder():
            assert not left.exists() and folder.exists() and others[1].exists()
    assert f"removed {left}: the process that wrote it was killed" in capsys.readouterr().out
    assert list(place.iterdir()) == [others[1]]


def test_outputs_that_are_links_and_the_current_folder(tmp_path, monkeypatch):
    """A link stays a link. The folder is as readable as the umask says. The current folder is refused."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    for text in ("1", "2"):
        with whole_folder(tmp_path / "link", "marker") as folder:
            (folder / "marker").write_text(text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/out/marker").read_text() == "2"
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "disk/out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    monkeypatch.chdir(tmp_path / "plain")
    with pytest.raises(UserError, match="the current one"), whole_folder(".", "marker"):
        pass


def test_the_command(adapter, tmp_path):
    """It finds the GPTQ folder in the adapter and prints the share moved. A mistake is one line and status 1."""
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "LoTA.lota_merge", *map(str, arguments)], cwd=ROOT, text=True,
                              capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    done = run("--adapter", adapter, "--output", tmp_path / "merged")
    assert done.returncode == 0 and "q_proj" in done.stdout and "all" in done.stdout, done.stderr
    with safe_open(tmp_path / "merged/lota/offsets.safetensors", "pt") as offsets:
        assert set(offsets.keys()) == {f"{name}.offset" for name in LAYERS}
    failed = run("--adapter", tmp_path / "nowhere", "--output", tmp_path / "merged2")
    assert failed.returncode == 1 and failed.stdout == "" and "Traceback" not in failed.stderr
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


@pytest.mark.parametrize("chunk", [16, 1 << 22])
def test_a_safetensors_file_is_written_anew(tmp_path, monkeypatch, chunk):
    """One tensor is replaced, all others and the header stay. The SHA-256 is that of the file."""
    monkeypatch.setattr("LoTA.storage.CHUNK_BYTES", chunk)
    tensors = {name: torch.randn(5, 7, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    save_file(tensors, tmp_path / "old", metadata={"by": "others"})
    new, asked = torch.ones(5, 7), []

    def replacement(name):
        asked.append(name)
        return new if name == "b" else None
    digest = rewrite_safetensors(tmp_path / "old", tmp_path / "new", replacement)
    save_file({**tensors, "b": new}, tmp_path / "wanted", metadata={"by": "others"})
    assert (tmp_path / "new").read_bytes() == (tmp_path / "wanted").read_bytes()
    assert digest == sha256(tmp_path / "new") and sorted(asked) == ["a", "b", "c"]
    with pytest.raises(UserError, match=r"b is F32 \[5, 7\], expected F16 \[5, 7\]"):
        rewrite_safetensors(tmp_path / "old", tmp_path / "other", lambda name: new.half() if name == "b" else None)
    (tmp_path / "cut").write_bytes((tmp_path / "old").read_bytes()[:-1])
    with pytest.raises(UserError, match="cut is not whole: it ends before its last tensor"):
        rewrite_safetensors(tmp_path / "cut", tmp_path / "other", lambda name: None)
