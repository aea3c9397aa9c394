"""The optimisers AdamW and Muon over a draft's named weights, and the learning rate's schedule."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pipeline.drafts import Draft

BETAS, EPS = (0.9, 0.999), 1e-8  # no weight decay; no published recipe of these methods needs other values
WSD_TAIL, WSD_FLOOR = 0.2, 0.1
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = 0.95
QUINTIC = 3.4445, -4.7750, 2.0315  # steepest at 0
MUON_RMS = 0.2  # root mean square of a step's entries, about that of AdamW's
FUSED = ("joint_proj",)  # three matrices stored as one, as a GRU's weights are


def lr_factor(step: int, total_steps: int, warmup: float, schedule: str) -> float:
    """Return the learning rate of `step` (0 to total_steps - 1) as a fraction of its peak.

    Linear warmup over W = int(warmup * total_steps) steps, (step + 1) / W; then `cosine` decays to 0, and `wsd`
    (warmup-stable-decay) stays at 1 until the last fifth, which decays linearly to a tenth.
    """
    rise = int(warmup * total_steps)
    if step < rise:
        return (step + 1) / rise
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / (total_steps - rise)))
    tail = int(WSD_TAIL * total_steps)
    into = step - (total_steps - tail)
    return 1.0 if into < 0 else 1 - (1 - WSD_FLOOR) * into / tail


class AdamW:
    """torch's fused AdamW over named float32 parameters, without weight decay.

    The functional form: the class of the same kernel imports the compiler, 1.5 s at every start of a run.
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = dict(weights)
        self.moments = {
            moment: {name: torch.zeros_like(weight) for name, weight in self.weights.items()} for moment in MOMENTS
        }
        self.step_counts = [torch.zeros((), device=weight.device) for weight in self.weights.values()]

    def zero_grad(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        adamw(
            list(self.weights.values()),
            [weight.grad for weight in self.weights.values()],
            *(list(self.moments[moment].values()) for moment in MOMENTS),
            [],
            self.step_counts,
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return both moments of every parameter, `exp_avg.<name>` and `exp_avg_sq.<name>`."""
        return {f"{moment}.{name}": value for moment, values in self.moments.items() for name, value in values.items()}

    def load_state_dict(self, state: dict[str, Tensor], step: int) -> None:
        """Load what `state_dict` returned after `step` steps; the next step is then the same to the bit."""
        for moment, values in self.moments.items():
            for name, value in values.items():
                value.copy_(state[f"{moment}.{name}"])
        for count in self.step_counts:
            count.fill_(step)


class Muon:
    """Muon (K. Jordan 2024) over the matrices of a draft's layers, AdamW over everything else.

    Nesterov momentum, orthogonalized. Its steps are scaled to AdamW's size (arXiv:2502.16982, section 2.2), so both
    take the same learning rate. Not torch's own Muon, which computes in bfloat16 whatever the weights are: a CPU
    without AVX-512 then takes 40 to 60 times as long. On a GPU, where bfloat16 is cheaper, torch's would be faster.
    """

    def __init__(self, draft: Draft):
        names = hidden_matrices(draft)
        named = dict(draft.named_parameters())
        self.weights = {name: weight for name, weight in named.items() if name in names}
        self.adamw = AdamW({name: weight for name, weight in named.items() if name not in names})
        self.momentum = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def zero_grad(self) -> None:
        for weight in self.weights.values():
            weight.grad = None
        self.adamw.zero_grad()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        for name, weight in self.weights.items():
            nesterov = weight.grad.lerp(self.momentum[name].lerp_(weight.grad, 1 - MOMENTUM), MOMENTUM)
            weight.add_(orthogonalize(nesterov), alpha=-lr * MUON_RMS * math.sqrt(max(weight.shape)))
        self.adamw.step(lr)

    def state_dict(self) -> dict[str, Tensor]:
        """Return `momentum.<name>` of every matrix and AdamW's state of the rest."""
        return {f"momentum.{name}": value for name, value in self.momentum.items()} | self.adamw.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], step: int) -> None:
        """Load what `state_dict` returned after `step` steps; the next step is then the same to the bit."""
        for name, value in self.momentum.items():
            value.copy_(state[f"momentum.{name}"])
        self.adamw.load_state_dict(state, step)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return a matrix [m, n] with its singular values brought close to 1: five Newton-Schulz steps of Muon's quintic,
    x <- a x + b (x x') x + c (x x')^2 x.

    Every step multiplies x from the left by a polynomial of x x' alone, so all five are gathered in m x m, where m is
    the shorter side, and x is multiplied once. At least in float32: bfloat16 would lose what the powers of x x' cancel.
    """
    m, n = matrix.shape
    if m > n:
        return orthogonalize(matrix.T).T
    x_mn = matrix / matrix.norm().clamp(min=1e-7)
    gram_mm = x_mn @ x_mn.T
    factor_mm = product_mm = None
    for _ in range(5):
        if factor_mm is not None:
            gram_mm = factor_mm @ gram_mm @ factor_mm
        factor_mm = torch.addmm(gram_mm, gram_mm, gram_mm, beta=QUINTIC[1], alpha=QUINTIC[2])
        factor_mm.diagonal().add_(QUINTIC[0])
        product_mm = factor_mm if product_mm is None else factor_mm @ product_mm
    return product_mm @ x_mn


def hidden_matrices(draft: Draft) -> set[str]:
    """Return the names of the weights that map one hidden vector to another, which Muon updates.

    Projections onto the vocabulary or onto one number are left out, and so are fused matrices.
    """
    others = (draft.config.vocab_size, 1)
    return {
        f"{name}.weight"
        for name, module in draft.named_modules()
        if isinstance(module, nn.Linear) and module.out_features not in others and not name.endswith(FUSED)
    }


def make_optimizer(kind: str, draft: Draft) -> AdamW | Muon:
    """Return the optimiser that `train.optimizer` names ("adamw" or "muon") over all of a draft's parameters."""
    return Muon(draft) if kind == "muon" else AdamW(dict(draft.named_parameters()))
