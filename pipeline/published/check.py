"""`pipeline check-export`: a published folder judged from its files alone, ours or anyone's.

Names and shapes are written out from the publications (`names.py`), the arithmetic a second time (`reference.py`): no
module that trains is asked whether it likes its own work.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import ProofError, UsageError
from pipeline.published.export_probe import ProbeResult, check_probe
from pipeline.published.folder import Opened, open_folder
from pipeline.published.names import draft_tensors
from pipeline.published.weights import WEIGHTS

# What engines load as weights, whatever it is called (vLLM and SGLang glob these).
_LOADED = ("*.safetensors", "*.bin", "*.pt")


@dataclass(frozen=True)
class Checked:
    """What was found of a sound folder."""

    opened: Opened
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    probe: ProbeResult | None

    def as_dict(self) -> dict:
        config, described = self.opened.config, self.opened.described
        return {
            "path": str(self.opened.path),
            "method": config.method,
            "form": "speculators" if described.speculators else "qwen3",
            "tensors": self.tensors,
            "parameters": self.parameters,
            "dtypes": list(self.dtypes),
            "layers": list(config.target_layer_ids),
            "block_size": config.block_size,
            "proposals": config.proposals,
            "proposed_ids": described.proposed,
            "vocab_size": config.vocab_size,
            "probe": None if self.probe is None else vars(self.probe),
        }


def check_export(path: Path, target_layers: int | None = None) -> Checked:
    """Check a published folder: every expected tensor, none surplus, shapes, finite values, ids in range, the probe.

    target_layers: the target's depth, for folders that do not state it. ProofError for the first thing wrong,
    UsageError where there is no folder.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path} is no folder; name one that holds a published draft")
    try:
        opened = open_folder(path, target_layers)
        _check_files(opened)
        dtypes = {str(tensor.dtype).removeprefix("torch.") for _, tensor in opened.own()}  # each is read, and finite
        for name in opened.names.keys() - draft_tensors(opened.config, opened.described.proposed).keys():
            _check_map(opened, name) if name in ("d2t", "t2d") else opened[name]
        shapes = draft_tensors(opened.config, opened.described.proposed)
        count = sum(int(torch.Size(shape).numel()) for shape in shapes.values())
        return Checked(opened, len(shapes), count, tuple(sorted(dtypes)), check_probe(opened))
    except UsageError as error:
        raise ProofError(f"check-export: {error}") from error


def checked_table(found: dict) -> str:
    """Return what `check-export` says of a sound folder."""
    ids = f", proposes {found['proposed_ids']:,} ids" if found["proposed_ids"] < found["vocab_size"] else ""
    first = (
        f"{found['path']}: a {found['method']} draft in the form of {found['form']}, {found['tensors']} tensors, "
        f"{found['parameters']:,} parameters, {' and '.join(found['dtypes'])}; reads layers {found['layers']}, "
        f"{found['proposals']} proposals in blocks of {found['block_size']}{ids}"
    )
    probe = found["probe"]
    if probe is None:
        return f"{first}\nno probe lies with it, so what it computes is not compared with what its trainer computed"
    return (
        f"{first}\nlogits recomputed from the files within {probe['difference']:.0e} of those stored at export, "
        f"{probe['blocks']} blocks of {probe['source']}"
    )


def _check_files(opened: Opened) -> None:
    """Refuse other files that an engine would load beside, or instead of, the weights."""
    mine = {file.name for file in opened.weights.files}
    others = sorted({file.name for pattern in _LOADED for file in opened.path.glob(pattern)} - mine)
    if others:
        raise UsageError(
            f"{opened.path / others[0]} lies beside {', '.join(sorted(mine))}, and engines load every such file as "
            f"weights; leave {WEIGHTS} alone"
        )


def _check_map(opened: Opened, name: str) -> None:
    """Refuse maps of reduced ids that leave the vocabulary, or contradict each other."""
    if not {"d2t", "t2d"} <= opened.names.keys():
        raise UsageError(f"{opened.path} holds only one of d2t and t2d; export it again")
    ids_W = opened["d2t"] + torch.arange(opened.described.proposed)
    may_V = opened["t2d"]
    vocabulary = opened.config.vocab_size
    if bool((ids_W < 0).any() or (ids_W >= vocabulary).any()):
        raise UsageError(f"{opened.path}: {name} leads outside the vocabulary of {vocabulary}; export it again")
    if not torch.equal(ids_W.sort().values, may_V.nonzero()[:, 0]):
        raise UsageError(f"{opened.path}: d2t and t2d name different ids; export it again")
