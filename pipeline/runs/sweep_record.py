"""The record that a sweep leaves in its folder, as `pipeline sweep --json` prints it: sweep.json, read strictly.

    FOLDER/sweep.json   `SweepRecord`, with a checksum of itself (see pipeline/json_files.py)
           sweep.csv    one row a run, for spreadsheets
           sweep.log    what the runs printed while a table was shown in their place

FOLDER is the sweep's --out, without it runs/sweep-DIGEST. Both files are there from the start on, and a sweep that was
stopped leaves them, too: a grid's runs to come have the state "unfinished", a search has the trials begun. A value of a
recipe's field is a number, text, true or false, or a list of these; a setting has one for each field of the sweep, by
"section.field".
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import FailFast, Field

from pipeline.cache.atomic import write_file
from pipeline.errors import UsageError
from pipeline.json_files import Count, Number, Numbers, Record, read_record, record_bytes

SWEEP = "sweep.json"
MAKE_AGAIN = "remove it: the same `pipeline sweep` makes it again from its runs"

Value = bool | int | Number | str | list[int | Number | str]
Setting = dict[str, Value]


class PrunedAt(Record):
    """Where a search gave up a run, and the accept length on held-out replies that it had there."""

    step: Count
    accept_len: Number


class SweptRun(Record):
    """One run of a sweep."""

    setting: Setting
    run: str = Field(description="its folder; the sweep's where a search's setting was refused, which then has no run")
    state: Literal["finished", "failed", "pruned", "unfinished"]
    steps: Count = Field(description="of its recipe")
    parameters: Count | None = Field(description="of the draft; null until the run is finished")
    accept_len: Number | None = Field(description="on held-out replies; null where nothing was measured at the end")
    interval: list[Number] | None = Field(
        description="95 % bootstrap interval of accept_len over replies, low and high"
    )
    calls: Count = Field(description="target calls that accept_len is a mean over")
    failed: str | None = Field(description="what ended the run, in one line")
    pruned: PrunedAt | None = None
    data: str = Field(
        description='digest of the training samples and their order; equal: learned from the same; "" without a run'
    )
    heldout: str = Field(description='digest of the samples that accept_len is measured on; "" without a run')
    seconds: Number | None = Field(description="spent on training steps, evaluations and checkpoints left out")
    trial: Count | None = Field(None, description="its number in the study of a search")


class PooledSetting(Record):
    """The runs that differ only in their seed. setting: without the seed."""

    setting: Setting
    accept_len: Number | None = Field(description="over the replies of all seeds")
    interval: list[Number] | None = Field(description="95 % interval over replies, low and high; says nothing of seeds")
    runs: Count
    measured: Count = Field(description="how many of them have an accept length")
    seeds: Numbers = Field(description="the accept length of each of these")


class Ratio(Record):
    """The accept length of `setting` over that of `to`, over the replies and seeds that both measured."""

    setting: Setting
    to: Setting
    differs: list[str] = Field(description="the fields that differ")
    value: Number
    interval: Numbers = Field(description="95 % interval over replies, which are resampled alike for both")
    by_seed: Numbers = Field(description="the ratio of each seed alone")
    replies: Count
    same_data: bool = Field(description="each seed's two runs learned from the same samples in the same order")


class SearchFacts(Record):
    """How a search chose its settings."""

    sampler: str
    seed: Count
    trials: Count = Field(description="how many were asked for")
    prune: bool
    study: str = Field(description="its name in the journal")
    journal: str = Field(description="the path of optuna's journal")


class SweepRecord(Record):
    """A sweep: what it was made of, its runs and settings by accept length, best first, and their ratios."""

    version: str = Field(description="of draft-pipeline")
    command: list[str]
    cache: str
    cache_digest: str
    target: str
    recipe: str = Field(description="the path of the sweep's file")
    init_from: str | None
    search: SearchFacts | None = Field(description="null for a grid")
    runs: Annotated[list[SweptRun], FailFast()]
    pooled: Annotated[list[PooledSetting], FailFast()]
    ratios: Annotated[list[Ratio], FailFast()] = Field(
        description="each setting's to the best one's; in a grid also those of settings that differ in one list's value"
    )
    warnings: list[str] = Field(description="what makes runs hard to compare, a line each")


def write_sweep(folder: Path, record: SweepRecord) -> None:
    """Write sweep.json. Raises RoomError."""
    write_file(folder / SWEEP, record_bytes(record.model_dump()))


def read_sweep(folder: Path) -> SweepRecord:
    """Return the record of the sweep in a folder. Raises UsageError where there is none, CacheError when damaged."""
    path = folder / SWEEP
    if not path.is_file():
        raise UsageError(f"{folder} holds no {SWEEP}; it is in a sweep's --out, or in runs/sweep-… without one")
    return read_record(path, SweepRecord, MAKE_AGAIN)


def setting_text(setting: Setting) -> str:
    """Return a combination as text: "method = domino, lr = 0.003"."""
    return ", ".join(f"{key.partition('.')[2]} = {value_text(value)}" for key, value in setting.items())


def value_text(value: object) -> str:
    """Return a field's value as a table shows it; of a drawn number six digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
