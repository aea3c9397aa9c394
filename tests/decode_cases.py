"""Drafts that tests decode with, one of each form, for the tiny target."""

from pipeline.drafts import DRAFTS, draft_config, init_weights
from pipeline.target.model import head_of

MASK, PROMPT = 259, [104, 105, 10, 257, 33]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 264,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "num_target_layers": 6,
    "target_layer_ids": (1, 3, 4),
    "block_size": 4,
    "mask_token_id": MASK,
}
DOMINO = {"emb_dim": 8, "gru_hidden_dim": 16, "pure_draft_prefix_len": 1}
HEADS = ("vanilla", "gated", "rnn")
DRAFTED = [
    ("dflash", {"shift_label": False}),
    ("dflash", {"shift_label": True}),
    ("domino", {"shift_label": True, **DOMINO}),
    ("domino", {"shift_label": False, **DOMINO}),
    ("domino", {"shift_label": True, **DOMINO, "pure_draft_prefix_len": 0}),
    *(("dspark", {"shift_label": True, "markov_rank": 8, "markov_head_type": kind}) for kind in HEADS),
    ("dspark", {"shift_label": True, "markov_rank": 0}),
]


def make_draft(target, method="domino", **options):
    """A draft with seeded weights for the tiny target; without options a Domino draft of next-position labels."""
    options = options or {"shift_label": True, **DOMINO}
    draft = DRAFTS[method](draft_config(method=method, **SIZES, **options), head_of(target))
    init_weights(draft, 0)
    return draft.eval()
