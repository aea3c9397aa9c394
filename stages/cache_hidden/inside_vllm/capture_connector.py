"""The connector by which vLLM writes hidden states, mended for CPUs. Imported by every process of the engine."""

import os
from types import SimpleNamespace

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as vllm_connector

WRITTEN = SimpleNamespace(query=lambda: True, synchronize=lambda: None)  # in place of a CUDA event


class CaptureConnector(vllm_connector.ExampleHiddenStatesConnector):
    """vLLM's own, which copies from the device by a CUDA stream into pinned memory, and fails where there is no CUDA.

    On a CPU (seen in 0.32.0) there is nothing to copy: the states are written as they lie, before the step goes on.
    """

    def _submit_async_write(self, pending):
        if self._kv_cache is None or self._kv_cache.device.type != "cpu":
            return super()._submit_async_write(pending)
        if not self._is_tp_rank_zero:
            return None
        offsets = torch.arange(self._block_size)
        slots = (torch.tensor(pending.block_ids)[:, None] * self._block_size + offsets).flatten()
        states_TKD = vllm_connector.extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        tensors = {"hidden_states": states_TKD.contiguous(), "token_ids": pending.token_ids.clone()}
        os.makedirs(os.path.dirname(pending.filename), exist_ok=True)
        self._write_tensors(tensors, WRITTEN, pending.filename, self._lock_fds.pop(pending.req_id, None))
        self._req_copy_events[pending.req_id] = WRITTEN
        return None
