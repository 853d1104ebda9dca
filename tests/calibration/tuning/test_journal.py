"""The journal of trials, and searches that are killed and go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from isthmus.calibration.executors import InProcess
from isthmus.calibration.journal import Journal
from isthmus.calibration.trials import FACTS, Trials, fingerprint, sqnr_db
from isthmus.calibration.tuning import Trialing

# Beside the other files that read the graph of `conftest.py`, which is made once a process.
pytestmark = pytest.mark.xdist_group("tuning")


def test_a_journal_gives_back_the_same_numbers(tmp_path):
    journal = Journal(tmp_path / "j")
    numbers = (1 / 3, 5e-324, 1e30, 0.0)
    journal.add("k", numbers)
    journal.add("l", [2.0])
    again = Journal(tmp_path / "j")
    assert (again.get("k"), again.get("l"), again.get("m"), len(again)) == (numbers, (2.0,), None, 2)


def test_lines_that_are_not_whole_are_no_results(tmp_path):
    path = tmp_path / "j"
    for i in range(3):
        Journal(path).add(f"k{i}", [float(i)])
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for cut in range(first, len(data)):
        path.write_bytes(data[:cut])
        journal = Journal(path)
        whole = data[: cut + 1].count(b"\n") if data[cut : cut + 1] == b"\n" else data[:cut].count(b"\n")
        assert len(journal) == whole
    path.write_bytes(data[: len(data) - 5])
    Journal(path).add("k3", [3.0])  # after a line that was cut off
    assert [Journal(path).get(f"k{i}") for i in range(4)] == [(0.0,), (1.0,), None, (3.0,)]
    path.write_bytes(data.replace(b"[1.0]", b"[1.5]"))
    assert Journal(path).get("k1") is None
    for junk in (b"\xff\n", b"[]\n", b'{"key": 1}\n', b"[" * 100_000, b'{"key": "k", "values": [NaN], "sha256": ""}\n'):
        path.write_bytes(junk + data)
        assert len(Journal(path)) >= 2


CHILD = """
import os, signal, sys
from pathlib import Path
from isthmus.calibration import journal as journals
from isthmus.calibration.executors import InProcess
from isthmus.calibration.journal import Journal
from isthmus.calibration.recipe import Recipe, patterns_of
from isthmus.calibration.sensitivity import Unit
from isthmus.calibration.trials import fingerprint
from isthmus.calibration.tuning import Budget, Trialing, search

folder, output, left, torn = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "torn"
whole = Journal.add

def add(self, key, values):
    global left
    if left == 0:
        if torn:  # killed while it writes
            with self.path.open("ab") as file:
                file.write(b'{"key": "' + key.encode()[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    whole(self, key, values)

Journal.add = add
units = [Unit(f"blocks.{i}.fc", (), 100 + 7 * i) for i in range(5)]
with InProcess() as running:
    trialing = Trialing(running, Journal(output.with_suffix(".journal")))
    mark = fingerprint(folder)
    found = search(units, 1000, Budget(min_sqnr=float(sys.argv[5])), noises=lambda choices: trialing.noises(folder, mark, choices))
low = [unit.module for i, unit in enumerate(units) if i in found.best.on]
rest = [unit.module for i, unit in enumerate(units) if i not in found.best.on]
output.write_text(Recipe("fp8", patterns_of(low, rest), patterns_of(rest, low)).text(notes=[repr(found.best.sqnr_db)]))
print(trialing.done, trialing.known)
"""


def test_a_search_that_is_killed_goes_on_to_the_same_recipe(folder, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    count = json.loads((folder / FACTS).read_text())["switches"]
    trials = Trials(folder)
    bound = str(sqnr_db(trials.noise(range(count))) + 1.5)

    def start(name, left, torn=""):
        output = tmp_path / name / "recipe.yaml"
        output.parent.mkdir(exist_ok=True)
        command = [sys.executable, tmp_path / "child.py", folder, output, str(left), torn, bound]
        return output, subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    output, done = start("whole", -1)
    assert done.returncode == 0, done.stderr
    expected, trials_run = output.read_bytes(), int(done.stdout.split()[0])
    assert trials_run > 8
    killed = 0
    for left, torn in ((0, "torn"), (3, ""), (2, "torn"), (trials_run - 6, "torn")):  # each goes on where the one before was killed
        output, ended = start("killed", left, torn)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not output.exists()
        killed += left
    output, done = start("killed", -1)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == expected
    assert [int(n) for n in done.stdout.split()] == [trials_run, killed]


def test_what_is_known_is_not_run_again(folder, tmp_path):
    class Counting(InProcess):
        ran = 0

        def run(self, folder, trials):
            for result in super().run(folder, trials):
                Counting.ran += 1
                yield result

    told = []
    mark = fingerprint(folder)
    choices = [frozenset([0]), frozenset([1]), frozenset([0, 1])]
    for expected in (3, 3):
        with Counting() as running:
            trialing = Trialing(running, Journal(tmp_path / "j"), lambda *told_: told.append(told_), expected=3)
            noises = trialing.noises(folder, mark, choices)
            assert trialing.value("psnr", mark, choices[0], lambda: 40.0) == 40.0
        assert Counting.ran == expected
    assert noises == [Trials(folder).noise(on) for on in choices]
    assert (trialing.done, trialing.known) == (4, 4)
    assert [t[0] for t in told] == [1, 2, 3, 4]
    assert all(left >= 0 for _, _, left in told)
    assert fingerprint(folder, "other") != mark  # then nothing of it is known
