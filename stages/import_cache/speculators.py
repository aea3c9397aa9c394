"""speculators' offline hidden states: `hs_<i>.safetensors`, and the prepared data set, which has the loss masks.

`token_ids` [T] and `hidden_states` [T, K + 1, D]: the layers asked for and, unless left out, the last one. File i
belongs to row i of the data set (`input_ids`, `loss_mask`), a folder that `datasets` saved.
vLLM numbers layers by their input, so that 1 is the first one's output, and gives the last state before the norm; the
files do not state it.

    T tokens   K layers   D hidden size
"""

import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from pipeline.errors import DataError, UsageError, first_line, refuse_limit
from stages.import_cache.foreign_sample import (
    ForeignSample,
    PartialConvention,
    SampleLocation,
    bad_file,
    check_loss_mask,
    check_plain,
    check_states,
    check_token_ids,
    mapped_sample,
    source_facts,
)

NAME = re.compile(r"hs_(0|[1-9][0-9]*)\.safetensors")
SAVED = "state.json"  # of a data set that `datasets` saved
MASKS = "loss_mask"
KEYS = frozenset({"token_ids", "hidden_states"})


class Speculators:
    """A folder of `hs_<i>.safetensors`. `masks`: the data set's folder, by default this folder or its parent."""

    form = "speculators"
    stated = PartialConvention()

    def __init__(self, folder: Path, layers: int, width: int, masks: Path | None):
        self.folder, self.layers, self.width = folder, layers, width
        named = {int(match[1]): path for path in folder.iterdir() if (match := NAME.fullmatch(path.name))}
        self._numbers = {path.name: number for number, path in named.items()}
        self._files = [named[number] for number in sorted(named)]
        self.locations: list[SampleLocation] = [(path.name, 1) for path in self._files]
        self.masks = masks or next((place for place in (folder, folder.parent) if (place / SAVED).is_file()), None)
        if self.masks is None:
            raise UsageError(
                f"{folder}: hidden states without loss masks, which the prepared data set has; name its folder, the "
                f"one that holds {SAVED}, with --masks"
            )
        self._rows = self._open_rows()

    def _open_rows(self):
        from datasets import load_from_disk

        try:
            rows = load_from_disk(str(self.masks)).with_format("numpy")
            lacks = {"input_ids", MASKS} - {*rows.column_names}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            refuse_limit(self.masks, error)
            cause = first_line(error)
            raise UsageError(f"{self.masks}: no saved data set ({cause}); name its folder with --masks") from error
        if lacks:
            raise UsageError(f"{self.masks}: its rows have no {sorted(lacks)[0]}; name another data set with --masks")
        return rows

    def source_facts(self) -> dict:
        """Return this source's entry in the plan, the masks' folder included."""
        masks = sorted(path for path in self.masks.iterdir() if path.suffix == ".arrow")
        of_masks = source_facts(self.masks, "masks", masks)
        return {**source_facts(self.folder, self.form, self._files), "masks": of_masks["xxh3"]}

    def open(self, file: str, line: int) -> ForeignSample:
        """Memory-map one sample. DataError for a file that holds none, or belongs to another data set."""
        path = self.folder / file
        where, limit = str(path), path.stat().st_size
        try:
            with safe_open(path, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in {*opened.keys()} & KEYS}
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
            refuse_limit(path, error)
            raise bad_file(where, f"cut short or damaged ({str(error)[:120]})") from error
        absent = KEYS - tensors.keys()
        if absent:
            raise bad_file(where, f"has no {sorted(absent)[0]}")
        ids_T = check_token_ids(check_plain(tensors["token_ids"], "token_ids", where, limit).numpy(), where)
        states_TKD = check_states(tensors["hidden_states"], "hidden_states", where, limit)
        if (
            states_TKD.ndim != 3
            or states_TKD.shape[1] not in (self.layers, self.layers + 1)
            or states_TKD.shape[2] != self.width
        ):
            raise DataError(
                f"{where}: its hidden_states are {list(states_TKD.shape)}, wanted [tokens, {self.layers} and the last, "
                f"{self.width}]; name with --layers those it holds but the last, of the --model it was made with"
            )
        last_TD = states_TKD[:, self.layers] if states_TKD.shape[1] > self.layers else None
        return mapped_sample(where, ids_T, self._mask(path, ids_T), states_TKD[:, : self.layers], last_TD)

    def _mask(self, path: Path, ids_T: np.ndarray) -> np.ndarray:
        number = self._numbers[path.name]
        if number >= len(self._rows):
            raise DataError(
                f"{path}: {self.masks} has {len(self._rows)} rows, not that one; name its own data set with --masks"
            )
        row = self._rows[number]
        if not np.array_equal(np.asarray(row["input_ids"]), ids_T):
            raise DataError(
                f"{path}: its tokens are not those of row {number} of {self.masks}; name its own data set with --masks"
            )
        return check_loss_mask(np.asarray(row[MASKS]), str(path))
