"""The split of a cache's samples into training and held-out ones: by hash of the prompt, so it is reproducible.

n samples of the cache   T rows of a sample
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.cache import HiddenCache
from pipeline.errors import DataError, UsageError

MAX_HELDOUT = 1024  # prompts held out by hash, however large the corpus
HELDOUT = "heldout"


def splitmix64(x) -> np.ndarray:
    """Return splitmix64's finaliser of x (uint64, any shape): a bijection with pseudorandom output."""
    x = np.asarray(x, np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Split:
    """Indices of the training and held-out samples, the number of unusable ones, and a digest of the split."""

    train: np.ndarray
    heldout: np.ndarray
    unusable: int
    digest: str


def split_samples(
    cache: HiddenCache, mask_token_id: int, share: float, layers: Sequence[int] | None = None, final: bool = False
) -> Split:
    """Split the samples of a cache, reading every sample's tokens once.

    A sample is usable when two adjacent tokens are supervised (an anchor and the token after it) and no column of
    `layers` (None: all complete ones) has its states refused. To be held out, or trained on where `final`, it needs its
    final states too. The corpus says what is held out; where it does not, `split_by_prompt` does. Raises UsageError
    when the mask token occurs in the corpus, DataError when nothing is left to train on.
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
    measured = np.flatnonzero(usable & heldout & table.usable(layers, cache.has_final))
    digest = _digest(table.sample_id, train, measured)
    return Split(train, measured, int(len(cache) - usable.sum()), digest)


def prompt_hash(ids_T: np.ndarray, mask_T: np.ndarray) -> int:
    """Return a hash of the tokens before the first supervised one, so that all answers to a prompt stay together.

    A sample without a prompt is hashed whole.
    """
    start = int(np.argmax(mask_T)) if mask_T.any() else len(ids_T)
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids_T[: start or len(ids_T)], "<i4").tobytes())


def split_by_prompt(prompts_n: np.ndarray, among_n: np.ndarray, share: float) -> np.ndarray:
    """Return which samples are held out, bool [n]: those whose prompt's hash is in the lowest `share` of 64-bit values.

    At most MAX_HELDOUT prompts; at least one, where there are two or more and `share` is not 0.
    """
    hashes_n = splitmix64(prompts_n)
    hashes = np.unique(hashes_n[among_n])
    if not share or len(hashes) < 2:
        return np.zeros(len(hashes_n), bool)
    count = int(np.searchsorted(hashes, np.uint64(min(int(share * 2**64), 2**64 - 1))))
    last = hashes[min(max(count, 1), MAX_HELDOUT, len(hashes) - 1) - 1]
    return among_n & (hashes_n <= last)


def stratified_subset(cache: HiddenCache, indices: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` of the samples `indices`, equally many of each domain if possible, by hash, ascending."""
    hashes = splitmix64(cache.samples.low64[indices])
    seen: dict[str, int] = {}
    ranked = []
    for value, index in sorted(zip(hashes.tolist(), indices.tolist(), strict=True)):
        domain = cache.samples.domain[index]
        seen[domain] = seen.get(domain, 0) + 1
        ranked.append((seen[domain], value, index))
    return np.array(sorted(index for _, _, index in sorted(ranked)[:count]), np.int64)


def _digest(ids_n2: np.ndarray, train: np.ndarray, heldout: np.ndarray) -> str:
    """Return a hash of the training and held-out samples' ids, whatever their order in the cache."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (train, heldout):
        ids = ids_n2[part]
        ids = ids[np.lexsort((ids[:, 1], ids[:, 0]))]
        digest.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, ">u8").tobytes())
    return digest.hexdigest()
