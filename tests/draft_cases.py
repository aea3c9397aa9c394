"""Small drafts of every method with random weights, packed samples for them, and what their tests compare."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.drafts import DRAFTS, Draft, draft_config, eligible_anchors, lay_blocks, pack
from pipeline.drafts.backbone import attend, visibility_mask
from pipeline.drafts.head_loss import HeadLoss
from pipeline.target.head import TargetHead
from pipeline.target.layers import final_rows

H, V, K, L = 32, 64, 3, 8
SHAPE = {
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # not H / 4
    "vocab_size": V,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "num_target_layers": L,
    "target_layer_ids": (1, 3, 5),
    "block_size": 5,
    "mask_token_id": V - 1,
    "gamma": 4.0,
}
OWN = {
    "dflash": {},
    "domino": {"pure_draft_prefix_len": 1, "emb_dim": 8, "gru_hidden_dim": 16},
    "dspark": {"markov_rank": 8, "markov_head_type": "rnn"},
}
HEADS = ("prefix_gru", "embed_proj", "markov_head", "confidence_head")
SLIDING = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 6}
every_method = pytest.mark.parametrize("method", DRAFTS)
both_shifts = pytest.mark.parametrize("shift", [False, True], ids=["same", "shift"])
every_convention = pytest.mark.parametrize(
    ("method", "shift"),
    [(method, shift) for method in DRAFTS for shift in (False, True) if shift or method != "dspark"],
)
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
both_windows = pytest.mark.parametrize(
    "window", [{}, SLIDING, {"rope_scaling": YARN}], ids=["full", "sliding", "full, scaled"]
)


def fields(method: str, shift: bool = True, **changes) -> dict:
    return SHAPE | OWN[method] | {"method": method, "shift_label": shift} | changes


def build(method: str, shift: bool = True, seed: int = 0, softcap: float | None = None, **changes) -> Draft:
    """A draft whose parameters are all far from their start, norms included."""
    generator = torch.Generator().manual_seed(seed)
    embed_VD = torch.randn(V, H, generator=generator)
    head = TargetHead(embed_VD, torch.randn(V, H, generator=generator) * 0.3, logit_softcap=softcap)
    draft = DRAFTS[method](draft_config(**fields(method, shift, **changes)), head)
    with torch.no_grad():
        for name, parameter in sorted(draft.named_parameters()):
            norm = parameter.ndim == 1 and "bias" not in name
            parameter.copy_(norm + 0.25 * torch.randn(parameter.shape, generator=generator))
    return draft


class Sample:
    def __init__(self, length: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, V - 1, (length,), generator=generator, dtype=torch.int32)
        self.mask = torch.rand(length, generator=generator) > 0.2
        self.mask[:3] = False
        self.aux = torch.randn(K, length, H, generator=generator)
        self.final_rows = torch.from_numpy(final_rows(self.mask.numpy())).nonzero().flatten()
        self.final = torch.randn(len(self.final_rows), H, generator=generator)


def cell_of(*lengths: int):
    names = [f"s{n}" for n in range(len(lengths))]
    return pack([Sample(length, seed) for seed, length in enumerate(lengths)], names, final=True)


def anchors_of(cell) -> torch.Tensor:
    """Every eligible anchor of every document."""
    spans = zip(cell.starts_M.tolist(), cell.lengths_M.tolist(), strict=True)
    return torch.cat([eligible_anchors(cell.mask_R[s : s + n]).nonzero().flatten() + s for s, n in spans])


def all_blocks(draft: Draft, cell):
    return lay_blocks(cell, anchors_of(cell), draft.config)


def head_loss(hidden_NSD, target, objective, correction, blocks):
    """The total loss of the head's logits, corrected by (z, W_out) where there is a correction."""
    return HeadLoss.apply(hidden_NSD, *(correction or (None, None)), target, objective, blocks)


def forced_logits(draft: Draft, hidden_NSD, tokens_NP) -> torch.Tensor:
    """The rollout's logits [N, P, V] where each next token is one of these instead of its own choice."""
    tokens = iter(tokens_NP.unbind(1))
    draft._choose = lambda raw_NV, sampling: next(tokens)
    try:
        return draft.rollout_logits(hidden_NSD, next(tokens))[1]
    finally:
        del draft._choose


def loss_of(draft, cell, blocks, lambda_base=0.4, metrics=False):
    return draft.loss(cell, blocks, {"lambda_base": lambda_base}, draft.denominators(blocks), metrics)


def gradients(draft: Draft, total: torch.Tensor) -> dict[str, torch.Tensor]:
    draft.zero_grad()
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in draft.named_parameters()}


def assert_near(found, wanted, tolerance=1e-6):
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-3)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


class DenseAttention:
    """Every query against every key, under one boolean mask for each kind of layer: what the package's attention is
    compared with."""

    def __init__(self, blocks, windows):
        rows, N = slice(0, sum(blocks.lengths)), len(blocks.anchors_N)
        self.masks = {window: visibility_mask(blocks, rows, 0, N, window) for window in windows}

    def __call__(self, q_AQE, context, slots, window, layer):
        k_GLE, v_GLE = (torch.cat(pair, dim=1) for pair in zip(context, slots, strict=True))
        return attend(q_AQE, k_GLE, v_GLE, self.masks[window])


def dense_hidden(draft: Draft, cell, blocks) -> torch.Tensor:
    """The states of every slot by `DenseAttention`."""
    draft.attention = DenseAttention
    try:
        return draft.hidden(cell, blocks)
    finally:
        del draft.attention
