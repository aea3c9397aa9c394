"""How many rows of logits should exist at once on a CPU: `python tests/bench/head.py`.

Times `HeadLoss` with its gradient, one thread, random weights, at four vocabularies in float32 and bfloat16: with the
label alone (`ce`), with the target's own distribution beside it (`kl`), and corrected, as Domino's logits are, with a
correction of rank 256 (`domino`). Rows of a chunk take turns within a round; shown are the rounds' median CPU seconds,
and last those of the rules of `pipeline/target/head.py`: rule 1, of version 0.5 (4 MB of logits), rule 2 (256 rows
within 128 MB), and rule 3 (80 MB, but never fewer than 128 rows).

Seen on a core of a Xeon with AVX-512 and without AMX, others working beside
it (medians of two or three rounds):

          V     D  slots  type     loss        8     32     64    128    256    512   1024
      1,024   256  4,096  float32  ce       0.10   0.06   0.05   0.05   0.05   0.05   0.05
      1,024   256  4,096  float32  kl       0.15   0.09   0.08   0.08   0.07   0.07   0.08
      1,024   256  4,096  float32  domino   0.24   0.14   0.13   0.13   0.12   0.12   0.13
      1,024   256  4,096  bfloat16 ce       0.07   0.03   0.02   0.02   0.02   0.02   0.02
      1,024   256  4,096  bfloat16 kl       0.11   0.05   0.04   0.03   0.03   0.03   0.04
      1,024   256  4,096  bfloat16 domino   0.19   0.07   0.05   0.04   0.04   0.04   0.05
     32,768  1024  1,024  float32  ce       4.25   2.18   1.77   1.55   1.49   1.50   1.44
     32,768  1024  1,024  float32  kl       6.65   3.50   3.01   2.72   2.68   2.56   3.08
     32,768  1024  1,024  float32  domino   7.95   3.59   3.43   3.19   2.45   2.62   2.52
     32,768  1024  1,024  bfloat16 ce       1.91   0.74   0.54   0.48   0.51   0.58   0.66
     32,768  1024  1,024  bfloat16 kl       2.65   1.08   0.87   0.78   1.04   1.08   1.14
     32,768  1024  1,024  bfloat16 domino   4.97   1.68   1.10   0.85   0.87   1.01   0.97
    151,936  1024    256  float32  ce       4.78   2.53   2.24   1.94   1.81      -      -
    151,936  1024    256  float32  kl       7.25   3.85   3.37   3.12   2.90      -      -
    151,936  1024    256  bfloat16 ce       2.13   1.02   0.79   0.84   0.93      -      -
    151,936  1024    256  bfloat16 kl       2.99   1.41   1.36   1.52   1.70      -      -
    262,144   640    256  float32  ce       5.04   2.60   2.46   2.14   2.00      -      -
    262,144   640    256  float32  kl       8.43   4.70   4.28   3.74   3.46      -      -
    262,144   640    256  float32  domino  14.11   6.38   5.00   4.61   4.19      -      -  (one round)
    262,144   640    256  bfloat16 ce       2.23   1.13   0.94   0.88   0.82      -      -
    262,144   640    256  bfloat16 kl       3.70   2.03   1.79   1.71   1.85      -      -

So rule 1, whose rows are 1,024, 32, 8 and 8 at these vocabularies, became 256, 256, 216 and 128 (blocks are whole).
Why not more: nothing gains a tenth, and memory grows. Why not 128: in bfloat16 it is as fast, with the target's
distribution up to a quarter faster, but in float32 corrected logits take 1.3 times as long; one rule serves all.

Since logits use their memory again, rows from 128 on are nearly alike at large vocabularies, others working beside it:

          V     D  slots  type     loss       64     96    112    128    208
    151,936  1024    512  float32  ce       4.04   3.76   3.63   3.52   3.38
    151,936  1024    512  float32  domino   5.77   5.38   5.23   5.07   4.99
    151,936  1024    512  bfloat16 ce       1.49   1.34   1.33   1.24   1.22
    151,936  1024    512  bfloat16 domino   2.43   2.16   2.11   2.06   2.03
    262,144   640    512  float32  ce       4.94   4.42   4.32   4.27   3.91

So rule 3, whose rows are 256, 256, 136 and 128. A step of the mid Domino of `tests/bench/step.py` in float32 has 789 MB
live beyond weights and moments at 32,768 tokens, and at 151,936 996 MB, 1.26 times that; by rule 2 it had 1,093, 1.39.

    V vocabulary   D hidden size   N blocks   S slots   U rank of the correction
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from pipeline.drafts.head_loss import HeadLoss
from pipeline.drafts.objectives import Objective, TargetStates
from pipeline.target.head import RULES, TargetHead, chunk_blocks

SHAPES = ((1024, 256, 4096), (32_768, 1024, 1024), (151_936, 1024, 256), (262_144, 640, 256))  # V, D, slots
ROWS = (8, 32, 64, 128, 256, 512, 1024)
S, U = 8, 256
LOSSES = ("ce", "kl", "domino")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabularies", default=",".join(str(shape[0]) for shape in SHAPES))
    parser.add_argument("--types", default="float32,bfloat16")
    parser.add_argument("--losses", default=",".join(LOSSES))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    heads = "".join(f"{rows:>8}" for rows in ROWS)
    print(f"{'V':>7} {'D':>5} {'slots':>6} {'type':9} {'loss':7}{heads}{'rule 1':>9}{'rule 2':>9}{'rule 3':>9}")
    for V, D, slots in SHAPES:
        if str(V) in asked.vocabularies.split(","):
            for kind in asked.types.split(","):
                for loss in asked.losses.split(","):
                    row = seconds(V, D, slots, getattr(torch, kind), loss, asked.rounds)
                    print(f"{V:7} {D:5} {slots:6} {kind:9} {loss:7}{row}", flush=True)


def seconds(V: int, D: int, slots: int, dtype: torch.dtype, loss: str, rounds: int) -> str:
    """CPU seconds by rows of a chunk, and by the rules."""
    draw = torch.Generator().manual_seed(0)
    N = slots // S
    head_VD = torch.empty(V, D).normal_(0, 0.02, generator=draw).to(dtype)
    target = TargetHead(head_VD, head_VD)
    hidden_NSD, final_FD = (torch.empty(*shape).normal_(generator=draw) for shape in ((N, S, D), (slots, D)))
    z_NSU, out_VU = (torch.empty(*shape).normal_(0, 0.02, generator=draw) for shape in ((N, S, U), (V, U)))
    labels_NS = torch.randint(V, (N, S), generator=draw)
    teacher = TargetStates(final_FD.to(dtype), torch.arange(slots).view(N, S)) if loss == "kl" else None
    kinds = ("final", "base") if loss == "domino" else ("final",)
    chunks = {rows: rows // S for rows in ROWS if rows <= slots}
    chunks |= {f"rule {rule}": min(N, chunk_blocks(S, V, "cpu", rule)) for rule in RULES}
    found: dict[int, list[float]] = {blocks: [] for blocks in chunks.values()}
    for _ in range(rounds):
        for blocks, taken in found.items():
            objective = Objective(
                labels_NS,
                lambda part, ce_NS: torch.ones_like(ce_NS),
                {kind: {"": 1.0} for kind in kinds},
                "kl" if loss == "kl" else "ce",
                teacher,
            )
            leaves = [leaf.clone().requires_grad_() for leaf in (hidden_NSD, z_NSU, out_VU)]
            started = time.process_time()
            hidden, z, out = leaves if loss == "domino" else (leaves[0], None, None)
            HeadLoss.apply(hidden, z, out, target, objective, blocks).backward()
            taken.append(time.process_time() - started)
    shown = [f"{median(found[chunks[rows]]):8.2f}" if rows in chunks else f"{'-':>8}" for rows in ROWS]
    return "".join(shown) + "".join(f"{median(found[chunks[f'rule {rule}']]):9.2f}" for rule in RULES)


if __name__ == "__main__":
    main()
