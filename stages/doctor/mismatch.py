"""Whether a run is finished, and what does not belong together: a checkpoint and its run, its cache, a target, an
export; by value where that can be had without the target."""

import shlex
from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.cache.atomic import is_locked
from pipeline.cache.layout import FINAL
from pipeline.drafts import DraftConfig
from pipeline.published.reading import CONFIG, TRAINED_ON, read_description, read_json
from pipeline.runs.folder import RECIPE
from pipeline.target.files import template_digest, tokenizer_digest
from pipeline.target.weights import target_digest
from stages.doctor.examined_run import Case
from stages.doctor.finding import NOTE, OK, PROBLEM, Finding


def other_draft(case: Case) -> Finding:
    """The checkpoint against the recipe, label convention by value, and what it gains against what it gained."""
    name, asked, found = "labels, layers, config", case.resolved.draft, case.config
    differing = differences(asked, found)
    # States that the cache may lack cannot be read to measure it.
    flipped, here = None, None if "target_layer_ids" in differing else case.accept_len
    if here is not None and (differing or case.is_low):
        flipped = case.accept_len_with(shift_label=not found.shift_label)
    facts = {"differing": {key: [str(a), str(b)] for key, (a, b) in differing.items()}, "other_convention": flipped}
    remedy = f"put the checkpoint back as it was, or train again: {command(case, again(case))}"
    if differing:
        words = "; ".join(f"{key} is {b}, the recipe says {a}" for key, (a, b) in sorted(differing.items()))
        by_value = f"; with the other label convention {flipped:.2f} instead of {here:.2f}" if flipped and here else ""
        return Finding(
            name, PROBLEM, f"the checkpoint's config.json is not the run's: {words}{by_value}", "", remedy, facts
        )
    if flipped is not None and flipped > max(1.3 * here, here + 0.3):
        words = f"accept length {flipped:.2f} with the other label convention, {here:.2f} with its own"
        return Finding(name, PROBLEM, words, "its labels were laid by the other one", remedy, facts)
    fell = _fell(case)
    if fell:
        before, now, replies = fell
        words = f"{replies} held-out replies gained {before:.2f} when the run measured them, and gain {now:.2f} now"
        remedy = f"`pipeline verify {case.cache.path}`; weights, states or head are others than then"
        return Finding(name, PROBLEM, words, "", remedy, facts | {"then": before, "now": now})
    told = f"{flipped:.2f} with the other label convention" if flipped is not None else "label convention as trained"
    return Finding(name, OK, f"the checkpoint is the recipe's; {told}", facts=facts)


def _fell(case: Case) -> tuple[float, float, int] | None:
    """Return the accept length of some held-out replies when this checkpoint was measured, now, and of how many; None
    where it has not fallen."""
    of_step = [figures.replies for step, figures in case.evaluations if step == case.state.step]
    replies = of_step[-1] if of_step else []
    then = {(sample, row): (tokens, calls) for sample, row, tokens, calls in replies}
    pairs = [(then[span.sample, span.start], span) for span in case.spans if (span.sample, span.start) in then]
    if len(pairs) < 2:
        return None
    before = sum(tokens for (tokens, _), _ in pairs) / sum(calls for (_, calls), _ in pairs)
    now = sum(sum(span.lengths) for _, span in pairs) / max(1, sum(len(span.lengths) for _, span in pairs))
    return (before, now, len(pairs)) if now - 1 < 0.7 * (before - 1) and before - now > 0.1 else None


def other_cache(case: Case) -> Finding:
    """The cache that is there against the one that the run was trained from: identity, codecs, and an unproven norm."""
    name, cache, record = "cache, norm, codec", case.cache, case.record.cache
    grown = record.digest in cache.earlier_digests
    facts = {"digest": cache.digest, "trained_on": record.digest, "grown": grown}
    if cache.digest != record.digest and not grown:
        words = f"the cache there has identity {cache.digest[:12]}, the run was trained from {record.digest[:12]}"
        remedy = "pass --cache DIR with the cache it was trained from, or train again into another --out"
        return Finding(name, PROBLEM, words, "states, samples or target are others", remedy, facts)
    codecs = _rounded(case)
    facts |= {"codecs": codecs, "trained_with": record.rounded}
    states = Finding(name, OK, "the cache it was trained from", facts=facts)
    if codecs != record.rounded:
        now, then = (", ".join(each) or "as captured" for each in (codecs, record.rounded))
        return Finding(name, NOTE, f"recoded since: {now}, trained from {then}", "small where certified", "", facts)
    return wrong_norm(case, states)


def _rounded(case: Case) -> list[str]:
    draft = case.resolved.draft
    rounded = case.cache.rounded([*draft.target_layer_ids, *[FINAL] * draft.needs_final_states])
    return [f"{name} {'/'.join(codecs)}" for name, codecs in rounded.items()]


def gauge(cache: HiddenCache) -> tuple[int, int]:
    """Return how many tokens were the target's own greedy choice when the cache was captured, of how many."""
    facts = [
        manifest.facts.gauge
        for shard in range(cache.shards)
        for manifest in cache.columns(shard).values()
        if manifest.facts.gauge
    ]
    return sum(fact.agree for fact in facts), sum(fact.rows for fact in facts)


def wrong_norm(case: Case, fine: Finding) -> Finding:
    """The share of greedy tokens by the stored final states, against what was measured at capture: a norm that was lost
    or doubled makes it fall."""
    (agree, rows), (here, of) = gauge(case.cache), case.greedy_share
    imported = case.cache.identity.capture.imported
    if rows >= 50 and of >= 50 and here / of < 0.6 * agree / rows:
        words = (
            f"by the stored final states {here / of:.0%} of tokens are the target's own, at capture {agree / rows:.0%}"
        )
        remedy = f"`pipeline verify {case.cache.path}`, then capture or import them again"
        return Finding(
            fine.check, PROBLEM, words, "the states are not those before the head: norm or layer", remedy, fine.facts
        )
    if imported is not None and not imported.proven:
        words = "imported and compared with no target: layers and norm are as they were stated"
        return Finding(fine.check, NOTE, words, "", "import again with --model, which proves them", fine.facts)
    return fine


def unfinished(case: Case) -> Finding:
    """Whether the run has taken its last step."""
    last, steps = (case.state.step if case.state else 0), case.recipe.train.steps
    facts = {"step": last, "steps": steps, "finished": case.result is not None}
    if case.result is not None:
        return Finding("unfinished", OK, f"finished after {last:,} steps", facts=facts)
    words = f"step {last:,} of {steps:,} is saved"
    if is_locked(case.path / "lock"):
        return Finding("unfinished", NOTE, f"{words}; it is being trained now", "wait for it", facts=facts)
    cost = "its rate has not come down yet, and what comes of it is not what the recipe says"
    return Finding("unfinished", PROBLEM, f"{words}, and nobody trains it", cost, command(case), facts)


def other_target(case: Case, folder: Path) -> Finding:
    """A target's folder against the one that was captured: weights, tokenizer, chat template."""
    name, identity = "target", case.cache.identity
    found = {
        "weights": target_digest(folder),
        "tokenizer": tokenizer_digest(folder),
        "chat template": template_digest(folder),
    }
    kept = {
        "weights": identity.target.digest,
        "tokenizer": identity.tokenizer.digest,
        "chat template": identity.tokenizer.chat_template,
    }
    wrong = [part for part, digest in kept.items() if digest is not None and digest != found[part]]
    facts = {"found": found, "captured": kept, "differing": wrong}
    if wrong:
        words = f"{folder} has another {' and '.join(wrong)} than the target captured, {identity.target.name}"
        cost = "states, or prompts, are others than those learned from"
        remedy = "serve with the target that was captured, or capture and train with this one"
        return Finding(name, PROBLEM, words, cost, remedy, facts)
    return Finding(name, OK, f"{folder} is the target captured: weights, tokenizer, chat template", facts=facts)


def other_export(case: Case, folder: Path) -> Finding:
    """A published folder's config against the run's."""
    name, config = "export", case.config
    published: DraftConfig = read_description(folder, config.num_target_layers).config
    differing = differences(config, published)
    trained = (read_json(folder / CONFIG).get(TRAINED_ON) or {}).get("cache")
    facts = {"differing": {key: [str(a), str(b)] for key, (a, b) in differing.items()}, "trained_on": trained}
    remedy = f"`pipeline export --draft {shlex.quote(str(case.path))} --out` another folder"
    if differing:
        words = "; ".join(f"{key} is {b}, the run says {a}" for key, (a, b) in sorted(differing.items()))
        return Finding(name, PROBLEM, f"{folder}: {words}", "it computes something else", remedy, facts)
    if trained not in (None, case.record.cache.digest):
        return Finding(name, PROBLEM, f"{folder} is of a draft trained from another cache", "", remedy, facts)
    check = f"its weights by arithmetic: `pipeline check-export {shlex.quote(str(folder))}`"
    return Finding(name, OK, f"{folder}: labels, layers, block and positions are the run's", check, facts=facts)


def differences(asked: DraftConfig, found: DraftConfig) -> dict[str, tuple]:
    """Return the fields of which a draft computes something else, with both values."""
    names = (key for key in type(asked).model_fields if key not in asked.training_only)
    pairs = {key: (getattr(asked, key), getattr(found, key, None)) for key in names}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def again(case: Case) -> Path:
    """Return a folder for a run in place of this one."""
    return case.path.with_name(f"{case.path.name}-again")


def command(case: Case, out: Path | None = None, **sets: object) -> str:
    """Return the command, in backquotes, that goes on with the run; with `sets`, or `out`, one that trains another.

    sets: fields of [train] or [draft] to change, their dot written as two underscores.
    """
    out = out or (again(case) if sets else case.path)
    words = ["pipeline", "train-draft", str(case.path / RECIPE), "--cache", str(case.cache.path)]
    words += [word for name, value in sets.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]
    start = case.record.start
    words += ["--init-from", start.place] if start else []
    return f"`{shlex.join([*words, '--out', str(out)])}`"
