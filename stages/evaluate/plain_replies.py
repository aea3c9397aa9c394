"""Plain replies kept in a file: they depend on the target and the prompt, not on the draft, and take most of the time.

A file is a manifest with its own hash. It says what decided its replies; under anything else it is refused, so that a
reply out of it is what plain decoding would give here and now, but for near ties where a processor of another kind made
it. How long that would take, it does not know.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.manifest import read_canonical, write_canonical
from pipeline.errors import CacheError, UsageError
from stages.evaluate.decode import Decoded

DECIDED_BY = {
    "target": str,
    "dtype": str,
    "device": str,
    "threads": int,
    "torch": str,
    "transformers": str,
    "max_new": int,
    "stops": [int],
}
FORM = {"decided_by": DECIDED_BY, "plain_replies": {str: [int]}}


def reply_settings(target: PreTrainedModel, digest: str, max_new: int, stops: Collection[int]) -> dict:
    """Return what a plain reply depends on besides the prompt; threads, device and versions where two logits tie."""
    return {
        "target": digest,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": _device(target.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "max_new": max_new,
        "stops": sorted(stops),
    }


def _device(device: torch.device) -> str:
    """The device's type, and what of its kind chooses other kernels."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def digest_of(prompt_ids: Sequence[int]) -> str:
    """Return the digest of a prompt's ids, the key of its reply in the file."""
    return blake2b(np.array(prompt_ids, "<i8").tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class PlainReplies:
    """A file of plain replies as it was when opened, and those decoded since. Without a path: no replies."""

    path: Path | None = None
    decided_by: dict = field(default_factory=dict)
    held: dict[str, list[int]] = field(default_factory=dict)
    made: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, decided_by: dict) -> "PlainReplies":
        """Open a file, which need not be there yet. UsageError when it is damaged, or of another target or settings."""
        return PlainReplies(path, decided_by, _read(path, decided_by))

    def find(self, prompt_ids: Sequence[int]) -> Decoded | None:
        """Return the reply that the file has to a prompt. Nobody knows its seconds, so every ratio of them is NaN."""
        ids = self.held.get(digest_of(prompt_ids))
        if ids is None:
            return None
        none = [0] * (len(ids) - 1)
        return Decoded(ids, [1] * len(none), none, none, len(ids), float("nan"))

    def add(self, prompt_ids: Sequence[int], plain: Decoded) -> None:
        """Remember a reply for `write`."""
        self.made[digest_of(prompt_ids)] = plain.ids

    def write(self) -> None:
        """Add what was decoded to the file, and keep what others have added since. UsageError as in `open`."""
        if self.path is None or not self.made:
            return
        folder = self.path.absolute().parent
        with write_errors(self.path, "plain replies"), process_lock(folder, self.path.name):
            replies = _read(self.path, self.decided_by) | self.made
            write_canonical(self.path, {"decided_by": self.decided_by, "plain_replies": replies})


def _read(path: Path, decided_by: dict) -> dict[str, list[int]]:
    if not path.exists():
        return {}
    try:
        facts = read_canonical(path, FORM)
    except CacheError as error:
        found = str(error).removesuffix("; run `pipeline verify`")
        raise UsageError(f"--plain {found}; remove it or name another file") from error
    held = facts["decided_by"]
    for key, wanted in decided_by.items():
        if held[key] != wanted:
            raise UsageError(
                f"--plain {path} has replies decoded with {key} {held[key]}, and here it is {wanted}; name another file"
            )
    return facts["plain_replies"]
