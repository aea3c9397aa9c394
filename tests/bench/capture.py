"""How much of the target's speed a capture leaves: whole captures beside the bare forward of the same batches.

    python tests/bench/capture.py                  33 M random parameters on a CPU, Qwen3-8B's shape on CUDA
    python tests/bench/capture.py --rounds 3 --tokens 2048 --width 64      to see that it runs

A round takes one shard. The bare forward: the decoder alone, without hooks, over the shard's right-padded batches. The
capture: `capture_shards` as the command runs it, hooks, copies, gauge, checksums, writing, syncing, probe and commit.
Loading the target is left out; what else a run does once (its head is read back) is timed with no shard to capture, and
taken off. Fixed seeds; the cache goes to --out and is removed.

On CUDA the two run one after the other, and which comes first alternates. On a CPU, whose speed here may double and
halve again within a minute, the bare forward of each batch is run beside the capture's own, before or after it in turn,
once the writer is idle: all the rest of the time is the capture's, what the writer does meanwhile included. Only the
disk works on during the bare forwards: where it is slower than the target, this flatters the capture.

The padded share needs no forward: it follows from the lengths of a shard (4 GiB of Qwen3-8B's states, five layers and
`final`; log-normal, median 768, at most 3,072) and the tokens of a batch.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import stages.cache_hidden.capture as shards
import stages.cache_hidden.engine as engine
from pipeline.cache.catalog import Catalog
from pipeline.cache.file_writer import create_identity
from pipeline.cache.plan import Plan
from pipeline.cache.plan_writer import SHARD_BYTES, micro_batches, write_segment
from pipeline.cache.samples import PlannedSample, ShardPlan
from pipeline.target.files import TOKENIZER_FILES
from pipeline.target.model import run_decoder
from stages.cache_hidden.settings import MAX_LENGTH, CaptureOptions, CaptureSettings, resolve_settings

BUNDLED = Path(__file__).parents[2] / "data" / "tiny-qwen3"
QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}
SHARDS = 16  # a plan has at least so many; rounds take the first
MUST, AIM, PADDED_MUST, PADDED_AIM = 0.93, 0.97, 0.05, 0.03


def shape(device: str, width: int) -> Qwen3Config:
    """Return Qwen3-8B's shape on CUDA, elsewhere a small one: width 512 has 33 M parameters."""
    if device.startswith("cuda"):
        return Qwen3Config(**QWEN3_8B)
    heads = max(2, width // 64)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 8, "head_dim": 64}
    heads = {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return Qwen3Config(**sizes, **heads, vocab_size=8192, max_position_embeddings=4096, tie_word_embeddings=False)


def random_target(folder: Path, config: Qwen3Config, device: str) -> PreTrainedModel:
    """Return the frozen model, and write what a plan asks of its files, tokenizer included; weights stay in memory."""
    config.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (BUNDLED / name).is_file():
            shutil.copyfile(BUNDLED / name, folder / name)
    save_file({"never.read": torch.zeros(1)}, folder / "model.safetensors")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def accept_lengths_of(tokens: int, longest: int, seed: int = 0) -> list[int]:
    """Return log-normal lengths, about `tokens` together, their median a quarter of the longest."""
    rng, lengths = np.random.default_rng(seed), []
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(rng.lognormal(np.log(longest / 4), 0.7), 16, longest)))
    return lengths


def samples(tokens: int, vocab: int, longest: int) -> list[PlannedSample]:
    """Return random samples, the last two thirds of each supervised."""
    rng, lengths = np.random.default_rng(0), accept_lengths_of(tokens, longest)
    return [
        PlannedSample(rng.integers(0, vocab, length).astype(np.int32), np.arange(length) >= length // 3)
        for length in lengths
    ]


def padded_share(batch_tokens: int) -> float:
    """Return the share of padding in the batches of full shards of Qwen3-8B's states, over ten of them."""
    tokens = SHARD_BYTES // (6 * 2 * QWEN3_8B["hidden_size"])
    real = padded = 0
    for seed in range(10):
        lengths = sorted(accept_lengths_of(tokens, MAX_LENGTH, seed), reverse=True)  # as a plan has them
        real += sum(lengths)
        padded += sum(len(rows) * lengths[rows.start] for rows in micro_batches(lengths, batch_tokens))
    return 1 - real / padded


def padded_ids(shard: ShardPlan, batch_tokens: int) -> list[np.ndarray]:
    """Return the shard's batches of ids, padded behind, as the engine sends them."""
    batches = []
    for rows in micro_batches(shard.lengths, batch_tokens):
        ids_BT = np.zeros((len(rows), int(shard.lengths[rows].max())), np.int64)
        for at, row in enumerate(rows):
            ids_BT[at, : shard.lengths[row]] = shard.ids(row)
        batches.append(ids_BT)
    return batches


def seconds(work: Callable[[], None], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


@contextlib.contextmanager
def unhooked(model: PreTrainedModel) -> Iterator[None]:
    """Take the capture's hooks off the model's modules for a while."""
    tapped = [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    held = [(module._forward_hooks, module._forward_pre_hooks) for module in tapped]
    for module in tapped:
        module._forward_hooks, module._forward_pre_hooks = {}, {}
    yield
    for module, (after, before) in zip(tapped, held, strict=True):
        module._forward_hooks, module._forward_pre_hooks = after, before


class Beside:
    """The bare forward of every batch beside the capture's own, patched into the engine: `seconds` of all of them."""

    def __init__(self):
        self.seconds, self.put, self.done, self.turn = 0.0, 0, 0, 0
        beside = self

        class Counted(shards.BackgroundWriter):
            def __init__(self, consume, depth):
                def counting(piece):
                    consume(piece)
                    beside.done += 1

                super().__init__(counting, depth)

        engine.run_decoder, shards.BackgroundWriter = self.run, Counted

    def run(self, model: PreTrainedModel, ids_BT: torch.Tensor):
        while self.done < self.put:  # the capture's time
            time.sleep(1e-4)
        self.put, self.turn = self.put + 1, self.turn + 1
        if self.turn % 2:
            self.bare(model, ids_BT)
        output = run_decoder(model, ids_BT)
        if not self.turn % 2:
            self.bare(model, ids_BT)
        return output

    def bare(self, model: PreTrainedModel, ids_BT: torch.Tensor) -> None:
        with unhooked(model):
            self.seconds += seconds(lambda: run_decoder(model, ids_BT), "cpu")


def measure(model: PreTrainedModel, out: Path, settings: CaptureSettings, plan: Plan, device: str, rounds: int) -> dict:
    """Time bare forward and capture of a shard a round, and return seconds and tokens of each round."""
    bare, whole, setup, tokens = [], [], [], []

    @torch.no_grad()
    def forward(shard: ShardPlan) -> float:
        batches = padded_ids(shard, settings.batch_tokens)
        return seconds(lambda: [run_decoder(model, torch.from_numpy(ids_BT).to(device)) for ids_BT in batches], device)

    def capture(work: list) -> float:
        return seconds(lambda: shards.capture_shards(Catalog(out), settings, work, device, 0), device)

    last, columns = plan.shards[-1], list(settings.columns)
    forward(last)  # first calls are slow
    capture([(last, columns)])
    beside = None if device.startswith("cuda") else Beside()
    for number, shard in enumerate(plan.shards[:rounds]):
        if beside:
            before = beside.seconds
            took = capture([(shard, columns)])
            bare.append(beside.seconds - before)
            whole.append(took - bare[-1])
        else:
            turns = [lambda: bare.append(forward(shard)), lambda: whole.append(capture([(shard, columns)]))]  # noqa: B023
            for turn in turns[:: -1 if number % 2 else 1]:
                turn()
        setup.append(capture([]))
        tokens.append(shard.rows)
    return {"bare": bare, "whole": whole, "setup": setup, "tokens": tokens}


def figures(found: dict) -> dict:
    """Return medians over the rounds: tokens a second of both, and their ratio round by round."""
    setup = statistics.median(found["setup"])
    captures = [spent - setup for spent in found["whole"]]
    rounds = list(zip(found["tokens"], found["bare"], captures, strict=True))
    return {
        "bare tokens/s": statistics.median(rows / bare for rows, bare, _ in rounds),
        "capture tokens/s": statistics.median(rows / spent for rows, _, spent in rounds),
        "ratio": statistics.median(bare / spent for _, bare, spent in rounds),
        "ratios": [round(bare / spent, 4) for _, bare, spent in rounds],
        "set-up s": setup,
    }


def table(said: str, result: dict) -> Table:
    made = Table(title=said, title_justify="left")
    for column in ("figure", "measured", "must reach", "aim"):
        made.add_column(column, justify="left" if column == "figure" else "right")
    made.add_row("bare forward, tokens/s", f"{result['bare tokens/s']:,.0f}", "", "")
    made.add_row("whole capture, tokens/s", f"{result['capture tokens/s']:,.0f}", "", "")
    made.add_row("capture against bare forward", f"{result['ratio']:.3f}", str(MUST), str(AIM))
    padded = f"{result['padded share']:.1%}"
    made.add_row(
        "padded share of the forward, full shards of Qwen3-8B", padded, f"<= {PADDED_MUST:.0%}", f"{PADDED_AIM:.0%}"
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, choices=range(1, SHARDS))
    parser.add_argument("--tokens", type=int, default=None, help="a shard; default 49,152, on CUDA 98,304")
    parser.add_argument("--width", type=int, default=512, help="of the small model; 512 has 33 M parameters")
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--codec", default=None)
    parser.add_argument(
        "--out", type=Path, default=None, help="folder on the disk to measure; default: a temporary one"
    )
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    tokens = asked.tokens or (98_304 if asked.device.startswith("cuda") else 49_152)
    with tempfile.TemporaryDirectory(dir=asked.out) as place:
        config = shape(asked.device, asked.width)
        model = random_target(Path(place, "target"), config, asked.device)
        shards.load_target = lambda *_, **__: model  # as if it were loaded: only that is left out
        out = Path(place, "cache")
        codec = {"codec": asked.codec} if asked.codec else {}
        options = CaptureOptions(
            dtype=str(model.dtype).removeprefix("torch."), batch_tokens=asked.batch_tokens, device=asked.device, **codec
        )
        settings = resolve_settings(str(Path(place, "target")), Catalog(out), options)
        made = samples(SHARDS * tokens, config.vocab_size, min(settings.max_length, tokens // 4))
        plan = write_segment(out, made, row_bytes=settings.row_bytes, sources=[])
        create_identity(out, settings.identity.as_dict())
        found = measure(model, out, settings, plan, asked.device, asked.rounds)
    result = {**figures(found), "padded share": padded_share(settings.batch_tokens)}
    result |= {"parameters": sum(weight.numel() for weight in model.parameters())}
    said = (
        f"{result['parameters'] / 1e6:,.0f} M parameters on {asked.device}, {asked.rounds} rounds of {tokens:,} tokens"
    )
    Console(width=110).print(table(said, result))
    if asked.json:
        asked.json.write_text(json.dumps({**vars(asked), **result, "rounds": found}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
