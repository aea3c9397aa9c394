"""Draw tokens by inverse CDF, with float64 sums and one uniform number each: the same text for a seed on every device,
up to the rounding of the probabilities, where `torch.multinomial` draws differently on each.

    N rows   V vocabulary
"""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def draw(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Return one token [N] a row, drawn in proportion to its weights: where their sum passes uniform * total.

    weights: not negative, not all 0 in a row. uniform: float64 in [0, 1). A token of weight 0 is never drawn.
    """
    cumulative_NV = weights_NV.double().cumsum(-1)
    threshold_N1 = uniform_N.to(cumulative_NV)[:, None] * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, threshold_N1, right=True)[:, 0]


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """Return `count` uniform float64 numbers in [0, 1), one for each token to draw."""
    return torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)


def prompt_generator(seed: int, prompt_ids: list[int]) -> torch.Generator:
    """Return a generator seeded by the seed and the prompt's tokens only, not by order, count or device."""
    digest = blake2b(np.array([seed, *prompt_ids], "<i8").tobytes(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def key_seed(seed: int, key: str, turn: int) -> int:
    """Return a seed of 63 bits for one reply, from the seed, the corpus row's key and the turn."""
    return int.from_bytes(blake2b(f"{seed} {key} {turn}".encode(), digest_size=8).digest(), "little") >> 1


def nucleus(weights_NV: Tensor, top_p: float) -> Tensor:
    """Return the weights with all but the nucleus at 0: the fewest tokens whose share reaches top_p, and ties.

    weights: not negative, not all 0 in a row. The likeliest token is always in it.
    """
    if top_p >= 1:
        return weights_NV
    sorted_NV = weights_NV.double().sort(-1, descending=True).values
    before_NV = sorted_NV.cumsum(-1) - sorted_NV
    kept_N1 = (before_NV < top_p * sorted_NV.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    least_N1 = sorted_NV.gather(-1, kept_N1 - 1).to(weights_NV.dtype)
    return weights_NV.where(weights_NV >= least_N1, 0)
