"""Several processes: gloo on the CPU, started by torchrun. What they train, resume and answer is what one process does.

On the small GPTQ model of tests/fixtures/old, 32 rows, 16 of them a step. Two processes have batches of 8, one has two
of 8 before a step. tests/processes_driver.py runs in each of the two.
"""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, parse
from safetensors.torch import load_file
from test_resume import METHODS as ALL_METHODS
from test_resume import OLD
from transformers import LlamaConfig

import LoTA_QAF_main
from LoTA import UserError, adapter, processes
from LoTA.adapter_folder import LotaConfig
from LoTA.check import check_folder

FLAGS = ("--mode", 1, "--quantized_model_dir", OLD / "gptq", "--pretrained", "base", "--data_dir", OLD / "data",
         "--training_data_name", "viggo", "--lora_r", 4, "--train_batch_size", 8, "--debug_number", 32, "--dtype",
         "float32", "--device_map", "cpu", "--gradient_checkpointing", False, "--max_steps", 6, "--save_number", 6,
         "--save_total_limit", 6, "--logging_steps", 2, "--prompt_layout", "system")
METHODS = {**{name: ALL_METHODS[name] for name in ("published", "full", "lrqat", "qalora")},
           "lrqat mean": ("--method", "lrqat", "--recipe", "mean", "--learning_rate", 1e-2),
           "qalora packed": (*ALL_METHODS["qalora"], "--packing", True),
           "lora": ("--method", "lora", "--learning_rate", 1e-2)}
# In two processes, and in one. Gradients are formed again in the backward, and two batches make a step.
SMALLER = (("--train_batch_size", 4, "--gradient_accumulation_steps", 2, "--gradient_checkpointing", True),
           ("--train_batch_size", 4, "--gradient_accumulation_steps", 4, "--gradient_checkpointing", True))
EVALUATE = ("--mode", 2, "--data_dir", OLD / "data", "--ft_dataset_name", "viggo", "--dtype", "float32",
            "--prompt_layout", "system", "--max_new_tokens", 20, "--eval_batch_size", 5, "--answer_loss",
            "--device_map", "cpu")


def torchrun(*arguments, count=2, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
                             *map(str, arguments)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **kwargs)


def in_two(folder, *tasks):
    """[what each task returned or raised in process 0 and in process 1], see processes_driver.py."""
    folder.mkdir()
    (folder / "tasks.json").write_text(json.dumps(
        [(task, [str(word) for word in argv], arguments) for task, argv, *arguments in tasks]))
    started = torchrun("tests/processes_driver.py", folder / "tasks.json")
    output = started.communicate(timeout=600)[0]
    assert started.returncode == 0, output
    return [[json.loads((folder / f"{number}.{rank}.json").read_text()) for rank in (0, 1)]
            for number in range(len(tasks))]


def paths(results):
    """The folders that tasks returned, the same in both processes."""
    assert all(one == other and "returned" in one for one, other in results), results
    return [OLD.__class__(one["returned"]) for one, _ in results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder):
    """{method: the adapter folder that two processes made}."""
    return dict(zip(METHODS, paths(in_two(folder / "train", *(
        ("train", [*FLAGS, "--adapter_path", folder / f"two {name}", *flags]) for name, flags in METHODS.items()))),
        strict=True))


@pytest.fixture(scope="module")
def one(folder):
    """The same of one process, which takes two batches of 8 before a step."""
    made = {}
    for name, flags in METHODS.items():
        base, training, _ = parse(*FLAGS, "--gradient_accumulation_steps", 2, "--adapter_path", folder / f"one {name}",
                                  *flags)
        made[name] = LoTA_QAF_main.train(base, training)
    return made


def alike(ours, theirs):
    """Whether adapters are equal to the rounding of a sum in another order, and what their runs logged too."""
    one, other = tensors(ours), tensors(theirs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if tensor.dtype == torch.int8:          # an entry at a border may round the other way
            assert (tensor.int() - other[name].int()).abs().max() <= 1
        else:
            assert torch.allclose(tensor.float(), other[name].float(), rtol=1e-3, atol=1e-5), name
    for row, same in zip(logged(ours), logged(theirs), strict=True):
        assert row.keys() == same.keys()
        for name, value in row.items():
            assert same[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def logged(folder):
    rows = json.loads((folder / "log_history.json").read_text())
    return [{name: value for name, value in row.items() if not name.startswith("train_")} for row in rows]


# --- training -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_does(one, two, method):
    """Ternary matrices are equal. Real ones are to the rounding of a sum in another order, as is all that is logged."""
    alike(one[method], two[method])
    if method in ("published", "full"):
        ours, theirs = tensors(one[method]), tensors(two[method])
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if "lora_A" in name or "lora_B" in name)


def test_batches_of_a_step_and_checkpointing(folder):
    """Two processes with two batches of 4 before a step, and one with four."""
    flags = (*FLAGS, *METHODS["full"], "--adapter_path")
    two, = paths(in_two(folder / "batches", ("train", [*flags, folder / "batches two", *SMALLER[0]])))
    base, training, _ = parse(*flags, folder / "batches one", *SMALLER[1])
    alike(LoTA_QAF_main.train(base, training), two)


def test_distillation(folder, quantize, base_model, demo_data):
    """The mean over the tokens that are compared with the teacher is over those of both processes."""
    flags = (*FLAGS, "--method", "lora", "--learning_rate", 1e-2, "--distill", "all", "--quantized_model_dir",
             quantize(4), "--pretrained", base_model, "--data_dir", demo_data, "--max_steps", 2, "--save_strategy",
             "no", "--logging_steps", 1, "--adapter_path")
    two, = paths(in_two(folder / "distill", ("train", [*flags, folder / "distill two"])))
    base, training, _ = parse(*flags, folder / "distill one", "--gradient_accumulation_steps", 2)
    alike(LoTA_QAF_main.train(base, training), two)


@pytest.mark.parametrize("method", METHODS)
def test_the_folders_are_those_of_one_process(one, two, method):
    """The same files, but for a random state of each process, and a whole adapter. Nothing else lies beside it."""
    def files(folder):
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    want = [name for path in files(one[method]) for name in (
        [path.replace("rng_state", f"rng_state_{rank}") for rank in (0, 1)] if "rng_state" in path else [path])]
    assert files(two[method]) == sorted(want) and len(list(two[method].parent.iterdir())) == 1
    for whole in (two[method], two[method] / "checkpoint-6"):
        assert check_folder(whole).findings == []
    config = LotaConfig.load(two[method])
    assert config.training["processes"] == 2 and config.training["steps"] == 6
    assert config.training["data"] == LotaConfig.load(one[method]).training["data"]


def test_resume_is_exact(folder, two):
    """From the second of six steps, within an epoch: tensors bit for bit, and all that is logged."""
    resumed = paths(in_two(folder / "resume", *(
        ("train", [*FLAGS, "--adapter_path", folder / f"resumed {name}", *flags, "--adapter_ckpt",
                   two[name] / "checkpoint-3"]) for name, flags in METHODS.items())))
    for name, again in zip(METHODS, resumed, strict=True):
        before, after = tensors(two[name]), tensors(again)
        assert before.keys() == after.keys() and all(torch.equal(t, after[key]) for key, t in before.items()), name
        assert logged(again) == logged(two[name])


def test_another_number_of_processes_is_refused(tmp_path, two):
    base, training, _ = parse(*FLAGS, *METHODS["published"], "--adapter_path", tmp_path, "--adapter_ckpt",
                              two["published"] / "checkpoint-3")
    with pytest.raises(UserError, match="it was trained by 2 processes, not 1"):
        LoTA_QAF_main.train(base, training)
    assert not list(tmp_path.iterdir())


def test_what_must_stop_both_processes(folder):
    """A matrix that drifts, other rows in one process, a Ctrl-C that reaches one. No folder stays empty."""
    flags = [*FLAGS, *METHODS["full"], "--adapter_path"]
    drifted, rows, stopped = in_two(
        folder / "stops", ("drift", [*flags, folder / "drift", "--save_strategy", "no"], 3),
        ("other_rows", [*flags, folder / "rows"]),
        ("interrupt", [*flags, folder / "interrupt", "--save_number", 1], 3))
    for found in drifted:
        assert found["error"] == (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight is not the same in process 0 and "
            "in process 1 at step 4: the processes train apart; resume from the checkpoint before")
    for found in rows:
        assert found["error"].startswith("the processes have not the same rows: process 0 has ")
    assert not (folder / "drift").exists() and not (folder / "rows").exists()
    run, = (folder / "interrupt").iterdir()
    for found in stopped:
        assert found["error"] == f"interrupted at step 4; resume with --adapter_ckpt {run / 'checkpoint-4'}"
    assert check_folder(run / "checkpoint-4").findings == []
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (run / "checkpoint-4").iterdir()}


def test_a_killed_process_ends_the_run(folder):
    """kill -9 of one process: the other ends within a minute, and the last checkpoint is whole."""
    started = torchrun("LoTA_QAF_main.py", *FLAGS, *METHODS["published"], "--max_steps", 4000, "--save_number", 2000,
                       "--adapter_path", folder / "killed")
    try:
        deadline = time.time() + 300
        while len(list((folder / "killed").glob("*/checkpoint-*/lota_config.json"))) < 2 and time.time() < deadline:
            assert started.poll() is None, started.communicate()[0]
            time.sleep(0.1)
        os.kill(process_of_rank(started.pid, 1), signal.SIGKILL)
        killed = time.time()
        started.communicate(timeout=60)
        assert started.returncode != 0 and time.time() - killed < 60
    finally:
        started.kill()
    *_, before, last = sorted((folder / "killed").glob("*/checkpoint-*"), key=lambda path: int(path.name[11:]))
    try:
        LotaConfig.load(last)
    except UserError as error:              # it was being saved, and says so
        assert "is not whole" in str(error)
        last = before
    assert check_folder(last).findings == [] and LotaConfig.load(last).training["processes"] == 2


def process_of_rank(parent, rank):
    for process in os.listdir("/proc"):
        if process.isdecimal():
            try:
                stat = open(f"/proc/{process}/stat").read().rsplit(")", 1)[1].split()
                environment = open(f"/proc/{process}/environ").read().split("\0")
            except OSError:
                continue
            if int(stat[1]) == parent and f"RANK={rank}" in environment:
                return int(process)
    raise AssertionError("no such process")


def test_the_script_speaks_with_one_voice(tmp_path):
    """Its output is that of one process: each line once, one progress bar, one adapter. A mistake names its process."""
    started = torchrun("LoTA_QAF_main.py", *FLAGS, *METHODS["published"], "--adapter_path", tmp_path / "made")
    output = started.communicate(timeout=300)[0]
    assert started.returncode == 0, output
    for line in ("quantized layers get an adapter", "trainable params", "step 2/6 ", "adapter saved to "):
        assert output.count(line) == 1, output
    assert "Warning" not in output.replace("FutureWarning: `is_gradient_checkpointing`", "")
    started = torchrun("LoTA_QAF_main.py", *FLAGS, "--method", "lora", "--recipe", "full")
    output = started.communicate(timeout=300)[0]
    assert started.returncode != 0
    # The other one may be ended by torchrun before it says so too.
    assert re.search("^error( in process 1)?: --recipe full is for", output, re.MULTILINE)


# --- evaluation ---------------------------------------------------------------------------------------------------

def test_two_processes_answer_what_one_does(folder, two, tmp_path):
    """Live, merged, GPTQ, and lm-eval. Answers, accuracy and loss are equal to the last bit. 12 rows are 3 batches."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.jsonl").write_text("".join(
        json.dumps({"question": f"word {i}", "choices": ["yes", "no"], "answer": i % 2}) + "\n" for i in range(7)))
    (tmp_path / "tasks" / "words.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {tmp_path}/tasks/words.jsonl}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: answer\n"
        "doc_to_choice: choices\nmetric_list: [{metric: acc}]\n")
    lm_eval = ["--tasks", "words", "--include_path", tmp_path / "tasks", "--num_fewshot", 0]
    kinds = {"live": [*EVALUATE, "--load_adapter", two["full"], "--merge", False],
             "merged": [*EVALUATE, *lm_eval, "--load_adapter", two["lrqat mean"]],
             "gptq": [*EVALUATE, "--quantized_model_dir", OLD / "gptq", "--pretrained", "base"]}
    both = in_two(folder / "evaluate", *(("evaluate", [*argv, "--output_path", folder / "results" / kind])
                                         for kind, argv in kinds.items()))
    for (kind, argv), (first, second) in zip(kinds.items(), both, strict=True):
        base, _, evaluation = parse(*argv, "--output_path", tmp_path)
        alone = LoTA_QAF_main.evaluate(base, evaluation)
        assert first == second and "returned" in first, first
        got = first["returned"]["viggo"]
        assert got == {key: alone["viggo"][key] for key in ("accuracy", "loss", "predictions")}
        assert len(got["predictions"]) == 12
        files = list((folder / "results" / kind).iterdir())
        assert len(files) == (2 if kind == "merged" else 1)
        if kind == "merged":
            scores = first["returned"]["lm_eval"]["results"]["words"]
            assert scores["acc,none"] == alone["lm_eval"]["results"]["words"]["acc,none"]


# --- without processes --------------------------------------------------------------------------------------------

def test_a_checksum_sees_every_bit_and_every_place():
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float64):
        tensor = torch.zeros(5, 7, dtype=dtype)
        tensor[2, 3] = 1
        sums = {int(processes.checksum(tensor))}
        for place in range(35):
            other = torch.zeros(35, dtype=dtype)
            other[place] = 1
            sums.add(int(processes.checksum(other.view(5, 7))))
            sums.add(int(processes.checksum(-other.view(5, 7))))
        assert len(sums) == 70
    assert processes.checksum(torch.arange(6).view(2, 3)) == processes.checksum(torch.arange(6).view(3, 2).t().t())


@pytest.mark.parametrize("environment, message", [
    ({"WORLD_SIZE": "two"}, "the environment says WORLD_SIZE=two, and a number is wanted"),
    ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}, "FSDP cuts tensors into shards"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed ZeRO cuts tensors into shards"),
    ({"WORLD_SIZE": "2"}, "--device_map cuda:0 would put all 2 processes on one device")])
def test_launches_that_cannot_work(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{message}"):
        processes.check_launch("cuda:0")


def test_accelerate_on_a_cpu_starts_one_process(monkeypatch, capsys):
    """As accelerate launch --cpu --num_processes 2 sets the environment."""
    processes.check_launch("auto")
    assert capsys.readouterr().out == ""
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    processes.check_launch("auto")
    assert capsys.readouterr().out == ("accelerate launch --cpu has started one process, whatever its --num_processes "
                                       "says; torchrun --nproc_per_node 2 starts two\n")


def test_each_process_has_gpus_of_its_own(monkeypatch):
    """Every GPU belongs to one process, and the first of each is where accelerate puts its rows."""
    for there, count in ((8, 8), (8, 2), (8, 3), (1, 1), (4, 1)):
        owned = []
        for rank in range(count):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
            own = processes.own_gpus(there)
            assert own[0] == rank
            owned += own
        assert sorted(owned) == list(range(there))
    with pytest.raises(UserError, match="^4 processes on a machine with 2 GPUs: start at most one process"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        processes.own_gpus(2)


@pytest.mark.parametrize("rank, world, gpus, want", [
    (0, 1, 4, {"device_map": "auto"}), (1, 2, 2, {"device": "cuda:1"}), (1, 2, 4, {"cuda:1", "cuda:3"})])
def test_where_a_process_puts_its_model(monkeypatch, tmp_path, rank, world, gpus, want):
    """On its own GPU, or in two halves of neighbouring layers on its own two."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (80 * 2**30, 80 * 2**30))
    LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=64).save_pretrained(tmp_path)
    place = adapter.own_device_map(tmp_path)
    if isinstance(want, dict):
        assert place == want
        return
    places = place["device_map"]
    assert set(places.values()) == want
    layers = [places[name] for name in sorted(places) if name.startswith("model.layers.")]
    assert layers == sorted(layers) and 3 <= layers.count("cuda:1") <= 5        # neighbours are together
