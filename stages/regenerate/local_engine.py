"""Decoding here, for targets that are small: many prompts at once, of about the same length, and no key computed twice.

Where a reply ends the next prompt takes its row, so that the forwards stay full; a conversation's next turn goes on
from what is remembered of the turns before. Where a target cannot decode several texts at once, they follow each other.

    B texts   T positions   V vocabulary
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.corpus.tally import Unusable
from pipeline.errors import RoomError, UsageError
from pipeline.sampling import draw, key_seed, nucleus, uniforms
from pipeline.target.files import max_positions, text_config
from pipeline.target.kv_cache import BatchedKV, check_batchable, new_kv
from pipeline.target.model import lm_logits, load_target, run_decoder, stop_tokens
from pipeline.tensors import out_of_memory
from stages.regenerate.options import Options
from stages.regenerate.pending import Failure, Job
from stages.regenerate.rendering import Renderer
from stages.regenerate.replies import CUT, Reply

WINDOW = 4096  # prompts sorted by length at a time
PREFILL_TOKENS = 8192  # padded, of one forward over prompts
HEADROOM = 128  # tokens of a row beyond the longest prompt, to begin with


class _Text:
    """A job's prompt and the reply to it so far. ids: both; the last one has not been run yet."""

    def __init__(self, job: Job, prompt: list[int], options: Options):
        self.job, self.prompt, self.ids = job, prompt, list(prompt)
        seed = key_seed(options.seed, job.row.key, job.turn)
        self.generator = torch.Generator().manual_seed(seed) if options.temperature else None

    @property
    def written(self) -> list[int]:
        return self.ids[len(self.prompt) :]


class Local:
    """The target, loaded here. UsageError when it cannot be, RoomError when it does not fit."""

    engine = "transformers"

    def __init__(self, options: Options, folder, model: str):
        self.options, self.model = options, model
        self.target = load_target(str(folder), device=options.device or _device())
        self.most = max_positions(text_config(folder))[0]
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
                texts = [text for job in window if (text := self._text(job))]
                texts.sort(key=lambda text: len(text.prompt))
                (self._together if self.batch else self._one_by_one)(deque(texts))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise RoomError(
                f"no room on {self.target.device} for {self.batch} prompts at once; pass a smaller --batch or --max-new"
            ) from error

    def _text(self, job: Job) -> _Text | None:
        """Return what to decode for a job; None when it is through, or failed."""
        if job.done:
            return None
        try:
            prompt = self.renderer.prompt_ids(job.messages(), job.row.tools, job.row.template_kwargs)
        except Unusable as refused:
            return self.on_failure(Failure(job.row, job.turn, f"it {refused}"))
        if self.most is not None and len(prompt) >= self.most:
            cause = f"a prompt of {len(prompt)} tokens, and the target has {self.most} positions"
            return self.on_failure(Failure(job.row, job.turn, cause))
        return _Text(job, prompt, self.options)

    def _together(self, waiting: deque[_Text]) -> None:
        if not waiting:
            return
        memory = BatchedKV(self.target, self.batch, len(waiting[-1].prompt) + min(self.options.max_new, HEADROOM))
        live: list[_Text] = []
        while waiting or live:
            # A prefill costs about as much for a few prompts as for one, so it waits for an eighth of the rows.
            if waiting and (not live or self.batch - len(live) >= max(self.batch // 8, 1)):
                self._prefill(memory, live, waiting)
            else:
                logits_BNV = memory.run([[text.ids[-1]] for text in live])
                memory.crop([1] * len(live))
                self._write(live, logits_BNV[:, -1])
            self._end(memory, live)

    def _prefill(self, memory: BatchedKV, live: list[_Text], waiting: deque[_Text]) -> None:
        """Run the next prompts at once, padded on the right, where no token of a prompt sees them."""
        group: list[_Text] = []
        while waiting and len(live) + len(group) < self.batch:
            if group and len(waiting[0].prompt) * (len(group) + 1) > PREFILL_TOKENS:
                break
            group.append(waiting.popleft())
        width, kv = max(len(text.prompt) for text in group), new_kv()
        padded = [text.prompt + text.prompt[-1:] * (width - len(text.prompt)) for text in group]
        hidden_BTD = run_decoder(self.target, self._tensor(padded), past_key_values=kv).last_hidden_state
        last_B = torch.tensor([len(text.prompt) - 1 for text in group], device=hidden_BTD.device)
        self._write(group, lm_logits(self.target, hidden_BTD[torch.arange(len(group), device=last_B.device), last_B]))
        for row, text in enumerate(group):
            memory.add_from_batch(kv, row, len(text.prompt))
        live += group

    def _end(self, memory: BatchedKV, live: list[_Text]) -> None:
        """Hand out the replies that have ended; where another turn follows, its text takes the row's place."""
        for place in reversed(range(len(live))):
            text = live[place]
            while text is not None and self._ended(text):
                following = self._reply(text)
                kept = _common(text.ids[:-1], following.prompt[:-1]) if following else 0
                kv = memory.extract(place, kept) if following else None
                memory.remove(place)
                live[place] = live[-1]
                live.pop()
                if following:
                    self._go_on(following, kv, kept)
                    memory.add(kv)
                    place = len(live)
                    live.append(following)
                text = following

    def _go_on(self, text: _Text, kv: DynamicCache, kept: int) -> None:
        """Run the rest of a prompt of which the first `kept` tokens are remembered."""
        output = self.target(
            input_ids=self._tensor([text.prompt[kept:]]), past_key_values=kv, use_cache=True, logits_to_keep=1
        )
        self._write([text], output.logits[:, -1])

    def _one_by_one(self, waiting: deque[_Text]) -> None:
        while waiting:
            text = waiting.popleft()
            while text is not None:
                kv = DynamicCache(config=self.target.config)
                self._go_on(text, kv, 0)
                while not self._ended(text):
                    self._go_on_with_last(text, kv)
                text = self._reply(text)

    def _go_on_with_last(self, text: _Text, kv: DynamicCache) -> None:
        output = self.target(input_ids=self._tensor([text.ids[-1:]]), past_key_values=kv, use_cache=True)
        self._write([text], output.logits[:, -1])

    def _write(self, texts: Sequence[_Text], logits_BV: Tensor) -> None:
        """Append to each text the target's next token: the likeliest, or drawn."""
        logits_BV = logits_BV.float()
        if not self.options.temperature:
            tokens = logits_BV.argmax(-1)
        else:
            weights_BV = nucleus((logits_BV / self.options.temperature).softmax(-1), self.options.top_p)
            tokens = draw(weights_BV, torch.cat([uniforms(1, text.generator) for text in texts]).to(logits_BV.device))
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.ids.append(token)

    def _ended(self, text: _Text) -> bool:
        full = self.most is not None and len(text.ids) >= self.most
        return text.ids[-1] in self.stops or len(text.written) >= self.options.max_new or full

    def _reply(self, text: _Text) -> _Text | None:
        """Hand out a reply, and return what to decode for the turn after it, if there is one."""
        ids = text.written
        stopped = ids[-1] in self.stops
        content = self.renderer.text(ids[:-1] if stopped else ids)
        reply = Reply(content, "stop" if stopped else CUT, None, None, ids, text.prompt, len(ids))
        self.on_reply(text.job, reply)
        return self._text(text.job)

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.target.device)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts share from their start."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
