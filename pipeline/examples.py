"""The example that ends each command's help. All work as pasted in the repository, on the bundled target, in this
order: a command takes what those before it made in build/example. `tests/test_examples.py` runs them.

Two need what the repository does not hold: another trainer's states, and an engine (`make engines`); `quickstart` takes
minutes."""

CAPTURE = "--model data/tiny-qwen3 --max-samples 520 --out build/example/cache"

# By the command as it is typed.
EXAMPLES = {
    "": f"cache-hidden {CAPTURE}",
    "regenerate": "regenerate --model data/tiny-qwen3 --corpus data/chats.jsonl --max-samples 4 --max-new 32 "
    "--out build/example/chats.jsonl",
    "plan": f"plan {CAPTURE}",
    "cache-hidden": f"cache-hidden {CAPTURE}",
    "inspect": "inspect build/example/cache --sample 3",
    "verify": "verify build/example/cache",
    "recode": "recode build/example/cache --codec zstd",
    "import-cache": "import-cache build/example/states --model data/tiny-qwen3 --layers 1,3 "
    "--out build/example/imported",
    "train-draft": "train-draft configs/demo.toml --cache build/example/cache --set train.steps=4 "
    "--out build/example/run",
    "sweep": "sweep configs/sweep.toml --cache build/example/cache --set train.steps=1 --set train.eval_samples=2 "
    "--out build/example/sweep",
    "recipe": "recipe show configs/demo.toml",
    "recipe show": "recipe show configs/demo.toml --set train.lr=2e-3 --cache build/example/cache",
    "recipe schema": "recipe schema --sweep",
    "evaluate": "evaluate --draft build/example/run --count 2 --max-new 16 --out build/example/report.json",
    "export": "export --draft build/example/run --out build/example/draft",
    "check-export": "check-export build/example/draft",
    "serve-check": "serve-check build/example/draft --count 4 --max-new 16",
    "report": "report build/example/report.json",
    "watch": "watch build/example/run --once",
    "doctor": "doctor build/example/cache",
    "quickstart": "quickstart --out build",
    "completion": "completion bash",
}


def example_of(command: str) -> str | None:
    """Return a command's example as a line to paste, None without one. command: "" is the program itself."""
    return f"pipeline {EXAMPLES[command]}" if command in EXAMPLES else None
