"""How the documentation's commands are run here: what stands for what nobody has in a test, and what is not run at all.

Reviewed by hand: every entry hides something from the test.
"""

# What a word stands for. A word that ends with … stands for the newest path that begins so.
WORDS = {
    "Qwen/Qwen3-8B": "data/tiny-qwen3",
    "TARGET": "data/tiny-qwen3",
    "http://localhost:8000/v1": "SERVER",  # the tests' own
    "V/bin/python": "PYTHON",  # the engine is the tests' own, in this process
    "vllm/bin/python": "PYTHON",
    "build/vllm/bin/python": "PYTHON",
    # Layers of a target of 36 layers, and of one of eight.
    "1,9,17,25,33": "1,3,5",
    "1,9,17,25,33,34": "1,3,5,6",
    # Its lists cut to one value each, but for the method.
    "configs/sweep.toml": "small-sweep.toml",
    # Placeholders.
    "[RUN]": "runs/domino-…",
    "RUN": "runs/domino-…",
    "FILE": "plain.json",
    "DIR": "my-draft",
}
# Of a command line with these words, too.
WORDS_OF = {
    ("import-cache", "FOLDER"): "states",
    ("train-draft", "FOLDER"): "runs/domino-…",
    # A day's numbers.
    ("sweep", "train.steps=20"): "train.steps=2",
    ("evaluate", "64"): "2",
    # Of so few rows the calibration misses what the others hold, and int8 refuses them.
    ("recode", "int8"): "zstd",
    # The tests' own drafts are of Domino, for which vLLM has no method.
    ("serve-check", "my-draft"): "my-dflash",
    ("serve-check", "DIR"): "my-dflash",
}
# Options of which a line under torchrun has 1: of several ranks other tests have more to say.
RANKS = ("--nproc-per-node", "--tensor-parallel")
# What `…` on its own stands for: the command's other options, which the page does not repeat.
REST = {"cache-hidden": "--model data/tiny-qwen3 --corpus chats.jsonl"}
# What keeps a run to seconds. An option that the line has itself is left out.
SMALL = {
    "plan": "--corpus few.jsonl",
    "cache-hidden": "--corpus few.jsonl",
    "regenerate": "--max-samples 12 --max-new 16",
    "evaluate": "--count 2 --max-new 8",
    "serve-check": "--count 2 --max-new 8",
}
SMALL_SETS = {"train.steps": 2, "train.batch": 8, "train.anchors": 4, "train.eval_samples": 2, "train.eval_every": 9}
# What a part of a command in the text leaves out.
NEEDED = {
    "plan": "--model data/tiny-qwen3",
    "cache-hidden": "--model data/tiny-qwen3",
    "regenerate": "--model data/tiny-qwen3 --corpus prompts.jsonl --out other.jsonl",
    "evaluate": "--draft runs/domino-…",
    "export": "--draft runs/dflash-… --out another-draft",
    "verify --repair": "--model data/tiny-qwen3",
    "verify --deep": "--model data/tiny-qwen3",
    "recode": "--codec int8",
    "report": "a.json",
    "sweep": "small-sweep.toml",
    "serve-check": "my-draft",
}
# Where a line may end otherwise than with 0.
ENDS = {"doctor": (0, 1)}  # 1 where something hinders, as a machine without a GPU may
# What is only parsed, each with its reason: of `make` every command that it would run, of pytest its files and options.
PARSED = {
    "make": "minutes to hours; every `pipeline` line of a dry run is parsed",
    "pytest": "it is this suite; its files and options have to be there",
    "pip": "it would change this environment; its extras have to be there",
    "python": "training a target or fetching one takes hours; the script and its options have to be there",
}
