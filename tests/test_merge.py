"""The merge of folders: its integers and offsets against the oracle, what it refuses, what it leaves behind."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import LAYERS, PREFIX, ROOT, write_adapter, write_gptq
from oracle import merge as oracle_merge
from oracle import unpack_columns
from safetensors import safe_open
from safetensors.torch import load_file

from LoTA import UserError, lota_merge
from LoTA.folders import GPTQFolder, MergedFolder, overwrite_tensor, whole_folder
from LoTA.ternary import Grid


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_merge_is_the_oracles(tmp_path, bits, desc_act, shards):
    """Integers equal, mu to float32 rounding, every other tensor and file as it was."""
    gptq = write_gptq(tmp_path / "gptq", bits, desc_act=desc_act, shards=shards)
    adapter = write_adapter(tmp_path / "adapter", gptq)
    moved = lota_merge.merge_folders(adapter, gptq, tmp_path / "merged")
    source, merged = GPTQFolder(gptq), MergedFolder(tmp_path / "merged")
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


def test_originals_are_not_touched(tmp_path):
    gptq = write_gptq(tmp_path / "gptq")
    adapter = write_adapter(tmp_path / "adapter", gptq)
    before = {f: f.read_bytes() for folder in (gptq, adapter) for f in folder.iterdir()}
    lota_merge.merge_folders(adapter, gptq, tmp_path / "merged")
    assert {f: f.read_bytes() for folder in (gptq, adapter) for f in folder.iterdir()} == before


def test_without_offset_it_is_a_plain_gptq_folder(tmp_path):
    """Config files byte for byte as they were, no offsets file."""
    gptq = write_gptq(tmp_path / "gptq")
    adapter = write_adapter(tmp_path / "adapter", gptq, residual=False)
    lota_merge.merge_folders(adapter, gptq, tmp_path / "merged")
    for name in ("quantize_config.json", "config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (gptq / name).read_bytes()
    assert not list(tmp_path.glob("merged/lota/*.safetensors"))


def test_with_offset_both_config_files_name_our_format(tmp_path):
    gptq = write_gptq(tmp_path / "gptq")
    lota_merge.merge_folders(write_adapter(tmp_path / "adapter", gptq), gptq, tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "lota_gptq"
    assert json.loads((tmp_path / "merged/quantize_config.json").read_text())["checkpoint_format"] == "lota_gptq"


def test_another_gptq_model_is_refused_by_its_fingerprint(tmp_path):
    """One integer of one layer differs: same shapes, same names, another model."""
    gptq = write_gptq(tmp_path / "gptq")
    adapter = write_adapter(tmp_path / "adapter", gptq)
    other = shutil.copytree(gptq, tmp_path / "other")
    name = "model.layers.0.mlp.down_proj.qweight"
    qweight = GPTQFolder(other).tensor(name)
    qweight[0, 0] ^= 1
    overwrite_tensor(other / "model.safetensors", name, qweight)
    with pytest.raises(UserError, match="fingerprint"):
        lota_merge.merge_folders(adapter, other, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_does_not_belong_together_is_refused(tmp_path):
    gptq = write_gptq(tmp_path / "gptq", bits=4)
    adapter = write_adapter(tmp_path / "adapter", gptq)
    with pytest.raises(UserError, match="trained on 4 bits"):
        lota_merge.merge_folders(adapter, write_gptq(tmp_path / "other", bits=2), tmp_path / "m")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(UserError, match="rank"):
        lota_merge.merge_folders(adapter, gptq, tmp_path / "m")
    with pytest.raises(UserError, match="not an adapter folder"):
        lota_merge.merge_folders(gptq, gptq, tmp_path / "m")
    with pytest.raises(UserError, match="not a model folder"):
        lota_merge.merge_folders(write_adapter(tmp_path / "a2", gptq), tmp_path, tmp_path / "m")


def test_merging_into_a_merged_folder_is_refused(tmp_path):
    gptq = write_gptq(tmp_path / "gptq")
    adapter = write_adapter(tmp_path / "adapter", gptq, residual=False)
    lota_merge.merge_folders(adapter, gptq, tmp_path / "merged")
    with pytest.raises(UserError, match="merged LoTA folder"):
        lota_merge.merge_folders(adapter, tmp_path / "merged", tmp_path / "again")


def test_an_adapter_that_is_not_ternary_is_refused(tmp_path):
    from safetensors.torch import save_file
    gptq = write_gptq(tmp_path / "gptq")
    adapter = write_adapter(tmp_path / "adapter", gptq)
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = 0.5
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not ternary"):
        lota_merge.merge_folders(adapter, gptq, tmp_path / "merged")


def test_an_output_folder_that_is_not_ours_is_refused_and_ours_is_replaced(tmp_path):
    gptq = write_gptq(tmp_path / "gptq")
    adapter = write_adapter(tmp_path / "adapter", gptq)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not made by this project"):
        lota_merge.merge_folders(adapter, gptq, theirs)
    assert (theirs / "thesis.txt").read_text() == "years of work"
    for _ in range(2):
        lota_merge.merge_folders(adapter, gptq, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "gptq", "merged", "theirs"]


def test_a_failure_in_the_middle_leaves_the_old_folder_and_no_rest(tmp_path, monkeypatch):
    """As when the disk is full: the second layer's write fails."""
    gptq = write_gptq(tmp_path / "gptq")
    adapter = write_adapter(tmp_path / "adapter", gptq)
    lota_merge.merge_folders(adapter, gptq, tmp_path / "merged")
    before = {f: f.read_bytes() for f in (tmp_path / "merged").rglob("*") if f.is_file()}
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(lota_merge, "overwrite_tensor", full)
    with pytest.raises(OSError, match="No space left"):
        lota_merge.merge_folders(adapter, gptq, tmp_path / "merged")
    assert {f: f.read_bytes() for f in (tmp_path / "merged").rglob("*") if f.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "gptq", "merged"]


@pytest.mark.parametrize("damage, message", [
    ("integer", "differ"), ("offset", "differ"), ("scales", "must not touch"), ("learned scales", "differ")])
def test_the_verification_catches_damage(tmp_path, damage, message):
    """A merged folder with one number changed does not pass."""
    from safetensors.torch import save_file
    gptq = write_gptq(tmp_path / "gptq")
    adapter = write_adapter(tmp_path / "adapter", gptq, learned_scales=damage == "learned scales")
    folder = tmp_path / "merged"
    lota_merge.merge_folders(adapter, gptq, folder)
    name = "model.layers.0.mlp.down_proj"
    source, merged = GPTQFolder(gptq), MergedFolder(folder)
    config, tensors = merged.lota, lota_merge.AdapterTensors(adapter)
    merge_layer = lota_merge.layer_merger(adapter, config, tensors)
    lota_merge.verify_folders(tensors, source, merged, merge_layer)
    if damage == "integer":
        qweight = merged.tensor(f"{name}.qweight")
        qweight[3, 3] ^= 1
        overwrite_tensor(folder / "model.safetensors", f"{name}.qweight", qweight)
    elif damage == "offset":
        offsets = load_file(folder / "lota/offsets.safetensors")
        offsets[f"{name}.offset"][0, 0] += 1e-3
        save_file(offsets, folder / "lota/offsets.safetensors")
    else:
        everything = load_file(folder / "model.safetensors")
        everything[f"{name}.scales"][0, 0] *= 2
        save_file(everything, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=message):
        lota_merge.verify_folders(tensors, source, MergedFolder(folder), merge_layer)


@pytest.mark.parametrize("residual", [True, False])
def test_learned_scales_become_the_checkpoints_own(tmp_path, residual):
    """The merged scales are s * (1 + change) in float16; integers, zeros and offsets those of the merge without them;
    without an offset the folder is a plain GPTQ checkpoint."""
    gptq = write_gptq(tmp_path / "gptq", bits=3, shards=2)
    folders = []
    for learned in (True, False):
        adapter = write_adapter(tmp_path / f"adapter_{learned}", gptq, residual=residual, learned_scales=learned)
        folders.append(tmp_path / f"merged_{learned}")
        shares = lota_merge.merge_folders(adapter, gptq, folders[-1])
        assert shares["all"] > 0
    learned, plain = map(MergedFolder, folders)
    changes = load_file(tmp_path / "adapter_True/adapter_model.safetensors")
    for name in plain.modules:
        change = changes[f"{PREFIX}{name}.lora_scale"].double()
        want = (GPTQFolder(gptq).tensor(f"{name}.scales").double() * (1 + change)).half()
        got = learned.tensor(f"{name}.scales")
        assert got.dtype == torch.float16 and torch.allclose(got.double(), want.double(), rtol=1e-3)
        assert not torch.equal(got, plain.tensor(f"{name}.scales"))
        for t in ("qweight", "qzeros", "g_idx"):
            assert torch.equal(learned.tensor(f"{name}.{t}"), plain.tensor(f"{name}.{t}"))
        assert not residual or torch.equal(learned.offset(name), plain.offset(name))
    config = json.loads((folders[0] / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == ("lota_gptq" if residual else "gptq")


def test_published_scripts_adapter_loads_by_its_name_alone(tmp_path):
    """No lota_config.json: bits, omega and method come from the folder's name."""
    gptq = write_gptq(tmp_path / "gptq", bits=4)
    with_config = write_adapter(tmp_path / "with_config", gptq, omega=3)
    named = write_adapter(tmp_path / "8B_int4_LoTA_3_0.950_0.999_alpaca_1234_20480_05_101112", gptq, with_config=False)
    lota_merge.merge_folders(with_config, gptq, tmp_path / "one")
    lota_merge.merge_folders(named, gptq, tmp_path / "two")
    one, two = MergedFolder(tmp_path / "one"), MergedFolder(tmp_path / "two")
    assert (two.lota.method, two.lota.omega, two.lota.bits, two.lota.data_set) == ("LoTA", 3.0, 4, "alpaca")
    assert one.fingerprint() == two.fingerprint() != GPTQFolder(gptq).fingerprint()
    wrong_bits = write_adapter(tmp_path / "8B_int2_LoTA_3_0.950_0.999_alpaca_1_2_3", gptq, with_config=False)
    with pytest.raises(UserError, match="2 bits"):
        lota_merge.merge_folders(wrong_bits, gptq, tmp_path / "three")


@pytest.mark.parametrize("change, message", [
    ({"bits": 5}, "5 bits"), ({"quant_method": "awq"}, "not a GPTQ model"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'")])
def test_folders_of_other_kinds_are_refused(tmp_path, change, message):
    gptq = write_gptq(tmp_path / "gptq")
    config = json.loads((gptq / "quantize_config.json").read_text())
    (gptq / "quantize_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        GPTQFolder(gptq)


def test_a_missing_shard_is_refused(tmp_path):
    gptq = write_gptq(tmp_path / "gptq", shards=2)
    (gptq / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        GPTQFolder(gptq)


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


def test_command_line(tmp_path):
    """It runs alone, finds the GPTQ folder in the adapter, prints the share moved; mistakes are one line, status 1."""
    gptq = write_gptq(tmp_path / "gptq")
    adapter = write_adapter(tmp_path / "adapter", gptq)

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


def test_zeros_and_scales_of_the_grid_are_the_files(tmp_path):
    """Grid reads the "gptq" format's zeros as stored plus one."""
    for form, plus in (("gptq", 1), ("gptq_v2", 0)):
        gptq = GPTQFolder(write_gptq(tmp_path / form, bits=4, checkpoint_format=form))
        name = "model.layers.0.self_attn.q_proj"
        tensors = [gptq.tensor(f"{name}.{t}") for t in ("qweight", "qzeros", "scales", "g_idx")]
        grid = Grid(*tensors, 4, form)
        stored = unpack_columns(tensors[1].t().contiguous(), 4, 48).t()
        assert torch.equal(grid.zeros.long(), stored + plus)
