"""A target is loaded once: what the host's memory holds meanwhile, beyond pages of mapped files."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loading_memory import STATUS
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

SCRIPT = Path(__file__).parents[1] / "loading_memory.py"
SIZES = dict(num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, head_dim=128, tie_word_embeddings=False)
SIZES |= dict(hidden_size=768, intermediate_size=2304, vocab_size=16_000)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=288)  # a file has each expert by itself
KINDS = {"dense": (Qwen3Config, SIZES), "experts": (Qwen3MoeConfig, SIZES | EXPERTS)}
SMALL = dict(num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=32)
MORE = 20 << 20  # what a load takes beside weights: modules, names, heaps of threads

pytestmark = pytest.mark.skipif(
    not STATUS.exists() or "RssAnon" not in STATUS.read_text() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="needs Linux and glibc",
)


class Loads:
    """A target in bfloat16, in files of 24 MB at most, and the most bytes of its loads in float32, by loader."""

    def __init__(self, kind: str, loaders: list[str], folder: Path):
        made, sizes = KINDS[kind]
        for name, chosen in (("target", sizes), ("small", sizes | SMALL)):
            model = AutoModelForCausalLM.from_config(made(**chosen), dtype=torch.bfloat16)
            model.save_pretrained(folder / name, max_shard_size="24MB")
        files = [path.stat().st_size for path in (folder / "target").glob("*.safetensors")]
        self.files, self.largest_file, self.weights = len(files), max(files), 2 * sum(files)
        command = [sys.executable, str(SCRIPT), str(folder / "target"), str(folder / "small"), *loaders]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        self.most = json.loads(done.stdout)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Loads:
    loaders = ["to a device", "to the host", "through the host", "two copies"]
    return Loads("dense", loaders, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Loads:
    return Loads("experts", ["to a device", "to the host"], tmp_path_factory.mktemp("experts"))


@pytest.fixture(params=KINDS)
def loads(request) -> Loads:
    return request.getfixturevalue(request.param)


def test_a_load_to_the_host_holds_the_weights_and_at_most_a_file_of_them_beside(loads):
    assert loads.files >= 4
    assert 0.95 * loads.weights < loads.most["to the host"] < loads.weights + loads.largest_file + MORE


def test_a_load_to_a_device_holds_at_most_a_file_of_the_weights_on_the_host(loads):
    assert loads.most["to a device"] < loads.largest_file + MORE


def test_loads_that_hold_more_are_found(dense):
    """So the bounds above can be missed: by a second copy of all weights, and by all of them on the host."""
    beside = dense.largest_file + MORE
    assert dense.most["two copies"] > dense.weights + 2 * beside
    assert dense.most["through the host"] > 2 * beside
