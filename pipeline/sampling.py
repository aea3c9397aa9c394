"""Drawing tokens, with float64 sums and one uniform number each: a seed gives the same text on every device, up to the
rounding of the probabilities, where `torch.multinomial` has a stream of its own on each.

    N rows   V vocabulary
"""

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def draw(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Return one token [N] a row, with chances proportional to its weights: where its sum passes uniform * total.

    weights: not negative, not all 0 in a row. uniform: float64 in [0, 1). A token of weight 0 is never drawn.
    """
    passed_NV = weights_NV.double().cumsum(-1)
    wanted_N1 = uniform_N.to(passed_NV)[:, None] * passed_NV[:, -1:]
    return torch.searchsorted(passed_NV, wanted_N1, right=True)[:, 0]


def uniforms(count: int, generator: torch.Generator) -> Tensor:
    """Return numbers [count] in [0, 1) to draw with, float64."""
    return torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device)


def prompt_generator(seed: int, prompt_ids: list[int]) -> torch.Generator:
    """Return a generator that depends on the seed and the prompt's tokens only: not on order, count or device."""
    digest = blake2b(np.array([seed, *prompt_ids], "<i8").tobytes(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def key_seed(seed: int, key: str, turn: int) -> int:
    """Return a seed of 63 bits for one reply: it depends on the seed, the row's key and the turn only."""
    return int.from_bytes(blake2b(f"{seed} {key} {turn}".encode(), digest_size=8).digest(), "little") >> 1


def nucleus(weights_NV: Tensor, top_p: float) -> Tensor:
    """Return the weights with all but the likeliest tokens at 0: the fewest whose share reaches top_p, equal ones too.

    weights: not negative, not all 0 in a row. The likeliest token always stays.
    """
    if top_p >= 1:
        return weights_NV
    sorted_NV = weights_NV.double().sort(-1, descending=True).values
    before_NV = sorted_NV.cumsum(-1) - sorted_NV
    kept_N1 = (before_NV < top_p * sorted_NV.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    least_N1 = sorted_NV.gather(-1, kept_N1 - 1).to(weights_NV.dtype)
    return weights_NV.where(weights_NV >= least_N1, 0)
