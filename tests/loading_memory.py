"""The most anonymous memory of a load: `python tests/loading_memory.py FOLDER FIRST LOADER...`, a process of its own.

LOADER: a key of LOADERS. FIRST: the folder of a small target of the same kind, which is loaded before, for what a first
load imports. Prints, by loader, the most bytes while FOLDER was loaded beyond what the process had.

Pages of a mapped file are no anonymous memory: the kernel drops them when memory is short, and reads them again.
"""

import ctypes
import gc
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pipeline.target.loading import load_target

STATUS = Path("/proc/self/status")
EVERY_S = 0.001


def two_copies(folder: str) -> PreTrainedModel:
    """Load as one must not: all weights are read, widened, and then copied into a model that is there."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    files = Path(folder).glob("*.safetensors")
    weights = {name: weight.float() for path in files for name, weight in load_file(path).items()}
    model.load_state_dict(weights, strict=False)
    return model


def through_the_host(folder: str) -> PreTrainedModel:
    """Load as one must not: whole in host memory, and then to the device."""
    return load_target(folder, dtype=torch.float32).to("meta")


# The meta device stands for a GPU: its tensors take nothing of the host's memory.
LOADERS = {
    "to the host": lambda folder: load_target(folder, dtype=torch.float32),
    "to a device": lambda folder: load_target(folder, dtype=torch.float32, device="meta"),
    "two copies": two_copies,
    "through the host": through_the_host,
}


def anonymous_bytes() -> int:
    return next(int(line.split()[1]) << 10 for line in STATUS.open() if line.startswith("RssAnon"))


def most_beyond(load: Callable[[], PreTrainedModel]) -> int:
    """Return the most anonymous bytes of the process while it loads, beyond those of now."""
    before, seen, ended = anonymous_bytes(), [], threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY_S):
            seen.append(anonymous_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    held = load()
    ended.set()
    watching.join()
    seen.append(anonymous_bytes())
    del held
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # so that the next load finds no freed memory to use again
    return max(seen) - before


def main(folder: str, first: str, *loaders: str) -> None:
    transformers_logging.disable_progress_bar()
    for loader in loaders:
        LOADERS[loader](first)
    print(json.dumps({loader: most_beyond(lambda loader=loader: LOADERS[loader](folder)) for loader in loaders}))


if __name__ == "__main__":
    main(*sys.argv[1:])
