"""AdamW, the rate at each step, and the optimiser's state as named tensors."""

import math

import torch
from torch import nn
from torch.optim.adamw import adamw

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


class AdamW:
    """torch's AdamW over a draft's float32 parameters, its state held as named tensors.

    The functional form: the class of the same kernel imports the compiler, 1.5 s at every start of a run.
    """

    def __init__(self, draft: nn.Module):
        self.weights = dict(draft.named_parameters())
        self.moments = {
            moment: {name: torch.zeros_like(weight) for name, weight in self.weights.items()} for moment in MOMENTS
        }
        self.counts = [torch.zeros((), device=weight.device) for weight in self.weights.values()]

    def zero_grad(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move every parameter along its gradient."""
        adamw(
            list(self.weights.values()),
            [weight.grad for weight in self.weights.values()],
            *(list(self.moments[moment].values()) for moment in MOMENTS),
            [],
            self.counts,
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return both moments of every parameter, `exp_avg.<name>` and `exp_avg_sq.<name>`."""
        return {f"{moment}.{name}": value for moment, values in self.moments.items() for name, value in values.items()}

    def restore(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Put back what `tensors` gave after `step` steps; the next step is then the very same to the bit."""
        for moment, values in self.moments.items():
            for name, value in values.items():
                value.copy_(tensors[f"{moment}.{name}"])
        for count in self.counts:
            count.fill_(step)
