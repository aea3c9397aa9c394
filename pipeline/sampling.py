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
