"""What the presets cost: write the tables of docs/presets.md and docs/why-offline.md, by the arithmetic of `plan`.

    python docs/cost_table.py            write them
    python docs/cost_table.py --check    end with 1 where the pages have others

Bytes are the codecs' own, memory that of `stages/cache_hidden/device_memory.py` and `stages/train_draft/memory.py`.
Hours are operations over a share of a GPU's peak that is assumed, not measured. Targets are configs alone,
`targets.json`, and models without weights; nothing is downloaded.

    T tokens of a sample   D hidden size   L layers
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.cache.codecs import CODECS
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.file_writer import create_identity
from pipeline.cache.layout import FINAL
from pipeline.cache.plan_writer import write_segment
from pipeline.cache.samples import PlannedSample
from pipeline.runs.recipe import load_recipe, resolve
from pipeline.target.layers import default_layers
from stages.cache_hidden.device_memory import USABLE, CaptureMemory, capture_memory
from stages.train_draft.batches import forward_cost
from stages.train_draft.memory import Fit, step_memory
from stages.train_draft.planned_memory import PlannedCache

ROOT = Path(__file__).parent.parent
TARGETS = ROOT / "docs/targets.json"
PAGES = {"capture": "presets", "training": "presets", "offline": "why-offline"}
BEGIN, END = "<!-- cost_table.py {} -->", "<!-- end of {} -->"
PRESETS = ("dflash", "domino", "dspark")
GIB = 1 << 30

# The corpus that is priced: every sample as long as the others, its second half supervised.
SAMPLES, T = 100_000, 1_000
SUPERVISED = T // 2
# Of each GPU: its memory, and dense bf16 operations a second with float32 accumulation, by its maker's data sheet.
GPUS = {"H100": (80 * GIB, 989e12), "RTX 4090": (24 * GIB, 165e12)}
CAPTURE_SHARE, TRAINING_SHARE = 0.4, 0.35  # of that peak: assumed
BATCH_TOKENS = 4096  # the default of `cache-hidden`


@dataclass
class Target:
    """A target by its config alone, in a folder with its weights' shapes."""

    name: str
    config: dict
    folder: Path

    def __post_init__(self):
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        offsets = {"dtype": "BF16", "data_offsets": [0, 0]}
        header = json.dumps({name: {**offsets, "shape": list(shape)} for name, shape in self.shapes.items()}).encode()
        (self.folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of its weights, one that serves twice named once."""
        config = AutoConfig.for_model(**self.config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return {name: weight.shape for name, weight in model.named_parameters()}

    @cached_property
    def layers(self) -> list[int]:
        return default_layers(self.config["num_hidden_layers"], 5)

    @cached_property
    def columns(self) -> tuple[ColumnSpec, ...]:
        D = self.config["hidden_size"]
        aux = [ColumnSpec(f"aux.{layer}", "bfloat16", D) for layer in self.layers]
        return (*aux, ColumnSpec(FINAL, "bfloat16", D, keeps="needed"))

    def cache_bytes(self, codec: str) -> int:
        """Return the expected bytes of the corpus' states: of `final` those beside a supervised token."""
        rows = {FINAL: SAMPLES * (SUPERVISED + 1)}
        sizes = [CODECS[codec].stored_bytes(rows.get(c.name, SAMPLES * T), c.width, c.dtype) for c in self.columns]
        return sum(sizes)

    @cached_property
    def memory(self) -> CaptureMemory:
        settings = SimpleNamespace(
            folder=self.folder, columns=self.columns, dtype="bfloat16", batch_tokens=BATCH_TOKENS
        )
        return capture_memory(settings, T)

    def forward_operations(self, tokens: int) -> float:
        """Operations of one forward over a sample: two a weight that a token meets, and attention."""
        experts, used = self.config.get("num_local_experts", 1), self.config.get("num_experts_per_tok", 1)
        met = sum(
            shape.numel() * (used / experts if ".experts." in name else 1)
            for name, shape in self.shapes.items()
            if "embed_tokens" not in name and "lm_head" not in name
        )
        heads = self.config["num_attention_heads"] * self.config["head_dim"]
        attention = 4 * heads * (tokens / 2) * self.config["num_hidden_layers"]
        return tokens * (2 * met + attention)

    def planned_cache(self) -> PlannedCache:
        """Return the cache as a recipe asks about it."""
        place = self.folder / "cache"
        if not place.exists():
            create_identity(place, {"target": {"name": self.name}, "samples": {"max_length": T}})
            sample = PlannedSample(np.arange(T, dtype=np.int32), np.arange(T) >= T - SUPERVISED)
            write_segment(place, [sample], row_bytes=sum(spec.row_bytes for spec in self.columns), sources=[])
        report = {"cache": place, "dtype": "bfloat16", "codecs": {spec.name: "raw" for spec in self.columns}}
        cache = PlannedCache(report, self.folder)
        cache.__dict__["tokens"] = {"mask": self.config["vocab_size"] - 1, "length": 0, "eos": [], "pad": 0, "bos": 0}
        return cache


@dataclass
class Training:
    """A preset resolved for a target, and what its steps take."""

    target: Target
    preset: str

    @cached_property
    def resolved(self):
        recipe = load_recipe(ROOT / f"configs/{self.preset}.toml")
        return resolve(recipe, self.target.planned_cache()).with_steps(SAMPLES)

    @cached_property
    def memory(self):
        tied = self.target.config["tie_word_embeddings"]
        return step_memory(self.resolved.draft, self.resolved.recipe.train, torch.bfloat16, tied)

    @property
    def operations(self) -> float:
        """Operations of the whole training, as `train-draft` estimates its time: three forwards a step."""
        train = self.resolved.recipe.train
        return train.steps * train.batch * self.sample_operations(T)

    def sample_operations(self, tokens: int) -> float:
        """Operations of a step for one sample, its second half supervised."""
        eligible = np.arange(tokens // 2, tokens - 1)  # supervised, and the next one, too
        anchors_N = eligible[: self.resolved.recipe.train.anchors]
        return 6.0 * forward_cost(self.resolved.draft, tokens, anchors_N)

    def fit(self, size: int) -> str:
        fit = self.memory.fit(size)
        if not fit.at_once:
            return "no"
        parts = -(-self.memory.blocks // fit.at_once)
        means = [
            f"in {parts} parts" * (parts > 1),
            "layers again" * fit.recomputes_layers,
            "moments on host" * fit.moments_on_host,
            "embedding on host" * fit.embedding_on_host,
        ]
        return ", ".join(filter(None, means)) or "whole"

    def row(self) -> str:
        train = self.resolved.recipe.train
        whole = self.memory.peak(Fit(self.memory.blocks))
        cells = [self.preset, self.target.name, f"{self.memory.parameters / 1e9:.2f} B", f"{train.steps:,}"]
        cells += [f"{whole / GIB:.0f} GiB"]
        for size, peak in GPUS.values():
            fits = self.fit(size)
            cells += [fits, "" if fits == "no" else hours(self.operations / (TRAINING_SHARE * peak))]
        return line(cells)


def capture_row(target: Target) -> str:
    memory, raw = target.memory, target.cache_bytes("raw")
    cells = [target.name, " ".join(map(str, target.layers)), f"{raw / SAMPLES / T / 1000:.1f} kB"]
    cells += [f"{target.cache_bytes(codec) / 1e12:.2f} TB" for codec in CODECS]
    cells += [f"{memory.device / GIB:.0f} GiB"]
    for size, peak in GPUS.values():
        devices = next((n for n in (1, 2, 4, 8) if memory.weights / n + memory.batch <= USABLE * size), None)
        cells += [f"{devices or 'more than 8'}", hours(SAMPLES * target.forward_operations(T) / (CAPTURE_SHARE * peak))]
    return line(cells)


def offline_row(training: Training, tokens: int) -> str:
    """What a resident target costs of each step, and what reading its states takes instead, at one length."""
    forward, step = training.target.forward_operations(tokens), training.sample_operations(tokens)
    of_target = forward / CAPTURE_SHARE
    cells = [f"{tokens:,}", f"{of_target / (of_target + step / TRAINING_SHARE):.0%}"]
    samples_a_second = 8 * TRAINING_SHARE * GPUS["H100"][1] / step
    for codec in CODECS:
        width = training.target.config["hidden_size"]
        rows = [tokens] * len(training.target.layers)
        size = sum(CODECS[codec].stored_bytes(count, width, "bfloat16") for count in rows)
        cells += [f"{size / 1e6:.0f} MB", f"{samples_a_second * size / 1e9:.1f} GB/s"]
    return line(cells)


def hours(seconds: float) -> str:
    value = seconds / 3600
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def head(cells: list[str], left: int) -> list[str]:
    return [line(cells), line(["---"] * left + ["---:"] * (len(cells) - left))]


def targets(folder: Path) -> list[Target]:
    configs = json.loads(TARGETS.read_text())
    return [Target(name, config, folder / str(number)) for number, (name, config) in enumerate(configs.items())]


def capture_table(every: list[Target]) -> list[str]:
    cells = ["target", "layers", "a token", *CODECS, "memory"]
    for gpu in GPUS:
        cells += [f"{gpu}s", "GPU hours"]
    return [*head(cells, 2), *map(capture_row, every)]


def training_table(every: list[Target]) -> list[str]:
    cells = ["preset", "target", "draft", "steps", "memory"]
    for gpu in GPUS:
        cells += [f"{gpu}", "hours"]
    rows = []
    for preset in PRESETS:
        for target in every:
            rows.append(Training(target, preset).row())
            print(rows[-1], file=sys.stderr, flush=True)  # half a minute each
    return [*head(cells, 2), *rows]


def offline_table(every: list[Target]) -> list[str]:
    """Of Qwen3-8B and the preset of DFlash, which reads no `final`."""
    training = Training(next(target for target in every if target.name == "Qwen3-8B"), "dflash")
    cells = ["tokens", "the target's share"]
    for codec in CODECS:
        cells += [f"a sample, {codec}", "eight H100s read"]
    return [*head(cells, 0), *(offline_row(training, tokens) for tokens in (550, 1000, 2000, 4000))]


def with_table(page: str, name: str, rows: list[str]) -> str:
    """Return a page with a table between its marks."""
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = page.split(begin)
    return "\n".join([before + begin, "", *rows, "", end + rest.split(end)[1]])


def table_on_page(name: str) -> list[str]:
    """Return the rows of a table as its page has them."""
    page = (ROOT / f"docs/{PAGES[name]}.md").read_text()
    return page.split(BEGIN.format(name))[1].split(END.format(name))[0].strip().splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="end with 1 where the pages have other tables")
    check, differ = parser.parse_args().check, False
    with tempfile.TemporaryDirectory() as folder:
        every = targets(Path(folder))
        for name, table in (("capture", capture_table), ("offline", offline_table), ("training", training_table)):
            rows, page = table(every), ROOT / f"docs/{PAGES[name]}.md"
            differ |= rows != table_on_page(name)
            if not check:
                page.write_text(with_table(page.read_text(), name, rows))
    return int(check and differ)


if __name__ == "__main__":
    sys.exit(main())
