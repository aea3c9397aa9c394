"""The frozen head: scaled embeddings, capped logits, and a file that is the same bytes for the same head."""

import pytest
import torch

from pipeline.errors import CacheError
from pipeline.target.head import TargetHead


def random_head(tied: bool, **facts) -> TargetHead:
    generator = torch.Generator().manual_seed(0)
    embed_VD = torch.randn(7, 4, generator=generator)
    return TargetHead(embed_VD, embed_VD if tied else torch.randn(7, 4, generator=generator), **facts)


def test_embeddings_are_scaled_and_logits_capped():
    head = random_head(False, embed_scale=2.0, logit_softcap=3.0)
    ids = torch.tensor([[1, 6]])
    hidden = torch.ones(1, 4)

    assert torch.equal(head.embed(ids), 2 * head.embed_VD[ids])
    raw = hidden @ head.head_VD.T
    torch.testing.assert_close(head.logits(hidden), 3 * torch.tanh(raw / 3))
    assert head.logits(hidden).abs().max() < 3
    torch.testing.assert_close(head.raw_logits(hidden), raw)


def test_the_embedding_scale_is_rounded_as_the_target_rounds_it():
    head = random_head(True, embed_scale=33.9411).to(dtype=torch.bfloat16)
    assert head.embed(torch.tensor([2])).dtype == torch.bfloat16
    assert torch.equal(head.embed(torch.tensor([2])), head.embed_VD[2:3] * torch.tensor(33.9411).bfloat16())


def test_logits_of_a_bfloat16_head_are_float32():
    head = random_head(True).to(dtype=torch.bfloat16)
    assert head.tied
    assert head.logits(torch.ones(2, 4)).dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_head_comes_back(tmp_path, tied):
    head = random_head(tied, embed_scale=1.5, logit_softcap=None if tied else 30.0)
    head.save(tmp_path / "head.safetensors")
    again = TargetHead.load(tmp_path / "head.safetensors")

    assert again.tied == tied
    assert (again.embed_scale, again.logit_softcap) == (head.embed_scale, head.logit_softcap)
    assert torch.equal(again.embed_VD, head.embed_VD) and torch.equal(again.head_VD, head.head_VD)
    assert TargetHead.load(tmp_path / "head.safetensors", dtype=torch.bfloat16).head_VD.dtype == torch.bfloat16


def test_the_same_head_is_the_same_bytes(tmp_path):
    for name in "ab":
        random_head(False, embed_scale=1.5, logit_softcap=30.0).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_what_is_no_head_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "head.safetensors").write_bytes(content)
    with pytest.raises(CacheError, match="verify"):
        TargetHead.load(tmp_path / "head.safetensors")


def test_heads_are_equal_only_bit_by_bit():
    head = random_head(False, embed_scale=2.0)
    assert head.equals(random_head(False, embed_scale=2.0))
    assert not head.equals(random_head(False)) and not head.equals(
        random_head(False, embed_scale=2.0, logit_softcap=3.0)
    )
    assert not head.equals(random_head(True, embed_scale=2.0)) and not random_head(True).equals(random_head(False))
    assert not head.equals(head.to(dtype=torch.bfloat16))
    other = random_head(False, embed_scale=2.0)
    other.head_VD[6, 3] += 1e-6
    assert not head.equals(other)
