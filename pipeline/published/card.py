"""The card of an exported draft: what it is, what it was made from, how good it is, how to serve it."""

import json
import shlex
from dataclasses import dataclass, field

from pipeline.drafts import DraftConfig
from pipeline.published.writing import Origin
from pipeline.visible_text import escape_markdown, markdown_code, visible

CARD = "README.md"
TITLES = {"dflash": "DFlash", "domino": "Domino", "dspark": "DSpark"}
PAPERS = {"dflash": "2602.06036", "domino": "2605.29707", "dspark": "2607.05147"}


@dataclass(frozen=True)
class Facts:
    """What a run's folder and its cache tell of a draft; None or empty where they are not there any more."""

    steps: int | None = None
    start: str | None = None  # the draft it began with, and the digest of those weights
    recipe: str | None = None  # TOML
    cache: str | None = None  # its digest
    target_digest: str | None = None
    sources: list[dict] = field(default_factory=list)  # of the corpus, as the plan has them
    samples: int | None = None
    template: dict = field(default_factory=dict)  # what the chat template was told: arguments, day
    gauge: dict | None = None  # rows, agreement, logprob
    evaluations: list[dict] = field(default_factory=list)  # title, and figures as `summarise` gives them


def card(config: DraftConfig, form: str, origin: Origin, facts: Facts, parameters: int, folder: str) -> str:
    """Return the card as Markdown. The same facts give the same bytes."""
    target = escape_markdown(origin.target or "the target")
    front = [f"base_model: {json.dumps(origin.target)}"] if origin.target and "/" in origin.target else []
    front = ["---", *front, "tags:", "- speculative-decoding", f"- {config.method}", "---"]
    title = f"# {TITLES[config.method]} draft for {target}"
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
    rows = [
        (
            "method",
            f"{TITLES[config.method]} ([arXiv:{PAPERS[config.method]}](https://arxiv.org/abs/{PAPERS[config.method]}))",
        ),
        ("target", f"{escape_markdown(origin.target or 'not recorded')}{revision}"),
        ("parameters", f"{parameters:,}, {origin.dtype}"),
        ("block", f"{config.block_size} slots, {config.proposals} proposals; slot k guesses the token at {slots}"),
        ("target layers read", f"{', '.join(map(str, config.target_layer_ids))} (outputs of decoder layers, from 0)"),
        ("mask token", str(config.mask_token_id)),
    ]
    if config.method == "domino":
        rows.append(("causal head", f"GRU of {config.gru_hidden_dim}, rank {config.emb_dim}"))
    if config.method == "dspark":
        confidence = "with" if config.enable_confidence_head else "without"
        markov = f"{config.markov_head_type}, rank {config.markov_rank}" if config.markov_rank else "none"
        rows.append(("Markov head", f"{markov}, {confidence} confidence head"))
    return _table(("", ""), rows)


def _serving(config: DraftConfig, form: str, origin: Origin, folder: str) -> str:
    command = serve_command(config, form, origin, folder)
    notes = ["Compare the accept length that the engine reports with the one below: far less means that it reads the"]
    notes += ["draft otherwise than it was trained."]
    if form == "speculators" and config.method == "dspark":
        notes.append("vLLM has to heed `sample_from_anchor`; builds that take it for false accept nothing, and serve")
        notes.append("the same draft exported with `--format sglang`.")
    if form == "sglang" and config.markov_rank == 0:
        notes.append("SGLang has so far refused `markov_rank` 0, which DeepSpec's and SpecForge's own decoding takes.")
    if form == "sglang" and config.method == "domino":
        notes.append("SGLang has to know Domino; older builds pass over its head without a word. Greedy drafts only,")
        notes.append(f"and {config.proposals - 1} proposals a block, where the figures below have {config.proposals}.")
    if form == "sglang" and config.method == "dspark" and not config.enable_confidence_head:
        notes.append("Without a confidence head SGLang serves it in its default, static verify mode only.")
    check = markdown_code(shlex.join(["pipeline", "check-export", folder]))
    return f"    {visible(command)}\n\n" + "\n".join(notes) + f"\n{check} proves the files themselves."


def serve_command(config: DraftConfig, form: str, origin: Origin, folder: str) -> str:
    """Return the command that serves the target with this draft."""
    target, revision = origin.target or "TARGET", ["--revision", origin.revision] if origin.revision else []
    place = f"./{folder}"
    if form == "speculators":
        chosen = {"method": config.method, "model": place, "num_speculative_tokens": config.proposals}
        return shlex.join(["vllm", "serve", target, *revision, "--speculative-config", json.dumps(chosen)])
    algorithm = "DSPARK" if config.method == "dspark" else "DFLASH"
    # DFlash counts the anchor among the tokens to verify; DSpark's block holds proposals only.
    verified = config.block_size + (config.method == "dspark")
    words = ["python", "-m", "sglang.launch_server", "--model-path", target, *revision]
    words += ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", place]
    return shlex.join([*words, "--speculative-num-draft-tokens", str(verified)])


def _accept_lengths(facts: Facts, config: DraftConfig) -> str:
    if not facts.evaluations:
        return "Not measured: no evaluation lies with the run."
    said = "Tokens gained per target call, the target's own included; +k: share of calls that kept proposal k."
    return "\n\n".join([said, *(_accept_table(found) for found in facts.evaluations)])


def _accept_table(found: dict) -> str:
    figures = found["figures"]
    slots = len(figures["per_slot"])
    rows = []
    for name, row in [*sorted(figures["domains"].items()), ("all", figures)]:
        if row["calls"]:
            low, high = row["interval"]
            kept = [f"{share:.0%}" for share in row["per_slot"]] + [""] * (slots - len(row["per_slot"]))
            cells = (
                escape_markdown(name or "-"),
                str(row["prompts"]),
                f"{row['accept_len']:.2f}",
                f"{low:.2f} - {high:.2f}",
            )
            rows.append((*cells, *kept))
    head = ("domain", "prompts", "accept length", "95 %", *(f"+{slot + 1}" for slot in range(slots)))
    return f"{found['title']}:\n\n{_table(head, rows)}"


def _made_from(origin: Origin, facts: Facts) -> str:
    rows = [
        ("target's digest", facts.target_digest and escape_markdown(facts.target_digest)),
        ("cache's digest", facts.cache and escape_markdown(facts.cache)),
        *([("started from", escape_markdown(facts.start))] if facts.start else []),
        ("steps", None if facts.steps is None else f"{facts.steps:,}"),
        ("samples of the cache", None if facts.samples is None else f"{facts.samples:,}"),
        *(("corpus", _source(source)) for source in facts.sources),
        ("chat template told", _told(facts.template)),
        ("on-policy gauge", _gauge(facts.gauge)),
    ]
    return _table(("", ""), [(name, value or "not recorded") for name, value in rows])


def _source(source: dict) -> str:
    """A data set of the hub, or a file by its name inside the corpus, and what says which one exactly."""
    return ", ".join(escape_markdown(value) for key, value in source.items() if key != "size" and value)


def _told(template: dict) -> str | None:
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
