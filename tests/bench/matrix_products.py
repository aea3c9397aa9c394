"""Products of float32 on a CPU by MKL and by oneDNN: `python tests/bench/matrix_products.py`.

One thread, the shapes of a draft's layers and head, forward and both gradients. The libraries take turns within a
round; shown are the GFLOP a CPU second of the medians. Seen with torch 2.13 on a Zen 5, other work beside it:

      T      I      O              MKL  oneDNN   oneDNN with AVX2 alone (ONEDNN_MAX_CPU_ISA=AVX2)
  2,048    256    768  forward     109     246      117
  2,048    256    768  by x        110     248      119
  2,048    256    768  by weight   102     142       96
  2,048  1,024  3,072  forward     101     227      123
  2,048  1,024  3,072  by x        104     220      114
  2,048  1,024  3,072  by weight   105     199      110
    256    256  4,096  forward      98     213      115
    256    256  4,096  by x        106     225      108
    256    256  4,096  by weight   102     202       93
    256  1,024 32,768  forward      82     188      106
    256  1,024 32,768  by x        105     185       96

by weight: oneDNN has both factors transposed, and copies one. T tokens   I inputs   O outputs
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from pipeline.matrix_products import onednn_product

SHAPES = [(2048, 256, 768), (2048, 1024, 3072), (256, 256, 4096), (256, 1024, 32_768), (256, 256, 32_768)]


def seconds(function, *factors) -> float:
    start = time.process_time()
    function(*factors)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("      T      I      O              MKL  oneDNN")
    for tokens, inputs, outputs in SHAPES:
        x_TI, weight_OI, grad_TO = (
            torch.randn(*sizes) for sizes in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        )
        kinds = {"forward": (x_TI, weight_OI.T), "by x": (grad_TO, weight_OI), "by weight": (grad_TO.T, x_TI)}
        for kind, factors in kinds.items():
            taken = [(seconds(torch.mm, *factors), seconds(onednn_product, *factors)) for _ in range(rounds + 1)][1:]
            rates = [2e-9 * tokens * inputs * outputs / median(times) for times in zip(*taken, strict=True)]
            print(f"{tokens:7,}{inputs:7,}{outputs:7,}  {kind:10}{rates[0]:7.0f} {rates[1]:7.0f}", flush=True)


if __name__ == "__main__":
    main()
