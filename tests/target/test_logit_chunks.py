"""The number of logits computed at once: a function of shapes, within its limit of bytes."""

import pytest
import torch
from draft_cases import V, all_blocks, build, cell_of, every_method, loss_of
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.target.head import NEWEST, RULES, ChunkLimit, chunk_blocks, chunk_rows


class Logits(TorchDispatchMode):
    """Records the most bytes of any tensor [..., V] that an operation returned, in float32."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor) and tensor.ndim and tensor.shape[-1] == V:
                self.bytes = max(self.bytes, 4 * tensor.numel())
        return result


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_chunk_is_as_many_rows_as_its_bytes_let_it_have(device):
    bound = {"cpu": 80 << 20, "cuda": 256 << 20}[device]
    fewest, most = {"cpu": (128, 256), "cuda": (1, bound)}[device]
    for vocabulary in (1000, 32_000, 80_000, 152_000, 262_144, 1 << 20):
        rows = chunk_rows(vocabulary, device)
        assert rows == fewest or 4 * vocabulary * rows <= bound
        assert rows == most or 4 * vocabulary * (rows + 1) > bound
        assert chunk_blocks(7, vocabulary, device) == rows // 7


def test_a_block_is_never_cut():
    assert chunk_rows(1 << 30, "cuda") == chunk_blocks(16, 1 << 30, "cuda") == 1


def test_the_first_rule_is_that_of_version_0_5():
    for vocabulary, slots in [(1024, 8), (32_768, 16), (151_936, 16), (262_144, 8)]:
        for device, size in {"cpu": 4 << 20, "cuda": 256 << 20}.items():
            assert chunk_blocks(slots, vocabulary, device, rule=1) == max(1, size // (4 * slots * vocabulary))
            assert chunk_rows(vocabulary, device, rule=1, greedy=True) == max(1, (1 << 22) // vocabulary)
            assert chunk_rows(vocabulary, device, greedy=True) == chunk_rows(vocabulary, device)


def test_the_second_rule_is_that_of_versions_0_6_to_0_9():
    rows = [chunk_rows(vocabulary, "cpu", rule=2) for vocabulary in (1024, 32_768, 151_936, 262_144, 1 << 26)]
    assert rows == [256, 256, 220, 128, 1]
    assert chunk_rows(151_936, "cuda", rule=2) == (1 << 28) // (4 * 151_936)


@every_method
@pytest.mark.parametrize("objective", ["ce", "lk-hybrid", "dspark"])
def test_no_logits_of_a_loss_or_of_proposals_pass_the_bound(method, objective, monkeypatch):
    bound = 45 * 4 * V  # more than a head of 32 channels takes, transposed; 9 blocks of 5 slots
    monkeypatch.setitem(RULES[NEWEST], "cpu", ChunkLimit(bound))
    draft, cell = build(method, objective=objective), cell_of(40, 30)
    blocks = all_blocks(draft, cell)
    assert len(blocks.anchors_N) > 3 * 9

    with Logits() as loss:
        loss_of(draft, cell, blocks, metrics=True).total.backward()
    with Logits() as proposals, torch.no_grad():
        hidden = draft.hidden(cell, blocks)
        draft.rollout(hidden, cell.ids_R[blocks.anchors_N])

    assert bound / 2 < loss.bytes <= bound and bound / 2 < proposals.bytes <= bound
