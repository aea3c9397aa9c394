"""AdamW, the rate at each step, and the optimiser's state as named tensors (ALGORITHMS 4.9)."""

import math

import torch
from torch import nn

BETAS, EPS = (0.9, 0.999), 1e-8  # no weight decay; no published recipe of these methods needs other values
WSD_TAIL, WSD_FLOOR = 0.2, 0.1
MOMENTS = ("exp_avg", "exp_avg_sq")


def rate(step: int, horizon: int, warmup: float, schedule: str) -> float:
    """Return the learning rate as a share of its peak at `step`, counted from 0 to horizon - 1.

    W = int(warmup * T) steps rise as (s + 1) / W; then `cosine` falls to 0, and `wsd` stays until the last fifth,
    which falls linearly to a tenth.
    """
    rise = int(warmup * horizon)
    if step < rise:
        return (step + 1) / rise
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / (horizon - rise)))
    tail = int(WSD_TAIL * horizon)
    into = step - (horizon - tail)
    return 1.0 if into < 0 else 1 - (1 - WSD_FLOOR) * into / tail


def make_optimizer(draft: nn.Module) -> torch.optim.AdamW:
    """Return AdamW over the draft's float32 parameters. The rate is set at each step."""
    return torch.optim.AdamW(draft.parameters(), lr=0.0, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)


def optimizer_tensors(draft: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Return both moments of every parameter, `exp_avg.<name>` and `exp_avg_sq.<name>`."""
    return {
        f"{moment}.{name}": optimizer.state[weight][moment]
        for name, weight in draft.named_parameters()
        for moment in MOMENTS
        if weight in optimizer.state
    }


def restore_optimizer(
    draft: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, torch.Tensor], step: int
) -> None:
    """Put back what `optimizer_tensors` gave after `step` steps; the next step is then the very same to the bit."""
    for name, weight in draft.named_parameters():
        moments = {moment: tensors[f"{moment}.{name}"].to(weight.device).clone() for moment in MOMENTS}
        count = torch.tensor(float(step), dtype=torch.float32, device=weight.device)
        optimizer.state[weight] = {"step": count, **moments}
