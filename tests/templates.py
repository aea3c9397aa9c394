"""Chat templates of our own, each with one trait of templates that the world uses, and what makes samples by them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tiny import CHAT_TEMPLATE, tokenizer

from pipeline.cache.samples import PlannedSample
from pipeline.corpus.record_formats import Conversation, RejectedRecord, parse_record
from pipeline.corpus.rejections import Tally, Unusable
from pipeline.target.chat_template import ChatTemplate
from stages.cache_hidden.prepare_records import Job, RecordPreparer, samples_of
from stages.cache_hidden.tokenise import PreparedConversation, SampleMaker

PLAIN = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# A reply is asked for behind a question only (Apriel, DeepSeek V3.1).
ASKS_USERS_ONLY = PLAIN.replace(
    "{%- if add_generation_prompt -%}", "{%- if add_generation_prompt and messages[-1].role != 'assistant' -%}"
)
# The header and the newline behind the end are marked, too.
WIDE_MARKS = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{% generation %}<|im_start|>assistant{{ '\n' + m.content }}<|im_end|>{{ '\n' }}{% endgeneration %}"
    "{%- else -%}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
)
# The system prompt stands in the last question, and nowhere once that is answered (Mistral).
SYSTEM_LAST = (
    "{%- set ns = namespace(system='') -%}{%- for m in messages -%}"
    "{%- if m.role == 'system' -%}{%- set ns.system = m.content -%}"
    "{%- elif m.role == 'user' -%}<|im_start|>{{ (ns.system + '\n\n' if loop.last and ns.system) ~ m.content }}<|mask|>"
    "{%- else -%}{{ m.content }}<|im_end|>{%- endif -%}{%- endfor -%}"
)
# A thought, an empty one where there is none, stands in the last turn only (Qwen3).
LAST_THOUGHT = (
    "{%- for m in messages -%}<|im_start|>{{ m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last -%}<think>{{ '\n' ~ (m.reasoning_content or '') ~ '\n' }}</think>"
    "{{ '\n' }}{%- endif -%}{{ m.content }}<|im_end|>{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}"
    "{%- if enable_thinking is false -%}<think>{{ '\n\n' }}</think>{{ '\n' }}{%- endif -%}{%- endif -%}"
)
# The prompt opens a thought that no rendering shows (R1), or closes it at once, by an argument.
OPENS_THOUGHT = (
    "{%- for m in messages -%}<|im_start|>{{ m.role + '\n' + m.content.split('</think>')[-1] }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}<think>"
    "{%- if thinking is false -%}</think>{%- else -%}{{ '\n' }}{%- endif -%}{%- endif -%}"
)
# ... and shows calls behind the text.
OPENS_AND_CALLS = OPENS_THOUGHT.replace("m.content.split", "(m.content or '').split").replace(
    "<|im_end|>{%- endfor",
    "{%- for call in m.tool_calls or [] -%}<call>{{ call.function | tojson }}</call>{%- endfor -%}<|im_end|>{%- endfor",
)
# Nothing ends a turn but the next role's marker (GLM).
NEXT_MARKER = (
    "{%- for m in messages -%}{{ '<|im_start|>' if m.role == 'user' else '<|mask|>' }}{{ m.content }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|mask|>{%- endif -%}"
)
# An end of text stands behind the whole conversation (Phi-3).
END_OF_TEXT = PLAIN.replace("{%- if add_gen", "{{ '<|endoftext|>' if not add_generation_prompt }}{%- if add_gen")
TOOL_CALLS = (
    "{%- if tools -%}{{ tools | tojson }}{%- endif -%}{%- for m in messages -%}<|im_start|>{{ m.role + '\n' }}"
    "{{ m.content or '' }}{%- for call in m.tool_calls or [] -%}"
    "<call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</call>{%- endfor -%}"
    "<|im_end|>{{ '\n' }}{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
)
FIRST_CALL = TOOL_CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")  # no other is shown (gpt-oss)
NO_SYSTEM = PLAIN.replace("- for message in messages -", "- for message in messages if message.role != 'system' -")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def turns(*texts: str) -> list[dict]:
    """Return messages of user and assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def call(arguments: object, content: str | None = None) -> dict:
    """Return an assistant's message that calls a tool."""
    made = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [made]}


def chat_template(folder: Path, text: str, **options) -> ChatTemplate:
    tokenizer(text).save_pretrained(folder)
    return ChatTemplate(folder, **options)


def prepared(template: ChatTemplate, messages: list[dict], max_length: int = 4096, **row) -> PreparedConversation:
    """Return what a row becomes. Raises Unusable where it cannot be used."""
    made = parse_record({"messages": messages, **row}, "a.jsonl", 1)
    found = SampleMaker(template).prepare([made], max_length)[0]
    if isinstance(found, Unusable):
        raise found
    return found


def supervised(template: ChatTemplate, found: PreparedConversation) -> list[list[tuple[str, str]]]:
    """Return of each sample the supervised stretches, each as the text before it and its own."""
    samples = []
    for sample in found.samples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.mask.astype(int), [0]]))).reshape(-1, 2)
        decode = template.tokenizer.decode
        samples.append([(decode(sample.ids[:start]), decode(sample.ids[start:stop])) for start, stop in edges])
    return samples


def replies(template: ChatTemplate, found: PreparedConversation) -> list[list[str]]:
    """Return of each sample the supervised stretches."""
    return [[reply for _, reply in sample] for sample in supervised(template, found)]


def prepared_here(
    rows: Iterable[Conversation | RejectedRecord], target: Path, max_length: int, tally: Tally, vocab_size: int
) -> Iterator[PlannedSample]:
    """Yield the samples of rows, in order, without worker processes; whatever is left out goes into the tally."""
    preparer = RecordPreparer(Job(target, max_length, vocab_size))
    for row in rows:
        tally.records += 1
        for outcome in preparer.outcomes([row]):
            yield from samples_of(outcome, tally)
