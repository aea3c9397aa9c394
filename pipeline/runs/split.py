"""Which samples of a cache train a draft, and which are held out to measure it: by hash, so that nothing else matters.

n samples of the cache   T rows of a sample
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.cache import HiddenCache
from pipeline.errors import DataError, UsageError

MOST_HELDOUT = 1024  # prompts held out by hash, however large the corpus
HELDOUT = "heldout"


def mix(x) -> np.ndarray:
    """Return splitmix64's finaliser of x (uint64, any shape): a bijection whose output bits look independent."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Split:
    """Indices of the usable samples, the number of others, and a digest of which samples are used how."""

    train: np.ndarray
    heldout: np.ndarray
    unusable: int
    digest: str


def split_samples(
    cache: HiddenCache, mask_token_id: int, share: float, layers: Sequence[int] | None = None, final: bool = False
) -> Split:
    """Go over every sample's tokens once. A sample counts that none of `layers` (None: all that are whole) refused;
    to be held out, or to be trained on where the loss reads `final`, that must not have refused it either.

    A sample is usable when two adjacent tokens are supervised: an anchor and the token after it. The corpus says what
    is held out; where it does not, `split_by_prompt` does. Raises UsageError when the mask token occurs in the corpus,
    DataError when nothing is left to train on.
    """
    table = cache.samples
    usable = np.zeros(len(cache), bool)
    prompts_n = np.zeros(len(cache), np.uint64)
    layers = cache.layers if layers is None else layers
    for index in np.flatnonzero(table.usable(layers)):
        ids_T, mask_T = cache.tokens_of(int(index))
        if (ids_T == mask_token_id).any():
            raise UsageError(
                f"mask token {mask_token_id} occurs in sample {table.hex(int(index))} of {cache.path}; "
                "set draft.mask_token_id to an id that no text uses"
            )
        usable[index] = (mask_T[:-1] & mask_T[1:]).any()
        prompts_n[index] = prompt_hash(ids_T, mask_T)
    stated = np.array(table.split)
    drawn = split_by_prompt(prompts_n, usable & (stated == ""), share)
    heldout = np.where(stated == "", drawn, stated == HELDOUT)
    train = np.flatnonzero(usable & ~heldout & table.usable(layers, final))
    if not len(train):
        out, short = int((usable & heldout).sum()), int((~usable).sum())
        raise DataError(
            f"{cache.path}: none of {len(cache)} samples can train a draft: {out} are held out (split `{HELDOUT}`), "
            f"{short} have no two adjacent supervised tokens, the states of {len(cache) - out - short} were refused; "
            "add others with `pipeline cache-hidden --append` and another --corpus, or a larger --max-samples"
        )
    held = np.flatnonzero(usable & heldout & table.usable(layers, cache.has_final))
    digest = _digest(table.sample_id, train, held)
    return Split(train, held, int(len(cache) - usable.sum()), digest)


def prompt_hash(ids_T: np.ndarray, mask_T: np.ndarray) -> int:
    """Return a hash of the tokens before the first supervised one, so that all answers to a prompt stay together.

    A sample without a prompt is its own.
    """
    start = int(np.argmax(mask_T)) if mask_T.any() else len(ids_T)
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids_T[: start or len(ids_T)], "<i4").tobytes())


def split_by_prompt(prompts_n: np.ndarray, among_n: np.ndarray, share: float) -> np.ndarray:
    """Return what is held out, bool [n]: the prompts whose mixed hash lies in the lowest `share` of all words.

    At most MOST_HELDOUT prompts; at least one, where there are two or more and `share` is not 0.
    """
    words_n = mix(prompts_n)
    words = np.unique(words_n[among_n])
    if not share or len(words) < 2:
        return np.zeros(len(words_n), bool)
    count = int(np.searchsorted(words, np.uint64(min(int(share * 2**64), 2**64 - 1))))
    last = words[min(max(count, 1), MOST_HELDOUT, len(words) - 1) - 1]
    return among_n & (words_n <= last)


def spread(cache: HiddenCache, indices: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` of the samples, as many of each domain as can be, chosen by hash, ascending."""
    words = mix(cache.samples.low64[indices])
    seen: dict[str, int] = {}
    ranked = []
    for word, index in sorted(zip(words.tolist(), indices.tolist(), strict=True)):
        domain = cache.samples.domain[index]
        seen[domain] = seen.get(domain, 0) + 1
        ranked.append((seen[domain], word, index))
    return np.array(sorted(index for _, _, index in sorted(ranked)[:count]), np.int64)


def _digest(ids_n2: np.ndarray, train: np.ndarray, heldout: np.ndarray) -> str:
    """Hash which samples are used how, whatever their order in the cache."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (train, heldout):
        ids = ids_n2[part]
        ids = ids[np.lexsort((ids[:, 1], ids[:, 0]))]
        digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, ">u8").tobytes())
    return digest.hexdigest()
