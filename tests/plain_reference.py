"""The losses of all methods written as plainly as can be: every query against every key under one dense mask, all
logits at once, autograd throughout. What the package's fused step is compared and timed with.

    N blocks   S slots   Q = N * S   R context rows   D hidden size   V vocabulary
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.drafts import Blocks, Cell, Draft
from pipeline.drafts.backbone import visibility_mask
from pipeline.drafts.rope import rope_tables


def plain_loss(draft: Draft, cell: Cell, blocks: Blocks, lambda_base: float = 0.0) -> Tensor:
    """Return a batch of one cell's loss, differentiable by the draft's parameters."""
    N, S = blocks.labels_NS.shape
    hidden_NSD = plain_hidden(draft, cell, blocks).view(N, S, -1)
    base_NSV = F.linear(hidden_NSD, draft.target.head_VD)
    if draft.config.method == "domino":
        added_NSV = _domino_correction(draft, hidden_NSD, blocks)
        final, base = _cross_entropy(base_NSV + added_NSV, blocks), _cross_entropy(base_NSV, blocks)
        return (1 - lambda_base) * final + lambda_base * base
    if draft.config.method == "dspark":
        return _dspark_loss(draft, cell, blocks, hidden_NSD, base_NSV)
    return _cross_entropy(base_NSV, blocks)


def plain_hidden(draft: Draft, cell: Cell, blocks: Blocks) -> Tensor:
    """Return the states [Q, D] of every slot, by the published equations and torch's own operations."""
    x_QD = draft.target.embed(blocks.input_ids_NS.flatten()).to(draft.fc.weight.dtype)
    aux_RF = cell.aux_KRD.to(draft.fc.weight.dtype).transpose(0, 1).flatten(1)
    context_RD = _norm(draft.hidden_norm, draft.fc(aux_RF))
    positions_L = torch.cat([cell.pos_R, blocks.positions_NS.flatten()])
    cos_LE, sin_LE = rope_tables(positions_L, draft.config.head_dim, draft.config.rope_theta)
    mask_QL = visibility_mask(blocks, slice(0, len(cell.ids_R)), 0, len(blocks.anchors_N), None)
    for layer in draft.layers:
        y_QD, attention = _norm(layer.input_layernorm, x_QD), layer.self_attn
        both_LD = torch.cat([context_RD, y_QD])
        q, k, v = (
            project(source).unflatten(-1, (-1, draft.config.head_dim)).transpose(0, 1)
            for project, source in ((attention.q_proj, y_QD), (attention.k_proj, both_LD), (attention.v_proj, both_LD))
        )
        q = _rotate(_norm(attention.q_norm, q), cos_LE[len(context_RD) :], sin_LE[len(context_RD) :])
        k = _rotate(_norm(attention.k_norm, k), cos_LE, sin_LE)
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask_QL, enable_gqa=True)[0]
        x_QD = x_QD + attention.o_proj(out.transpose(0, 1).flatten(1))
        x_QD = x_QD + layer.mlp(_norm(layer.post_attention_layernorm, x_QD))
    return _norm(draft.norm, x_QD)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def _rotate(x_ATE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    cos, sin = torch.cat([cos_TE, cos_TE], -1), torch.cat([sin_TE, sin_TE], -1)
    left, right = x_ATE.chunk(2, -1)
    return x_ATE * cos + torch.cat([-right, left], -1) * sin


def _domino_correction(draft: Draft, hidden_NSD: Tensor, blocks: Blocks) -> Tensor:
    config = draft.config
    embedded_NPD = draft.target.embed(blocks.prev_NS[:, : config.proposals]).to(hidden_NSD.dtype)
    gru = nn.GRU(config.hidden_size, config.gru_hidden_dim, bias=False, batch_first=True, device="meta")
    states_NPH, _ = functional_call(gru, dict(draft.prefix_gru.named_parameters()), embedded_NPD)
    kept = slice(config.pure_draft_prefix_len, None)
    joined = torch.cat([hidden_NSD[:, config.first_slot :][:, kept], states_NPH[:, kept]], -1)
    return F.pad(draft.embed_proj(joined), (0, 0, config.first_slot + config.pure_draft_prefix_len, 0))


def _dspark_loss(draft: Draft, cell: Cell, blocks: Blocks, hidden_NSD: Tensor, base_NSV: Tensor) -> Tensor:
    """alpha_ce ce + alpha_l1 |q - p|_1 + alpha_confidence bce(confidence, 1 - |q - p|_1 / 2), vanilla Markov head."""
    e_NSU, weights_NS = draft.markov_head.markov_w1(blocks.prev_NS), blocks.weights_NS
    logits_NSV = base_NSV + draft.markov_head.markov_w2(e_NSU)
    at_NS = torch.where(blocks.scored_NS, cell.final_at_R[blocks.final_row_NS], 0)
    with torch.no_grad():
        p_NSV = draft.target.logits(cell.final_FD[at_NS]).float().softmax(-1)
    gap_NS = (logits_NSV.float().softmax(-1) - p_NSV).abs().sum(-1)
    confidence_NS = draft.confidence_head["proj"](hidden_NSD)[..., 0].float()
    bce_NS = F.binary_cross_entropy_with_logits(confidence_NS, (1 - gap_NS / 2).detach(), reduction="none")
    rest = (weights_NS * (0.9 * gap_NS + bce_NS)).sum() / weights_NS.sum()
    return 0.1 * _cross_entropy(logits_NSV, blocks) + rest


def _cross_entropy(logits_NSV: Tensor, blocks: Blocks) -> Tensor:
    ce_NS = F.cross_entropy(logits_NSV.float().flatten(0, 1), blocks.labels_NS.flatten(), reduction="none")
    return (ce_NS.view_as(blocks.weights_NS) * blocks.weights_NS).sum() / blocks.weights_NS.sum()
