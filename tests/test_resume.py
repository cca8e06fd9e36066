"""Interrupted and resumed runs: exact in any epoch, refused where they would be another run, never half a folder.

All on the small GPTQ model of tests/fixtures/old: 40 rows, so 3 steps of 2 x 8 rows are one epoch.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, forget_checksums, parse
from datasets import Dataset
from safetensors.torch import load_file, save_file

import LoTA_QAF_main
from LoTA import UserError, run_script, settings
from LoTA.adapter_folder import MAY_DIFFER, OLD_RECIPE_NAMES, AdapterFolder, LotaConfig, check_resumable
from LoTA.check import check_folder
from LoTA.folders import GPTQFolder
from LoTA.lota_merge import merge_folders
from LoTA.storage import sha256
from LoTA.trainer import LossGuard, data_fingerprint, remedy_for

OLD = ROOT / "tests/fixtures/old"
FLAGS = ("--mode", 1, "--quantized_model_dir", OLD / "gptq", "--pretrained", "base", "--data_dir", OLD / "data",
         "--training_data_name", "viggo", "--lora_r", 4, "--train_batch_size", 8, "--gradient_accumulation_steps", 2,
         "--debug_number", 40, "--dtype", "float32", "--device_map", "cpu", "--gradient_checkpointing", False,
         "--max_steps", 12, "--save_number", 12, "--save_total_limit", 12, "--logging_steps", 3, "--prompt_layout",
         "system")
FULL = ("--method", "lota", "--recipe", "full", "--interval_point", 1)
METHODS = {
    "published": ("--method", "lota", "--interval_point", 2),
    "ternary": ("--method", "lota", "--recipe", "ternary", "--interval_point", 1),
    "full": FULL,
    "lrqat": ("--method", "lrqat", "--learning_rate", 1e-2),
    "lrqat full": ("--method", "lrqat", "--recipe", "full", "--learning_rate", 1e-2, "--lr_scheduler_type", "cosine"),
    "lora": ("--method", "lora", "--learning_rate", 1e-2, "--lora_dropout", 0.1, "--lr_scheduler_type", "cosine"),
    "qalora": ("--method", "qalora", "--learning_rate", 1e-2)}


def train(folder, *flags):
    """The adapter folder of mode 1."""
    base, training, _ = parse(*FLAGS, "--adapter_path", folder, *flags)
    return LoTA_QAF_main.train(base, training)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A function (method) -> the folder of a run that nothing interrupted, with a checkpoint at each of 12 steps."""
    made = {}

    def whole(method):
        if method not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("LoTA.monitor.DETAILED_STEPS", 3)         # detailed metrics every 4 steps
                made[method] = train(tmp_path_factory.mktemp(method), *METHODS[method])
        return made[method]
    return whole


# --- exact --------------------------------------------------------------------------------------------------------

TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def logged(folder):
    """Everything that the run logged but times."""
    return [{name: value for name, value in row.items() if name not in TIMES}
            for row in json.loads((folder / "log_history.json").read_text())]


@pytest.mark.parametrize("method, step", [*((method, 5) for method in METHODS), ("published", 8), ("full", 2),
                                          ("full", 3), ("lrqat full", 2),
                                          ("lora", 2), ("lora", 3), ("lora", 8)])
def test_a_resumed_run_ends_as_the_run_that_was_not_interrupted(whole, tmp_path, monkeypatch, method, step):
    """Inside the first epoch (2), between two (3), inside the second (5) and the third (8). No checkpoint but 3 is at
    a logging step, so the loss of the next logged step has parts from before."""
    monkeypatch.setattr("LoTA.monitor.DETAILED_STEPS", 3)
    adapter = whole(method)
    resumed = train(tmp_path, *METHODS[method], "--adapter_ckpt", adapter / f"checkpoint-{step}")
    assert sha256(resumed / "adapter_model.safetensors") == sha256(adapter / "adapter_model.safetensors")
    assert logged(resumed) == logged(adapter)
    one, other = LotaConfig.load(resumed).training, LotaConfig.load(adapter).training
    for fact in ("data", "steps", "loss"):
        assert one[fact] == other[fact]
    before = LotaConfig.load(adapter / f"checkpoint-{step}").training["runtime_s"]
    assert one["runtime_s"] > before > 0


def test_a_run_is_resumed_twice(whole, tmp_path, monkeypatch):
    """Also from a checkpoint of a resumed run; the sums go on."""
    monkeypatch.setattr("LoTA.monitor.DETAILED_STEPS", 3)
    adapter = whole("full")
    once = train(tmp_path / "a", *FULL, "--adapter_ckpt", adapter / "checkpoint-2")
    twice = train(tmp_path / "b", *FULL, "--adapter_ckpt", once / "checkpoint-8")
    assert sha256(twice / "adapter_model.safetensors") == sha256(adapter / "adapter_model.safetensors")
    assert logged(twice) == logged(adapter)
    times = [LotaConfig.load(folder).training["runtime_s"]
             for folder in (adapter / "checkpoint-2", once / "checkpoint-8", twice)]
    assert 0 < times[0] < times[1] < times[2]


def test_every_epoch_has_an_order_of_its_own():
    """The rows of an epoch are all rows, and another seed or epoch draws them in another order."""
    from LoTA.trainer import EpochSampler
    lengths = [7, 3, 9, 4, 4, 8, 1, 2] * 5
    orders = [list(EpochSampler(4, lengths, seed, lambda epoch=epoch: epoch)) for seed in (1, 5) for epoch in (1, 2, 3)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len(set(map(tuple, orders))) == 6


def test_loss_and_runtime_cover_the_whole_run(whole, tmp_path):
    """train_loss is the mean over all 12 steps, the runtime is the sum of the parts, the rates are of the whole."""
    adapter = whole("lora")
    checkpoint = shutil.copytree(adapter / "checkpoint-8", tmp_path / "checkpoint-8")
    record = LotaConfig.load(checkpoint)
    record.training.update(runtime_s=1000.0, peak_mb=1e9)
    record.save(checkpoint)
    resumed = train(tmp_path / "a", *METHODS["lora"], "--adapter_ckpt", checkpoint)
    rows = json.loads((resumed / "log_history.json").read_text())
    losses = [row["loss"] for row in rows if "loss" in row]
    assert rows[-1]["train_loss"] == pytest.approx(sum(losses) / 4) and len(losses) == 4
    assert 1000 < rows[-1]["train_runtime"] < 1100
    assert rows[-1]["train_steps_per_second"] == pytest.approx(12 / rows[-1]["train_runtime"], abs=1e-3)
    outcome = LotaConfig.load(resumed).training
    assert 1000 < outcome["runtime_s"] < 1100 and outcome["peak_mb"] == 1e9 and "loss_sum" not in outcome


def kinds(folder):
    """{"A and B": the dtypes of these tensors, "others": those of all others} in an adapter folder."""
    dtypes = {"A and B": set(), "others": set()}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        dtypes["A and B" if "weight" in name else "others"].add(tensor.dtype)
    return dtypes


def test_the_dtypes_on_disk(whole):
    """Ternary matrices take a byte, also in checkpoints. All that is real stays float32, and so do other methods."""
    for folder in (whole("full"), whole("full") / "checkpoint-5"):
        assert kinds(folder) == {"A and B": {torch.int8}, "others": {torch.float32}}
    for method in ("lora", "qalora"):
        assert kinds(whole(method)) == {"A and B": {torch.float32}, "others": set()}


def test_a_checkpoint_with_float_matrices_resumes(whole, tmp_path):
    """As versions before wrote it."""
    adapter = whole("full")
    checkpoint = shutil.copytree(adapter / "checkpoint-5", tmp_path / "checkpoint-5")
    file = checkpoint / "adapter_model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    forget_checksums(checkpoint)
    resumed = train(tmp_path / "a", *FULL, "--adapter_ckpt", checkpoint)
    assert sha256(resumed / "adapter_model.safetensors") == sha256(adapter / "adapter_model.safetensors")


def test_the_newest_checkpoints_stay(whole, tmp_path):
    """The resumed run may keep another number of them."""
    adapter = train(tmp_path / "a", *FULL, "--adapter_ckpt", whole("full") / "checkpoint-5", "--save_total_limit", 2)
    assert sorted(p.name for p in adapter.glob("checkpoint-*")) == ["checkpoint-11", "checkpoint-12"]
    check_resumable(adapter / "checkpoint-11", LotaConfig.load(whole("full")))


def test_a_kill_while_an_old_checkpoint_is_removed(whole, tmp_path, monkeypatch):
    """The newest is whole by then, and what is left of the old one is refused."""
    def killed(folder):
        raise RuntimeError("killed")
    monkeypatch.setattr("LoTA.trainer.shutil", SimpleNamespace(rmtree=killed))
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "a", *FULL, "--save_total_limit", 1)
    run, = (tmp_path / "a").iterdir()
    with pytest.raises(UserError, match="adapter_model.safetensors is missing"):
        check_resumable(run / "checkpoint-1", LotaConfig.load(whole("full")))
    check_resumable(run / "checkpoint-2", LotaConfig.load(whole("full")))


def test_logging_and_saving_follow_the_flags_of_the_resumed_run(whole, tmp_path):
    """Trainer would take both from the checkpoint."""
    resumed = train(tmp_path, *METHODS["lora"], "--adapter_ckpt", whole("lora") / "checkpoint-8", "--logging_steps", 2,
                    "--save_number", 2, "--max_steps", 14)
    rows = json.loads((resumed / "log_history.json").read_text())
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 10, 12, 14]
    assert sorted(p.name for p in resumed.glob("checkpoint-*")) == ["checkpoint-14"]


def test_a_checkpoint_without_the_new_records_resumes(whole, tmp_path):
    """What it does not record is not compared, and the adapter is the same. But for two settings: older versions had no
    limit on flips and no warm-up, so that a resumed run must have none either."""
    adapter = whole("full")
    checkpoint = shutil.copytree(adapter / "checkpoint-5", tmp_path / "checkpoint-5")
    forget_checksums(checkpoint)
    record = json.loads((checkpoint / "lota_config.json").read_text())
    assert record.pop("complete") is True
    record |= {"training": {}, "settings": {"recipe": "learned"}}
    (checkpoint / "lota_config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="its --flip_limit is inf, not 1.0; its --warm_up is 0.0, not 0.1"):
        train(tmp_path / "a", *FULL, "--adapter_ckpt", checkpoint)
    train(tmp_path / "b", *FULL, "--adapter_ckpt", checkpoint, "--flip_limit", "inf", "--warm_up", 0)
    record["settings"] |= {"flip_limit": 1.0, "warm_up": 0.1}
    (checkpoint / "lota_config.json").write_text(json.dumps(record))
    resumed = train(tmp_path / "c", *FULL, "--adapter_ckpt", checkpoint)
    assert sha256(resumed / "adapter_model.safetensors") == sha256(adapter / "adapter_model.safetensors")


# --- another run --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag, given, there", [
    ("train_batch_size", 4, 8), ("gradient_accumulation_steps", 4, 2), ("seed", 7, 42), ("filter_ratio", 0.5, 0.95),
    ("min_grad", 0.99, 0.999), ("filter_upper", 0.9995, 0.9999), ("momentum", 0.9, 0.0), ("offset_lr", 0.1, 0.007),
    ("scale_lr", 0.1, 0.03), ("flip_limit", 1.0, None), ("warm_up", 0.5, 0.0),
    ("train_ratio", 0.5, 1.0), ("debug_number", 24, 40), ("source_max_len", 8, 1024),
    ("target_max_len", 8, 256), ("recipe", "ternary", "published"), ("dtype", "bfloat16", "float32"),
    ("learning_rate", 1e-3, 1e-5), ("lr_scheduler_type", "linear", "constant"), ("lora_alpha", 4, 8),
    ("training_data_name", "sql", "viggo"), ("lora_target_modules", "q_proj", "[...]")])
def test_another_setting_is_refused_by_name(whole, tmp_path, monkeypatch, flag, given, there):
    """The error has the flag, the checkpoint's value and the given one. Nothing is loaded, nothing is written."""
    checkpoint = whole("published") / "checkpoint-5"
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]], "length": [2]})
    if flag == "training_data_name":                # the rows on disk are ViGGO's
        monkeypatch.setattr("data_print_save.prepare_dataset", lambda *args: rows)
    monkeypatch.setattr("LoTA.adapter.load_for_training", None)
    extra = ("--residual", True) if flag == "recipe" else ()         # the recipe's own is refused before
    there, given_text = ("['q_proj', 'k_proj'", "['q_proj']") if flag == "lora_target_modules" else (there, given)
    with pytest.raises(UserError) as error:
        train(tmp_path / "a", *METHODS["published"], "--adapter_ckpt", checkpoint, f"--{flag}", given, *extra)
    assert f"its --{flag} is {there}" in str(error.value) and f", not {given_text}" in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_all_other_settings_are_named_in_one_line(whole):
    """Case 20: several at once."""
    config = LotaConfig.load(whole("published"))
    config.settings.update(train_batch_size=4, seed=7, momentum=0.9)
    with pytest.raises(UserError, match="its --seed is 42, not 7; its --train_batch_size is 8, not 4; "
                                        "its --momentum is 0.0, not 0.9$"):
        check_resumable(whole("published") / "checkpoint-5", config)


def test_another_number_of_processes_is_refused(whole):
    """It is a factor of the batch. A checkpoint that does not say it is not compared."""
    config = LotaConfig.load(whole("published"))
    check_resumable(whole("published") / "checkpoint-5", config)
    config.training["processes"] = 2
    with pytest.raises(UserError, match="it was trained by 1 processes, not 2"):
        check_resumable(whole("published") / "checkpoint-5", config)


def test_what_may_differ_exists():
    """Every name but the recorded date is a flag, and the old names of recipes are those that the flag takes."""
    names = {f for group in (settings.baseConfig, settings.trainingConfig) for f in vars(group())}
    assert MAY_DIFFER - names == {"template_date"} and OLD_RECIPE_NAMES == settings.OLD_RECIPE_NAMES


def test_what_may_differ_does(whole, tmp_path):
    """A longer run, elsewhere, with other logging, saving and memory settings. Gradients are the same ones."""
    moved = shutil.copytree(OLD / "data", tmp_path / "data")
    resumed = train(tmp_path / "a", *METHODS["published"], "--adapter_ckpt", whole("published") / "checkpoint-5",
                    "--max_steps", 13, "--logging_steps", 1, "--save_strategy", "no", "--gradient_checkpointing", True,
                    "--data_dir", moved, "--report_to", "none", "--flash_attn", "eager", "--num_train_epochs", 1)
    assert LotaConfig.load(resumed).training["steps"] == 13


def test_other_rows_are_refused(whole, tmp_path):
    """The same flags, and one word of one row is another."""
    data = tmp_path / "data"
    data.mkdir()
    text = (OLD / "data/train.csv").read_text()
    (data / "train.csv").write_text(text.replace("a game called", "the game called", 1))
    with pytest.raises(UserError, match="the tokenized rows of --training_data_name viggo are others"):
        train(tmp_path / "a", *METHODS["published"], "--data_dir", data, "--adapter_ckpt",
              whole("published") / "checkpoint-5")
    assert not (tmp_path / "a").exists()


def test_the_fingerprint_of_the_rows():
    """Each token, each label, the order of the rows and where a row ends."""
    def of(ids, labels):
        return data_fingerprint(Dataset.from_dict({"input_ids": ids, "labels": labels}))
    rows = ([[1, 2], [3]], [[-100, 2], [3]])
    others = [([[1, 2], [4]], rows[1]), (rows[0], [[-100, -100], [3]]), ([[1], [2, 3]], [[-100], [2, 3]]),
              ([[3], [1, 2]], [[3], [-100, 2]])]
    assert of(*rows) == of(*rows) and len({of(*rows), *(of(*other) for other in others)}) == 5


# --- damaged ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, part, damage, message", [
    ("full", "lora_A", lambda t: t.view(-1)[:1].fill_(0.5), "A of .* is not ternary"),
    ("full", "lora_B", lambda t: t.view(-1)[:1].fill_(-2), "B of .* is not ternary"),
    ("full", "lora_offset", lambda t: t.view(-1)[:1].fill_(float("nan")), "lora_offset is not finite"),
    ("full", "lora_scale", None, "lora_scale is missing"),
    ("full", "lora_B", None, "lora_B.weight is missing"),
    ("lora", "lora_A", lambda t: t.view(-1)[:1].fill_(float("inf")), "lora_A.weight is not finite"),
    ("lora", "both", None, r"has the shape None there, \(.*\) here")])
def test_a_damaged_checkpoint_is_refused_before_training(whole, tmp_path, monkeypatch, method, part, damage, message):
    """One entry that no such adapter has, or a tensor that is gone, and no checksum tells. No step is taken."""
    checkpoint = shutil.copytree(whole(method) / "checkpoint-5", tmp_path / "checkpoint-5")
    forget_checksums(checkpoint)
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    module = AdapterFolder(checkpoint).modules[3]
    for name in [n for n in tensors if module in n and (part == "both" or part in n)]:
        tensors[name] = tensors[name].float()           # A and B are int8, which holds no 0.5
        damage(tensors[name]) if damage else tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    monkeypatch.setattr("transformers.Trainer.train", None)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "a", *METHODS[method], "--adapter_ckpt", checkpoint)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"])
def test_a_checkpoint_without_its_state_is_refused(whole, tmp_path, file):
    """Trainer would begin anew what is not there: the steps, sigma, the averages, or the random numbers."""
    checkpoint = shutil.copytree(whole("published") / "checkpoint-5", tmp_path / "checkpoint-5")
    (checkpoint / file).unlink()
    with pytest.raises(UserError, match=f"is not whole .it has no {file[:9]}"):
        check_resumable(checkpoint, LotaConfig.load(whole("published")))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["code", "cut", "empty", "another content"])
def test_the_pickles_of_a_checkpoint_run_no_code(whole, tmp_path, file, damage):
    """They are the only ones that are read. One line refuses what is more than tensors and plain values.

    The checksums of a new checkpoint would refuse it before.
    """
    checkpoint = shutil.copytree(whole("published") / "checkpoint-5", tmp_path / "checkpoint-5")
    forget_checksums(checkpoint)
    if damage == "code":
        torch.save({"state": Touch(tmp_path / "ran")}, checkpoint / file)
    elif damage == "another content":
        torch.save({"x": [1]}, checkpoint / file)
    else:
        content = (checkpoint / file).read_bytes()
        (checkpoint / file).write_bytes(content[:len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: train(tmp_path / "a", *METHODS["published"], "--adapter_ckpt", checkpoint))
    line = stopped.value.code
    assert line.startswith("error: ") and "\n" not in line
    assert file in line and str(checkpoint) in line and "take another checkpoint" in line
    assert not (tmp_path / "ran").exists()
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth",
                                  "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_refused(whole, tmp_path, file):
    """One flipped bit in what a resumed run reads. An adapter without the state of its training merges all the same."""
    checkpoint = shutil.copytree(whole("published") / "checkpoint-5", tmp_path / "checkpoint-5")
    config = LotaConfig.load(whole("published"))
    check_resumable(checkpoint, config)
    content = bytearray((checkpoint / file).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} has other bytes than those that were written; copy the folder again"):
        check_resumable(checkpoint, config)
    assert check_folder(checkpoint).findings == [f"{file} has other bytes than those that were written"]
    if file != "adapter_model.safetensors":
        (checkpoint / file).unlink()
        AdapterFolder(checkpoint).require_whole()
        report = check_folder(checkpoint)
        assert report.findings == [] and f"{file} is not here, so training cannot be resumed" in report.notes[0]


# --- killed -------------------------------------------------------------------------------------------------------

class FileEvents:
    """Calls back at every moment at which a run writes: before each open for writing and each rename; and before, in
    the middle of and after what safetensors and torch write, which Python does not see. A context manager."""

    def __init__(self, folder, at_event):
        self.folder, self.at_event, self.on = str(folder), at_event, True
        sys.addaudithook(self.hook)             # a hook cannot be taken away; `on` ends it

    def hook(self, event, arguments):
        if not self.on or event not in ("open", "os.rename") or not str(arguments[0]).startswith(self.folder):
            return
        if event == "os.rename" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            self.call(f"{event} {Path(arguments[0]).relative_to(self.folder)}")

    def call(self, what):
        self.on = False
        try:
            self.at_event(what)
        finally:
            self.on = True

    def in_parts(self, write):
        """`write`, a function (content, file), with events around it and one where half of the file is there."""
        def written(content, file, **kwargs):
            name = Path(file).name
            self.call(f"before {name}")
            write(content, file, **kwargs)
            whole = Path(file).read_bytes()
            for part, what in ((whole[:len(whole) // 2], "half of"), (whole, "after")):
                Path(file).write_bytes(part)
                self.call(f"{what} {name}")
        return written

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("peft.peft_model.safe_save_file", self.in_parts(save_file))
        self.patch.setattr("torch.save", self.in_parts(torch.save))
        return self

    def __exit__(self, *exception):
        self.on = False
        self.patch.undo()


SHORT = ("--max_steps", 2, "--save_number", 1, "--gradient_accumulation_steps", 1)
KILLED = (*FULL, *SHORT)


def merged(adapter, output):
    """The checksums of what merging a folder gives, or None where it is refused, in one line."""
    try:
        merge_folders(AdapterFolder(adapter), GPTQFolder(OLD / "gptq"), output)
    except Exception as error:
        assert isinstance(error, UserError | OSError) or type(error).__name__ == "SafetensorError", error
        assert not output.exists()
        return None
    return {file.name: sha256(file) for file in output.rglob("*.safetensors")}


@pytest.mark.parametrize("flags", [FULL, ("--method", "lota", "--residual", False, "--interval_point", 1)],
                         ids=["full", "no_residual"])
def test_a_folder_that_is_killed_while_it_is_written_is_never_merged_wrong(tmp_path, flags):
    """At every event of a checkpoint's save and of the run's last save, a copy is taken: it is what a kill at that
    moment leaves. Each copy is refused, or merges into what the whole folder does; and half a checkpoint does not
    resume. Neither method is the published one, which a folder without lota_config.json is taken for."""
    copies = []

    def copy(what):
        copies.append((what, tmp_path / f"copies/{len(copies)}"))
        shutil.copytree(tmp_path / "a", copies[-1][1])
    with FileEvents(tmp_path / "a", copy):
        final = train(tmp_path / "a", *flags, *SHORT)
    names = " ".join(what for what, _ in copies)
    assert "half of optimizer.pt" in names and "trainer_state.json" in names and len(copies) > 30
    want = merged(final, tmp_path / "want")
    assert want and merged(final / "checkpoint-2", tmp_path / "want2") == want      # both are of the last step
    config = LotaConfig.load(final)
    whole = {"checkpoint-2": 0, "run": 0}
    half = dict(whole)
    for number, (what, copied) in enumerate(copies):
        run, = copied.iterdir()
        for kind, folder in (("checkpoint-2", run / "checkpoint-2"), ("run", run)):
            if not (folder / "adapter_model.safetensors").exists():
                continue
            got = merged(folder, tmp_path / f"merged/{kind}{number}")
            assert got in (None, want), what
            (whole if got else half)[kind] += 1
            if kind == "checkpoint-2" and got is None:
                with pytest.raises(UserError, match="is not whole"):
                    check_resumable(folder, config)
    assert all(half.values()) and all(whole.values())
    # Both files of the adapter are there, and the last one is not: this is what was read as a published adapter.
    half_saved, = [run for what, run in copies if what == "before scheduler.pt"]
    with pytest.raises(UserError, match="is not whole, because its saving was interrupted: take an earlier checkpoint"):
        AdapterFolder(next(half_saved.glob("*/checkpoint-2")))


KILL = """
import os, signal, sys
sys.path[:0] = ["tests", "."]
import conftest, test_resume
folder, wanted = sys.argv[1:]
def at_event(what):
    if wanted in what:
        os.kill(os.getpid(), signal.SIGKILL)
with test_resume.FileEvents(folder, at_event):
    test_resume.train(folder, *test_resume.KILLED)
"""


@pytest.mark.parametrize("event", ["after adapter_model.safetensors", "trainer_state.json"])
def test_a_real_kill_in_a_checkpoint(tmp_path, event):
    """SIGKILL after the adapter's tensors, and before the last file of Trainer's. The checkpoint is refused."""
    process = subprocess.run([sys.executable, "-c", KILL, tmp_path / "a", event], cwd=ROOT, capture_output=True,
                             text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    checkpoint, = (tmp_path / "a").glob("*/checkpoint-2")
    assert (checkpoint / "adapter_model.safetensors").exists()
    with pytest.raises(UserError, match="is not whole, because its saving was interrupted"):
        AdapterFolder(checkpoint)


@pytest.mark.parametrize("part", ["lora_offset", "lora_scale"])
def test_learned_tensors_are_never_ignored(whole, tmp_path, part):
    """A half checkpoint of an older version has no lota_config.json. The published scripts learn neither offsets nor
    scales, so it is none of theirs."""
    folder = tmp_path / "2M_int2_LoTA_1_0.950_0.999_viggo_05_101112"
    shutil.copytree(whole("full") / "checkpoint-5", folder / "checkpoint-5")
    file = folder / "checkpoint-5/adapter_model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if part in n or "lora_A" in n or "lora_B" in n}
    save_file(tensors, file, {"format": "pt"})
    (folder / "checkpoint-5/lota_config.json").unlink()
    with pytest.raises(UserError, match="learned offsets or scales, and no lota_config.json"):
        AdapterFolder(folder / "checkpoint-5")


# --- diverged -----------------------------------------------------------------------------------------------------

GUARDED = (*METHODS["full"], "--logging_steps", 1, "--save_strategy", "no", "--offset_lr", 5, "--scale_lr", 2)


def test_a_run_whose_loss_climbs_is_ended(tmp_path, capsys):
    """In one line that says what to lower, and without a folder. A flag lets it go on."""
    remedy = ("lower --offset_lr, --scale_lr and --flip_limit, or take --recipe published, or go on with "
              "--loss_guard False")
    with pytest.raises(UserError, match=rf"the loss climbed from .* to .* at step \d+: {remedy}"):
        train(tmp_path / "a", *GUARDED)
    assert not (tmp_path / "a").exists()
    adapter = train(tmp_path / "b", *GUARDED, "--loss_guard", False)
    losses = [row["loss"] for row in logged(adapter) if "loss" in row]
    assert len(losses) == 12 and max(losses) > 2 * losses[0] + 1


@pytest.mark.parametrize("losses, ends", [
    ([1, 2.1, 2.1, 2.1], True), ([1, 2.1, 2.1], False), ([1, 9, 9, 0.9, 9], False), ([1, 2, 2, 2], False),
    ([0.1, 0.9, 1, 0.9], False), ([0.1, 2, 2, 2], True), ([8, 15, 15, 15], False), ([8, 17, 17, 17], True),
    ([5], False)])
def test_what_is_a_climb(losses, ends):
    """Three logs in a row beyond twice the first one, and beyond it by a nat."""
    state = SimpleNamespace(log_history=[{"loss": loss} for loss in losses], global_step=7)
    guard = LossGuard("do this")
    with pytest.raises(UserError, match="do this") if ends else nullcontext():
        guard.on_log(None, state, None, logs={"loss": losses[-1]})
    guard.on_log(None, state, None, logs={"train_loss": 99})


@pytest.mark.parametrize("record, remedy", [
    (LotaConfig(method="LoRA"), "--learning_rate"), (LotaConfig(omega=3.0), "--sigma_start"),
    (LotaConfig(omega=3.0, offset_scale="learned"), "--offset_lr"), (LotaConfig(omega=3.0, learned_scales=True),
                                                                     "--scale_lr")])
def test_the_remedy_fits_the_method(record, remedy):
    assert remedy in remedy_for(record)
