"""A cache whose replies are the target's own greedy ones, some ended by a stop token, and a draft that learned them."""

import numpy as np
import torch
from tiny import config, random_model, tokenizer

from pipeline.cache import HiddenCache
from pipeline.cache.catalog import Catalog
from pipeline.cache.file_writer import create_identity
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample
from pipeline.corpus.rejections import Tally
from pipeline.drafts import (
    DRAFTS,
    Draft,
    draft_config,
    eligible_anchors,
    init_weights,
    lay_blocks,
    pack,
)
from pipeline.target.loading import load_target

STOP, MASK = 258, 259
OPTIONS = {
    "dflash": {"shift_label": False},
    "domino": {"shift_label": True, "emb_dim": 16, "gru_hidden_dim": 24, "pure_draft_prefix_len": 1},
    "dspark": {"shift_label": True, "markov_rank": 16, "confidence_head_with_markov": True},
}


def save_stopping_target(folder):
    """The tiny target, its head changed so that every tenth token or so is the stop token, and none the mask."""
    model = random_model(config())
    head = model.get_output_embeddings().weight
    head[STOP] *= 1.4
    head[MASK] = 0
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def reply(target, ids, most):
    """The target's greedy reply, computed without any kv."""
    new = []
    while len(new) < most and new[-1:] != [STOP]:
        new.append(int(target(torch.tensor([[*ids, *new]])).logits[0, -1].argmax()))
    return new


def conversation(target, rng, turns, most):
    """Ids and mask of random prompts and greedy replies."""
    ids, mask = [], []
    for _ in range(turns):
        prompt = rng.integers(0, 250, rng.integers(1, 9)).tolist()
        new = reply(target, [*ids, *prompt], most)
        ids += prompt + new
        mask += [False] * len(prompt) + [True] * len(new)
    return ids, mask


def make_greedy_cache(model, out, count=12, most=20, seed=0):
    """Capture chats in the domains a, b and c, half of them held out; in `sampled` a reply leaves the greedy path."""
    from stages.cache_hidden.run import run
    from stages.cache_hidden.settings import CaptureOptions, resolve_settings

    target, rng, samples = load_target(str(model)), np.random.default_rng(seed), []
    for at in range(count):
        ids, mask = conversation(target, rng, turns=1 + at % 3 // 2, most=most)
        domain = "abc"[at % 3]
        if at % 6 == 5:
            domain, ids[-3] = "sampled", (ids[-3] + 1) % 250
        split = "heldout" if at % 2 else "train"
        samples.append(PlannedSample(np.array(ids, np.int32), np.array(mask), domain, split, "made", at + 1))
    options = CaptureOptions(layers="1,3,4", max_length=256)
    settings = resolve_settings(str(model), Catalog(out), options)
    create_identity(out, settings.identity.as_dict())
    write_segment(out, samples, row_bytes=1024, sources=[], notes={"max_samples": None, **Tally().as_notes()})
    run(str(model), None, out, options=options)
    return out


def make_learned_draft(cache_path, method="domino", steps=50, **options) -> Draft:
    """Overfit a draft to a cache, so that it accepts some and rejects some."""
    cache = HiddenCache.open(cache_path)
    config = draft_config(
        method=method,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=264,
        rope_theta=10_000.0,
        max_position_embeddings=512,
        num_target_layers=6,
        target_layer_ids=(1, 3, 4),
        mask_token_id=MASK,
        **{"block_size": 4, **OPTIONS[method], **options},
    )
    draft = DRAFTS[method](config, cache.head())
    init_weights(draft, 0)
    soft = config.needs_final_states
    samples = [cache.read(index, final=soft) for index in range(len(cache))]
    cell = pack(samples, [cache.samples.hex(index) for index in range(len(cache))], final=soft)
    eligible = torch.cat([eligible_anchors(sample.mask) for sample in samples]).nonzero()[:, 0]
    blocks = lay_blocks(cell, eligible, config)
    dens = draft.denominators(blocks)
    optimizer = torch.optim.Adam(draft.parameters(), lr=6e-3)
    for step in range(steps):
        optimizer.zero_grad()
        draft.loss(cell, blocks, {"lambda_base": 1 - step / steps}, dens).total.backward()
        optimizer.step()
    return draft.eval()
