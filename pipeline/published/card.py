"""The card of an exported draft: what it is, what it was made from, how good it is, how to serve it."""

import json
import shlex
from dataclasses import dataclass, field

from pipeline.drafts import DRAFTS, DraftConfig
from pipeline.evaluation.figures import Figures
from pipeline.visible_text import escape_markdown, markdown_code, visible

CARD = "README.md"


@dataclass(frozen=True)
class Origin:
    """What is known of a draft besides its config and weights."""

    dtype: str  # of the stored weights, "float32" or "bfloat16"
    target: str | None = None
    revision: str | None = None
    architectures: tuple[str, ...] = ()  # the target's
    tokens: dict | None = None  # the target's special ids: bos, pad, a list of eos
    trained_on: dict | None = None  # the cache's digest and the share of prompts held out, which `evaluate` reads


@dataclass(frozen=True)
class Measurement:
    """Accept lengths of a draft, over all prompts and by domain; title: how they were measured."""

    title: str
    overall: Figures
    domains: dict[str, Figures]


@dataclass(frozen=True)
class Facts:
    """What a run's folder and its cache record about a draft; None or empty where they are not there any more."""

    steps: int | None = None
    start: str | None = None  # the draft it began with, and the digest of those weights
    recipe: str | None = None  # TOML
    cache: str | None = None  # its digest
    target_digest: str | None = None
    sources: list[dict] = field(default_factory=list)  # of the corpus, as the plan has them
    samples: int | None = None
    template: dict = field(default_factory=dict)  # arguments and day that the chat template was given
    gauge: dict | None = None  # rows, agreement, logprob
    evaluations: list[Measurement] = field(default_factory=list)


def card(config: DraftConfig, form: str, origin: Origin, facts: Facts, parameters: int, folder: str) -> str:
    """Return the card as Markdown. The same facts give the same bytes."""
    target = escape_markdown(origin.target or "the target")
    front = [f"base_model: {json.dumps(origin.target)}"] if origin.target and "/" in origin.target else []
    front = ["---", *front, "tags:", "- speculative-decoding", f"- {config.method}", "---"]
    title = f"# {DRAFTS[config.method].title} draft for {target}"
    sections = [
        "\n".join(front),
        f"{title}\n\n{_what(config, origin, parameters)}",
        f"## Serving\n\n{_serving(config, form, origin, folder)}",
        f"## Accept length\n\n{_accept_lengths(facts, config)}",
        f"## Made from\n\n{_made_from(origin, facts)}",
        f"## Recipe\n\n{_recipe(facts)}",
        f"## Licence\n\n{_licence(target)}",
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
    notes = ["Compare the accept length that the engine reports with the one below: far less means that it reads the"]
    notes += ["draft otherwise than it was trained."]
    notes += DRAFTS[config.method].card_notes(config, form)
    check = markdown_code(shlex.join(["pipeline", "check-export", folder]))
    return f"    {visible(command)}\n\n" + "\n".join(notes) + f"\n{check} proves the files themselves."


def serve_command(config: DraftConfig, form: str, origin: Origin, folder: str) -> str:
    """Return the command that serves the target with this draft."""
    target, revision = origin.target or "TARGET", ["--revision", origin.revision] if origin.revision else []
    path = f"./{folder}"
    if form == "speculators":
        chosen = {"method": config.method, "model": path, "num_speculative_tokens": config.proposals}
        return shlex.join(["vllm", "serve", target, *revision, "--speculative-config", json.dumps(chosen)])
    algorithm, beside = DRAFTS[config.method].sglang
    words = ["python", "-m", "sglang.launch_server", "--model-path", target, *revision]
    words += ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", path]
    return shlex.join([*words, "--speculative-num-draft-tokens", str(config.block_size + beside)])


def _accept_lengths(facts: Facts, config: DraftConfig) -> str:
    if not facts.evaluations:
        return "Not measured: no evaluation lies with the run."
    legend = "Tokens gained per target call, the target's own included; +k: share of calls that kept proposal k."
    return "\n\n".join([legend, *map(_accept_table, facts.evaluations)])


def _accept_table(measured: Measurement) -> str:
    slots, rows = len(measured.overall.per_slot), []
    for name, row in [*sorted(measured.domains.items()), ("all", measured.overall)]:
        if row.calls:
            low, high = row.interval
            kept = [f"{share:.0%}" for share in row.per_slot] + [""] * (slots - len(row.per_slot))
            length = (f"{row.accept_len:.2f}", f"{low:.2f} - {high:.2f}")
            rows.append((escape_markdown(name or "-"), str(row.prompts), *length, *kept))
    head = ("domain", "prompts", "accept length", "95 %", *(f"+{slot + 1}" for slot in range(slots)))
    return f"{measured.title}:\n\n{_table(head, rows)}"


def _made_from(origin: Origin, facts: Facts) -> str:
    rows = [
        ("target's digest", facts.target_digest and escape_markdown(facts.target_digest)),
        ("cache's digest", facts.cache and escape_markdown(facts.cache)),
        *([("started from", escape_markdown(facts.start))] if facts.start else []),
        ("steps", None if facts.steps is None else f"{facts.steps:,}"),
        ("samples of the cache", None if facts.samples is None else f"{facts.samples:,}"),
        *(("corpus", _source(source)) for source in facts.sources),
        ("chat template told", _template_settings(facts.template)),
        ("on-policy gauge", _gauge(facts.gauge)),
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


def _recipe(facts: Facts) -> str:
    return f"```toml\n{facts.recipe.strip()}\n```" if facts.recipe else "Not recorded: a checkpoint without its run."


def _licence(target: str) -> str:
    return (
        f"None is stated here. The weights were learned from hidden states of {target} on the corpus above, and are of "
        "use with that target only: its licence and the corpus's terms decide what may be done with them."
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
