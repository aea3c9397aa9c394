"""What a cache keeps of its target, so that training needs nothing else: see `cache/target_folder.py` for the files."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedConfig

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.target_folder import CONFIG, HEAD, TOKENS, WEIGHTS, has_target, new_target
from pipeline.target.files import complete_config, tokenizer_files
from pipeline.target.head import TargetHead
from pipeline.target.tokenizer import load_tokenizer
from pipeline.target.weights import check_weights_if_kept, weight_facts


def store_target(out: Path, folder: Path, head: TargetHead, config: PreTrainedConfig, stops: Iterable[int]) -> None:
    """Write the cache's `target/`, once: config, tokenizer, special tokens, embedding and LM head, digests of weights.

    `stops` are the tokens that end a reply. One process does, others wait for it. UsageError when the cache has it and
    these weights are not, to the byte, those that it was captured with.
    """
    check_weights_if_kept(out, folder)
    if has_target(out):
        return
    with write_errors(out, "the target's files"), process_lock(out, "target"):
        if not has_target(out):
            with new_target(out) as place:
                for path in tokenizer_files(folder):
                    shutil.copyfile(path, place / path.name)
                (place / CONFIG).write_bytes(complete_config(folder, config))
                (place / TOKENS).write_text(special_tokens(folder, stops), encoding="utf-8")
                (place / WEIGHTS).write_text(json.dumps(weight_facts(folder), indent=1, sort_keys=True) + "\n")
                head.save(place / HEAD)
    check_weights_if_kept(out, folder)  # another process may have stored them while we waited


def special_tokens(folder: Path, stops: Iterable[int]) -> str:
    """Return tokens.json: ids of mask, pad, bos, all that end a reply, and how many tokens the tokenizer knows."""
    tokenizer = load_tokenizer(folder)
    own = {tokenizer.eos_token_id} - {None}
    facts = {
        "bos": tokenizer.bos_token_id,
        "eos": sorted(own | set(stops)),
        "length": len(tokenizer),
        "mask": tokenizer.mask_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return json.dumps(facts, indent=1, sort_keys=True) + "\n"
