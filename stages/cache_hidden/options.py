"""The options of a capture. None means: as in the existing cache, else the default stated here."""

import re
import sys
from dataclasses import dataclass

from pipeline.errors import UsageError

DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")
SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)\s*([kmgtp]?)(i?)b?", re.IGNORECASE)


@dataclass(frozen=True)
class CaptureOptions:
    """All options of the command line but model, corpus and output folder."""

    layers: str | None = None  # "1,9,17"; None: `taps` evenly spaced layers, with `append` those of the cache
    taps: int | None = None  # None: `pipeline.target.layers.default_taps`
    final: str | None = (
        None  # rows stored: needed (beside supervised ones), all, none. None: needed, or as in the cache
    )
    max_length: int | None = None  # tokens a sample, truncated at the end. None: 3072, or the target's maximum if less
    batch_tokens: int | None = None  # padded tokens a forward; part of the cache's identity. None: 4096
    max_samples: int | None = None  # stop reading the corpus after so many usable samples
    device: str | None = None  # None: cuda where there is one
    dtype: str | None = None  # bfloat16, float32; None: float32 on a CPU, else the target's own
    revision: str | None = None  # of a hub model
    budget: str | None = None  # bytes of the whole cache, "2TB"; see budget.py. None: all samples, or the plan's own
    methods: str | None = None  # "dflash,domino": whose drafts will be trained, for the budget. None: all
    seed: int = 0  # which samples a budget takes
    turns: str | None = None  # "last": one sample a conversation; "each": all turns. None: as the cache, else by rule
    template_kwargs: str | None = None  # arguments of the chat template, a JSON object. None: as the cache, else none
    template_date: str | None = None  # today's date for the template, "2024-07-26". None: as the cache, else that
    codec: str | None = None  # "int8", "aux=int8,final=zstd"; None: as it is in the cache, else raw
    roles: str | None = None  # "bard=assistant,narrator=user": who speaks, beside those in `messages.ROLES`
    append: bool = False  # add the corpus to those the cache has
    worker: str | None = None  # "I/N"; None: the variables of torchrun or SLURM, else the only one

    def __post_init__(self):
        if self.layers is not None and self.taps is not None:
            raise UsageError(f"--layers {self.layers} and --taps {self.taps} say two things; give one")
        if self.final not in (None, "needed", "all", "none"):
            raise UsageError(f"--final {self.final}: wanted needed, all or none")
        if self.turns not in (None, "last", "each"):
            raise UsageError(f"--turns {self.turns}: wanted last or each")
        if self.budget is not None:
            size_bytes(self.budget)
        elif self.methods is not None or self.seed:
            raise UsageError("--methods and --seed say what a budget may leave out; give --budget too")
        if self.max_samples is not None and self.max_samples > sys.maxsize:
            raise UsageError(f"--max-samples {self.max_samples}: no corpus has as many; leave it out for all of them")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed {self.seed}: wanted 0 or more, and less than 2^64")
        if self.device is not None and not DEVICE.fullmatch(self.device):
            raise UsageError(f"--device {self.device}: wanted cpu, cuda, or one of several such as cuda:1")
        if self.max_length is not None and self.max_length < 2:
            raise UsageError(f"--max-length {self.max_length}: a sample is two tokens at least")

    def layer_list(self) -> list[int] | None:
        """Return the layers named, in order, or None for the default layers. UsageError for anything but numbers."""
        if self.layers is None:
            return None
        try:
            return [int(part) for part in self.layers.split(",")]
        except ValueError as error:
            raise UsageError(f"--layers {self.layers}: wanted numbers with commas, such as 1,9,17") from error


def size_bytes(text: str) -> int:
    """Return a size in bytes: 2TB and 500G count by thousands, 1.5TiB and 64Gi by 1024. UsageError for all else."""
    found = SIZE.fullmatch(text.strip())
    size = 0
    if found and (found[2] or not found[3]):
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgtp".index(found[2].lower() or " "))
    if not size:
        raise UsageError(f"--budget {text}: wanted a size such as 500GB, 2TB or 1.5TiB")
    return size
