"""The backbone of every method: a few decoder layers whose queries are the slots of blocks, and whose keys are the
target's states before the anchor plus the block itself; its attention, in training and in decoding.

The context is one projection of the captured layers, computed once and read unchanged by every layer; only the slots'
residual stream is normed and updated. Parameter names are those of published checkpoints, all at the top level. RoPE
tables are computed in float32 in each forward, since a buffer would be rounded by a cast to bfloat16.

A slot of a block at anchor a attends to its document's context strictly before a, and to its own block: all of it on a
full layer; on a sliding layer of window W the context from a + slot - (W - 1) and the slots up to itself. This is
SpecForge's rule, which the serving engines execute. No row of the mask is empty, so no kernel makes a NaN.

    R context rows   K captured layers   D hidden size   N blocks   S slots   Q = N * S slots of all blocks, end to end
    A query heads   G key/value heads   E head size   L keys
"""

from collections.abc import Sequence
from itertools import accumulate, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.drafts.blocks import Blocks
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.fused import gated_down, rms_norm, rotated_norm
from pipeline.drafts.rope import Tables, rope_tables
from pipeline.matrix_products import Linear

KV = tuple[Tensor, Tensor]  # keys and values [G, tokens, E]


def backbone_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each of the backbone's tensors, written out from the publication, not asked of the
    modules."""
    D, inner = config.hidden_size, config.intermediate_size
    wide, narrow = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    layer = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (wide, D),
        "self_attn.k_proj.weight": (narrow, D),
        "self_attn.v_proj.weight": (narrow, D),
        "self_attn.o_proj.weight": (D, wide),
        "self_attn.q_norm.weight": (config.head_dim,),
        "self_attn.k_norm.weight": (config.head_dim,),
        "mlp.gate_proj.weight": (inner, D),
        "mlp.up_proj.weight": (inner, D),
        "mlp.down_proj.weight": (D, inner),
    }
    if config.attention_bias:
        sizes = {"q": wide, "k": narrow, "v": narrow, "o": D}
        layer |= {f"self_attn.{part}_proj.bias": (size,) for part, size in sizes.items()}
    shapes = {"fc.weight": (D, len(config.target_layer_ids) * D), "hidden_norm.weight": (D,), "norm.weight": (D,)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


class RMSNorm(nn.Module):
    """The weight and epsilon of a norm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, tables: Tables | None = None) -> Tensor:
        """Return the norm, and where there are tables each head [T, A, E] rotated."""
        if tables is None:
            return rms_norm(x, self.weight, self.eps)
        return rotated_norm(x, self.weight, self.eps, tables)


class SelfAttention(nn.Module):
    """The attention of layer number `index`. Context and slots share the same key and value weights."""

    def __init__(self, config: DraftConfig, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.window = config.sliding_window if config.layer_types[index] == "sliding_attention" else None
        wide, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, wide, bias=bias)
        self.k_proj = Linear(config.hidden_size, narrow, bias=bias)
        self.v_proj = Linear(config.hidden_size, narrow, bias=bias)
        self.o_proj = Linear(wide, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, y_QD: Tensor, context_RD: Tensor, slot_tables: Tables, context_tables: Tables, attention
    ) -> Tensor:
        """Return what the slots take [Q, D] from the context and their blocks; arguments as of `Layer`."""
        context_kv, slots_kv = self._keys_values(context_RD, context_tables), self._keys_values(y_QD, slot_tables)
        q_QAE = self.q_norm(self.q_proj(y_QD).unflatten(-1, (-1, self.head_dim)), slot_tables)
        out_AQE = attention(q_QAE.transpose(0, 1), context_kv, slots_kv, self.window, self.index)
        return self.o_proj(out_AQE.transpose(0, 1).flatten(1))

    def _keys_values(self, x_TD: Tensor, tables: Tables) -> KV:
        k_TGE = self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim)), tables)
        v_TGE = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        return k_TGE.transpose(0, 1), v_TGE.transpose(0, 1)


class MLP(nn.Module):
    """The gated MLP down(silu(gate x) * up x)."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return gated_down(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)


class Layer(nn.Module):
    """Decoder layer number `index`."""

    def __init__(self, config: DraftConfig, index: int):
        super().__init__()
        self.self_attn = SelfAttention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_QD: Tensor, context_RD: Tensor, slot_tables: Tables, context_tables: Tables, attention
    ) -> Tensor:
        """Return the slots' stream [Q, D] after this layer.

        All of the layer's weights are used in here, the context's keys and values included, so that it can be sharded
        by itself (FSDP2) and its keys and values need not outlive it. attention: a GroupedAttention or DecodeAttention.
        """
        y_QD = self.input_layernorm(x_QD)
        x_QD = x_QD + self.self_attn(y_QD, context_RD, slot_tables, context_tables, attention)
        return x_QD + self.mlp(self.post_attention_layernorm(x_QD))


def recomputed(layer: nn.Module, *inputs) -> Tensor:
    """Return what a layer makes of its inputs, to the bit; of all in between nothing is kept for the gradient, which
    computes the layer again."""
    out = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    torch.clear_autocast_cache()  # the weights rounded for products, which were kept until the end of the forward
    return out


class Backbone(nn.Module):
    """Projection of the captured layers, decoder layers, final norm."""

    layer_class = Layer
    recomputes_layers = False  # whether a gradient computes the layers again, instead of keeping what they made

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config = config
        layer_count = len(config.target_layer_ids)
        self.fc = Linear(layer_count * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(self.layer_class(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows of the layers; None stands for a full layer."""
        return {layer.self_attn.window for layer in self.layers}

    def slot_states(self, x_QD: Tensor, positions_Q: Tensor, aux_KRD: Tensor, positions_R: Tensor, attention) -> Tensor:
        """Return the slots' states [Q, D] after all layers and the final norm.

        x_QD: the slots' embeddings. aux_KRD: the target's states of the context rows, its layers in ascending order.
        attention: a GroupedAttention or DecodeAttention.
        """
        flat_RF = aux_KRD.to(self.fc.weight.dtype).transpose(0, 1).flatten(1)
        context_RD = self.hidden_norm(self.fc(flat_RF))
        slot_tables, context_tables = self.tables(positions_Q), self.tables(positions_R)
        for layer in self.layers:
            inputs = x_QD, context_RD, slot_tables, context_tables, attention
            x_QD = recomputed(layer, *inputs) if self.recomputes_layers else layer(*inputs)
        return self.norm(x_QD)

    def tables(self, positions: Tensor) -> Tables:
        return rope_tables(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)


def attend(q_AQE: Tensor, k_GLE: Tensor, v_GLE: Tensor, allowed_QL: Tensor | None) -> Tensor:
    """Return grouped-query attention [A, Q, E]: query head a reads key/value head a // (A / G). None: no mask."""
    A, Q, E = q_AQE.shape
    G = k_GLE.shape[0]
    # Query heads that share a key head are folded into the query axis: no copy of the keys, and any kernel can run it.
    folded_GQE = q_AQE.reshape(G, A // G * Q, E)
    mask = None if allowed_QL is None else allowed_QL.repeat(A // G, 1)
    out = F.scaled_dot_product_attention(folded_GQE[None], k_GLE[None], v_GLE[None], attn_mask=mask)
    return out[0].reshape(A, Q, E)


def visibility_mask(blocks: Blocks, rows: slice, first: int, last: int, window: int | None) -> Tensor:
    """Return the mask of blocks first .. last - 1: bool [(last - first) * S, rows + (last - first) * S], True where a
    slot attends to a context row of `rows`, then to a slot of these blocks. window: None on a full layer."""
    device = blocks.anchors_N.device
    N, S = last - first, blocks.labels_NS.shape[1]
    anchors_N1 = blocks.anchors_N[first:last, None]
    row_R = torch.arange(rows.start, rows.stop, device=device)
    context_NR = (row_R < anchors_N1) & (row_R >= blocks.starts_N[first:last, None])
    context_NSR = context_NR[:, None].expand(N, S, -1)
    slots_S = torch.arange(S, device=device)
    inside_SS = torch.ones(S, S, dtype=torch.bool, device=device)
    if window is not None:
        earliest_NS = anchors_N1 + slots_S - (window - 1)
        context_NSR = context_NSR & (row_R >= earliest_NS[..., None])
        inside_SS = inside_SS.tril()
    inside_NSNS = torch.eye(N, dtype=torch.bool, device=device)[:, None, :, None] & inside_SS[:, None]
    return torch.cat([context_NSR.reshape(N * S, -1), inside_NSNS.reshape(N * S, N * S)], dim=1)


class GroupedAttention:
    """The same attention group by group, over the context and slots that the group can attend to.

    Tensors are split, not sliced: the gradient of a slice is as large as the tensor it was sliced from.
    """

    def __init__(self, blocks: Blocks, windows: set[int | None]):
        slots = blocks.labels_NS.shape[1]
        self.groups = blocks.groups
        self.queries = [(group.last - group.first) * slots for group in self.groups]
        self.lengths = blocks.lengths
        starts = [0, *accumulate(self.lengths)]
        self.masks: dict[int | None, list[Tensor]] = {window: [] for window in windows}
        for group, window in product(self.groups, windows):
            rows = slice(starts[group.document], starts[group.document] + group.rows)
            self.masks[window].append(visibility_mask(blocks, rows, group.first, group.last, window))

    def __call__(self, q_AQE: Tensor, context: KV, slots: KV, window: int | None, layer: int) -> Tensor:
        """Return the heads' outputs [A, Q, E] of layer number `layer`, from keys and values of context and slots."""
        context_k, context_v = (values.split(self.lengths, dim=1) for values in context)
        slots_k, slots_v = (values.split(self.queries, dim=1) for values in slots)
        outs = []
        for index, (group, q_AqE) in enumerate(zip(self.groups, q_AQE.split(self.queries, dim=1), strict=True)):
            k_GLE = torch.cat([context_k[group.document][:, : group.rows], slots_k[index]], dim=1)
            v_GLE = torch.cat([context_v[group.document][:, : group.rows], slots_v[index]], dim=1)
            outs.append(attend(q_AqE, k_GLE, v_GLE, self.masks[window][index]))
        return torch.cat(outs, dim=1)


class DraftKV:
    """A draft's kv cache of one text: keys and values of the context only, each computed once."""

    def __init__(self):
        self.length = 0  # positions 0 .. length - 1 are cached, in every layer
        self._layers: dict[int, list[Tensor]] = {}  # keys and values [G, capacity, E]

    def extend(self, layer: int, *new: Tensor) -> KV:
        """Add one layer's keys and values [G, T, E] of the next T positions; return those of all positions so far.

        `length` stays as it is: the caller raises it once every layer was extended.
        """
        stop = self.length + new[0].shape[1]
        cached = self._layers.setdefault(layer, [values[:, :0] for values in new])
        for index, values in enumerate(new):
            if stop > cached[index].shape[1]:
                grown = values.new_empty(values.shape[0], 2 * stop, values.shape[2])
                grown[:, : self.length] = cached[index][:, : self.length]
                cached[index] = grown
            cached[index][:, self.length : stop] = values
        return cached[0][:, :stop], cached[1][:, :stop]


class DecodeAttention:
    """Attention while decoding: one block of each text over the text's kv cache, or the window's part of it.

    The context rows are each text's new ones, end to end: every layer adds their keys and values to the text's cache.
    Prefixes differ in length, so texts attend one after the other; all else is batched.
    """

    def __init__(self, slots: int, caches: Sequence[DraftKV], new_rows: Sequence[int], device: torch.device):
        self.slots, self.caches, self.new_rows, self.device = slots, caches, new_rows, device

    def __call__(self, q_AQE: Tensor, context: KV, slots: KV, window: int | None, layer: int) -> Tensor:
        """As `GroupedAttention.__call__`."""
        new_k, new_v = (values.split(self.new_rows, dim=1) for values in context)
        slots_k, slots_v = (values.split(self.slots, dim=1) for values in slots)
        outs = []
        for text, q_ASE in enumerate(q_AQE.split(self.slots, dim=1)):
            context_kv = self.caches[text].extend(layer, new_k[text], new_v[text])
            allowed = None if window is None else self._window(context_kv[0].shape[1], window)
            k_GLE = torch.cat([context_kv[0], slots_k[text]], dim=1)
            v_GLE = torch.cat([context_kv[1], slots_v[text]], dim=1)
            outs.append(attend(q_ASE, k_GLE, v_GLE, allowed))
        return torch.cat(outs, dim=1)

    def _window(self, start: int, window: int) -> Tensor:
        slots_S = torch.arange(self.slots, device=self.device)
        earliest_S1 = (start + slots_S - (window - 1))[:, None]
        context_SR = torch.arange(start, device=self.device) >= earliest_S1
        return torch.cat([context_SR, slots_S <= slots_S[:, None]], dim=1)
