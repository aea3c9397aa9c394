"""The weights of a published folder, opened as a draft.

It has every tensor that its config.json asks for, none more, none of another shape. Engines ignore names that they do
not know and serve random weights in their place; here both are refused, before a tensor is read.

Nothing in a file of weights is executed, and no more memory is allocated than it is large. safetensors holds tensors
only, and its reader checks each against the file's length. PyTorch's own format is a pickle: it passes the guard of
`pipeline/pickles.py` first, is then read by `weights_only=True` and never otherwise, and is mapped, not read; every
tensor must be laid out plainly.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.drafts import DRAFTS, Draft, DraftConfig
from pipeline.drafts.draft import Shapes
from pipeline.drafts.vocabulary import MAPS, ids_of
from pipeline.errors import UsageError, first_line, refuse_limit
from pipeline.json_files import check_regular
from pipeline.pickles import RefusedPickle, check_pickle
from pipeline.published.reading import (
    CONFIG,
    EMBEDDING,
    HEAD,
    Published,
    published_names,
    read_description,
    read_json,
    target_copies,
)
from pipeline.target.head import TargetHead

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "training_state.pt")
# Where trainers put the draft in what they save.
STATES = ("draft_state_dict", "model_state_dict", "state_dict", "model")
MOST_PICKLE = 4 << 20  # bytes; the pickle of a thousand tensors has 0.2 MiB
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "BOOL": torch.bool}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MASK_VECTOR = "mask_embedding.pt"  # vLLM puts it in the place of the mask token's embedding
ROWS_AT_ONCE = 1 << 14


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
    try:
        return check_pickle(path, MOST_PICKLE)
    except RefusedPickle as refused:
        found = {
            "layout": f"is not laid out as torch.save lays it out ({refused})",
            "damaged": f"cannot be read ({refused})",
        }.get(refused.kind, f"holds more than tensors ({refused}), and nothing in it is run")
    except OSError as error:
        refuse_limit(path, error)
        found = f"cannot be read ({error})"
    raise UsageError(f"{path} {found}; save the draft's state_dict as safetensors with the tool that made it")


@dataclass(frozen=True)
class Opened:
    """A folder whose tensors are all there, of the right shapes. Tensors are read when asked for."""

    path: Path
    described: Published
    weights: Weights
    names: dict[str, str]  # published name -> stored name

    @property
    def config(self) -> DraftConfig:
        return self.described.config

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by its published name, as stored. UsageError when it holds what is not finite."""
        tensor = self.weights[self.names[name]]
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UsageError(f"{self.path}: {name} holds values that are not finite; train or fetch it again")
        return tensor

    @property
    def shapes(self) -> Shapes:
        """Name and shape of the draft's own tensors."""
        return DRAFTS[self.config.method].tensors(self.config, self.described.proposed)

    def own(self) -> Iterator[tuple[str, Tensor]]:
        """Return the draft's own tensors one by one, by published name and as stored."""
        return ((name, self[name]) for name in self.shapes)

    def check_copies(self, embed_VD: Tensor, head_VD: Tensor) -> None:
        """Refuse copies of the target's embedding or head that are not this target's. UsageError."""
        if self.described.proposed < len(head_VD) and "d2t" in self.names:
            head_VD = head_VD[ids_of(self["d2t"]).to(head_VD.device)]
        for name, target_VD in ((EMBEDDING, embed_VD), (HEAD, head_VD)):
            if name not in self.names or name in self.shapes:  # a method of its own may have learned it
                continue
            copy_VD = self[name]
            for first in range(0, len(copy_VD), ROWS_AT_ONCE):
                rows = slice(first, first + ROWS_AT_ONCE)
                if not torch.equal(copy_VD[rows], target_VD[rows].to("cpu", copy_VD.dtype)):
                    raise UsageError(
                        f"{self.path} brings a {name} that is not the target's, so the draft is another target's or "
                        "was trained with a head of its own; only drafts on the target's frozen head are known here"
                    )


def open_folder(path: Path, target_layers: int | None = None) -> Opened:
    """Open a published folder of any form and check names, shapes and types. UsageError."""
    path = Path(path)
    described = read_description(path, target_layers)
    if (path / MASK_VECTOR).exists():
        raise UsageError(f"{path / MASK_VECTOR}: a mask vector of its own; a draft here reads the target's embedding")
    weights = open_weights(path)
    opened = Opened(path, described, weights, published_names(weights.shapes))
    _check_shapes(opened)
    _check_maps(opened)
    return opened


def _check_shapes(opened: Opened) -> None:
    config, proposed, weights = opened.config, opened.described.proposed, opened.weights
    file = weights.files[0] if len(weights.files) == 1 else opened.path
    described, wanted = opened.described, opened.shapes
    beside = target_copies(config, proposed, described.speculators) if described.owns_copies else {}
    reduced = {"d2t", "t2d", HEAD} if proposed < config.vocab_size else set()
    lacking = (wanted.keys() | reduced) - opened.names.keys()
    surplus = opened.names.keys() - wanted.keys() - beside.keys()
    for what, names in (("lacks", lacking), ("has surplus", surplus)):
        if names:
            raise UsageError(
                f"{file} {what} {', '.join(sorted(names)[:4])} ({len(names)} in all) for the {config.method} draft "
                f"that its {CONFIG} describes; fetch or export it again"
            )
    for name, stored in sorted(opened.names.items()):
        shape = (wanted | beside)[name]
        if weights.shapes[stored] != shape:
            raise UsageError(
                f"{opened.path}: {name} is {list(weights.shapes[stored])}, its {CONFIG} says {list(shape)}; fetch or "
                "export it again"
            )
        kinds = {"d2t": (torch.int64,), "t2d": (torch.bool,)}.get(name, FLOATS)
        if weights.dtypes[stored] not in kinds:
            raise UsageError(f"{opened.path}: {name} is stored as {weights.dtypes[stored]}; export it as bfloat16")


def _check_maps(opened: Opened) -> None:
    """Refuse maps of reduced ids that leave the vocabulary, or contradict each other."""
    found = MAPS & opened.names.keys()
    if not found:
        return
    if found != MAPS:
        raise UsageError(f"{opened.path} holds only one of d2t and t2d; export it again")
    ids_W, vocabulary = ids_of(opened["d2t"]), opened.config.vocab_size
    if bool((ids_W < 0).any() or (ids_W >= vocabulary).any()):
        raise UsageError(f"{opened.path}: d2t leads outside the vocabulary of {vocabulary}; export it again")
    if not torch.equal(ids_W.sort().values, opened["t2d"].nonzero()[:, 0]):
        raise UsageError(f"{opened.path}: d2t and t2d name different ids; export it again")


def load_draft_folder(
    path: Path, head: TargetHead, device: str | torch.device = "cpu", target_layers: int | None = None
) -> Draft:
    """Open a published draft, in float32 and evaluation mode. Nothing is guessed and nothing is left over.

    target_layers: the target's depth, for forms that do not state it. UsageError for an unknown kind of draft, a
    missing, contradictory or unknown value, and for tensors that are missing, surplus, of another shape or not finite.
    """
    opened = open_folder(path, target_layers)
    method = DRAFTS[opened.config.method]
    if opened.described.proposed < opened.config.vocab_size and not method.reduces_vocabulary:
        raise UsageError(
            f"{path} proposes {opened.described.proposed} of {opened.config.vocab_size} ids; a draft here proposes "
            "all: train one from it with `pipeline train-draft --init-from`"
        )
    draft = method(opened.config, head)
    opened.check_copies(head.embed_VD, head.head_VD)
    draft.load_state_dict(dict(opened.own()))
    return draft.to(device).eval()
