"""The options of all commands."""

import re
from collections.abc import Callable
from functools import reduce

import click
from click import FloatRange, IntRange, option

from pipeline.completion import complete_methods, complete_paths, complete_setting
from pipeline.errors import UsageError
from pipeline.option_types import (
    CACHE_FOLDER,
    DRAFT,
    EXAMINED,
    EXPORTED,
    FOLDER,
    PATH,
    RECIPE,
    REPORT,
    Choice,
    CodecOption,
)

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
ROLES = option(
    "--roles",
    multiple=True,
    metavar="A=B",
    callback=lambda ctx, option, pairs: ",".join(pairs) or None,
    help="Read the role A of CORPUS as B, such as bard=assistant; may be repeated.",
)
TEMPLATE_KWARGS = option(
    "--template-kwargs", metavar="JSON", help="Arguments of the chat template, such as '{\"enable_thinking\": false}'."
)
TEMPLATE_DATE = option("--template-date", metavar="DAY", help="The day that templates are told.  [default: 2024-07-26]")
DEVICE = option("--device", help="cpu, cuda, cuda:1 ...  [default: cuda if there is one]")
DEVICE_MAP = option("--device-map", metavar="MAP", help="Spread the target over devices: auto, or JSON by module.")
SIZE = re.compile(r"(\d{1,15}(?:\.\d+)?)\s*([kmgtp]?)(i?)b?", re.IGNORECASE)

PYTHON = option("--python", type=PATH, help="The engine's own Python, V/bin/python.  [default: that of `make engines`]")
ENGINE_OPTIONS = option(
    "--engine-option",
    "engine_options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=lambda ctx, option, pairs: "\n".join(pairs) or None,
    help="Tell the engine, such as tensor_parallel_size=2; may be repeated.",
)
SET = option(
    "--set",
    "sets",
    multiple=True,
    metavar="A.B=C",
    shell_complete=complete_setting,
    help="Change one field of the recipe, of every run's in a sweep; may be repeated.",
)
AS_JSON = option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
CACHE = click.argument("cache", type=CACHE_FOLDER, default="hs_cache")


def together(*options: Callable) -> Callable:
    """Return one decorator for several options, which a command's help lists in this order."""
    return lambda command: reduce(lambda decorated, each: each(decorated), reversed(options), command)


# Of `plan` alone.
plan_options = together(
    option("--probe", is_flag=True, help="Run target and disk for a moment, to say how long a capture takes."),
    option("--train", type=RECIPE, metavar="RECIPE", help="Say what memory a training by this recipe needs, too."),
    option("--device-memory", metavar="SIZE", help="A device's, such as 24GiB. What fits of a capture, of a step?"),
    option("--json", "as_json", is_flag=True, help="Print the plan as JSON."),
)
# Of `plan` and `cache-hidden`: everything that decides what a cache holds.
capture_options = together(
    option("--model", shell_complete=complete_paths, required=True, help="Target: a hub name or a folder."),
    option(
        "--corpus",
        shell_complete=complete_paths,
        help="JSON, JSONL, Parquet or Arrow, a folder of them, or a hub data set.  "
        "[default: the chats beside a bundled target, else mlabonne/open-perfectblend]",
    ),
    ROLES,
    option("--out", type=FOLDER, default="hs_cache", help="The cache's folder."),
    option("--layers", help="Layers to keep, such as 1,9,17 (0 is the first, -1 the input)."),
    option("--taps", type=IntRange(1), help="How many layers, evenly placed.  [default: 5; fewer of a shallow target]"),
    option(
        "--final", type=Choice(["needed", "all", "none"]), help="Rows whose final state is kept.  [default: needed]"
    ),
    option(
        "--max-length", type=IntRange(2), help="Tokens a sample.  [default: 3072, or the target's positions if fewer]"
    ),
    option(
        "--turns",
        type=Choice(["last", "each"]),
        help="Samples of a conversation whose template rewrites earlier turns: one, of the last turn, or one "
        "for each turn behind the prompt it was answered to.  [default: each, where last loses over 5%]",
    ),
    TEMPLATE_KWARGS,
    TEMPLATE_DATE,
    option("--max-samples", type=IntRange(1), help="Stop reading the corpus after so many conversations."),
    option("--batch-tokens", type=IntRange(1), help="Padded tokens a forward.  [default: 4096]"),
    option("--budget", metavar="SIZE", help="Bytes the cache may take, such as 2TB or 1.5TiB."),
    option(
        "--methods",
        shell_complete=complete_methods,
        help="What will be trained, such as dflash,domino: a budget keeps what these read.  [default: all]",
    ),
    option("--seed", type=IntRange(0, 2**64 - 1), default=0, help="Decides which samples a budget takes."),
    option(
        "--codec",
        cls=CodecOption,
        help="or such as aux=int8,final=zstd.  [default: raw]",
    ),
    DEVICE,
    option(
        "--dtype",
        type=Choice(["bfloat16", "float32"]),
        help="Compute type.  [default: float32 on a CPU, else the target's]",
    ),
    option("--revision", help="Revision of a hub model."),
    option(
        "--engine",
        type=Choice(["transformers", "vllm"]),
        help="What runs the target: this process, or one of vLLM's.  [default: as in the cache, else transformers]",
    ),
    PYTHON,
    ENGINE_OPTIONS,
    option("--append", is_flag=True, help="Add CORPUS to the cache: the samples that are not there yet."),
)
# Of `regenerate`: prompts, engine, sampling and request limits.
regenerate_options = together(
    option(
        "--corpus",
        shell_complete=complete_paths,
        required=True,
        help="Conversations or prompts: files, a folder or a data set.",
    ),
    ROLES,
    option("--out", type=PATH, required=True, help="The corpus to write; its name ends with .jsonl."),
    option("--endpoint", metavar="URL", help="An OpenAI-compatible server that runs the target."),
    option(
        "--model",
        shell_complete=complete_paths,
        help="The target's files: decodes here; with --endpoint, compares prompts.",
    ),
    option("--served-model", help="The server's name of the target.  [default: the only one it lists]"),
    option("--engine", type=Choice(["vllm", "sglang", "openai"]), help="The server's kind.  [default: as it says]"),
    option("--api-key-env", default="OPENAI_API_KEY", help="The variable that holds the key."),
    option("--temperature", type=float, default=0.0, help="At which replies are drawn; 0 is greedy."),
    option(
        "--top-p", type=float, default=1.0, help="Draw only from the likeliest tokens, up to this share of probability."
    ),
    option("--seed", type=IntRange(0), default=0, help="Decides what is drawn."),
    option("--max-new", type=IntRange(1), default=2048, help="Tokens a reply at most."),
    TEMPLATE_KWARGS,
    TEMPLATE_DATE,
    option("--max-samples", type=IntRange(1), help="Stop reading the corpus after so many rows."),
    option("--no-token-ids", is_flag=True, help="Leave the tokens' ids out of the corpus."),
    option("--concurrency", type=IntRange(1), default=32, help="Requests at once."),
    option("--rate", type=FloatRange(0, min_open=True), help="Requests a minute at most."),
    option("--retries", type=IntRange(0), default=8, help="How often a prompt is asked again."),
    option("--timeout", type=FloatRange(0, min_open=True), default=600.0, help="Seconds to wait for a reply."),
    option("--batch", type=IntRange(1), default=64, help="Prompts decoded here at once."),
    DEVICE,
    option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)

import_options = together(
    click.argument("source", type=FOLDER),
    option("--out", type=FOLDER, default="hs_cache", help="The cache's folder."),
    option("--model", shell_complete=complete_paths, help="The target that made the states: a folder, or a hub name."),
    option("--layers", help="The layers in the files, in their order and counting, where no file names them."),
    option(
        "--count-from",
        type=Choice([0, 1]),
        help="What the first decoder layer's output is called there.  [default: as it proves]",
    ),
    option(
        "--last",
        type=Choice(["normed", "raw", "none"]),
        help="The last state in the files: after the norm, before it, or not to be kept.  [default: as it proves]",
    ),
    option("--masks", type=FOLDER, help="speculators' prepared data set, which has the loss masks."),
    option("--unproven", is_flag=True, help="Compute nothing: take what is said of the files for true."),
    DEVICE,
    AS_JSON,
)

evaluate_options = together(
    option("--draft", type=DRAFT, required=True, help="A run's folder, a checkpoint or an exported folder."),
    option("--model", shell_complete=complete_paths, help="The target.  [default: the one the cache was made with]"),
    option("--cache", type=CACHE_FOLDER, help="The cache.  [default: the one the draft was trained on]"),
    option("--prompts", type=PATH, help="JSONL of messages.  [default: the cache's held-out split]"),
    option("--count", type=IntRange(1), default=64, help="Prompts, spread over domains."),
    option("--max-new", type=IntRange(1), default=64, help="Tokens a reply at most."),
    option("--temperature", type=float, default=0.0, help="Also draw replies, at this one."),
    option("--draft-temperature", type=float, help="Of the draft; 0 is greedy.  [default: the same]"),
    option("--seed", default=0, help="Decides what is drawn."),
    option("--threshold", type=FloatRange(0, 1), default=0.0, help="Cut blocks below this confidence."),
    option("--proposals", type=IntRange(1), help="Verify so many of a block: b - 1, as SpecForge.  [default: all]"),
    option("--batch", type=IntRange(1), default=1, help="Prompts decoded at once."),
    option("--plain", type=PATH, help="Keep the target's own replies here, for other drafts."),
    DEVICE,
    option("--dtype", type=Choice(["bfloat16", "float32"]), help="Compute type.  [default: the cache's]"),
    option("--out", type=PATH, help="Write the report here, as JSON."),
    option("--texts", type=IntRange(0), default=12, help="Replies that the report keeps as text, for its page."),
    option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)

verify_options = together(
    CACHE,
    option("--repair", is_flag=True, help="Make again what is damaged, with --model where the target has to."),
    option("--deep", is_flag=True, help="Check every byte of the files of --model, too, against those captured."),
    option("--complete", is_flag=True, help="End with 4 unless every shard has every column."),
    option("--model", shell_complete=complete_paths, help="The target, for --repair and --deep."),
    DEVICE,
    DEVICE_MAP,
    PYTHON,
    ENGINE_OPTIONS,
    option("--json", "as_json", is_flag=True, help="Print the findings as JSON."),
)

sweep_options = together(
    click.argument("recipe", type=RECIPE),
    option("--cache", type=CACHE_FOLDER, default="hs_cache", help="The cache to train from."),
    SET,
    option("--out", type=FOLDER, help="The folder for sweep.json and the runs' folders.  [default: in runs]"),
    DEVICE,
    option("--devices", metavar="A,B", help="Train on each of these at once.  [default: every CUDA device]"),
    option("--jobs", type=IntRange(1), default=1, help="Runs at once on each device."),
    option("--shared-read", is_flag=True, help="Read the cache once for all runs that learn from the same samples."),
    option("--init-from", type=FOLDER, help="Begin every run with the weights of this draft."),
    option("--json", "as_json", is_flag=True, help="Print the figures as JSON."),
)

recipe_options = together(
    click.argument("recipe", type=RECIPE, required=False),
    SET,
    option(
        "--cache", type=CACHE_FOLDER, help="Complete it from this cache.  [default: leave open what a cache decides]"
    ),
    option("--json", "as_json", is_flag=True, help="Print it as JSON."),
)

serve_check_options = together(
    click.argument("folder", type=EXPORTED),
    option("--engine", type=Choice(["vllm"]), default="vllm", help="What serves it."),
    PYTHON,
    option("--model", shell_complete=complete_paths, help="The target.  [default: the one that the export names]"),
    option("--data", type=PATH, help="JSONL of prompts.  [default: the bundled target's held-out chats]"),
    option("--count", type=IntRange(1), default=64, help="Prompts."),
    option("--max-new", type=IntRange(2), default=64, help="Tokens a reply at most."),
    option("--report", type=REPORT, help="Of `evaluate` on the exported run: compare the export with it, too."),
    option("--mend", is_flag=True, help="Serve once more, the engine's known faults mended in its process."),
    option("--timeout", type=FloatRange(0, min_open=True), default=600.0, help="Seconds without progress."),
    option("--logs", type=FOLDER, help="Keep the engine's logs here.  [default: only of one that crashes]"),
    DEVICE,
    option("--out", type=PATH, help="Write the report here, as JSON."),
    option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
)


def size_bytes(text: str, option: str = "--budget") -> int:
    """Return an option's size in bytes: 2TB and 500G count by thousands, 1.5TiB and 64Gi by 1024. UsageError."""
    found = SIZE.fullmatch(text.strip())
    size = 0
    if found and (found[2] or not found[3]):
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgtp".index(found[2].lower() or " "))
    if not size:
        raise UsageError(f"{option} {text}: wanted a size such as 500GB, 2TB or 1.5TiB")
    return size


# Of `doctor`.
doctor_options = together(
    click.argument("run", type=EXAMINED, required=False),
    option(
        "--cache",
        type=FOLDER,
        help="Where a cache lies or would lie: that disk is measured.  [default: hs_cache; of RUN its own]",
    ),
    PYTHON,
    option("--target", type=FOLDER, help="Compare this target's folder with the one that RUN learned from."),
    option("--export", type=FOLDER, help="Compare this published folder with RUN."),
    option("--device-memory", metavar="SIZE", help="A GPU's, such as 24GiB: does a step of RUN fit?"),
    option("--json", "as_json", is_flag=True, help="Print the findings as JSON."),
)

# Of `watch`.
watch_options = together(
    click.argument("path", type=PATH),
    option("--every", type=FloatRange(0.1), default=1.0, metavar="SECONDS", help="How often to look."),
    option("--once", is_flag=True, help="Print one frame and end."),
    option("--json", "as_json", is_flag=True, help="Print the facts of one frame as JSON."),
)
