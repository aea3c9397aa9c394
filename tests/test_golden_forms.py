"""Forms that reference cases have elsewhere: made here, and run by what runs the cases (`test_golden.py`)."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import test_golden as golden
import torch
from greedy import make_greedy_cache, make_learned_draft, save_stopping_target

from pipeline.cache import HiddenCache
from pipeline.drafts import DRAFTS, BlockRequest
from pipeline.published.card import Origin
from pipeline.published.export import published_config
from pipeline.target.loading import load_target
from pipeline.tensors import save_tensors

FORMS = {
    "a number in a list": lambda value: [value],
    "a number in lists": lambda value: [[value]],
    "positions in one number": lambda value: math.fsum(value) if isinstance(value, list) else value,
    "positions in two axes": lambda value: [value[:2], value[2:]] if isinstance(value, list) else value,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", DRAFTS)
def test_scalars_may_be_written_in_any_of_these_forms(monkeypatch, tmp_path, method, form):
    reference = Path(__file__).parent / "golden" / "reference"
    source = next(path for path in sorted(reference.glob(f"*-{method}-*.json")))
    monkeypatch.setattr(golden, "GOLDEN", tmp_path)
    facts = json.loads(source.read_text())
    write = FORMS[form]
    facts["scalars"] = {
        key: {at: write(one) for at, one in value.items()} if isinstance(value, dict)
        else value if isinstance(value, str) else write(value)
        for key, value in facts["scalars"].items()
    }  # fmt: skip
    name = f"{source.stem}, {form}"
    (tmp_path / f"{name}.safetensors").symlink_to(source.with_suffix(".safetensors"))
    for wrong in (False, True):
        if wrong:
            right = facts["scalars"]["correct_num"]
            facts["scalars"]["correct_num"] = write(golden.number(right) + 1)
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
        golden.load.cache_clear()
        golden.test_losses(name)
        with pytest.raises(AssertionError, match="correct_num") if wrong else contextlib.nullcontext():
            golden.test_every_scalar_we_recognise(name)
    golden.load.cache_clear()


def one_by_one(target, draft, prompt: list[int], max_new: int) -> tuple[list[int], list[int]]:
    """Decode by hand, as the reference does: no kv, no stop tokens, a block of b drafts b tokens."""
    ids, start, lengths = list(prompt), len(prompt), []

    def run(text):
        return target(torch.tensor([text]), output_hidden_states=True, use_cache=False)

    ids.append(int(run(ids).logits[0, -1].argmax()))
    while start < len(prompt) + max_new:
        hidden = run(ids[:start]).hidden_states
        features_KTD = torch.cat([hidden[layer + 1] for layer in draft.config.target_layer_ids])
        request = BlockRequest(features_KTD, ids[start], start, draft.new_kv())
        proposed = draft.propose([request])[0].ids_P.tolist()
        chosen = run([*ids[: start + 1], *proposed]).logits[0, start:].argmax(-1).tolist()
        kept = next((at for at, token in enumerate(proposed) if token != chosen[at]), len(proposed))
        ids += chosen[: kept + 1]
        lengths.append(kept + 1)
        start += kept + 1
    return ids[: len(prompt) + max_new], lengths


@torch.no_grad()
def test_a_dspark_block_of_b_drafts_b_tokens(tmp_path):
    folder = tmp_path / "decode-dspark"
    target = load_target(str(save_stopping_target(folder / "target")), device="cpu", dtype="float32")
    cache = make_greedy_cache(folder / "target", tmp_path / "cache")
    with torch.enable_grad():
        draft = make_learned_draft(cache, "dspark")
    (folder / "draft").mkdir()
    (folder / "draft" / "config.json").write_text(
        json.dumps(published_config(draft.config, "sglang", Origin("float32")))
    )
    save_tensors(draft.state_dict(), folder / "draft" / "model.safetensors")
    samples = HiddenCache.open(cache)
    prompts = [samples.tokens_of(index)[0][:4].tolist() for index in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in prompts))
    rows = [one_by_one(target, draft, prompt, 16) for prompt in prompts]
    facts = {"method": "dspark", "max_new": 16, "rows": [{"output_ids": ids, "acc": acc} for ids, acc in rows]}
    (folder / "expected.json").write_text(json.dumps(facts))
    assert draft.config.block_size + 1 in {length for _, acc in rows for length in acc}, "none was kept whole"

    golden.check_decoding(folder)
