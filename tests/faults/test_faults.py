"""The quick part of run.py, in the test suite: a sample of every fault of every folder, and nothing is silently wrong.

docs/reliability.md tells what the whole of it found.
"""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from faults.harness import COUNT, FAIL, FULL, HERE, KILL, STOP, Fault, Trial, snapshot
from LoTA import UserError

RESULTS = ("refused", "harmless", "silent", "traceback", "left over")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What the command of the page writes, without --all."""
    output = tmp_path_factory.mktemp("faults") / "figures.json"
    done = subprocess.run([sys.executable, HERE / "run.py", "--output", output], cwd=ROOT, text=True,
                          capture_output=True, timeout=900)
    assert output.exists(), done.stderr
    found = json.loads(output.read_text())
    assert done.returncode == bool(found["bad"])
    return found


def test_nothing_is_silently_wrong(figures):
    assert figures["bad"] == []
    assert all(row["refused"] + row["harmless"] == row["tried"] > 0 for row in figures["rows"])


def test_every_fault_meets_every_folder(figures):
    whole = {"merge", *(f"export {format}" for format in ("gptq", "peft", "dense", "gguf")), "training"}
    damaged = {"GPTQ folder", "adapter", "checkpoint", "adapter, LR-QAT", "checkpoint, LR-QAT", "merged folder",
               *whole - {"merge", "training"}}
    assert {(row["fault"], row["of"]) for row in figures["rows"]} == {
        *((fault, of) for fault in ("kill", "full disk", "two at once") for of in whole),
        *(("damage", of) for of in damaged)}


def test_the_page_quotes_its_figures():
    """And the whole of it found nothing silently wrong either."""
    committed = json.loads((ROOT / "docs/reliability.json").read_text())
    page = (ROOT / "docs/reliability.md").read_text()
    for row in committed["rows"]:
        cells = [row["fault"], row["of"], row["tried"], *(row[result] for result in RESULTS)]
        assert "| " + " | ".join(map(str, cells)) + " |" in page
    assert committed["command"] in page and committed["commit"] in page and committed["date"] in page
    assert committed["bad"] == [] and committed["below_python"]


# --- the harness itself, with the audit hooks that stand in where no C compiler is ------------------------------------

@pytest.fixture
def place(tmp_path):
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def write_three(place):
    """Three events: a file, a folder, a rename."""
    (place / "a").write_text("1")
    (place / "folder").mkdir()
    os.rename(place / "a", place / "b")
    return "written"


@pytest.mark.parametrize("action, at, kind, there", [
    (COUNT, 0, "done", ["b", "folder"]), (KILL, 1, "killed", []), (KILL, 2, "killed", ["a"]),
    (KILL, 3, "killed", ["a", "folder"]), (FAIL, 2, "line", ["a"]), (FULL, 1, "line", []),
    (KILL, 4, "done", ["b", "folder"])])
def test_a_fault_meets_its_event(tmp_path, place, action, at, kind, there):
    outcome = Trial(lambda: write_three(place), Fault(place, action, at), tmp_path).outcome()
    assert outcome.kind == kind and sorted(path.name for path in place.iterdir()) == there
    assert outcome.value == ("written" if kind == "done" else None)
    assert kind != "line" or outcome.text.startswith("the disk is full")
    assert len(outcome.events) == {"done": 3}.get(kind, at)


def test_a_stopped_trial_goes_on(tmp_path, place):
    trial = Trial(lambda: write_three(place), Fault(place, STOP, 3), tmp_path)
    assert trial.stopped() and snapshot(place).keys() == {"a"}
    trial.go_on()
    assert trial.outcome().kind == "done" and snapshot(place).keys() == {"b"}


def test_outcomes(tmp_path):
    """One line, a trace back, and a signal that is no fault of the trial's are told apart."""
    def fail(error):
        raise error
    for action, kind, text in ((lambda: fail(UserError("one line")), "line", "one line"),
                               (lambda: fail(KeyError("name")), "traceback", "KeyError: 'name'"),
                               (lambda: os.kill(os.getpid(), signal.SIGTERM), "traceback", "signal 15")):
        outcome = Trial(action, None, tmp_path).outcome()
        assert (outcome.kind, outcome.text) == (kind, text)
    assert snapshot(Path(tmp_path / "nowhere")) is None
