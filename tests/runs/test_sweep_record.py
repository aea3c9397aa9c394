"""sweep.json: what was written is read back, and what is damaged or no sweep is refused."""

import pytest

from pipeline.errors import CacheError, UsageError
from pipeline.runs.sweep_record import SweepRecord, read_sweep, write_sweep

SETTING = {"draft.layers": [1, 3], "train.lr": 1e-3, "draft.method": "dflash", "draft.shift_label": True}
RUN = {
    "setting": SETTING | {"train.seed": 0}, "run": "runs/dflash-1", "state": "pruned", "steps": 4, "parameters": None,
    "accept_len": None, "interval": None, "calls": 0, "failed": None, "pruned": {"step": 2, "accept_len": 1.5},
    "data": "aa", "heldout": "bb", "seconds": 0.5, "trial": 3,
}  # fmt: skip
POOLED = {"setting": SETTING, "accept_len": 2.5, "interval": [2.0, 3.0], "runs": 2, "measured": 1, "seeds": [2.5]}
RATIO = {
    "setting": SETTING, "to": SETTING | {"train.lr": 3e-3}, "differs": ["train.lr"], "value": 0.9,
    "interval": [0.8, 1.0], "by_seed": [0.9], "replies": 7, "same_data": True,
}  # fmt: skip
FACTS = {
    "version": "0.11.0", "command": ["pipeline", "sweep"], "cache": "hs_cache", "cache_digest": "cc", "target": "tiny",
    "recipe": "sweep.toml", "init_from": None, "search": None, "runs": [RUN], "pooled": [POOLED], "ratios": [RATIO],
    "warnings": [],
}  # fmt: skip


def test_a_sweeps_record_is_read_as_it_was_written(tmp_path):
    record = SweepRecord.model_validate(FACTS)
    write_sweep(tmp_path, record)
    assert read_sweep(tmp_path) == record and record.model_dump() == FACTS


def test_a_changed_byte_and_a_folder_without_a_sweep_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"holds no sweep\.json"):
        read_sweep(tmp_path)
    write_sweep(tmp_path, SweepRecord.model_validate(FACTS))
    path = tmp_path / "sweep.json"
    path.write_bytes(path.read_bytes().replace(b"2.5", b"3.5", 1))
    with pytest.raises(CacheError, match=r"checksum does not match.*makes it again"):
        read_sweep(tmp_path)
