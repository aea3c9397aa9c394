"""`pipeline quickstart`: the whole way on the bundled target, in minutes and without a GPU or a network.

Each step is a command that is printed as a user would type it, and run in a process of its own. All of them go on after
a stop, and so does this.

    OUT/hs_cache           the cache
    OUT/demo.toml          the recipe, to be changed
    OUT/demo/METHOD        a run for each method; beside it METHOD.json, its evaluation, and METHOD.log
    OUT/demo/report.html   the page
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.bundled_files import BUNDLED
from pipeline.cache.atomic import write_file
from pipeline.completion import method_names
from pipeline.errors import UsageError
from pipeline.nearest_name import did_you_mean
from pipeline.visible_text import print_visible, visible
from stages.quickstart.command_processes import Command, run_command, run_side_by_side

TARGET, RECIPE, CORPUS = "tiny-qwen3", "demo.toml", "chats.jsonl"
# Within nine minutes on two slow cores, the first accept length within three: of the corpus all that is held out and
# half of the rest, of the recipe's steps half, so a step's samples are as new as in the whole.
CONVERSATIONS, STEPS, EVAL_EVERY, PROMPTS = 3000, 200, 40, 40


@dataclass(frozen=True)
class Places:
    """What lies where in the folder `out`."""

    out: Path

    @property
    def cache(self) -> Path:
        return self.out / "hs_cache"

    @property
    def recipe(self) -> Path:
        return self.out / RECIPE

    @property
    def page(self) -> Path:
        return self.out / "demo" / "report.html"

    def run(self, method: str) -> Path:
        return self.out / "demo" / method

    def report(self, method: str) -> Path:
        return self.out / "demo" / f"{method}.json"

    def log(self, method: str) -> Path:
        return self.out / "demo" / f"{method}.log"


def capture_commands(places: Places) -> list[Command]:
    """Return the commands that end with a verified cache."""
    part = ("--model", TARGET, "--max-samples", CONVERSATIONS, "--out", places.cache)
    return [
        Command("plan", *part),
        Command("cache-hidden", *part),
        Command("verify", places.cache),
    ]


def draft_commands(places: Places, method: str) -> list[Command]:
    """Return the commands that train and evaluate one draft."""
    run = places.run(method)
    settings = {"draft.method": method, "train.steps": STEPS, "train.eval_every": EVAL_EVERY}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [
        Command("train-draft", places.recipe, *sets, "--cache", places.cache, "--out", run),
        Command("evaluate", "--draft", run, "--count", PROMPTS, "--out", places.report(method)),
    ]


def report_command(places: Places, methods: list[str]) -> Command:
    """Return the command that puts the drafts side by side, as a table and as a page."""
    return Command("report", *map(places.report, methods), "--page", places.page)


def next_commands(places: Places, method: str) -> list[Command]:
    """Return what to try next."""
    longer = ("--set", f"draft.method={method}", "--set", "train.steps=1200")
    export = places.out / "export"
    return [
        Command("inspect", places.cache, "--sample", "3"),
        Command("cache-hidden", "--model", TARGET, "--corpus", BUNDLED / CORPUS, "--append", "--out", places.cache),
        Command("train-draft", places.recipe, *longer, "--cache", places.cache, "--out", places.out / "longer"),
        Command("export", "--draft", places.run(method), "--out", export),
        Command("check-export", export),
        Command("plan", "--model", "Qwen/Qwen3-8B", "--corpus", "chats.jsonl"),
    ]


def chosen_methods(named: str | None) -> list[str]:
    """Return the methods named with commas, or all, in their order. UsageError."""
    there = method_names()
    names = there if named is None else [name.strip() for name in named.split(",")]
    for name in names:
        if name not in there:
            meant = did_you_mean(name, there)
            raise UsageError(f"--methods {named}: no method {name!r}{meant or ';'} there are {', '.join(there)}")
    return [name for name in there if name in names]


def run(out: Path, methods: str | None = None, as_json: bool = False) -> None:
    """Go the whole way in the folder `out`, from wherever an earlier call has come to.

    methods: those to train, with commas; None: all. as_json: print the figures as JSON, all else on standard error.
    Raises UsageError, RoomError; SystemExit with a command's exit code where it fails, KeyboardInterrupt and
    SystemExit(143) when stopped, once every command has saved what it has and ended.
    """
    chosen, places = chosen_methods(methods), Places(out)
    drafts = " and ".join(chosen) if len(chosen) < 3 else f"{len(chosen)} drafts"
    print_visible(f"{TARGET}, its cache, {drafts}: 1 GB in {visible(out)}, minutes on two cores", as_json)
    if not places.recipe.exists():
        schema, _, recipe = (BUNDLED / RECIPE).read_bytes().partition(b"\n")  # the schema's file is not beside it
        assert schema.startswith(b"#:schema"), schema
        write_file(places.recipe, recipe)
    for command in capture_commands(places):
        run_command(command, aside=as_json)
    works = {method: draft_commands(places, method) for method in chosen}
    for method, commands in works.items():
        if is_evaluated(places, method):
            print_visible(f"{visible(places.report(method))} is there", as_json)
            commands.clear()
    run_side_by_side(works, {method: places.log(method) for method in chosen}, aside=as_json)
    run_command(report_command(places, chosen), as_json=as_json)
    say_what_is_where(places, chosen, as_json)


def is_evaluated(places: Places, method: str) -> bool:
    """Return whether there is a report that was written after its run was finished."""
    from pipeline.runs.folder import DONE  # brings torch

    report, done = places.report(method), places.run(method) / DONE
    return report.is_file() and done.is_file() and report.stat().st_mtime_ns >= done.stat().st_mtime_ns


def say_what_is_where(places: Places, methods: list[str], aside: bool) -> None:
    """Print where everything lies, and what to try next."""
    first = methods[0]
    there = {
        places.page: "the page: open it in a browser",
        places.cache: "the cache, good for every further draft",
        places.run(first): f"the run of {first}; beside it {first}.json, its evaluation, and {first}.log",
        places.recipe: "the recipe: change it, and train into another --out",
    }
    width = max(len(str(path)) for path in there)
    print_visible("\nwhat is where:", aside)
    for path, what in there.items():
        print_visible(f"  {visible(path):{width}}  {what}", aside)
    print_visible("what to try next:", aside)
    for command in next_commands(places, methods[min(1, len(methods) - 1)]):
        print_visible(f"  {visible(command.typed)}", aside)
