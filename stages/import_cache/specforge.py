"""SpecForge's offline features: a folder of `.ckpt` files, one sample each, written by torch.save.

A dict of `input_ids` [T], `loss_mask` [T], and states, all with or without a leading axis of 1:
DFlash, Domino, DSpark: `hidden_states` [T, K * D], layers side by side; `target_last_hidden_states` [T, D] (DSpark);
EAGLE-3: `aux_hidden_state` [T, K * D]; `hidden_state` [T, D].
The files state neither which layers they hold nor whether the last state is normed.

    T tokens   K layers   D hidden size
"""

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError, UsageError, first_line, refuse_limit
from pipeline.pickles import RefusedPickle, check_pickle
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

SUFFIX = ".ckpt"
KEYS = (("hidden_states", "target_last_hidden_states"), ("aux_hidden_state", "hidden_state"))
MAX_PICKLE = 1 << 20  # bytes outside of tensors; a sample has a few hundred
# What torch's restricted unpickler raises on bytes that torch.save did not write.
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    EOFError,
    OSError,
)


class SpecForge:
    """A folder of `.ckpt` files, at any depth. Each holds `layers` layers of hidden size `width`, side by side."""

    form = "specforge"
    stated = PartialConvention()

    def __init__(self, folder: Path, layers: int, width: int):
        self.folder, self.layers, self.width = folder, layers, width
        packed = next(folder.rglob(f"*{SUFFIX}.gz"), None)
        if packed:
            raise UsageError(f"{packed}: compressed, so it cannot be mapped; unpack it (gunzip -r) and import that")
        self._files = sorted(path for path in folder.rglob(f"*{SUFFIX}") if path.is_file())
        self.locations: list[SampleLocation] = [(path.relative_to(folder).as_posix(), 1) for path in self._files]

    def source_facts(self) -> dict:
        """Return this source's entry in the plan."""
        return source_facts(self.folder, self.form, self._files)

    def open(self, file: str, line: int) -> ForeignSample:
        """Memory-map one sample. DataError for a file that holds none."""
        path = self.folder / file
        record, limit, where = load(path), path.stat().st_size, str(path)
        layers, last = next((pair for pair in KEYS if pair[0] in record), KEYS[0])
        absent = [key for key in ("input_ids", "loss_mask", layers) if key not in record]
        if absent:
            raise bad_file(where, f"has {sorted(map(str, record))[:8]}, not {absent[0]}")
        ids_T, mask_T = (
            _drop_batch_axis(check_plain(record[key], key, where, limit)) for key in ("input_ids", "loss_mask")
        )
        wide = _as_matrix(check_states(record[layers], layers, where, limit), layers, where)
        if wide.shape[1] != self.layers * self.width:
            raise DataError(
                f"{where}: its {layers} are {wide.shape[1]} wide, {self.layers} layers of {self.width} are "
                f"{self.layers * self.width}; name with --layers as many as it holds, of the --model it was made with"
            )
        last_TD = None
        if record.get(last) is not None:
            last_TD = _as_matrix(check_states(record[last], last, where, limit), last, where)
        layers_TKD = wide.unflatten(1, (self.layers, self.width))
        return mapped_sample(where, check_token_ids(ids_T, where), check_loss_mask(mask_T, where), layers_TKD, last_TD)


def _drop_batch_axis(tensor: Tensor) -> np.ndarray:
    """Return a tensor of shape [T] or [1, T] as an array [T]."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return (tensor[0] if tensor.ndim == 2 and len(tensor) == 1 else tensor).numpy()


def _as_matrix(tensor: Tensor, name: str, where: str) -> Tensor:
    """Return a tensor of shape [T, width] or [1, T, width] as [T, width]. DataError for any other shape."""
    if tensor.ndim == 3 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 2:
        raise bad_file(where, f"its {name} are {list(tensor.shape)}, wanted [tokens, width]")
    return tensor


def load(path: Path) -> dict:
    """Memory-map the tensors of a file of torch.save; no code in it is ever run. DataError for anything else.

    `pipeline/pickles.py` checks it before torch opens it.
    """
    try:
        check_pickle(path, MAX_PICKLE)
    except RefusedPickle as refused:
        what = {
            "layout": f"not as torch.save writes: {refused}",
            "names": f"holds more than tensors (it names {refused}); nothing in it was run",
            "tensor": f"holds a tensor that is no plain tensor ({refused})",
            "damaged": f"cut short, or nothing that torch.save wrote ({refused})",
        }
        raise bad_file(path, what[refused.kind]) from refused
    except OSError as error:
        refuse_limit(path, error)
        raise bad_file(path, f"cannot be read ({error})") from error
    try:
        record = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        refuse_limit(path, error)
        cause = first_line(error, 120)
        raise bad_file(path, f"damaged ({cause})") from error
    if not isinstance(record, dict):
        raise bad_file(path, f"holds a {type(record).__name__}, wanted a dict of tensors")
    return record
