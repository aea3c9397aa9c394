"""A whole training step beside the plain reference of `tests/plain_reference.py`: `python tests/bench/step.py`.

Forward, backward, clipping and AdamW of every method at two shapes, float32 and bfloat16, one thread, random weights.
The two take turns within a round; shown are the medians' CPU seconds, their ratio, and the most bytes of tensors that
were live beyond weights and moments (gradients included).

tiny: width 256, two layers, V 4,096, 2 x 512 rows, 64 anchors of each sample. mid: width 1,024, three layers, V 32,768,
1,024 rows, 128 anchors. Both: five captured layers, blocks of 16, heads of 64 or 128 channels.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from pipeline.drafts import DRAFTS, draft_config, lay_blocks, pack
from pipeline.drafts.block_draft import init_weights
from pipeline.matrix_products import torchs_own_products
from pipeline.target.head import TargetHead
from pipeline.tensors import keep_freed_memory
from stages.train_draft.memory import LiveBytes
from stages.train_draft.optimizers import AdamW
from tests.plain_reference import plain_loss

SHAPES = {
    "tiny": {"D": 256, "layers": 2, "V": 4096, "rows": 512, "samples": 2, "anchors": 64, "gru": 256, "rank": 128},
    "mid": {"D": 1024, "layers": 3, "V": 32_768, "rows": 1024, "samples": 1, "anchors": 128, "gru": 512, "rank": 256},
}
BLOCK = 16


class RandomSample:
    """Random ids and states; what follows the first quarter is supervised."""

    def __init__(self, shape: dict, generator: torch.Generator):
        rows, D = shape["rows"], shape["D"]
        self.ids = torch.randint(0, shape["V"] - 1, (rows,), generator=generator)
        self.mask = torch.arange(rows) >= rows // 4
        self.aux = torch.randn(5, rows, D, generator=generator).bfloat16()
        self.final = torch.randn(rows, D, generator=generator).bfloat16()
        self.final_rows = torch.arange(rows)


class Step:
    """A draft of one method with a batch of one cell, and its step in both forms."""

    def __init__(self, method: str, shape: dict, dtype: torch.dtype):
        D, heads = shape["D"], shape["D"] // 64 if shape["D"] < 1024 else shape["D"] // 128
        own = {"domino": {"pure_draft_prefix_len": 1, "emb_dim": shape["rank"], "gru_hidden_dim": shape["gru"]}}
        own |= {"dspark": {"markov_rank": shape["rank"]}}
        fields = {
            "method": method,
            "hidden_size": D,
            "intermediate_size": 3 * D,
            "num_hidden_layers": shape["layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": D // heads,
            "vocab_size": shape["V"],
            "rope_theta": 1e6,
            "max_position_embeddings": 4096,
            "num_target_layers": 36,
            "target_layer_ids": (1, 9, 17, 25, 33),
            "block_size": BLOCK,
            "mask_token_id": shape["V"] - 1,
            "shift_label": method != "dflash",
            "gamma": 7.0,
        }
        generator = torch.Generator().manual_seed(0)
        weights_VD = torch.empty(shape["V"], D).normal_(0, 0.02, generator=generator).to(dtype)
        head_VD = torch.empty(shape["V"], D).normal_(0, 0.02, generator=generator).to(dtype)
        self.draft = DRAFTS[method](draft_config(**fields | own.get(method, {})), TargetHead(weights_VD, head_VD))
        init_weights(self.draft, 0)
        samples = [RandomSample(shape, generator) for _ in range(shape["samples"])]
        self.cell = pack(samples, ["s"] * len(samples), final=method == "dspark")
        rows, span = shape["rows"], shape["rows"] - shape["rows"] // 4 - 2
        anchors = [
            torch.randperm(span, generator=generator)[: shape["anchors"]].sort().values + rows // 4 + index * rows
            for index in range(len(samples))
        ]
        anchors_N = torch.cat(anchors)
        self.blocks = lay_blocks(self.cell, anchors_N, self.draft.config)
        self.autocast, self.device = dtype == torch.bfloat16, torch.device("cpu")
        self.optimizer = AdamW(dict(self.draft.named_parameters()))
        self.plain_optimizer = torch.optim.AdamW(self.draft.parameters(), lr=1e-6)

    def to(self, device: torch.device | str) -> None:
        """Move draft, head, cell and blocks."""
        self.draft.to(device).target = self.draft.target.to(device)
        self.cell, self.blocks, self.device = self.cell.to(device), self.blocks.to(device), torch.device(device)

    def ours(self) -> None:
        return self.updated(self.our_loss, self.optimizer)

    def plain(self) -> None:
        with torchs_own_products():
            return self.updated(self.plain_loss, self.plain_optimizer)

    def our_loss(self) -> Tensor:
        dens = self.draft.denominators(self.blocks)
        return self.draft.loss(self.cell, self.blocks, {"lambda_base": 0.5}, dens).total

    def plain_loss(self) -> Tensor:
        return plain_loss(self.draft, self.cell, self.blocks, 0.5)

    def updated(self, loss_of, optimizer) -> None:
        self.draft.zero_grad()
        loss = self.in_dtype(loss_of)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
        optimizer.step(*[1e-6] * (optimizer is self.optimizer))

    def in_dtype(self, loss_of) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return loss_of()


def peak_above(step: Step, name: str) -> int:
    """Return the most bytes of tensors that were live in a step, beyond weights, head, moments and batch."""
    draft, optimizer = step.draft, step.plain_optimizer if name == "plain" else step.optimizer
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    batch = [value for record in (step.cell, step.blocks) for value in vars(record).values() if torch.is_tensor(value)]
    draft.zero_grad()
    with LiveBytes() as memory:
        for tensor in (*draft.parameters(), draft.target.embed_VD, draft.target.head_VD, *moments, *batch):
            memory.note(tensor)
        before = memory.live
        getattr(step, name)()
    return memory.peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default="tiny,mid")
    parser.add_argument("--methods", default=",".join(DRAFTS))
    parser.add_argument("--types", default="float32,bfloat16")
    parser.add_argument("--keep-freed-memory", action="store_true", help="as `train-draft` does")
    parser.add_argument("--torchs-own-products", action="store_true", help="of ours, too: as on a CPU that Intel made")
    asked = parser.parse_args()
    with torchs_own_products() if asked.torchs_own_products else nullcontext():
        compare(asked)


def compare(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if asked.keep_freed_memory:
        keep_freed_memory(torch.device("cpu"))
    print(f"{'shape':6}{'type':10}{'method':8}{'plain s':>9}{'ours s':>9}{'ratio':>7}{'plain MB':>10}{'ours MB':>9}")
    for shape in asked.shapes.split(","):
        for kind in asked.types.split(","):
            for method in asked.methods.split(","):
                step = Step(method, SHAPES[shape], getattr(torch, kind))
                losses = [float(step.in_dtype(loss).detach()) for loss in (step.plain_loss, step.our_loss)]
                near = 1e-5 if kind == "float32" else 2e-2
                assert abs(losses[0] - losses[1]) <= near * abs(losses[0]), f"{losses} differ"
                taken: dict[str, list[float]] = {"plain": [], "ours": []}
                for _ in range(asked.rounds):
                    for name, times in taken.items():
                        started = time.process_time()
                        getattr(step, name)()
                        times.append(time.process_time() - started)
                plain, ours = (median(taken[name]) for name in ("plain", "ours"))
                memory = [peak_above(step, name) / 1e6 for name in ("plain", "ours")]
                print(
                    f"{shape:6}{kind:10}{method:8}{plain:9.2f}{ours:9.2f}{plain / ours:7.2f}"
                    f"{memory[0]:10.0f}{memory[1]:9.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
