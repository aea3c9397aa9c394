"""Fixtures shared by all tests: a tiny target, a tiny corpus, and their cache. Read-only: copy to change."""

# ruff: noqa: E402  the environment first

import os
import signal

from pipeline.command_line import disable_spin_waiting

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub
disable_spin_waiting()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with Ctrl-C ignored

import hypothesis
import pytest
import torch
from cache_maker import CAPTURE
from tiny import conversations, save_target, write_jsonl

# An example may take long on a busy machine: no test is of time.
TIMELESS = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("suite", **TIMELESS)
hypothesis.settings.register_profile("long", max_examples=10_000, **TIMELESS)  # --hypothesis-profile long
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption("--flips", type=int, default=40, help="bits that test_damage.py flips (1000: all it can do)")
    parser.addoption("--threads", type=int, default=1, help="of torch; results differ in rounding, no test may")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture(scope="session", autouse=True)
def without_syncing():
    """Syncing is for power cuts, which no test makes; it was half of the suite's time."""
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda fd: None)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory):
    """The folder of a random Qwen3 target with its tokenizer."""
    return save_target(tmp_path_factory.mktemp("target") / "tiny-random")


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A JSONL file of 24 chats with domain and split."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "chats.jsonl", conversations())


@pytest.fixture(scope="session")
def tiny_cache(tiny_target, tiny_corpus, tmp_path_factory):
    """The folder of a cache with layers 1, 3 and 4 and `final`, captured in float32 on the CPU."""
    from stages.cache_hidden.run import run
    from stages.cache_hidden.settings import CaptureOptions

    folder = tmp_path_factory.mktemp("cache") / "hs_cache"
    run(str(tiny_target), str(tiny_corpus), folder, options=CaptureOptions(layers="1,3,4", max_length=256))
    return folder


@pytest.fixture(scope="session")
def greedy_cache(tiny_cache, tiny_target, tmp_path_factory):
    """The same, its replies the target's own greedy ones: accept lengths can be measured on it."""
    from rewritten_caches import with_greedy_replies

    return with_greedy_replies(tiny_cache, tiny_target, tmp_path_factory.mktemp("greedy") / "cache")


@pytest.fixture(scope="session")
def captured(tiny_target, tiny_corpus, tmp_path_factory):
    """Return a function that captures layers 1 and 3 and `final` of eight chats with a codec, once each."""
    from stages.cache_hidden.run import run
    from stages.cache_hidden.settings import CaptureOptions

    folder, caches = tmp_path_factory.mktemp("captured"), {}

    def capturing(codec: str):
        if codec not in caches:
            caches[codec] = folder / codec
            run(str(tiny_target), str(tiny_corpus), caches[codec], options=CaptureOptions(codec=codec, **CAPTURE))
        return caches[codec]

    return capturing
