"""Folders that check themselves: every changed bit and every renamed tensor is found, by loading and by the command."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, ROOT, forget_checksums
from random_gptq import write_gptq, write_lota_adapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from LoTA import UserError
from LoTA.adapter import load_live, load_merged
from LoTA.adapter_folder import ADAPTER_FILES, LOTA_CONFIG, AdapterFolder, LotaConfig, check_resumable
from LoTA.check import check_folder
from LoTA.export.run import export, opened
from LoTA.export.shared import MARKER
from LoTA.folders import GPTQFolder, MergedFolder
from LoTA.lota_merge import merge_folders
from LoTA.storage import checksums, files_below, sha256

OLD = ROOT / "tests/fixtures/old"
NORM = "model.norm.weight"


@pytest.fixture
def gptq(tmp_path):
    return write_gptq(tmp_path / "gptq", LAYERS, other_tensors={NORM: torch.ones(64)})


@pytest.fixture
def adapter(tmp_path, gptq):
    """A random adapter, with the record that training writes."""
    folder = write_lota_adapter(tmp_path / "adapter", gptq)
    fingerprint, fingerprint_all = GPTQFolder(gptq).fingerprints()
    LotaConfig(**{**vars(LotaConfig.load(folder)), "fingerprint": fingerprint, "fingerprint_all": fingerprint_all,
                  "quantized_model_dir": str(gptq)}).save_adapter(folder)
    return folder


@pytest.fixture
def merged(tmp_path, gptq, adapter):
    merge_folders(AdapterFolder(adapter), GPTQFolder(gptq), tmp_path / "merged")
    return tmp_path / "merged"


def flip(file, place):
    """Flips one bit of a file. place: from 0, the first byte, to 1, the last one."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def means(text):
    """The content of JSON, or None."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def rename(file, old, new):
    """Renames a tensor in a safetensors file, as one changed letter in its header does."""
    assert len(old) == len(new) and file.read_bytes().count(f'"{old}"'.encode()) == 1
    file.write_bytes(file.read_bytes().replace(f'"{old}"'.encode(), f'"{new}"'.encode()))


# --- checksums ----------------------------------------------------------------------------------------------------

def test_the_recorded_checksums_are_those_of_all_files(merged, adapter, gptq):
    for folder, root, names in ((merged / "lota", merged, set(files_below(merged)) - {"lota/lota_config.json"}),
                                (adapter, adapter, set(ADAPTER_FILES))):
        assert LotaConfig.load(folder).sha256 == {name: sha256(root / name) for name in names}
        assert LOTA_CONFIG in json.loads((folder / LOTA_CONFIG).read_text())["sha256"]
    assert {"lota/offsets.safetensors", *(file.name for file in gptq.iterdir())} <= set(
        MergedFolder(merged).lota.sha256)


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 1])
@pytest.mark.parametrize("name", ["model.safetensors", "lota/offsets.safetensors", "lota/lota_config.json",
                                  "config.json", "quantize_config.json"])
def test_a_flipped_bit_in_a_merged_folder_is_found(merged, name, place):
    """Wherever it is. Opening, loading and exporting refuse the folder, and the command says it."""
    assert check_folder(merged).findings == []
    MergedFolder(merged).require_whole()
    flip(merged / name, place)
    assert check_folder(merged).findings
    with pytest.raises((UserError, SafetensorError)):
        load_merged(MergedFolder(merged))
    with pytest.raises((UserError, SafetensorError)), opened(merged, "dense"):
        pass


def test_no_changed_character_of_the_record_is_read(merged):
    """Not in a key either: a record whose "sha256" is called otherwise is no record of an older version."""
    file = merged / "lota/lota_config.json"
    text, paths = file.read_text(), json.loads(file.read_text())["quantized_model_dir"]
    for place in range(0, len(text), 7):
        changed = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1:]
        file.write_text(changed)
        if paths not in changed or text[place].isspace() or means(changed) == means(text):
            continue                    # a folder's path may change; spaces and a number's 18th digit mean nothing
        with pytest.raises(UserError):
            MergedFolder(merged).require_whole()


def test_no_changed_character_of_an_exports_record_passes(gptq, tmp_path):
    """Nor another type, nor a list. A record without a checksum of its own is older, and passes."""
    plain = AdapterFolder(write_lota_adapter(tmp_path / "plain", gptq, residual=False))
    merge_folders(plain, GPTQFolder(gptq), tmp_path / "merged")
    export(tmp_path / "merged", "gptq", tmp_path / "out")
    file = tmp_path / "out" / MARKER
    text, record = file.read_text(), json.loads(file.read_text())
    assert check_folder(tmp_path / "out").findings == []
    for place in range(0, len(text), 5):
        if not text[place].isspace():               # spaces mean nothing
            file.write_text(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1:])
            assert check_folder(tmp_path / "out").findings, text[place:][:20]
    for content in ([], {**record, "verified": 1}, {**record, "sha256": []}):
        file.write_text(json.dumps(content))
        assert len(check_folder(tmp_path / "out").findings) == 1
    record["sha256"].pop(MARKER)
    file.write_text(json.dumps(record))
    assert check_folder(tmp_path / "out").findings == []


@pytest.mark.parametrize("name", [*ADAPTER_FILES, LOTA_CONFIG])
def test_a_changed_adapter_is_refused(adapter, gptq, tmp_path, name):
    """In all three files. Its record is protected too, but for the paths of its models, which move."""
    file = adapter / name
    file.write_text(file.read_text().replace('"omega": 3.0', '"omega": 2.0').replace('"r": 8,', '"r":  8,')) \
        if name.endswith(".json") else flip(file, 1)
    assert len(check_folder(adapter).findings) == 1
    message = "other content than" if name == LOTA_CONFIG else f"{name} has other bytes"
    for use in (lambda: merge_folders(AdapterFolder(adapter), GPTQFolder(gptq), tmp_path / "m"),
                lambda: load_live(AdapterFolder(adapter), gptq)):
        with pytest.raises(UserError, match=message):
            use()
    assert not (tmp_path / "m").exists()


def test_a_record_is_read_once(merged, adapter, monkeypatch):
    read, read_text = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *args: read.append(self.name) or read_text(self, *args))
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.name))
    for folder in (merged, adapter):
        read.clear()
        MergedFolder(merged) if folder == merged else AdapterFolder(adapter)
        assert read.count(LOTA_CONFIG) == 1 and read.count("adapter_config.json") == (folder == adapter)


def test_a_moved_base_is_no_change(adapter, gptq, tmp_path):
    record = adapter / LOTA_CONFIG
    record.write_text(record.read_text().replace(str(gptq), str(tmp_path / "moved")))
    gptq.rename(tmp_path / "moved")
    assert check_folder(adapter).findings == [] and check_folder(adapter).notes == []
    merge_folders(AdapterFolder(adapter), GPTQFolder(tmp_path / "moved"), tmp_path / "merged")


def test_files_that_came_or_went(merged):
    """A model card may be edited. The command names every file; loading refuses what it would load."""
    (merged / "README.md").write_text("mine")
    (merged / "notes.txt").write_text("mine")
    MergedFolder(merged).require_whole()
    assert "notes.txt was not there when the folder was written" in check_folder(merged).findings
    shutil.copyfile(merged / "lota/offsets.safetensors", merged / "extra.safetensors")
    with pytest.raises(UserError, match="extra.safetensors was not there"):
        MergedFolder(merged).require_whole()
    (merged / "extra.safetensors").unlink()
    (merged / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is missing; copy the folder again or merge again"):
        MergedFolder(merged).require_whole()


def test_an_unchanged_file_is_read_once(merged, monkeypatch):
    """Within a process. A file that changed is read again, also where its size and its time of change are as before."""
    file, read = merged / "model.safetensors", []
    now = os.stat(file).st_ctime_ns
    monkeypatch.setattr("LoTA.storage.time.time_ns", lambda: now + 10**10)
    monkeypatch.setattr("LoTA.storage.sha256", lambda path, progress: read.append(path) or sha256(path))
    first = checksums(merged, ["model.safetensors"])
    assert checksums(merged, ["model.safetensors"]) == first and read == [file]
    before = os.stat(file)
    while os.stat(file).st_ctime_ns == before.st_ctime_ns:
        flip(file, 1)
        flip(file, 1)
    flip(file, 1)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert checksums(merged, ["model.safetensors"]) != first and len(read) == 2


# --- names, shapes, dtypes ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("file, old, new", [
    ("model.safetensors", "model.layers.0.mlp.down_proj.qweight", "model.layers.0.mlp.down_proj.qweighu"),
    ("model.safetensors", "model.layers.0.mlp.down_proj.qzeros", "model.layers.0.mlp.down_proj.qzeror"),
    ("model.safetensors", "model.layers.0.mlp.down_proj.qweight", "model.layers.0.mlp.down_prok.qweight"),
    ("lota/offsets.safetensors", "model.layers.0.mlp.down_proj.offset", "model.layers.0.mlp.down_prok.offset"),
    ("lota/offsets.safetensors", "model.layers.0.mlp.down_proj.offset", "model.layers.0.mlp.down_proj.offseu")])
def test_a_renamed_tensor_is_found_without_checksums(merged, file, old, new):
    """As in folders that were made before: no layer and no offset is dropped."""
    forget_checksums(merged / "lota")
    assert check_folder(merged).findings == []
    MergedFolder(merged).require_whole()
    rename(merged / file, old, new)
    assert check_folder(merged).findings
    with pytest.raises(UserError):
        MergedFolder(merged).require_whole()


def test_a_renamed_norm_is_found_beside_the_base(merged):
    """Nothing in the folder says what its tensors are called, and its GPTQ model does."""
    forget_checksums(merged / "lota")
    rename(merged / "model.safetensors", NORM, "model.norn.weight")
    assert [finding.split()[0] for finding in check_folder(merged).findings] == [NORM, "model.norn.weight"]


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_renamed_matrix_of_an_adapter_is_found(adapter, gptq, tmp_path, letter):
    forget_checksums(adapter)
    name = f"base_model.model.model.layers.0.mlp.down_proj.lora_{letter}.weight"
    rename(adapter / "adapter_model.safetensors", name, name.replace("weight", "weighu"))
    finding, = check_folder(adapter).findings
    assert f"lora_{letter}.weighu is not supported" in finding
    with pytest.raises(UserError, match=f"lora_{letter}.weighu is not supported"):
        merge_folders(AdapterFolder(adapter), GPTQFolder(gptq), tmp_path / "merged")


@pytest.mark.parametrize("tensor, change, message", [
    ("qweight", lambda t: t[:-1], r"shape is \(9, 64\), not \(10, 64\)"),
    ("scales", lambda t: t.double(), "dtype is F64, not F16 or BF16 or F32"),
    ("qzeros", lambda t: t.float(), "dtype is F32, not I32"), ("g_idx", lambda t: t + 1, "it names 3")])
def test_misfits_of_a_gptq_model(gptq, tensor, change, message):
    assert check_folder(gptq).findings == []
    tensors = load_file(gptq / "model.safetensors")
    name = f"model.layers.0.mlp.down_proj.{tensor}"
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, gptq / "model.safetensors")
    finding, = check_folder(gptq).findings
    assert re.search(f"{tensor} is wrong: .*{message}", finding)


# --- the base's fingerprint ---------------------------------------------------------------------------------------

def change_norm(gptq):
    tensors = load_file(gptq / "model.safetensors")
    tensors[NORM][0] += 1
    save_file(tensors, gptq / "model.safetensors")


def test_a_base_with_another_norm_is_refused(adapter, merged, gptq, tmp_path):
    """The quantized tensors are the same, so the fingerprint of those alone says nothing."""
    before = GPTQFolder(gptq).fingerprint()
    assert MergedFolder(merged).lota.fingerprint_all == LotaConfig.load(adapter).fingerprint_all
    change_norm(gptq)
    source, config = GPTQFolder(gptq), LotaConfig.load(adapter)
    assert source.fingerprint() == source.fingerprints()[0] == before == config.fingerprint
    assert source.fingerprints()[1].startswith("all:") and source.fingerprints()[1] != config.fingerprint_all
    with pytest.raises(UserError, match="trained on other embeddings, norms or biases .*fingerprints differ"):
        merge_folders(AdapterFolder(adapter), source, tmp_path / "again")
    for folder in (adapter, merged):
        finding, = check_folder(folder).findings
        assert "other embeddings, norms or biases than those" in finding
    changed = LotaConfig(**{**vars(config), "fingerprint_all": source.fingerprints()[1]})
    with pytest.raises(UserError, match="its embeddings, norms or biases are others"):
        check_resumable(adapter, changed)


def test_old_fingerprints_are_compared_as_before(gptq, tmp_path):
    """32 hexadecimal digits over the quantized tensors: another norm passes, another integer does not."""
    adapter = AdapterFolder(write_lota_adapter(tmp_path / "adapter", gptq))
    assert len(adapter.config.fingerprint) == 32 and adapter.config.fingerprint_all is None
    change_norm(gptq)
    adapter.check_match(GPTQFolder(gptq))
    tensors = load_file(gptq / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.qweight"][0, 0] ^= 1
    save_file(tensors, gptq / "model.safetensors")
    with pytest.raises(UserError, match="trained on other GPTQ weights"):
        adapter.check_match(GPTQFolder(gptq))


def test_other_settings_files_of_the_base_are_named(trained, tmp_path, capsys):
    """Its tensors are the same. A changed template changes the prompts, and the line says which file it is."""
    base = shutil.copytree(LotaConfig.load(trained).quantized_model_dir, tmp_path / "base")
    adapter, names = AdapterFolder(trained), set(LotaConfig.load(trained).base_files)
    assert {"config.json", "quantize_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    adapter.check_match(GPTQFolder(base))
    assert "changed" not in capsys.readouterr().out
    flip(base / "tokenizer_config.json", 0.5)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    adapter.check_match(GPTQFolder(base))
    assert capsys.readouterr().out == (
        f"{base}: chat_template.jinja, tokenizer_config.json changed after the adapter was trained; prompts or results "
        "may be others\n")


# --- cards --------------------------------------------------------------------------------------------------------

def test_a_merged_folder_has_a_card(merged, gptq, tmp_path):
    """Base, method, settings, what moved, where the checksums are, how it is loaded. A source's own is replaced."""
    moved = MergedFolder(merged).lota.training["moved"]["all"]
    card = (merged / "README.md").read_text()
    for text in ("base_model: gptq", "# gptq, 4 bits, fine-tuned with LoTA", "| Omega | 3.0 |", "| Rank | 8 |",
                 "GPTQ, 4 bits, group size 32", f"{moved:.4%}", 'LTA(path="merged").load()', "`lota/lota_config.json`",
                 "Stock GPTQ tools refuse"):
        assert text in card, text
    (gptq / "README.md").write_text("of the source")
    plain = AdapterFolder(write_lota_adapter(tmp_path / "plain", gptq, residual=False))
    merge_folders(plain, GPTQFolder(gptq), tmp_path / "other")
    assert "a plain GPTQ checkpoint" in (tmp_path / "other/README.md").read_text()


def test_an_adapter_has_a_card(trained):
    """The run's folder and its checkpoints, instead of the form that PEFT leaves to be filled in."""
    for folder in (trained, trained / "checkpoint-4"):
        card, config = (folder / "README.md").read_text(), LotaConfig.load(folder)
        for text in ("library_name: peft", "fine-tuned with LoTA", "| Training data | viggo |", "| Omega | 4",
                     "| Sigma | 0.95, ", f'LTA(path="{folder.name}")', "`lota_config.json`"):
            assert text in card, text
        assert "More Information Needed" not in card
        state = {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"} if folder != trained else set()
        assert set(config.sha256) == {*ADAPTER_FILES, *state} and config.fingerprint_all.startswith("all:")
        assert check_folder(folder).findings == []
    moved = LotaConfig.load(trained).training["moved"]["all"]
    assert f"| Integer weights moved by the merge | {moved:.4%} |" in (trained / "README.md").read_text()


# --- the command --------------------------------------------------------------------------------------------------

def run(folder):
    return subprocess.run([sys.executable, "-m", "LoTA.check", str(folder)], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_the_command(merged):
    done = run(merged)
    assert done.returncode == 0 and done.stdout == f"whole: {len(files_below(merged))} files\n", done.stderr
    flip(merged / "model.safetensors", 1)
    failed = run(merged)
    assert failed.returncode == 1
    assert failed.stdout == "model.safetensors has other bytes than those that were written\n"
    nowhere = run(merged / "nowhere")
    assert nowhere.returncode == 1 and nowhere.stderr.startswith("error: ") and nowhere.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["published", "published/checkpoint-4", "learned", "lora", "qalora", "residual_false",
                                  "merged_published", "merged_learned", "merged_plain", "gptq"])
def test_old_folders_have_nothing_to_compare_with(name):
    """And nothing is wrong with them."""
    report = check_folder(OLD / name)
    assert report.findings == [] and report.files >= 1
    assert "no checksums" in report.notes[0]
