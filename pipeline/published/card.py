"""The card of an exported draft: what it is, what it was made from, how good it is, how to serve it.

Its facts are what the run's folder records, and the cache that the draft was trained on, if that is still there.
"""

import json
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.cache import HiddenCache
from pipeline.cache.inspect import describe
from pipeline.drafts import DRAFTS, DraftConfig
from pipeline.errors import CacheError, UsageError
from pipeline.evaluation.accept_length import Figures
from pipeline.evaluation.reports import load_report
from pipeline.runs.checkpoint import find_checkpoint, open_checkpoint
from pipeline.runs.folder import DONE, RUN, read_recipe, read_result, read_run
from pipeline.visible_text import escape_markdown, markdown_code, visible

CARD = "README.md"


@dataclass(frozen=True)
class Measurement:
    """Accept lengths of a draft, over all prompts and by domain; title: how they were measured."""

    title: str
    overall: Figures
    domains: dict[str, Figures]
    as_vllm: float | None = None  # the accept length over all prompts as vLLM counts it


@dataclass(frozen=True)
class Origin:
    """What is known of a draft besides its config and weights; None or empty where it is not recorded."""

    dtype: str  # of the stored weights, "float32" or "bfloat16"
    target: str | None = None
    revision: str | None = None
    trained_on: dict | None = None  # the cache's digest and the share of prompts held out, which `evaluate` reads
    start: str | None = None  # the draft it began with, and the digest of those weights
    steps: int | None = None
    recipe: str | None = None  # TOML
    anchors: int | None = None  # blocks of a sample, at most
    evaluations: list[Measurement] = field(default_factory=list)
    # Of the cache, where it is still there.
    target_digest: str | None = None
    architectures: tuple[str, ...] = ()  # the target's
    tokens: dict | None = None  # the target's special ids: bos, pad, a list of eos
    sources: list[dict] = field(default_factory=list)  # of the corpus, as the plan has them
    samples: int | None = None
    template: dict = field(default_factory=dict)  # arguments and day that the chat template was given
    gauge: dict | None = None  # rows, agreement, logprob


def provenance(place: Path) -> tuple[HiddenCache | None, Origin]:
    """Return where a run or a checkpoint comes from, and the cache that it was trained on, if that is still there.

    Almost nothing is known of a checkpoint outside a run's folder.
    """
    checkpoint = find_checkpoint(place)
    folder = checkpoint.resolve().parent.parent
    if not (folder / RUN).is_file():
        return None, Origin("float32")
    recorded, recipe = read_run(folder), read_recipe(folder)
    step, start = open_checkpoint(checkpoint, ()).step, recorded.start
    origin = Origin(
        dtype=recipe.train.dtype,
        target=recorded.target,
        trained_on={"cache": recorded.cache.digest, "heldout": recipe.train.heldout},
        start=start and f"{Path(start.place).name}, {start.digest}",
        steps=step,
        recipe=recipe.toml(),
        anchors=recipe.train.anchors,
        evaluations=evaluations(folder, step),
    )
    try:
        cache = HiddenCache.open(recorded.cache.path)
    except (UsageError, CacheError):  # moved, deleted or damaged since; the draft is none the worse for it
        return None, origin
    if cache.digest != recorded.cache.digest:
        return None, origin
    target, rules, description = cache.identity.target, cache.identity.samples, describe(cache.path)
    return cache, replace(
        origin,
        revision=target.revision or None,
        target_digest=target.digest,
        architectures=tuple(cache.target_config.get("architectures") or ()),
        tokens=cache.tokens,
        sources=description["plan"]["sources"],
        samples=description["plan"]["samples"],
        template={key: getattr(rules, key) for key in ("template_kwargs", "template_date") if rules.template_kwargs},
        gauge=description["gauge"],
    )


def evaluations(folder: Path, step: int) -> list[Measurement]:
    """Return the measurements of the checkpoint after `step`: reports of `evaluate` in the run's folder or beside it
    under its name, and the accept length that training measured. Raises CacheError for a damaged one."""
    measured = []
    own = {folder / RUN, folder / DONE}
    for path in sorted({*folder.glob("*.json"), folder.parent / f"{folder.name}.json"} - own):
        try:
            report = load_report(path)
        except UsageError:  # another file, or a report of another version
            continue
        if report.draft.steps != step:
            continue
        threshold, drawn = report.settings.threshold, report.sampled
        cut = f", blocks cut at confidence {threshold:g}" if threshold else ""
        limited = report.settings.proposals
        cut += "" if limited is None else f", {limited} proposals a block"
        most = f"{report.settings.max_new} tokens at most{cut}"
        title, engine = f"Decoded greedily with the target, {most}", report.overall.engine_accept_len
        measured.append(Measurement(title, report.overall, report.domains, engine))
        if drawn:
            title = f"Replies drawn from the target at T = {drawn.temperature:g}, {most}"
            measured.append(Measurement(title, drawn.overall, drawn.domains, drawn.overall.engine_accept_len))
    done = read_result(folder)
    if done and done.steps == step and done.eval and done.eval.calls:
        title = "On held-out replies that are the target's own, greedy, without decoding"
        measured.append(Measurement(title, done.eval, done.eval.domains))
    return measured


def card(config: DraftConfig, form: str, origin: Origin, parameters: int, folder: str) -> str:
    """Return the card as Markdown. The same origin gives the same bytes."""
    target = escape_markdown(origin.target or "the target")
    front = [f"base_model: {json.dumps(origin.target)}"] if origin.target and "/" in origin.target else []
    front = ["---", *front, "tags:", "- speculative-decoding", f"- {config.method}", "---"]
    title = f"# {DRAFTS[config.method].title} draft for {target}"
    recipe = (
        f"```toml\n{origin.recipe.strip()}\n```" if origin.recipe else "Not recorded: a checkpoint without its run."
    )
    licence = (
        f"None is stated here. The weights were learned from hidden states of {target} on the corpus above, and are of "
        "use with that target only: its licence and the corpus's terms decide what may be done with them."
    )
    sections = [
        "\n".join(front),
        f"{title}\n\n{_what(config, origin, parameters)}",
        f"## Serving\n\n{_serving(config, form, origin, folder)}",
        f"## Accept length\n\n{_accept_lengths(origin)}",
        f"## Made from\n\n{_made_from(origin)}",
        f"## Recipe\n\n{recipe}",
        f"## Licence\n\n{licence}",
    ]
    return "\n\n".join(sections) + "\n"


def _what(config: DraftConfig, origin: Origin, parameters: int) -> str:
    slots = "anchor + k + 1" if config.shift_label else "anchor + k"
    revision = f", revision {markdown_code(origin.revision)}" if origin.revision else ""
    method = DRAFTS[config.method]
    paper = f" ([arXiv:{method.paper}](https://arxiv.org/abs/{method.paper}))" if method.paper else ""
    rows = [
        ("method", f"{method.title}{paper}"),
        ("target", f"{escape_markdown(origin.target or 'not recorded')}{revision}"),
        ("parameters", f"{parameters:,}, {origin.dtype}"),
        ("block", f"{config.block_size} slots, {config.proposals} proposals; slot k guesses the token at {slots}"),
        ("target layers read", f"{', '.join(map(str, config.target_layer_ids))} (outputs of decoder layers, from 0)"),
        ("mask token", str(config.mask_token_id)),
    ]
    rows += method.card_rows(config)
    return _table(("", ""), rows)


def _serving(config: DraftConfig, form: str, origin: Origin, folder: str) -> str:
    command = serve_command(config, form, origin, folder)
    notes = [
        "Compare the accept length that the engine reports with the one below, in its own way of counting: less means",
        "that it computes the draft otherwise than it was trained, and a little less already does.",
        *DRAFTS[config.method].card_notes(config, form),
    ]
    check = markdown_code(shlex.join(["pipeline", "check-export", folder]))
    last = f"{check} proves the files themselves"
    if form != "deepspec" and "speculators" in DRAFTS[config.method].forms:  # which vLLM reads
        served = markdown_code(shlex.join(["pipeline", "serve-check", folder, "--python", "V/bin/python"]))
        last += f",\n{served} what a vLLM on your machine makes of them"
    return f"    {visible(command)}\n\n" + "\n".join(notes) + f"\n{last}."


def serve_command(config: DraftConfig, form: str, origin: Origin, folder: str) -> str:
    """Return the command that serves the target with this draft, or evaluates it."""
    target, revision = origin.target or "TARGET", ["--revision", origin.revision] if origin.revision else []
    path = f"./{folder}"
    if form == "speculators":
        chosen = {"method": config.method, "model": path, "num_speculative_tokens": config.proposals}
        return shlex.join(["vllm", "serve", target, *revision, "--speculative-config", json.dumps(chosen)])
    if form == "deepspec":
        return shlex.join(["python", "eval.py", "--target_name_or_path", target, "--draft_name_or_path", path])
    algorithm, beside = DRAFTS[config.method].sglang
    words = ["python", "-m", "sglang.launch_server", "--model-path", target, *revision]
    words += ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", path]
    return shlex.join([*words, "--speculative-num-draft-tokens", str(config.block_size + beside)])


def _accept_lengths(origin: Origin) -> str:
    if not origin.evaluations:
        return "Not measured: no evaluation lies with the run."
    legend = "Tokens gained per target call, the target's own included; +k: share of calls that kept proposal k."
    if any(measured.as_vllm for measured in origin.evaluations):
        legend += (
            " vLLM's mean acceptance length is another figure of the same calls: it counts accepted proposals beyond "
            "the end of a reply, and makes no call once a reply has all the tokens of its limit."
        )
    return "\n\n".join([legend, *map(_accept_table, origin.evaluations)])


def _accept_table(measured: Measurement) -> str:
    slots, rows = len(measured.overall.per_slot), []
    for name, row in [*sorted(measured.domains.items()), ("all", measured.overall)]:
        if row.calls:
            low, high = row.interval
            kept = [f"{share:.0%}" for share in row.per_slot] + [""] * (slots - len(row.per_slot))
            length = (f"{row.accept_len:.2f}", f"{low:.2f} - {high:.2f}")
            rows.append((escape_markdown(name or "-"), str(row.prompts), *length, *kept))
    head = ("domain", "prompts", "accept length", "95 %", *(f"+{slot + 1}" for slot in range(slots)))
    engine = f"\n\nAs vLLM counts: {measured.as_vllm:.3f}." if measured.as_vllm else ""
    return f"{measured.title}:\n\n{_table(head, rows)}{engine}"


def _made_from(origin: Origin) -> str:
    rows = [
        ("target's digest", origin.target_digest and escape_markdown(origin.target_digest)),
        ("cache's digest", origin.trained_on and escape_markdown(origin.trained_on["cache"])),
        *([("started from", escape_markdown(origin.start))] if origin.start else []),
        ("steps", None if origin.steps is None else f"{origin.steps:,}"),
        ("samples of the cache", None if origin.samples is None else f"{origin.samples:,}"),
        *(("corpus", _source(source)) for source in origin.sources),
        ("chat template told", _template_settings(origin.template)),
        ("on-policy gauge", _gauge(origin.gauge)),
    ]
    return _table(("", ""), [(name, value or "not recorded") for name, value in rows])


def _source(source: dict) -> str:
    """Return a data set of the hub, or a file by its name inside the corpus, and what identifies it exactly."""
    return ", ".join(escape_markdown(value) for key, value in source.items() if key != "size" and value)


def _template_settings(template: dict) -> str | None:
    """Return what to serve the target with: another mode has other prompts than those the draft has learned."""
    if not template:
        return None
    arguments = markdown_code(json.dumps(template["template_kwargs"], sort_keys=True))
    return f"{arguments} and the day {template['template_date']}; serve the target in the same mode"


def _gauge(gauge: dict | None) -> str | None:
    if not gauge:
        return None
    return (
        f"the target's own greedy token in {gauge['agreement']:.1%} of {gauge['rows']:,} supervised rows "
        f"(mean log-probability {gauge['logprob']:.2f})"
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
