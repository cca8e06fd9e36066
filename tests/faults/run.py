"""Kills, full disks, damaged files, two runs at once: every trial is judged, and the figures go to a JSON file.

    python tests/faults/run.py --all --output docs/reliability.json       # every event; docs/reliability.md quotes it
    python tests/faults/run.py --output FILE                              # the part that the test suite runs

It exits with 1 where a trial ended in something silently wrong, in a trace back, or with files left over.
All is done with the small GPTQ model of tests/fixtures/old. harness.py explains how a fault is made.
"""
import argparse
import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                    "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}.items():
    os.environ[name] = value

from harness import (  # noqa: E402
    BYTES,
    COUNT,
    FAIL,
    FULL,
    HALF_KILL,
    KILL,
    ROOM,
    STOP,
    Fault,
    Outcome,
    Trial,
    below_python,
    outcome_of,
    restart_below_library,
    snapshot,
)

OLD = ROOT / "tests/fixtures/old"
LOTA = ("--method", "lota", "--recipe", "full", "--interval_point", 1)
LRQAT = ("--method", "lrqat", "--recipe", "full")
TRAIN = ("--mode", 1, "--pretrained", "base", "--data_dir", OLD / "data", "--training_data_name", "viggo",
         "--prompt_layout", "system", "--lora_r", 4, "--train_batch_size", 8, "--debug_number", 40, "--dtype",
         "float32", "--device_map", "cpu", "--gradient_checkpointing", False, "--max_steps", 2, "--save_number", 2,
         "--logging_steps", 1)
EVALUATE = ("--mode", 2, "--ft_dataset_name", "viggo", "--data_dir", OLD / "data", "--dtype", "float32",
            "--max_new_tokens", 4, "--eval_batch_size", 64)
FORMATS = ("gptq", "peft", "dense", "gguf")
SAID = "changed after the adapter was trained"  # the line about a GPTQ model whose settings or tokenizer changed
UNREAD = "README.md", "lota_export.json"        # of an export: for people, and for LoTA.check
GOOD, BAD = ("refused", "harmless"), ("silent", "traceback", "left over")


# --- what a user does -----------------------------------------------------------------------------------------------

def train(gptq: Path, adapters: Path, *flags, method: tuple = LOTA) -> Path:
    """Mode 1. Returns the adapter's folder."""
    import LoTA_QAF_main
    flags = map(str, (*TRAIN, *method, "--quantized_model_dir", gptq, "--adapter_path", adapters, *flags))
    return LoTA_QAF_main.train(*LoTA_QAF_main.parse_args(list(flags))[:2])


def merge(adapter: Path, gptq: Path, output: Path) -> None:
    """python -m LoTA.lota_merge."""
    from LoTA.adapter_folder import AdapterFolder
    from LoTA.folders import GPTQFolder
    from LoTA.lota_merge import merge_folders
    merge_folders(AdapterFolder(adapter), GPTQFolder(gptq), output)


def export(merged: Path, format: str, output: Path) -> None:
    """python -m LoTA.export."""
    from LoTA.export.run import export
    export(merged, format, output)


def check(folder: Path) -> list[str]:
    """python -m LoTA.check: its findings, each one line."""
    from LoTA.check import check_folder
    findings = check_folder(folder).findings
    assert all(len(finding.splitlines()) == 1 for finding in findings)
    return findings


def answers(results: Path, *flags) -> tuple:
    """Mode 2: the texts that it generates."""
    import LoTA_QAF_main
    flags = map(str, (*EVALUATE, "--output_path", results, *flags))
    base, _, evaluation = LoTA_QAF_main.parse_args(list(flags))
    found = LoTA_QAF_main.evaluate(base, evaluation)["viggo"]
    return [row["prediction"] for row in found["predictions"]]


def logits(folder: Path, adapter: Path | None = None) -> str:
    """A checksum of the logits of a merged folder, or of a live adapter on its GPTQ folder."""
    import torch

    from LoTA.adapter import load_live, load_merged
    from LoTA.adapter_folder import AdapterFolder
    from LoTA.folders import MergedFolder
    model = (load_live(AdapterFolder(adapter), folder, dtype=torch.float32) if adapter else
             load_merged(MergedFolder(folder), dtype=torch.float32).model)
    with torch.inference_mode():
        out = model(input_ids=torch.arange(3, 35).view(1, -1)).logits
    return hashlib.sha256(out.numpy().tobytes()).hexdigest()


def weights(folder: Path) -> dict[str, str]:
    """snapshot() of the safetensors files."""
    return {name: value for name, value in (snapshot(folder) or {}).items() if name.endswith(".safetensors")}


def losses(adapter: Path) -> list:
    """The log of a run without its times."""
    return [{name: value for name, value in line.items() if not name.startswith("train_") or name == "train_loss"}
            for line in json.loads((adapter / "log_history.json").read_text())]


# --- the bench ------------------------------------------------------------------------------------------------------

class Bench:
    """The folders that all trials start from, a place for each trial, and the list of what came out.

    every: 1 tries every event and many damages; the quick part takes a sample.
    """

    def __init__(self, scratch: Path, whole: bool):
        self.scratch, self.whole, self.trials, self.place = scratch, whole, [], scratch / "trial"
        self.family = ""
        inputs = scratch / "inputs"
        shutil.copytree(OLD / "gptq", inputs / "gptq")
        self.gptq = inputs / "gptq"

        def make():
            made = {}
            for i, seed in enumerate((42, 43)):
                full = train(self.gptq, inputs / f"full{i}", "--seed", seed)
                plain = train(self.gptq, inputs / f"plain{i}", "--seed", seed, "--recipe", "ternary")
                for kind, adapter in (("full", full), ("plain", plain)):
                    merge(adapter, self.gptq, inputs / f"merged_{kind}{i}")
                    made[kind, i] = adapter
            made["lrqat", 0] = train(self.gptq, inputs / "lrqat", method=LRQAT)
            return made
        self.adapters = self.must(make)
        self.merged = {(kind, i): inputs / f"merged_{kind}{i}" for kind in ("full", "plain") for i in (0, 1)}

    def start(self, action: Callable, fault: Fault | None = None, name: str = "one") -> Trial:
        scratch = self.scratch / name
        scratch.mkdir(exist_ok=True)
        return Trial(action, fault, scratch)

    def do(self, action: Callable, fault: Fault | None = None) -> Outcome:
        return self.start(action, fault).outcome()

    def must(self, action: Callable):
        """What an undisturbed action returns."""
        outcome = self.do(action)
        if outcome.kind != "done":
            raise RuntimeError(f"undisturbed, and yet: {outcome.kind}: {outcome.text}\n" +
                               (self.scratch / "one/output").read_text()[-2000:])
        return outcome.value

    def clear(self) -> Path:
        """An empty folder for a trial."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        return self.place

    def some(self, count: int, quick: int, stride: int = 1) -> Iterable[int]:
        """Numbers from 1 to count: one of `stride`, or in the quick part `quick` in all, at equal distances."""
        return range(1, count + 1, stride) if self.whole or not count else [1 + (2 * i + 1) * count // (2 * quick)
                                                               for i in range(quick)]

    def judge(self, subject: str, where: str, result: str, text: str = "") -> None:
        self.trials.append({"family": self.family, "subject": subject, "where": where, "result": result, "text": text})
        if result in BAD:
            print(f"{result}: {self.family}, {subject}, {where}: {text[:300]}", flush=True)


# --- outputs that are whole folders: merges and exports --------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Job:
    """A merge or an export, in two variants: 0, and 1, which writes another content."""
    name: str
    act: Callable[[Path, int], None]            # (the output folder, the variant)


def jobs(bench: Bench) -> list[Job]:
    kind = {format: "plain" if format == "gptq" else "full" for format in FORMATS}
    return [Job("merge", lambda output, i: merge(bench.adapters["full", i], bench.gptq, output)),
            *(Job(f"export {format}", lambda output, i, format=format: export(
                bench.merged[kind[format], i], format, output)) for format in FORMATS)]


def undisturbed(bench: Bench, job: Job) -> tuple[list[dict], Path]:
    """(what the two variants write, the folder of variant 1)."""
    made = []
    for i in (0, 1):
        output = bench.scratch / "undisturbed" / job.name / str(i) / "out"
        bench.must(lambda output=output, i=i: job.act(output, i))
        made.append(snapshot(output))
    assert made[0] != made[1]
    return made, output


def count_events(bench: Bench, job: Job, old: Path | None, kinds: int) -> list[str]:
    place = bench.clear()
    if old:
        shutil.copytree(old, place / "out")
    return list(bench.do(lambda: job.act(place / "out", 0), Fault(place, COUNT, kinds=kinds)).events)


def fault_in_job(bench: Bench, job: Job, fault: Fault, expected: list[dict], old: Path | None, label: str) -> None:
    """One kill or one failing call, then the next run."""
    place, (new, before) = bench.clear(), expected
    if old:
        shutil.copytree(old, place / "out")
    outcome = bench.do(lambda: job.act(place / "out", 0), dataclasses.replace(fault, folder=place))
    after, text = snapshot(place / "out"), outcome.text
    allowed = [new] if outcome.kind == "done" else [None, new, *([before] if old else [])]
    result = "refused" if outcome.kind == "line" else "harmless"
    if outcome.kind in ("traceback", "hangs"):
        result = "traceback"
    elif after not in allowed:
        result, text = "silent", f"the output is {'half' if after else 'not there'} ({outcome.kind}) {text}"
    elif after and check(place / "out"):
        result, text = "silent", "LoTA.check finds something in a whole folder"
    again = bench.do(lambda: job.act(place / "out", 0))
    if again.kind != "done" or snapshot(place / "out") != new:
        result, text = "silent", f"the next run: {again.kind} {again.text}"
    elif (there := sorted(path.name for path in place.iterdir())) != ["out"] and result not in BAD:
        result, text = "left over", ", ".join(there)
    bench.judge(job.name, label, result, text)


def kills(bench: Bench) -> None:
    bench.family = "kill"
    for job in jobs(bench):
        expected, other = undisturbed(bench, job)
        for old in (None, other):
            for action, kinds, quick, stride in ((KILL, Fault.kinds, 1, 1 if old else 2), (HALF_KILL, BYTES, 1, 2)):
                events = count_events(bench, job, old, kinds)
                for at in bench.some(len(events), quick, stride):
                    fault = Fault(bench.place, action, at, kinds)
                    fault_in_job(bench, job, fault, expected, old, f"{events[at - 1]} {'over' if old else 'new'}")


# (name, action, errno, kinds, of how many events one is tried). A quota ends as a full disk does, so few are tried.
FULL_DISKS = (("ENOSPC", FULL, errno.ENOSPC, BYTES | ROOM, 1), ("EDQUOT", FULL, errno.EDQUOT, BYTES | ROOM, 10),
              ("EIO", FAIL, errno.EIO, Fault.kinds, 4))


def full_disks(bench: Bench) -> None:
    bench.family = "full disk"
    for job in jobs(bench):
        expected, other = undisturbed(bench, job)
        for name, action, number, kinds, stride in FULL_DISKS:
            events = count_events(bench, job, other, kinds)
            for at in bench.some(len(events), 1, stride):
                fault = Fault(bench.place, action, at, kinds, number)
                fault_in_job(bench, job, fault, expected, other, f"{name} {events[at - 1]}")


def two_at_once(bench: Bench) -> None:
    """One run stops before an event, another one onto the same output goes by, and the first goes on."""
    bench.family = "two at once"
    for job in jobs(bench):
        expected, other = undisturbed(bench, job)
        for old in (None, other):
            events = count_events(bench, job, old, Fault.kinds)
            for at in bench.some(len(events), 1, 2):
                place = bench.clear()
                if old:
                    shutil.copytree(old, place / "out")
                acts = (partial(job.act, place / "out", i) for i in (0, 1))
                outcomes = one_between(bench, at, *acts)
                judge_two(bench, job.name, events[at - 1], outcomes, snapshot(place / "out") in expected,
                          sorted(path.name for path in place.iterdir()) == ["out"])


def one_between(bench: Bench, at: int, act: Callable, other: Callable) -> list[Outcome]:
    """The outcomes of `act`, which stops before event `at`, and of `other`, which runs while it stands still."""
    first = bench.start(act, Fault(bench.place, STOP, at))
    stopped = first.stopped()
    second = bench.start(other, name="two").outcome()
    if stopped:
        first.go_on()
    return [first.outcome(), second]


def judge_two(bench: Bench, subject: str, where: str, outcomes: list[Outcome], whole: bool, clean: bool) -> None:
    kinds, text = {outcome.kind for outcome in outcomes}, " / ".join(f"{o.kind} {o.text}" for o in outcomes)
    result = ("traceback" if kinds - {"done", "line"} else "silent" if not whole or "done" not in kinds else
              "left over" if not clean else "refused" if "line" in kinds else "harmless")
    bench.judge(subject, where, result, text)


# --- training -------------------------------------------------------------------------------------------------------

class Training:
    """What an undisturbed run and its resumed parts give, and the judge of what a disturbed one left."""

    def __init__(self, bench: Bench):
        self.bench, self.run = bench, bench.adapters["full", 0]
        self.known = {}
        checkpoints = {name: self.run / name for name in ("checkpoint-1", "checkpoint-2")}
        self.wanted = {name: bench.must(partial(self.merged, folder))
                       for name, folder in {**checkpoints, "run": self.run}.items()}
        self.resumed = {name: bench.must(partial(self.resume, folder)) for name, folder in checkpoints.items()}
        self.fresh = weights(self.run)["adapter_model.safetensors"]

    @classmethod
    @cache
    def of(cls, bench: Bench) -> "Training":
        """Made once for all families."""
        return cls(bench)

    def merged(self, folder: Path) -> dict[str, str]:
        """Merges it: the checksums of the merged tensors."""
        output = self.bench.scratch / "judge"
        shutil.rmtree(output, ignore_errors=True)
        merge(folder, self.bench.gptq, output / "out")
        return weights(output / "out")

    def resume(self, checkpoint: Path, gptq: Path | None = None, method: tuple = LOTA) -> tuple:
        """Trains a checkpoint on to step 3: the checksum of its tensors, and its losses."""
        import LoTA.monitor
        LoTA.monitor.draw = lambda *_: None                 # the picture takes half of the time
        adapters = self.bench.scratch / "resumed"
        shutil.rmtree(adapters, ignore_errors=True)
        final = train(gptq or self.bench.gptq, adapters, "--adapter_ckpt", checkpoint, "--max_steps", 3,
                      "--save_number", 1, method=method)
        return weights(final)["adapter_model.safetensors"], losses(final)

    def leftovers(self, adapters: Path) -> tuple[str, str]:
        """(result, text) for everything below the folder of a disturbed run."""
        refused = ""
        for record in sorted(adapters.glob("**/lota_config.json")) + sorted(adapters.glob("**/adapter_config.json")):
            folder = record.parent
            name = folder.name if folder.name.startswith("checkpoint") else "run"
            uses = [("merge", self.merged, self.wanted[name])]
            uses += [("resume", self.resume, self.resumed[name])] if name != "run" else []
            for use, act, wanted in uses:
                outcome = self.remembered(use, act, folder)
                if outcome.kind in ("traceback", "hangs"):
                    return "traceback", f"{use} of {name}: {outcome.text}"
                if outcome.kind == "done" and outcome.value != wanted:
                    return "silent", f"{use} of {name} differs"
                refused = outcome.text if outcome.kind == "line" else refused
        return ("refused", refused) if refused else ("harmless", "")

    def remembered(self, use: str, act: Callable, folder: Path) -> Outcome:
        """The outcome, which is that of an earlier folder with the same bytes. Times and paths may differ."""
        varying = ("lota_config.json", "training_args.bin", "README.md")
        files = {n: v for n, v in snapshot(folder, varying).items() if "checkpoint-" not in n and ".tmp" not in n}
        record = folder / "lota_config.json"
        state = json.loads(record.read_text()).get("complete") if record.exists() else "none"
        key = use, str(state), (folder / "training_args.bin").exists(), json.dumps(files)
        if key not in self.known:
            self.known[key] = self.bench.do(lambda: act(folder))
        return self.known[key]


def faults_in_training(bench: Bench, training: Training, action: int, kinds: int, number: int, label: str,
                       quick: int, stride: int = 1) -> None:
    def act():
        return train(bench.gptq, bench.place / "out")
    events = bench.do(act, Fault(bench.clear(), COUNT, kinds=kinds)).events
    for at in bench.some(len(events), quick, stride):
        outcome = bench.do(act, Fault(bench.clear(), action, at, kinds, number))
        where = f"{label} {events[at - 1]}"
        if outcome.kind in ("traceback", "hangs"):
            bench.judge("training", where, "traceback", outcome.text)
            continue
        result, text = training.leftovers(bench.place / "out")
        if result in GOOD:
            # The checkpoints were resumed above. Where there is none, the run is begun again.
            if not list((bench.place / "out").glob("*/checkpoint-1/lota_config.json")):
                again = bench.do(act)
                if again.kind != "done" or weights(again.value)["adapter_model.safetensors"] != training.fresh:
                    result, text = "silent", f"the next run: {again.kind} {again.text}"
            result = "refused" if outcome.kind == "line" else result
        bench.judge("training", where, result, text or outcome.text)


def training_faults(bench: Bench) -> None:
    training = Training.of(bench)
    bench.family = "kill"
    faults_in_training(bench, training, KILL, Fault.kinds, 0, "kill", 2, 2)
    faults_in_training(bench, training, HALF_KILL, BYTES, 0, "half", 1, 4)
    bench.family = "full disk"
    for name, action, number, kinds, stride in FULL_DISKS if bench.whole else FULL_DISKS[:1]:
        faults_in_training(bench, training, action, kinds, number, name, 1, 6 * stride)
    bench.family = "two at once"
    act = partial(train, bench.gptq, bench.place / "out")
    events = bench.do(act, Fault(bench.clear(), COUNT)).events
    for at in bench.some(len(events), 1, 10):
        bench.clear()
        outcomes = one_between(bench, at, act, act)
        whole = all(weights(o.value)["adapter_model.safetensors"] == training.fresh for o in outcomes
                    if o.kind == "done")
        judge_two(bench, "training", events[at - 1], outcomes, whole, True)


# --- damage ---------------------------------------------------------------------------------------------------------

def damages(file: Path, whole: bool) -> list[tuple[str, Callable[[bytes], bytes]]]:
    """(what it is, a function of the file's content) of truncations and flipped bits."""
    size, draw = file.stat().st_size, random.Random(file.name)
    cuts = sorted({0, size // 2, size - 1} if whole else {size // 2}) if size else []
    places = [0, size - 1, *(draw.randrange(size) for _ in range(6))][:8 if whole else 1] if size else []
    bits = [(place, draw.randrange(8)) for place in places]

    def flipped(content: bytes, place: int, bit: int) -> bytes:
        return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:]
    return [*((f"cut to {cut}", lambda content, cut=cut: content[:cut]) for cut in cuts if cut < size),
            *((f"bit {bit} of byte {place}", lambda content, p=place, b=bit: flipped(content, p, b))
              for place, bit in dict.fromkeys(bits))]


def damage(bench: Bench) -> None:
    bench.family, training = "damage", Training.of(bench)
    scratch, adapter, lrqat = bench.scratch / "used", bench.adapters["full", 0], bench.adapters["lrqat", 0]

    def used(act: Callable[[Path, Path], object]) -> Callable[[Path], object]:
        """A use (folder, a folder for output) -> result, as a function (folder) -> result."""
        def use(folder):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            return act(folder, scratch)
        return use

    def evaluate_gptq(folder, output):
        texts = answers(output, "--load_adapter", adapter, "--quantized_model_dir", folder, "--merged_path",
                        output / "out")
        return texts, logits(output / "out")

    def export_it(folder, output):
        export(folder, "dense", output / "out")
        return snapshot(output / "out", UNREAD)

    def live(folder):
        return logits(bench.gptq, folder)

    kinds = {
        "GPTQ folder": (bench.gptq, [
            used(evaluate_gptq), lambda folder: training.resume(adapter / "checkpoint-1", folder)]),
        "adapter": (adapter, [training.merged, live]),
        "checkpoint": (adapter / "checkpoint-1", [training.resume, training.merged]),
        "adapter, LR-QAT": (lrqat, [training.merged, live]),
        "checkpoint, LR-QAT": (lrqat / "checkpoint-1", [partial(training.resume, method=LRQAT), training.merged]),
        "merged folder": (bench.merged["full", 0], [
            used(lambda folder, output: (answers(output, "--load_adapter", folder), logits(folder))),
            used(export_it)])}
    for format in FORMATS:
        output = bench.scratch / f"export_{format}"
        bench.must(lambda format=format, output=output: export(
            bench.merged["plain" if format == "gptq" else "full", 0], format, output))
        # Other engines open an export, and LoTA only checks it. So "whole" must mean that the files are the same.
        kinds[f"export {format}"] = output, [used(lambda folder, _: snapshot(folder, UNREAD))]

    def trial(folder, uses):
        """The outcomes of LoTA.check and of all uses."""
        done = bench.do(lambda: [outcome_of(partial(use, folder)) for use in (check, *uses)])
        return [dataclasses.replace(outcome, printed=done.printed) for outcome in done.value or [done]]
    wanted = {}
    for kind, (folder, uses) in kinds.items():
        copy = bench.scratch / "damaged" / folder.name
        for name in sorted(snapshot(folder)):
            if "/checkpoint-" in f"/{name}":
                continue                                # a folder of its own kind
            for what, change in damages(folder / name, bench.whole):
                shutil.rmtree(copy.parent, ignore_errors=True)
                shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
                if kind not in wanted:
                    outcomes = trial(copy, uses)
                    assert [outcome.kind for outcome in outcomes] == ["done"] * len(outcomes) and not outcomes[0].value
                    wanted[kind] = [outcome.value for outcome in outcomes[1:]]
                (copy / name).write_bytes(change((folder / name).read_bytes()))
                outcomes = trial(copy, uses)
                bench.judge(kind, f"{name}, {what}", *judge_damage(kind, outcomes, wanted[kind]))


def judge_damage(kind: str, outcomes: list[Outcome], wanted: list) -> tuple[str, str]:
    """(result, text). outcomes: of LoTA.check and of the uses. wanted: what the uses give of the undamaged folder."""
    for outcome in outcomes:
        if outcome.kind not in ("done", "line"):
            return "traceback", f"{outcome.kind} {outcome.text}"
    said, *outcomes = outcomes
    findings = said.value if said.kind == "done" else [said.text]
    if kind.startswith("export") and findings:
        return "refused", findings[0]
    refused = [outcome.text for outcome in outcomes if outcome.kind == "line"]
    for outcome, value in zip(outcomes, wanted, strict=True):
        if outcome.kind == "done" and outcome.value != value:
            if SAID not in outcome.printed:
                return "silent", "another result"
            refused.append(SAID)
    return ("refused", refused[0]) if refused else ("harmless", "")


# --- figures --------------------------------------------------------------------------------------------------------

def table(figures: dict) -> str:
    """The figures as the table of docs/reliability.md."""
    lines = ["| fault | of | tried | refused in one line | harmless | silent | trace backs | files left over |",
             "|---|---|---|---|---|---|---|---|"]
    for row in figures["rows"]:
        cells = row["fault"], row["of"], row["tried"], *(row[result] for result in GOOD + BAD)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every event and many damages, in place of a sample")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="the families to run")
    parser.add_argument("--output", type=Path, help="the JSON file for the figures")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="lota_faults_")) if "LOTA_FAULTS_SCRATCH" not in os.environ else Path(
        os.environ["LOTA_FAULTS_SCRATCH"])
    os.environ["LOTA_FAULTS_SCRATCH"] = str(scratch)
    restart_below_library(scratch)
    started = time.time()
    try:
        bench = prepared(scratch, args.all)
        for name in args.only:
            FAMILIES[name](bench)
            figures = counted(bench, round(time.time() - started))
            print(f"{name}: {len(bench.trials)} trials so far, {figures['seconds']} s", flush=True)
            if args.output:
                args.output.write_text(json.dumps(figures, indent=1) + "\n")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(table(figures))
    return 1 if figures["bad"] else 0


def counted(bench: Bench, seconds: int) -> dict:
    """The figures of all trials so far."""
    rows = Counter((trial["family"], trial["subject"]) for trial in bench.trials)
    results = Counter((trial["family"], trial["subject"], trial["result"]) for trial in bench.trials)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": " ".join(["python", "tests/faults/run.py", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(), "seconds": seconds, "below_python": below_python(),
        "rows": [{"fault": family, "of": subject, "tried": tried,
                  **{result: results[family, subject, result] for result in GOOD + BAD}}
                 for (family, subject), tried in sorted(rows.items())],
        "bad": [trial for trial in bench.trials if trial["result"] in BAD]}


@cache
def prepared(scratch: Path, whole: bool) -> Bench:
    """The libraries, imported once for all children, and the folders."""
    import gc

    import matplotlib.pyplot  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401

    import LoTA_QAF_main  # noqa: F401
    from LoTA import adapter, check, lota_merge, trainer  # noqa: F401
    from LoTA.export import dense, gguf, gptq, peft_adapter, run  # noqa: F401
    gc.collect()
    gc.freeze()
    return Bench(scratch, whole)


FAMILIES = {"kills": kills, "two_at_once": two_at_once, "damage": damage, "full_disks": full_disks,
            "training": training_faults}

if __name__ == "__main__":
    sys.exit(main())
