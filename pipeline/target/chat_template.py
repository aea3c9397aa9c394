"""A target's chat template and tokenizer: render messages to the text and the ids that an engine would send.

Templates are untrusted programs, run in a sandbox. Their output must not depend on the clock, or the same command gives
other samples tomorrow: they get a fixed date as today's.

    T tokens
"""

import re
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from pipeline.corpus.rejections import Unusable
from pipeline.errors import UsageError, first_line, refuse_limit
from pipeline.target.files import TEMPLATE_DATE, chat_templates, stop_ids

# What a template may raise while rendering; it rejects the row. Any of Python's own errors is possible.
RENDERING_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, NameError, TypeError)
RENDERING_ERRORS += (ValueError, RecursionError, AssertionError, NotImplementedError)
THOUGHT = "reasoning_content"
INTERNAL_KEYS = frozenset(("supervise", "token_ids", "prompt_token_ids", THOUGHT))  # not passed to templates
REASONING_NAMES = (THOUGHT, "reasoning", "thinking")  # the keys under which templates look for a message's reasoning
THINKING_SWITCHES = ("enable_thinking", "thinking")  # template variables that turn thinking on and off
TOOL_USE = "tool_use"  # the name of the template for rows with tools, where a target has several


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the target's tokenizer, without any model code. UsageError when its files are damaged or incomplete."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_limit(folder, error)
        cause = first_line(error)
        if "trust_remote_code" in cause:
            raise UsageError(
                f"{folder}: its tokenizer or config is code of its own, and code that comes with a model is never run; "
                "take a target that transformers itself knows"
            ) from error
        raise UsageError(f"{folder}: its tokenizer cannot be loaded ({cause}); fetch its files again") from error


class ChatTemplate:
    """The target's tokenizer and chat templates, with their arguments and date.

    kwargs: the template's arguments for the whole run; a row's own take precedence. date: what the template gets as
    today. Raises UsageError for a tokenizer that cannot map tokens to characters, and for a template that is no Jinja.
    """

    def __init__(self, folder: Path, kwargs: Mapping | None = None, date: str = TEMPLATE_DATE):
        self.folder, self.kwargs, self.date = folder, dict(kwargs or {}), date
        self.tokenizer = load_tokenizer(folder)
        if not self.tokenizer.is_fast:
            raise UsageError(f"{folder}: its tokenizer cannot map tokens to characters; add a tokenizer.json")
        self.backend = self.tokenizer.backend_tokenizer
        self._special = dict(self.tokenizer.special_tokens_map)
        self.cached_ids: dict[str, list[int]] = {}  # of texts that recur often, the ends of prompts
        self._matchers: dict[frozenset[str], re.Pattern] = {}
        self.needs_offsets = False  # whether the previous batch of texts needed character offsets
        today = datetime.fromisoformat(date)
        self._texts = chat_templates(folder)
        self._compiled = {name: _compile(folder, text, today) for name, text in self._texts.items()}

    @cached_property
    def added(self) -> dict[int, str]:
        """The added tokens by id. Text is split at them first, so what precedes one does not affect its encoding."""
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}

    @cached_property
    def is_added(self) -> np.ndarray:
        """Which ids are of added tokens, bool [V]."""
        is_added_V = np.zeros(max(len(self), *self.added, 0) + 1, bool)
        is_added_V[[*self.added]] = True
        return is_added_V

    @cached_property
    def added_tokens_are_plain(self) -> bool:
        """Whether no added token takes in white space around it, or matches whole words only."""
        tokens = self.backend.get_added_tokens_decoder().values()
        return not any(token.lstrip or token.rstrip or token.single_word for token in tokens)

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of the unknown token, None where there is none."""
        return self.tokenizer.unk_token_id

    @cached_property
    def added_token_pattern(self) -> re.Pattern:
        """Matches any added token that is more than white space, the longest first."""
        return self.matcher(frozenset(content for content in self.added.values() if content.strip()))

    def matcher(self, texts: frozenset[str]) -> re.Pattern:
        """Return a pattern that matches any of the texts, the longest first."""
        if texts not in self._matchers:
            if len(self._matchers) > 1024:
                self._matchers.clear()
            longest_first = sorted(texts, key=len, reverse=True)
            self._matchers[texts] = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        return self._matchers[texts]

    @cached_property
    def stop_tokens(self) -> frozenset[str]:
        """The tokens at which the target stops: its generation config's, and the tokenizer's end of sequence."""
        return frozenset(token for token in (self.tokenizer.eos_token, *self.generation_stops) if token)

    @cached_property
    def generation_stops(self) -> list[str]:
        """The stop tokens that the target's generation config names."""
        return [self.tokenizer.convert_ids_to_tokens(i) for i in stop_ids(self.folder) if 0 <= i < len(self)]

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def variables(self, tools: bool = False) -> set[str]:
        """Return the names of the variables that a template reads."""
        name = self._template_name(tools)
        return find_undeclared_variables(self._compiled[name].environment.parse(self._texts[name]))

    def thinking_switch(self) -> str | None:
        """Return the name of the template's argument that turns thinking on and off; None where it has none."""
        return next((name for name in THINKING_SWITCHES if name in self.variables()), None)

    def render(
        self, messages: list[dict], tools: list[dict] | None = None, *, prompt: bool = False, kwargs: dict | None = None
    ) -> str:
        """Return messages as text, with the generation prompt after them if `prompt`.

        Raises Unusable where the template refuses them, or fails.
        """
        try:
            return self._compiled[self._template_name(bool(tools))].render(
                messages=[_for_template(message) for message in messages],
                tools=tools or None,
                documents=None,
                add_generation_prompt=prompt,
                **{**self._special, **self.kwargs, **(kwargs or {})},
            )
        except RENDERING_ERRORS as error:
            cause = first_line(error, 120)
            if not isinstance(error, TemplateError):
                cause = f"{type(error).__name__}: {cause}"
            raise Unusable("template error", f"the chat template refuses it ({cause})") from error

    def prompt_ids(
        self, messages: list[dict], tools: list[dict] | None = None, kwargs: dict | None = None
    ) -> list[int]:
        """Return the ids that an engine would send to get the next reply. Raises Unusable as `render` does."""
        text = self.render(messages, tools, prompt=True, kwargs=kwargs)
        return self.backend.encode(text, add_special_tokens=False).ids

    def _template_name(self, tools: bool) -> str:
        return TOOL_USE if tools and TOOL_USE in self._compiled else "default"


def _for_template(message: dict) -> dict:
    """Return a message for templates: its reasoning under every name they use, without our own keys."""
    if INTERNAL_KEYS.isdisjoint(message):
        return message
    visible = {key: value for key, value in message.items() if key not in INTERNAL_KEYS or key == THOUGHT}
    thought = visible.get(THOUGHT)
    return visible | dict.fromkeys(REASONING_NAMES, thought) if thought else visible


class IgnoreGenerationTag(Extension):
    """A Jinja extension that ignores `{% generation %}` tags, which are not needed here and take time.

    Variables set inside the tag stay local to it, as with transformers' own extension.
    """

    tags = frozenset(("generation",))
    priority = 200  # after transformers' own, whose tag it overrides

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)


def _compile(folder: Path, text: str, today: datetime) -> Template:
    """Compile a template, with a fixed date for `strftime_now`. UsageError when it is no Jinja."""
    try:
        environment = _compile_jinja_template(text).environment
        environment.add_extension(IgnoreGenerationTag)
        template = environment.from_string(text, globals={"strftime_now": today.strftime})
        template.globals = dict(template.globals)  # was a ChainMap, which every rendering would copy item by item
        return template
    except (TemplateError, RecursionError) as error:
        raise UsageError(
            f"{folder}: its chat template is no Jinja ({error}); fetch the target's files again"
        ) from error
