"""A capture's micro-batch on a fake GPU: `python tests/fake_accelerator.py capture:TOKENS[,codec=int8]`.

The target is a Qwen3 of a config made by hand, whose weights are fake and cost nothing. Its batch goes through the
engine and the packer as in a capture; what a shard's writer would do with the copies has no values here.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers.masking_utils
from fake_device import Meter, events
from fake_streams import journal
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from transformers.initialization import no_init_weights

from pipeline.cache.codecs.codec import Calibration
from pipeline.cache.columns import ColumnSpec
from pipeline.cache.samples import PlannedSample, ShardPlan, make_batch
from pipeline.target.head import TargetHead
from pipeline.target.model import head_of
from pipeline.target.probe import ReferenceTarget
from stages.cache_hidden.engine import make_engine
from stages.cache_hidden.pack import Packer

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
BUNDLED = Path(__file__).parents[1] / "data/tiny-qwen3/config.json"
SHARE = 0.01  # of the supervised rows whose tokens are scored


def shard_of(lengths: list[int], vocabulary: int) -> ShardPlan:
    """Return samples of random tokens, three quarters of them supervised, longest first."""
    rng = np.random.default_rng(0)
    samples = [
        PlannedSample(rng.integers(0, vocabulary, rows).astype(np.uint32), np.arange(rows) >= rows // 4)
        for rows in sorted(lengths, reverse=True)
    ]
    return ShardPlan(make_batch(samples, [bytes([number]) * 16 for number in range(len(samples))], 0), 0)


class FakeCapture:
    """A target on `device`, and a packer of one shard; its columns are the layers that a draft reads, and `final`."""

    def __init__(self, config: Qwen3Config, codec: str, lengths: list[int], device: str, dtype: str):
        self.mode, self.meter = FakeTensorMode(allow_non_fake_inputs=True), Meter(device)
        self.config, self.codec, self.device, self.dtype = config, codec, torch.device(device), dtype
        self.shard = shard_of(lengths, config.vocab_size)
        depth, width = config.num_hidden_layers, config.hidden_size
        layers = sorted({*np.linspace(1, depth - 3, 5).astype(int).tolist()})
        self.columns = [ColumnSpec(f"aux.{layer}", dtype, width, codec) for layer in layers]
        self.columns.append(ColumnSpec("final", dtype, width, codec, "needed"))
        nothing = Calibration(np.zeros(width, np.float32), np.ones(width, np.float32))
        self.calibrations = {spec.name: nothing for spec in self.columns} if codec == "int8" else {}

    def target(self) -> PreTrainedModel:
        with torch.device(self.device), no_init_weights():
            model = AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, self.dtype))
        model.tie_weights()
        return model.eval().requires_grad_(False)

    def measure(self) -> dict:
        """Return the record of the second micro-batch, which finds calibrations on the device."""
        transformers.masking_utils.is_tracing = lambda *_: False  # a fake tensor is taken for a traced one
        with self.mode, self.meter as meter:
            model = self.target()
            for weight in model.parameters():
                meter.note(weight)
            weights, head = meter.live, head_of(model)
            settings = SimpleNamespace(identity=SimpleNamespace(capture=SimpleNamespace(engine="transformers")))
            packer = Packer(make_engine(settings, model), self.shard, self.columns, head, SHARE, self.calibrations)
            whole = range(len(self.shard))
            for packed in packer.pack(whole):
                packed.wait()
            del packed
            meter.reset(), events.clear(), journal.clear()
            (packed,) = packer.pack(whole)
            receipt = meter.receipt()
            asked = [*journal]
            packed.wait()
            list(packed.unusable())
            on_host = [*packed.rows.values(), *packed.largest.values(), *packed.exact.values(), packed.on_policy]
            tensors = [part for value in on_host for part in (value if isinstance(value, tuple) else (value,))]
            return receipt | {
                "codec": self.codec,
                "tokens": int(self.shard.lengths.sum()),
                "padded_tokens": int(len(self.shard) * self.shard.lengths.max()),
                "weights_gib": round(weights / 2**30, 3),
                "events": dict(events),
                "copies": sum(meter.copies.values()),
                "order": [entry for number, entry in enumerate(asked) if entry not in asked[:number]],
                "places": sorted({tensor.device.type for tensor in tensors}),
                "storages_of_head": len(self._storages(model, head)),
                "operations": sorted([name, list(kinds), count] for (name, kinds), count in meter.operations.items()),
            }

    def _storages(self, model: PreTrainedModel, head: TargetHead) -> set[int]:
        """Every storage that the model, the packer's head and the probe's take for embedding and head."""
        probed = ReferenceTarget(model).model
        tensors = [head.embed_VD, head.head_VD, model.get_input_embeddings().weight, probed.lm_head.weight]
        return {tensor.untyped_storage()._cdata for tensor in tensors}


def capture(codec: str, rows: int, device: str = "cuda", dtype: str = "bfloat16", target: str = "qwen3-8b") -> dict:
    """Capture a micro-batch of about so many tokens: samples of a quarter of it, and of less."""
    config = Qwen3Config(**QWEN3_8B) if target == "qwen3-8b" else Qwen3Config.from_json_file(BUNDLED)
    config._attn_implementation = "sdpa"
    lengths = [rows // 4, rows // 4, rows // 4 - 7, rows // 8, rows // 8 - 1]
    return FakeCapture(config, codec, lengths, device, dtype).measure() | {"target": target, "device": device}
