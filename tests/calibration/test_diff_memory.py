"""`isthmus diff --memory` bounds what the whole process holds, not only what the code says it holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20

MODEL = """
import torch
from torch import nn

class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.01))

    def forward(self, x):
        return torch.tanh(x * self.scale)

class Net(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.steps = nn.ModuleList(Step() for _ in range(steps))

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x

def deep():
    return Net(24).eval()

def shallow():
    return Net(12).eval()

def inputs():
    return (torch.linspace(-2, 2, 2 * 2**20),)  # 8 MiB, as every value after it
"""

# The peak of this program alone: that of getrusage counts the process too from which it was started.
CHILD = """
import sys
from pathlib import Path
from isthmus.cli import main
try:
    main(sys.argv[1:])
finally:
    print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.matrix
@pytest.mark.full
def test_the_peak_of_a_diff_is_that_of_its_memory(tmp_path):
    (tmp_path / "activations.py").write_text(MODEL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path)])}

    def child(*arguments):
        command = [sys.executable, "-c", CHILD, *map(str, arguments)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout, int(done.stdout.split()[-1]) * 1024

    def exported(net):
        folder = tmp_path / net
        child("export", f"activations:{net}", "--inputs", "activations:inputs", "--target", "onnxruntime", "-o", folder)
        return folder

    def peak(folder, memory):
        model = f"activations:{folder.name}"
        out, found = child("diff", "torch", folder, "--case", "example", "--model", model, "--trust", "--memory", memory)
        assert "0 over 1e-05" in out
        return found / MIB

    deep, shallow = exported("deep"), exported("shallow")
    least, little, much = peak(shallow, 32), peak(deep, 32), peak(deep, 1024)
    print(f"peaks: 13 values in 32 MiB {least:.0f} MiB, 25 in 32 MiB {little:.0f} MiB, 25 in 1024 MiB {much:.0f} MiB")
    # PyTorch and the graph have 96 MiB more each: what a process needs beside the values that are held hardly depends on it.
    assert little - least <= 32
    # Where there is room, all 200 MiB of one side at least are held at a time.
    assert much - little >= 200 - 32
    assert much - little <= 1024
