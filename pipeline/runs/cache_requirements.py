"""What a draft needs of a cache: the target's sizes, a mask token, layers and final states.

A cache that lacks one is refused before any work, with the command that captures it.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.cache.atomic import in_use
from pipeline.cache.layout import FINAL, layer_of
from pipeline.cache.schema import CaptureRequest, read_log
from pipeline.errors import CacheError, UsageError
from pipeline.target.layers import text_config

if TYPE_CHECKING:
    from pipeline.cache import HiddenCache


def training_config(config: dict) -> dict:
    """Return the decoder's part of the target's config, with every size that training reads. UsageError."""
    text = text_config(config)
    needed = ["hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
    missing = [key for key in needed if key not in text]
    if missing:
        raise UsageError(f"the target's config.json in the cache lacks {', '.join(missing)}: not a decoder we know")
    return text


def resolve_mask_token(stated: int | None, tokens: dict, vocab_size: int) -> int:
    """Return the mask token's id: the recipe's, else the tokenizer's, else the first id no token has.

    Never pad, eos or bos: a draft would learn that the end of a text means "guess here".
    """
    candidates = {"draft.mask_token_id": stated, "the tokenizer's mask token": tokens.get("mask")}
    candidates["len(tokenizer)"] = tokens["length"]
    source, mask = next((source, token) for source, token in candidates.items() if token is not None)
    remedy = "set draft.mask_token_id to an id that no text uses"
    if mask >= vocab_size:
        raise UsageError(f"{source} is {mask}, outside the target's vocabulary of {vocab_size}; {remedy}")
    special = {"pad": [tokens.get("pad")], "bos": [tokens.get("bos")], "eos": tokens.get("eos") or []}
    equal = [name for name, ids in special.items() if mask in ids]
    if equal:
        raise UsageError(f"{source} is {mask}, the tokenizer's {' and '.join(equal)} token; {remedy}")
    return mask


def check_complete(cache: "HiddenCache", layers: Sequence[int] | None) -> None:
    """Refuse a cache with columns that only some shards have, unless the recipe states the `layers` it reads.

    The layers that a draft reads by default would depend on how far the capture is. Raises UsageError while a capture
    is running, else CacheError; and CacheError where shards have lost their segment of the plan, or nothing is captured
    yet.
    """
    if cache.catalog.unplanned_shards and not in_use(cache.path):
        raise CacheError(
            f"{cache.path}: shard {cache.catalog.unplanned_shards[0]} is in no segment of the plan, so one is lost; "
            "run `pipeline verify`"
        )
    if not (cache.whole or cache.catalog.partial):
        finish = "the same `pipeline import-cache` goes on" if _imported(cache) else f"run {recapture_command(cache)}"
        raise CacheError(f"{cache.path}: nothing is captured yet; {finish}")
    if layers is not None or not cache.catalog.partial:
        return
    read = f'`--set "draft.layers={[*cache.layers]}"` trains on what is whole'.replace(", ", ",")
    read = f", or {read}" if cache.layers else ""
    if in_use(cache.path):
        raise UsageError(f"{cache.path} is being captured: {partial_text(cache)}; wait until it is done{read}")
    every = {*cache.layers, *(layer_of(name) for name in cache.catalog.partial)} - {None}
    finish = how_to_add(cache, sorted(every), "needed" if FINAL in cache.catalog.partial else None)
    if _imported(cache):
        finish = "finish the import with the same command"
    raise CacheError(f"{cache.path} is incomplete, and nobody is capturing it: {partial_text(cache)}; {finish}{read}")


def partial_text(cache: "HiddenCache") -> str:
    """Return which columns only some shards have, such as "aux.3 in 15 of 16 shards"."""
    return ", ".join(f"{name} in {count} of {cache.shards} shards" for name, count in cache.catalog.partial.items())


def layers_to_read(cache: "HiddenCache", wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the layers to read, ascending: those wanted, or all that the cache holds.

    Raises UsageError for a layer that the cache lacks, naming the command that captures it.
    """
    present = list(cache.layers)
    missing = [layer for layer in wanted or () if layer not in present]
    if not missing and present:
        return tuple(sorted(set(wanted or present)))
    wanted = sorted({*present, *missing})
    if not present:
        finish = (
            "import with the same command" if _imported(cache) else f"capture with {recapture_command(cache, wanted)}"
        )
        raise UsageError(f"{cache.path} holds no layer that is whole; finish the {finish}")
    raise UsageError(
        f"{cache.path} holds layers {present}; this draft also reads {missing}: {how_to_add(cache, wanted)}, or leave "
        "`draft.layers` out of the recipe to read what is there"
    )


def check_final(cache: "HiddenCache", why: str, remedy: str) -> None:
    """Raise UsageError for a cache without the target's final states.

    why: what reads them. remedy: the setting that does without them.
    """
    if not cache.has_final:
        add = how_to_add(cache, cache.layers, "needed")
        raise UsageError(f"{cache.path} holds no final states, which {why} learns from; {add}, or set {remedy}")


def how_to_add(cache: "HiddenCache", layers: Sequence[int], final: str | None = None) -> str:
    """Return, for an error message, how to add the columns that a cache lacks: by a capture of the same samples, or by
    another import, as nothing can be captured into an imported cache."""
    if _imported(cache):
        return "it was imported, so import files that hold them too into another --out"
    return f"add them with {recapture_command(cache, layers, final)}"


def _imported(cache: "HiddenCache") -> bool:
    return cache.identity.capture.engine == "imported"


def cache_hidden_command(options: Mapping[str, object], *flags: str) -> str:
    """Return the command line `pipeline cache-hidden` with these options, without those that are None or empty."""
    words = [str(word) for name, value in options.items() if value not in (None, "") for word in (name, value)]
    return shlex.join(["pipeline", "cache-hidden", *words, *flags])


def recapture_command(cache: "HiddenCache", layers: Sequence[int] = (), final: str | None = None) -> str:
    """Return the command, in backquotes, that captures `layers` of the cache's samples; without any, the same ones."""
    request = read_log(cache.path).request or CaptureRequest()  # only there is the path of the corpus
    options = request.options
    stated = {
        "--model": request.model or cache.identity.target.name or "MODEL",
        "--corpus": request.corpus,
        "--max-samples": options.get("max_samples"),
        "--out": cache.path,
        "--layers": ",".join(map(str, layers)) or options.get("layers"),
        "--codec": None if layers else options.get("codec"),
        "--final": final,
    }
    return f"`{cache_hidden_command(stated)}`"
