"""The block backbone a second time: what its published tensors compute on one block, in plain torch, as an engine runs
it.

Written out from the publication (DFlash, arXiv:2602.06036). It shares nothing with `backbone.py` and `attention.py`,
where blocks are grouped and gradients written out, so what the two agree on is no mistake of one of them.

    K layers   T context rows   D hidden size   S slots   E head size
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.drafts.config import DraftConfig

Get = Callable[[str], Tensor]  # a tensor by its published name, in float32


def block_states(get: Get, config: DraftConfig, features_KTD: Tensor, slots_SD: Tensor) -> Tensor:
    """Return the states [S, D] of the block after its context (rows 0 .. T - 1): the anchor is at position T.

    slots_SD: the target's embeddings of the anchor and the mask tokens.
    """
    T, S = features_KTD.shape[1], len(slots_SD)
    fused_TF = torch.cat(list(features_KTD), dim=-1)
    context_TD = _norm(get("hidden_norm.weight"), fused_TF @ get("fc.weight").T, config)
    x_SD = slots_SD
    for index, kind in enumerate(config.layer_types):
        window = config.sliding_window if kind == "sliding_attention" else None
        part = _part(get, f"layers.{index}.")
        y_SD = _norm(part("input_layernorm.weight"), x_SD, config)
        x_SD = x_SD + _attention(_part(part, "self_attn."), config, y_SD, context_TD, _visible(T, S, window))
        z_SD = _norm(part("post_attention_layernorm.weight"), x_SD, config)
        gate_SI = F.silu(z_SD @ part("mlp.gate_proj.weight").T) * (z_SD @ part("mlp.up_proj.weight").T)
        x_SD = x_SD + gate_SI @ part("mlp.down_proj.weight").T
    return _norm(get("norm.weight"), x_SD, config)


def _part(get: Get, prefix: str) -> Get:
    return lambda name: get(prefix + name)


def _norm(weight: Tensor, x: Tensor, config: DraftConfig) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight


def _visible(T: int, S: int, window: int | None) -> Tensor:
    """Whether slot s sees key j [S, T + S]: everything, or on a sliding layer the context in the `window` positions up
    to its own, and the slots up to itself (SpecForge's rule: inside the block there is no window)."""
    if window is None:
        return torch.ones(S, T + S, dtype=torch.bool)
    distance = (T + torch.arange(S))[:, None] - torch.arange(T + S)
    return (distance >= 0) & ((distance < window) | (torch.arange(T + S) >= T))


def _attention(get: Get, config: DraftConfig, y_SD: Tensor, context_TD: Tensor, visible: Tensor) -> Tensor:
    """Attention of the slots over the context and themselves; keys and values of both by the same weights."""
    T, E = len(context_TD), config.head_dim
    keys_LD = torch.cat([context_TD, y_SD])

    def heads(name: str, x: Tensor, normed: bool) -> Tensor:
        out = x @ get(f"{name}_proj.weight").T + (get(f"{name}_proj.bias") if config.attention_bias else 0)
        out = out.unflatten(-1, (-1, E)).transpose(0, 1)
        return _norm(get(f"{name}_norm.weight"), out, config) if normed else out

    q = _rotate(heads("q", y_SD, True), T, config)
    k, v = _rotate(heads("k", keys_LD, True), 0, config), heads("v", keys_LD, False)
    shared = len(q) // len(k)  # query heads that read the same keys
    k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
    scores = (q @ k.mT / E**0.5).masked_fill(~visible, -torch.inf)
    out_SA = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return out_SA @ get("o_proj.weight").T + (get("o_proj.bias") if config.attention_bias else 0)


def _rotate(x_ALE: Tensor, first: int, config: DraftConfig) -> Tensor:
    """Rotary positions first, first + 1, ...: each half of a head with the other, at that position's angles."""
    half = x_ALE.shape[-1] // 2
    speed = torch.tensor([_rotary_frequency(index, half, config) for index in range(half)])
    angle = torch.arange(first, first + x_ALE.shape[1])[:, None] * speed
    left, right = x_ALE.split(half, -1)
    rotated = torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)
    return rotated if config.rope_scaling is None else rotated * config.rope_scaling.attention_factor


def _rotary_frequency(pair: int, half: int, config: DraftConfig) -> float:
    """Radians a token of one pair of channels, slowed down where the config scales them: fast pairs not, slow ones by
    the factor, those between in part."""
    theta, scaling = config.rope_theta, config.rope_scaling
    speed = theta ** -(pair / half)
    if scaling is None:
        return speed
    if scaling.rope_type == "linear":
        return speed / scaling.factor
    length = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        slow = (high - length * speed / (2 * math.pi)) / (high - low)
    else:
        ends = [
            half * math.log(length / (2 * math.pi * n), theta)
            for n in (scaling.beta_fast or 32, scaling.beta_slow or 1)
        ]
        if scaling.truncate is not False:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        start, stop = max(ends[0], 0), min(ends[1], 2 * half - 1)
        slow = (pair - start) / (stop - start if stop != start else 0.001)
    slow = min(max(slow, 0.0), 1.0)
    return speed * (1 - slow + slow / scaling.factor)
