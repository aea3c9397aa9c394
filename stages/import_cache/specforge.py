"""SpecForge's offline features: a folder of `.ckpt` files, a sample each, which torch.save wrote.

A dict of `input_ids` [T], `loss_mask` [T], and states, all with or without a leading axis of 1:
DFlash, Domino, DSpark: `hidden_states` [T, K * D], layers side by side; `target_last_hidden_states` [T, D] (DSpark);
EAGLE-3: `aux_hidden_state` [T, K * D]; `hidden_state` [T, D].
Which layers, and whether the last state is normed, no file says.

    T tokens   K layers   D hidden size
"""

import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError, UsageError
from pipeline.os_errors import refuse_limit
from pipeline.pickles import RefusedPickle, check_pickle
from stages.import_cache.foreign_sample import (
    Foreign,
    Place,
    Stated,
    broken,
    listing,
    loss_mask,
    mapped,
    plain,
    states,
    tokens,
)

SUFFIX = ".ckpt"
KEYS = (("hidden_states", "target_last_hidden_states"), ("aux_hidden_state", "hidden_state"))
MOST_PICKLE = 1 << 20  # bytes of what is not a tensor; a sample has a few hundred
# What torch's restricted unpickler raises on bytes that were never written by torch.save.
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
    """A folder of `.ckpt` files, at any depth. `layers` of width `width` lie side by side in each."""

    form = "specforge"
    stated = Stated()

    def __init__(self, folder: Path, layers: int, width: int):
        self.folder, self.layers, self.width = folder, layers, width
        packed = next(folder.rglob(f"*{SUFFIX}.gz"), None)
        if packed:
            raise UsageError(f"{packed}: compressed, so it cannot be mapped; unpack it (gunzip -r) and import that")
        self._files = sorted(path for path in folder.rglob(f"*{SUFFIX}") if path.is_file())
        self.places: list[Place] = [(path.relative_to(folder).as_posix(), 1) for path in self._files]

    def listing(self) -> dict:
        """What the plan says of this source."""
        return listing(self.folder, self.form, self._files)

    def open(self, file: str, line: int) -> Foreign:
        """Map one sample. DataError for a file that is not one."""
        path = self.folder / file
        held, limit, where = load(path), path.stat().st_size, str(path)
        layers, last = next((pair for pair in KEYS if pair[0] in held), KEYS[0])
        absent = [key for key in ("input_ids", "loss_mask", layers) if key not in held]
        if absent:
            raise broken(where, f"has {sorted(map(str, held))[:8]}, not {absent[0]}")
        ids_T, mask_T = (_row(plain(held[key], key, where, limit)) for key in ("input_ids", "loss_mask"))
        wide = _flat(states(held[layers], layers, where, limit), layers, where)
        if wide.shape[1] != self.layers * self.width:
            raise DataError(
                f"{where}: its {layers} are {wide.shape[1]} wide, {self.layers} layers of {self.width} are "
                f"{self.layers * self.width}; name with --layers as many as it holds, of the --model it was made with"
            )
        last_TD = None
        if held.get(last) is not None:
            last_TD = _flat(states(held[last], last, where, limit), last, where)
        layers_TKD = wide.unflatten(1, (self.layers, self.width))
        return mapped(where, tokens(ids_T, where), loss_mask(mask_T, where), layers_TKD, last_TD)


def _row(tensor: Tensor) -> np.ndarray:
    """The numbers [T] of a tensor that may have an axis of 1 before."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return (tensor[0] if tensor.ndim == 2 and len(tensor) == 1 else tensor).numpy()


def _flat(tensor: Tensor, name: str, where: str) -> Tensor:
    """[T, width] of a tensor that may have an axis of 1 before. DataError."""
    if tensor.ndim == 3 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 2:
        raise broken(where, f"its {name} are {list(tensor.shape)}, wanted [tokens, width]")
    return tensor


def load(path: Path) -> dict:
    """Map the tensors of a file of torch.save; no code in it is ever run. DataError for anything else.

    It passes the guard of `pipeline/pickles.py` before torch opens it.
    """
    try:
        check_pickle(path, MOST_PICKLE)
    except RefusedPickle as refused:
        what = {
            "layout": f"not as torch.save writes: {refused}",
            "names": f"holds more than tensors (it names {refused}); nothing in it was run",
            "tensor": f"holds a tensor that is no plain tensor ({refused})",
            "damaged": f"cut short, or nothing that torch.save wrote ({refused})",
        }
        raise broken(path, what[refused.kind]) from refused
    except OSError as error:
        refuse_limit(path, error)
        raise broken(path, f"cannot be read ({error})") from error
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        refuse_limit(path, error)
        cause = str(error).strip().split("\n")[0][:120] or type(error).__name__
        raise broken(path, f"damaged ({cause})") from error
    if not isinstance(held, dict):
        raise broken(path, f"holds a {type(held).__name__}, wanted a dict of tensors")
    return held
