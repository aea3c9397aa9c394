"""Weight files of unknown origin: nothing in them is executed, and no more memory is allocated than they are large.

safetensors holds tensors only, and its reader checks each against the file's length. PyTorch's own format is a
pickle: it passes the guard of `pipeline/pickles.py` first, is then read by `weights_only=True` and never otherwise, and
is mapped, not read; every tensor must be laid out plainly.
"""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import UsageError, cause_of, first_line, refuse_limit
from pipeline.json_files import check_regular, parse_json, read_file
from pipeline.pickles import RefusedPickle, check_pickle

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX, PICKLES = "model.safetensors.index.json", ("pytorch_model.bin", "training_state.pt")
# Where trainers put the draft in what they save.
STATES = ("draft_state_dict", "model_state_dict", "state_dict", "model")
MOST_JSON, MOST_PICKLE = 4 << 20, 4 << 20  # bytes; a config has 2 KiB, the pickle of a thousand tensors 0.2 MiB
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "BOOL": torch.bool}


class Weights:
    """A folder's tensors under the names they are stored by. Shapes and types are known before any is read."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | None] = {}  # None: a type that no draft has
        self._readers: dict[str, object] = {}

    def __getitem__(self, name: str) -> Tensor:
        reader = self._readers[name]
        return reader[name] if isinstance(reader, dict) else reader.get_tensor(name)

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, reader) -> None:
        if name in self.shapes:
            raise UsageError(f"{self.files[0].parent} holds {name} twice; remove the file that is not the draft's")
        self.shapes[name], self.dtypes[name], self._readers[name] = shape, dtype, reader


def read_json(path: Path) -> dict:
    """Read a JSON object of a moderate size. UsageError."""
    try:
        record = parse_json(read_file(path, MOST_JSON))
    except (OSError, ValueError) as error:
        refuse_limit(path, error)
        raise UsageError(
            f"{path} cannot be read ({cause_of(error)}); name a folder that holds a published draft"
        ) from error
    if not isinstance(record, dict):
        raise UsageError(f"{path} is no JSON object; name a folder that holds a published draft")
    return record


def open_weights(folder: Path) -> Weights:
    """Open the weights of a folder: safetensors, in one file or several, or else a pickle of PyTorch. UsageError."""
    if (folder / WEIGHTS).is_file():
        return open_safetensors([folder / WEIGHTS])
    if (folder / INDEX).is_file():
        return open_safetensors(_indexed(folder))
    for name in PICKLES:
        if (folder / name).is_file():
            return _pickled(folder / name)
    raise UsageError(f"{folder} holds no {', '.join((WEIGHTS, INDEX, *PICKLES))}; name a folder that holds a draft")


def _indexed(folder: Path) -> list[Path]:
    names = read_json(folder / INDEX).get("weight_map")
    files = sorted(set(names.values())) if isinstance(names, dict) and names else [None]
    if any(not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors") for name in files):
        raise UsageError(f"{folder / INDEX} names no safetensors files beside it; fetch the draft again")
    return [folder / name for name in files]


def open_safetensors(files: list[Path]) -> Weights:
    """Open safetensors files, whose tensors together are the draft. UsageError."""
    weights = Weights(files)
    for path in files:
        try:
            check_regular(path)
            reader = safe_open(path, framework="pt")
            for name in reader.keys():  # noqa: SIM118 - it is no mapping
                part = reader.get_slice(name)
                weights._add(name, tuple(part.get_shape()), _DTYPES.get(part.get_dtype()), reader)
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            refuse_limit(path, error)
            raise UsageError(f"{path} cannot be read ({error}); fetch the draft again") from error
    return weights


def _pickled(path: Path) -> Weights:
    stored = _check_pickle(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        refuse_limit(path, error)
        raise UsageError(f"{path} cannot be read ({first_line(error, 120)}); fetch the draft again") from error
    if isinstance(state, dict):
        state = next((state[key] for key in STATES if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UsageError(f"{path} holds no tensors by name; save the draft's state_dict as safetensors")
    weights = Weights([path])
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_contiguous():
            raise UsageError(f"{path}: {name} is no plain tensor; save the draft's state_dict as safetensors")
        weights._add(name, tuple(tensor.shape), tensor.dtype, {name: tensor.detach()})
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    if sum(storages.values()) > stored:
        raise UsageError(f"{path} holds {stored} bytes of tensors and names more; fetch the draft again")
    return weights


def _check_pickle(path: Path) -> int:
    """Refuse, before it is loaded, a pickle of anything but plain tensors. Return the bytes of tensors in it."""
    remedy = "save the draft's state_dict as safetensors with the tool that made it"
    try:
        return check_pickle(path, MOST_PICKLE)
    except RefusedPickle as refused:
        if refused.kind == "layout":
            raise UsageError(f"{path} is not laid out as torch.save lays it out ({refused}); {remedy}") from refused
        if refused.kind == "damaged":
            raise UsageError(f"{path} cannot be read ({refused}); {remedy}") from refused
        raise UsageError(f"{path} holds more than tensors ({refused}), and nothing in it is run; {remedy}") from refused
    except OSError as error:
        refuse_limit(path, error)
        raise UsageError(f"{path} cannot be read ({error}); {remedy}") from error
