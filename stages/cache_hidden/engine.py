"""Engines: what runs the target for a capture. Each has an entry in ENGINES.

B samples of a micro-batch   T tokens each, padding included   D hidden size
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.target.model import run_decoder, tap_layers
from pipeline.target.several_devices import input_device
from stages.cache_hidden.settings import CaptureSettings
from stages.cache_hidden.vllm_engine import VllmEngine


class Engine(Protocol):
    """Runs the target on a micro-batch of token ids, and states facts about itself.

    An engine only computes: `pack.py` chooses rows, checks, encodes and copies for all of them, and before a shard is
    committed the probe compares what is on disk with the target as Hugging Face runs it. So an engine that counts
    layers in another way, or leaves out the last norm, is refused at its first shard.

    device: where the states are that it gives. facts: what a column's manifest records about how it was made; the name
    of the engine ("engine"), versions of its libraries, the attention kernel ("attention"), the kind of device.
    """

    device: torch.device
    facts: Mapping[str, str]

    def forward(
        self, ids_BT: Tensor, lengths_B: Sequence[int], layers: Sequence[int]
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Return the states of B samples as ({layer: [B, T, D]}, final [B, T, D]), in the dtype of the capture.

        ids_BT: int64 on the CPU (in pinned memory for a GPU), zeros after a sample's end. T may exceed all `lengths_B`:
        where memory forced a micro-batch to be split, its parts keep its T. layers: which to return, by the convention
        of `pipeline/target/layers.py`: layer i is the residual stream after decoder layer i, -1 what enters layer 0.
        final: what the LM head reads, after the last norm; it is always returned.

        What is returned for padding is ignored. On a GPU, states must be complete in the order of the current CUDA
        stream. Their memory may be reused at the next call; entries of the dict are removed as they are used.
        One kind of device and one set of versions must give the same bytes for the same arguments, whatever ran before:
        a stopped capture continues, and several workers capture one cache.

        Called without autograd. Raises torch.OutOfMemoryError where the samples do not fit; fewer are tried next.
        """

    def close(self) -> None:
        """Release the device's memory; called once, after the last forward."""


class HfEngine:
    """The decoder of a loaded Hugging Face model, with hooks on the layers; it may be spread over several devices.

    A causal decoder's tokens never attend to the padding after them, so no attention mask is needed.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.device = input_device(model)
        self.facts = {
            "engine": "transformers",
            "attention": model.config._attn_implementation,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "device": self.device.type,
        }

    def forward(
        self, ids_BT: Tensor, lengths_B: Sequence[int], layers: Sequence[int]
    ) -> tuple[dict[int, Tensor], Tensor]:
        with tap_layers(self.model, layers) as states:
            output = run_decoder(self.model, ids_BT.to(self.device, non_blocking=True))
        on_device = {layer: state_BTD.to(self.device) for layer, state_BTD in states.items()}
        return on_device, output.last_hidden_state.to(self.device)

    def close(self) -> None:
        """Do nothing: the model is the caller's."""


# By the name of the engine in cache.json. `target` is the model that the probe asks, loaded on the device and in the
# dtype of the capture; an engine may run it, or load the target once more in its own way.
ENGINES: dict[str, Callable[[CaptureSettings, PreTrainedModel], Engine]] = {
    "transformers": lambda settings, target: HfEngine(target),
    "vllm": VllmEngine,
}


def make_engine(settings: CaptureSettings, target: PreTrainedModel) -> Engine:
    """Return the engine that the settings name. target: the loaded Hugging Face model, which the probe asks."""
    return ENGINES[settings.identity.capture.engine](settings, target)
