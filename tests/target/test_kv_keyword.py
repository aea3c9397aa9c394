"""The kv cache goes to a forward, and comes back, by the name that this version of transformers has for it."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pipeline.target.kv_cache import kv_argument, kv_keyword


class Renamed(nn.Module):
    def forward(self, input_ids, cache=None, use_cache=False): ...


class Before(nn.Module):
    def forward(self, input_ids, past_key_values=None, use_cache=False): ...


@pytest.mark.parametrize(("kind", "name"), [(Renamed, "cache"), (Before, "past_key_values")])
def test_the_name_is_the_forwards_own(kind, name):
    assert kv_argument(kind(), None) == {name: None, "use_cache": True}


@pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning")
def test_a_target_takes_it_and_gives_it_back_without_a_warning(tiny_target):
    model = AutoModelForCausalLM.from_pretrained(tiny_target)
    ids = torch.tensor([[1, 2, 3]])
    output = model(input_ids=ids, **kv_argument(model, None))
    kv = getattr(output, kv_keyword(model))
    assert kv.get_seq_length() == 3
    model(input_ids=ids, **kv_argument(model, kv))
    assert kv.get_seq_length() == 6
