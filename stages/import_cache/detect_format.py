"""Recognise the form of a folder: SpecForge, speculators or DeepSpec."""

from pathlib import Path

from pipeline.errors import UsageError
from stages.import_cache.deepspec import INDEX, DeepSpec
from stages.import_cache.specforge import SUFFIX, SpecForge
from stages.import_cache.speculators import NAME, Speculators

Source = SpecForge | Speculators | DeepSpec

WANTED = "SpecForge's *.ckpt, speculators' hs_<i>.safetensors, or DeepSpec's manifest.json and samples.idx"


def find_source(folder: Path, layers: tuple[int, ...] | None, width: int, masks: Path | None) -> Source:
    """Return the source that a folder's files form. `width`: the target's hidden size. `layers`: those of --layers.

    Raises UsageError where there is none or --layers is missing; DataError for a damaged one.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; name one that holds {WANTED}")
    inner = folder / "hidden_states" if (folder / "hidden_states").is_dir() else folder  # where speculators puts them
    deepspec = (folder / INDEX).exists()
    speculators = next((place for place in (folder, inner) if any(map(_is_hidden_states, place.iterdir()))), None)
    specforge = next(folder.rglob(f"*{SUFFIX}*"), None)
    if sum(map(bool, (deepspec, speculators, specforge))) != 1:
        raise UsageError(f"{folder}: holds {'none or several'} of these: {WANTED}; name a folder with one of them")
    if masks is not None and not speculators:
        raise UsageError(
            f"{folder}: its files hold each sample's loss mask, and --masks is for speculators' hs_<i>.safetensors, "
            "which have none; leave it out"
        )
    if deepspec:
        source = DeepSpec(folder, width)
        if layers not in (None, source.stated.layers):
            stated = ",".join(map(str, source.stated.layers))
            raise UsageError(f"{folder}: its manifest names the layers {stated}; pass the same, or leave out --layers")
        return source
    if layers is None:
        raise UsageError(
            f"{folder}: no file of it says which layers it holds; name them in their order with --layers, such as "
            "--layers 1,9,17,25,33"
        )
    source = (
        Speculators(speculators, len(layers), width, masks) if speculators else SpecForge(folder, len(layers), width)
    )
    if not source.locations:
        raise UsageError(f"{folder}: no sample in it; name a folder that holds {WANTED}")
    return source


def _is_hidden_states(path: Path) -> bool:
    return NAME.fullmatch(path.name) is not None
