"""Memory of tensors on a CPU."""

import ctypes
import json
import subprocess
import sys

import pytest

FAULTS = """
import json, resource, sys
import torch
from pipeline.tensors import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory(torch.device("cpu"))
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1.0)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(faults))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_that_was_freed_is_not_cleared_again_by_the_system():
    def faults(kind: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", FAULTS, kind], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    pages = (64 << 20) // 4096
    assert min(faults("given back")) > pages / 600  # in pages of 2 MB at the most
    assert max(faults("kept")[1:]) < 20
