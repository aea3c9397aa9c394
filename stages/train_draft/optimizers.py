"""The optimisers, AdamW and Muon: what they keep of each weight, on the device or the host, and in a checkpoint."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pipeline.drafts import Draft
from pipeline.matrix_products import product

BETAS, EPS = (0.9, 0.999), 1e-8  # no weight decay; no published recipe of these methods needs other values
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = 0.95
QUINTIC = 3.4445, -4.7750, 2.0315  # steepest at 0
MUON_RMS = 0.2  # root mean square of a step's entries, about that of AdamW's


class AdamW:
    """torch's fused AdamW over named float32 parameters, without weight decay.

    The functional form, and no `torch.optim.Optimizer`: making one imports the compiler, which takes as long as torch
    itself at every start of a run. state: of each weight by its name, as torch's optimisers have it; on the host where
    the weights' device has no memory for it, and the update is computed there, one weight after the other.
    """

    def __init__(self, weights: Mapping[str, Tensor], on_host: bool = False):
        self.weights, self.on_host = dict(weights), on_host
        place = {"device": "cpu"} if on_host else {}
        self.state: dict[str, dict[str, Tensor]] = {
            name: {"step": torch.zeros((), device=place.get("device", weight.device))}
            | {moment: torch.zeros_like(weight, **place) for moment in MOMENTS}
            for name, weight in self.weights.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        if not self.on_host:
            return self._update(self.weights, [weight.grad for weight in self.weights.values()], lr)
        for name, weight in self.weights.items():
            on_host = weight.detach().cpu()
            self._update({name: on_host}, [weight.grad.cpu()], lr)
            weight.copy_(on_host)

    def _update(self, weights: Mapping[str, Tensor], grads: Sequence[Tensor], lr: float) -> None:
        states = [self.state[name] for name in weights]
        adamw(
            list(weights.values()),
            grads,
            *([state[moment] for state in states] for moment in MOMENTS),
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )


class Muon(AdamW):
    """Muon (K. Jordan 2024) over the matrices of a draft's layers, AdamW over everything else.

    Nesterov momentum, orthogonalized. Its steps are scaled to AdamW's size (arXiv:2502.16982, section 2.2), so both
    take the same learning rate. Not torch's own Muon, which computes in bfloat16 whatever the weights are: a CPU
    without AVX-512 then takes 40 to 60 times as long. On a GPU, where bfloat16 is cheaper, torch's would be faster.
    """

    def __init__(self, draft: Draft):
        names, named = hidden_matrices(draft), dict(draft.named_parameters())
        super().__init__({name: weight for name, weight in named.items() if name not in names})
        self.matrices = {name: weight for name, weight in named.items() if name in names}
        self.state |= {name: {"momentum": torch.zeros_like(weight)} for name, weight in self.matrices.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its gradient."""
        for name, weight in self.matrices.items():
            momentum = self.state[name]["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
            nesterov = weight.grad.lerp(momentum, MOMENTUM)
            weight.add_(orthogonalize(nesterov), alpha=-lr * MUON_RMS * math.sqrt(max(weight.shape)))
        super().step(lr)


def state_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """Return an optimiser's state as a checkpoint holds it: each tensor by its kind and the weight's name, such as
    "exp_avg.fc.weight". The number of steps is left out: a checkpoint states it once."""
    return {
        f"{kind}.{name}": value
        for name, values in optimizer.state.items()
        for kind, value in values.items()
        if kind != "step"
    }


def load_state_tensors(optimizer: AdamW, tensors: Mapping[str, Tensor], step: int) -> None:
    """Load what `state_tensors` returned after `step` steps; the next one is then the same to the bit. KeyError for a
    tensor that is missing."""
    for name, values in optimizer.state.items():
        for kind, value in values.items():
            value.copy_(torch.tensor(float(step)) if kind == "step" else tensors[f"{kind}.{name}"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return a matrix [m, n] with its singular values brought close to 1: five Newton-Schulz steps of Muon's quintic,
    x <- a x + b (x x') x + c (x x')^2 x.

    Every step multiplies x from the left by a polynomial of x x' alone, so all five are gathered in m x m, where m is
    the shorter side, and x is multiplied once. At least in float32: bfloat16 would lose what the powers of x x' cancel.
    """
    if hasattr(matrix, "full_tensor"):  # sharded over ranks: each computes the whole matrix and keeps its part
        from torch.distributed.tensor import distribute_tensor  # here: half a second, which other runs need not wait

        whole = orthogonalize(matrix.full_tensor())
        return distribute_tensor(whole, matrix.device_mesh, matrix.placements, src_data_rank=None)
    m, n = matrix.shape
    if m > n:
        return orthogonalize(matrix.T).T
    x_mn = matrix / matrix.norm().clamp(min=1e-7)
    gram_mm = product(x_mn, x_mn.T)
    factor_mm = product_mm = None
    for _ in range(5):
        if factor_mm is not None:
            gram_mm = product(product(factor_mm, gram_mm), factor_mm)
        factor_mm = product(gram_mm, gram_mm).mul_(QUINTIC[2]).add_(gram_mm, alpha=QUINTIC[1])
        factor_mm.diagonal().add_(QUINTIC[0])
        product_mm = factor_mm if product_mm is None else product(factor_mm, product_mm)
    return product(product_mm, x_mn)


def hidden_matrices(draft: Draft) -> set[str]:
    """Return the names of the weights that map one hidden vector to another, which Muon updates.

    Projections onto the vocabulary, or the part of it that may be proposed, or onto one number are left out, and so are
    fused matrices.
    """
    others, fused = (draft.config.vocab_size, 1), draft.fused_matrices
    return {
        f"{name}.weight"
        for name, module in draft.named_modules()
        if isinstance(module, nn.Linear) and module.out_features not in others and not name.endswith(fused)
    } - set(draft.rows_of_ids)


def make_optimizer(kind: str, draft: Draft, on_host: bool = False) -> AdamW:
    """Return the optimiser that `train.optimizer` names ("adamw" or "muon") over all of a draft's parameters.

    on_host: keep AdamW's moments there; Muon's stay on the device, where it multiplies matrices.
    """
    return Muon(draft) if kind == "muon" else AdamW(dict(draft.named_parameters()), on_host)
