"""Writes a cache's copy of what training needs of the target; the files are those of `cache/target_files.py`."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedConfig

from pipeline.cache.atomic import process_lock, write_errors
from pipeline.cache.catalog import Catalog
from pipeline.cache.target_files import CONFIG, HEAD, TOKENS, WEIGHTS, has_target, new_target
from pipeline.target.files import complete_config, tokenizer_files
from pipeline.target.head import TargetHead
from pipeline.target.tokenizer import load_tokenizer
from pipeline.target.weights import check_weights_if_recorded, weight_facts


def store_target(
    catalog: Catalog, folder: Path, head: TargetHead, config: PreTrainedConfig, stops: Iterable[int]
) -> None:
    """Write the cache's `target/`, unless it exists: config, tokenizer, special tokens, head, checksums of the weights.

    stops: the tokens that end a reply. One process writes, others wait for it. UsageError when it exists and was made
    from other weights.
    """
    check_weights_if_recorded(catalog, folder)
    if has_target(catalog):
        return
    with write_errors(catalog.path, "the target's files"), process_lock(catalog.path, "target"):
        if not has_target(catalog):
            with new_target(catalog) as new_folder:
                for path in tokenizer_files(folder):
                    shutil.copyfile(path, new_folder / path.name)
                (new_folder / CONFIG).write_bytes(complete_config(folder, config))
                (new_folder / TOKENS).write_text(special_tokens(folder, stops), encoding="utf-8")
                (new_folder / WEIGHTS).write_text(json.dumps(weight_facts(folder), indent=1, sort_keys=True) + "\n")
                head.save(new_folder / HEAD)
    check_weights_if_recorded(catalog, folder)  # another process may have stored them while we waited


def special_tokens(folder: Path, stops: Iterable[int]) -> str:
    """Return the text of tokens.json: ids of mask, pad, bos, of all that end a reply, and the tokenizer's length."""
    tokenizer = load_tokenizer(folder)
    tokenizer_eos = {tokenizer.eos_token_id} - {None}
    tokens = {
        "bos": tokenizer.bos_token_id,
        "eos": sorted(tokenizer_eos | set(stops)),
        "length": len(tokenizer),
        "mask": tokenizer.mask_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return json.dumps(tokens, indent=1, sort_keys=True) + "\n"
