"""Plain replies kept in a file: they depend on the target and the prompt, not on the draft, and take most of the time.

The file is a manifest with its own hash. It records what decided its replies; under any other settings it is refused,
so that a stored reply is what plain decoding would give here and now, but for near ties where a processor of another
kind decoded it. It does not record how long decoding took.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import transformers
from pydantic import ValidationError
from transformers import PreTrainedModel

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.manifest import read_canonical, write_canonical
from pipeline.errors import CacheError, UsageError
from pipeline.evaluation.reports import Count, Counts, Record
from stages.evaluate.decode import Decoded


class DecidedBy(Record):
    """What a plain reply depends on besides the prompt; threads, device and versions where two logits tie."""

    target: str  # digest of its weights
    dtype: str
    device: str
    threads: Count
    torch: str
    transformers: str
    max_new: Count
    stops: Counts


class PlainRepliesFile(Record):
    decided_by: DecidedBy
    plain_replies: dict[str, Counts]  # token ids by `digest_of` the prompt


def reply_settings(target: PreTrainedModel, digest: str, max_new: int, stops: Collection[int]) -> DecidedBy:
    """Return what decides plain replies here; digest: of the target's weights."""
    return DecidedBy(
        target=digest,
        dtype=str(target.dtype).removeprefix("torch."),
        device=_device(target.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        max_new=max_new,
        stops=sorted(stops),
    )


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
    decided_by: DecidedBy | None = None
    stored: dict[str, list[int]] = field(default_factory=dict)
    new: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, decided_by: DecidedBy) -> "PlainReplies":
        """Open a file, which need not exist yet. UsageError when it is damaged, or of another target or settings."""
        return PlainReplies(path, decided_by, _read(path, decided_by))

    def find(self, prompt_ids: Sequence[int]) -> Decoded | None:
        """Return the stored reply to a prompt. Its seconds are unknown, so every ratio of them is NaN."""
        ids = self.stored.get(digest_of(prompt_ids))
        if ids is None:
            return None
        none = [0] * (len(ids) - 1)
        return Decoded(ids, [1] * len(none), none, none, len(ids), float("nan"))

    def add(self, prompt_ids: Sequence[int], plain: Decoded) -> None:
        """Remember a reply for `write`."""
        self.new[digest_of(prompt_ids)] = plain.ids

    def write(self) -> None:
        """Add the new replies to the file, and keep those that others have added since. UsageError as in `open`."""
        if self.path is None or not self.new:
            return
        folder = self.path.absolute().parent
        with write_errors(self.path, "plain replies"), process_lock(folder, self.path.name):
            replies = _read(self.path, self.decided_by) | self.new
            write_canonical(self.path, {"decided_by": self.decided_by.model_dump(), "plain_replies": replies})


def _read(path: Path, decided_by: DecidedBy) -> dict[str, list[int]]:
    if not path.exists():
        return {}
    try:
        file = PlainRepliesFile.model_validate(read_canonical(path))
    except CacheError as error:
        found = str(error).removesuffix("; run `pipeline verify`")
        raise UsageError(f"--plain {found}; remove it or name another file") from error
    except ValidationError:
        raise UsageError(f"--plain {path}: the manifest of something else; remove it or name another file") from None
    for key, wanted in decided_by:
        if (found := getattr(file.decided_by, key)) != wanted:
            raise UsageError(
                f"--plain {path} has replies decoded with {key} {found}, and here it is {wanted}; name another file"
            )
    return file.plain_replies
