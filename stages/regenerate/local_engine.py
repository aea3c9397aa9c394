"""Decode replies in this process, for small targets: continuous batching with a kv cache, prompts sorted by length.

Where a reply ends the next prompt takes its batch row; a conversation's next turn reuses the kv cache of the turns
before. A target that cannot decode a batch decodes one sequence at a time.

    B sequences   T positions   V vocabulary
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.corpus.rejections import Unusable
from pipeline.errors import RoomError, UsageError
from pipeline.matrix_products import compute_by_linear
from pipeline.target.files import max_positions, read_text_config
from pipeline.target.kv_cache import BatchedKV, check_batchable, kv_argument, new_kv
from pipeline.target.loading import load_target
from pipeline.target.model import lm_logits, run_decoder, stop_tokens
from pipeline.tensors import draw, find_device, out_of_memory, uniforms
from stages.regenerate.prompts import Failure, Job, Options, Renderer, common_prefix
from stages.regenerate.replies import CUT, Reply

WINDOW = 4096  # prompts sorted by length at a time
PREFILL_TOKENS = 8192  # padded tokens of one prefill
HEADROOM = 128  # initial kv cache capacity beyond the longest prompt, in tokens


class _Sequence:
    """A job's prompt and its reply so far. ids: both; the last token has not been run through the target yet."""

    def __init__(self, job: Job, prompt: list[int], options: Options):
        self.job, self.prompt, self.ids = job, prompt, list(prompt)
        self.generator = torch.Generator().manual_seed(job.seed(options.seed)) if options.temperature else None

    @property
    def generated(self) -> list[int]:
        return self.ids[len(self.prompt) :]


class LocalEngine:
    """An engine that loads the target in this process. UsageError when it cannot, RoomError when it does not fit."""

    def __init__(self, options: Options, folder: Path):
        self.options = options
        self.target = compute_by_linear(load_target(str(folder), device=find_device(options.device)))
        self.max_positions = max_positions(read_text_config(folder))[0]
        self.stops: frozenset[int] = frozenset()
        self.batch = options.batch
        try:
            check_batchable(self.target)
        except UsageError as error:
            why = str(error).partition(";")[0]
            print(f"{why}: prompts are decoded one at a time", file=sys.stderr)
            self.batch = 0

    @torch.inference_mode()
    def ask(self, jobs: Iterator[Job], renderer: Renderer, on_reply: Callable, on_failure: Callable) -> None:
        """Decode all jobs turn by turn, and call `on_reply(job, reply)`, or `on_failure(failure)` once for a job."""
        self.stops = stop_tokens(self.target) | ({renderer.tokenizer.eos_token_id} - {None})
        self.renderer, self.on_reply, self.on_failure = renderer, on_reply, on_failure
        try:
            while window := list(islice(jobs, WINDOW)):
                sequences = [sequence for job in window if (sequence := self._next_sequence(job))]
                sequences.sort(key=lambda sequence: len(sequence.prompt))
                (self._decode_batched if self.batch else self._one_by_one)(deque(sequences))
        except RuntimeError as error:
            out_of_memory(error)
            raise RoomError(
                f"no room on {self.target.device} for {self.batch} prompts at once; pass a smaller --batch or --max-new"
            ) from error

    def _next_sequence(self, job: Job) -> _Sequence | None:
        """Return the sequence of a job's next turn; None when the job is done or failed."""
        if job.done:
            return None
        try:
            prompt = self.renderer.prompt_ids(job.messages(), job.row.tools, job.row.template_kwargs)
        except Unusable as refused:
            return self.on_failure(Failure(job.row, job.turn, f"it {refused}"))
        if self.max_positions is not None and len(prompt) >= self.max_positions:
            cause = f"a prompt of {len(prompt)} tokens, and the target has {self.max_positions} positions"
            return self.on_failure(Failure(job.row, job.turn, cause))
        return _Sequence(job, prompt, self.options)

    def _decode_batched(self, waiting: deque[_Sequence]) -> None:
        if not waiting:
            return
        kv_cache = BatchedKV(self.target, self.batch, len(waiting[-1].prompt) + min(self.options.max_new, HEADROOM))
        live: list[_Sequence] = []
        while waiting or live:
            # A prefill costs about as much for a few prompts as for one, so it waits for an eighth of the rows.
            if waiting and (not live or self.batch - len(live) >= max(self.batch // 8, 1)):
                self._prefill(kv_cache, live, waiting)
            else:
                logits_BNV = kv_cache.run([[sequence.ids[-1]] for sequence in live])
                kv_cache.crop([1] * len(live))
                self._append_next_tokens(live, logits_BNV[:, -1])
            self._finish_ended(kv_cache, live)

    def _prefill(self, kv_cache: BatchedKV, live: list[_Sequence], waiting: deque[_Sequence]) -> None:
        """Prefill the next prompts in one forward, padded on the right, which causal attention does not see."""
        group: list[_Sequence] = []
        while waiting and len(live) + len(group) < self.batch:
            if group and len(waiting[0].prompt) * (len(group) + 1) > PREFILL_TOKENS:
                break
            group.append(waiting.popleft())
        width, kv = max(len(sequence.prompt) for sequence in group), new_kv()
        padded = [sequence.prompt + sequence.prompt[-1:] * (width - len(sequence.prompt)) for sequence in group]
        hidden_BTD = run_decoder(self.target, self._tensor(padded), kv).last_hidden_state
        last_B = torch.tensor([len(sequence.prompt) - 1 for sequence in group], device=hidden_BTD.device)
        self._append_next_tokens(
            group, lm_logits(self.target, hidden_BTD[torch.arange(len(group), device=last_B.device), last_B])
        )
        for row, sequence in enumerate(group):
            kv_cache.add_from_batch(kv, row, len(sequence.prompt))
        live += group

    def _finish_ended(self, kv_cache: BatchedKV, live: list[_Sequence]) -> None:
        """Report the replies that have ended; a job's next turn goes on in the batch with the kv cache it shares."""
        for row in reversed(range(len(live))):
            sequence = live[row]
            while sequence is not None and self._ended(sequence):
                following = self._reply(sequence)
                cached = common_prefix(sequence.ids[:-1], following.prompt[:-1]) if following else 0
                kv = kv_cache.extract(row, cached) if following else None
                kv_cache.remove(row)
                live[row] = live[-1]
                live.pop()
                if following:
                    self._extend(following, kv, cached)
                    kv_cache.add(kv)
                    row = len(live)
                    live.append(following)
                sequence = following

    def _extend(self, sequence: _Sequence, kv: DynamicCache, cached: int) -> None:
        """Run a sequence whose first `cached` tokens are in the kv cache, and append the next token."""
        output = self.target(
            input_ids=self._tensor([sequence.ids[cached:]]), **kv_argument(self.target, kv), logits_to_keep=1
        )
        self._append_next_tokens([sequence], output.logits[:, -1])

    def _one_by_one(self, waiting: deque[_Sequence]) -> None:
        while waiting:
            sequence = waiting.popleft()
            while sequence is not None:
                kv = DynamicCache(config=self.target.config)
                self._extend(sequence, kv, 0)
                while not self._ended(sequence):
                    self._extend(sequence, kv, len(sequence.ids) - 1)
                sequence = self._reply(sequence)

    def _append_next_tokens(self, sequences: Sequence[_Sequence], logits_BV: Tensor) -> None:
        """Append to each sequence the target's next token: greedy, or drawn at the temperature."""
        logits_BV = logits_BV.float()
        if not self.options.temperature:
            tokens = logits_BV.argmax(-1)
        else:
            weights_BV = nucleus((logits_BV / self.options.temperature).softmax(-1), self.options.top_p)
            tokens = draw(
                weights_BV, torch.cat([uniforms(1, sequence.generator) for sequence in sequences]).to(logits_BV.device)
            )
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.ids.append(token)

    def _ended(self, sequence: _Sequence) -> bool:
        full = self.max_positions is not None and len(sequence.ids) >= self.max_positions
        return sequence.ids[-1] in self.stops or len(sequence.generated) >= self.options.max_new or full

    def _reply(self, sequence: _Sequence) -> _Sequence | None:
        """Report a finished reply; return the sequence of the job's next turn, None where there is none."""
        ids = sequence.generated
        stopped = ids[-1] in self.stops
        content = self.renderer.text(ids[:-1] if stopped else ids)
        reply = Reply(content, "stop" if stopped else CUT, None, None, ids, sequence.prompt, len(ids))
        self.on_reply(sequence.job, reply)
        return self._next_sequence(sequence.job)

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.target.device)


def nucleus(weights_NV: Tensor, top_p: float) -> Tensor:
    """Return the weights with all but the nucleus at 0: the fewest tokens whose share reaches top_p, and ties.

    weights: not negative, not all 0 in a row. The likeliest token is always in it.
    """
    if top_p >= 1:
        return weights_NV
    sorted_NV = weights_NV.double().sort(-1, descending=True).values
    before_NV = sorted_NV.cumsum(-1) - sorted_NV
    kept_N1 = (before_NV < top_p * sorted_NV.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    least_N1 = sorted_NV.gather(-1, kept_N1 - 1).to(weights_NV.dtype)
    return weights_NV.where(weights_NV >= least_N1, 0)
