"""How much device memory a capture needs, by arithmetic: from the target's config, before anything is loaded.

Weights, and what of a micro-batch is live beside them: the most of three phases, each of which a target and a codec may
make the largest. On fake tensors, at the shape of Qwen3-8B, a test counts the same within a few percent.

- The decoder's last layer, behind all that are kept: their states, what the decoder began with, the layer's input, the
  residual stream and its norm, and three tensors as wide as the MLP. A norm has three float32 copies of its input.
- Encoding: the kept states, one column's rows once more, and of those what a lossy codec computes with.
- The probe: logits of a prefix, in the target's type and in float32, compared in float64.

Left out: CUDA's context, workspaces of its libraries, gaps between tensors; `USABLE` leaves room for them. Imports no
torch: a plan asks.

    N tokens of a micro-batch, padding included   D hidden size   F width of the MLP   V vocabulary
"""

from dataclasses import dataclass, replace
from math import prod

from pipeline.cache.atomic import size_text
from pipeline.cache.codecs import CODECS
from pipeline.cache.layout import FINAL
from pipeline.cache.plan import Plan
from pipeline.target.files import quantisation, read_text_config
from pipeline.target.weights import weight_files, weight_shapes
from stages.cache_hidden.engine_options import HUGGING_FACE
from stages.cache_hidden.settings import CaptureSettings

QUEUED = 2  # micro-batches that wait for the writer
USABLE = 0.875  # of a device
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
LOSSY_BYTES = 11  # of a value that is encoded, beside itself: float32 twice, two masks, and the code
PROBED_ROWS, PROBED_BYTES = 128, 34  # of a prefix; of each logit: both in their type and float32, three in float64


@dataclass(frozen=True)
class CaptureMemory:
    """Bytes of a capture. weights: of the target, on the device. tokens: of a micro-batch. a_token: of each, the most
    on the device. probe: what the probe takes there. pinned_a_token: of host memory, in all that waits for the writer.
    """

    weights: int
    tokens: int
    a_token: int
    probe: int
    pinned_a_token: int

    @property
    def batch(self) -> int:
        """What is live on the device beside the weights."""
        return max(self.tokens * self.a_token, self.probe)

    @property
    def device(self) -> int:
        return self.weights + self.batch

    @property
    def pinned(self) -> int:
        return self.tokens * self.pinned_a_token

    def fits(self, device_bytes: int) -> bool:
        return self.device <= USABLE * device_bytes

    def lines(self, longest: int, device_bytes: int | None) -> list[str]:
        """Return in words what a capture takes and whether a device of this size holds it. longest: tokens of the
        longest sample, which is never divided."""
        lines = [
            f"{size_text(self.device)}: weights {size_text(self.weights)}, a micro-batch of {self.tokens:,} tokens "
            f"{size_text(self.batch)}; of the host's memory {size_text(self.pinned)} pinned"
        ]
        if device_bytes is None:
            return lines
        size = f"a device of {size_text(device_bytes)}"
        if self.fits(device_bytes):
            return [*lines, f"it fits {size}"]
        halves = (replace(self, tokens=self.tokens >> by) for by in range(1, self.tokens.bit_length()))
        smaller = next((memory for memory in halves if memory.tokens >= longest and memory.fits(device_bytes)), None)
        several = "take several, with --tensor-parallel or --device-map"
        remedy = f"--batch-tokens {smaller.tokens} does" if smaller else several
        return [*lines, f"IT DOES NOT FIT {size}: {remedy}"]


def capture_memory(settings: CaptureSettings, longest: int) -> CaptureMemory:
    """Return the memory of a capture on one device. longest: tokens of the longest sample."""
    config, columns = read_text_config(settings.folder), settings.columns
    size, D, V = ITEM_BYTES[settings.dtype], config["hidden_size"], config["vocab_size"]
    experts = config.get("num_experts_per_tok") or 0
    F = max(config.get("intermediate_size") or 4 * D, experts * (config.get("moe_intermediate_size") or 0))
    lossy = any(CODECS[spec.codec].lossy for spec in columns)
    layers = sum(spec.name != FINAL for spec in columns) * D * size
    forward = layers + 4 * D * size + max(3 * F * size, 3 * 4 * D)
    encoding = layers + D * (2 * size + LOSSY_BYTES * lossy)  # final, and the rows of a column
    packed = sum(
        CODECS[spec.codec].stored_bytes(1, spec.width, spec.dtype) if CODECS[spec.codec].lossy else spec.row_bytes
        for spec in columns
    )
    return CaptureMemory(
        _weight_bytes(settings, size),
        max(settings.batch_tokens, longest),
        max(forward, encoding),
        PROBED_ROWS * (V * PROBED_BYTES + D * size * (config["num_hidden_layers"] + 1)),
        (QUEUED + 2) * packed,
    )


def memory_report(settings: CaptureSettings, plan: Plan, device_bytes: int | None) -> dict:
    """Return the entry `memory` of a plan's report: bytes, and all in words."""
    longest = max(int(shard.lengths[0]) for shard in plan.shards)  # the first of each
    memory = capture_memory(settings, longest)
    lines = memory.lines(longest, device_bytes)
    if settings.engine.name != HUGGING_FACE:
        lines.append(f"{settings.engine.name} holds the weights once more, in a process of its own, and its kv cache")
    return {
        "weights_bytes": memory.weights,
        "batch_bytes": memory.batch,
        "device_bytes": memory.device,
        "pinned_bytes": memory.pinned,
        "fits": None if device_bytes is None else memory.fits(device_bytes),
        "lines": lines,
    }


def _weight_bytes(settings: CaptureSettings, size: int) -> int:
    """Return the bytes of the target's weights in the capture's type; of a quantised target, as they are stored."""
    files = weight_files(settings.folder)
    if quantisation(settings.folder):
        return sum(path.stat().st_size for path in files)
    return size * sum(prod(shape) for path in files for shape in weight_shapes(path))
