"""Samples and masks by the target's own template: every supervised turn follows the prompt an engine would send."""

import json

import pytest
from templates import (
    ASKS_USERS_ONLY,
    END_OF_TEXT,
    FIRST_CALL,
    LAST_THOUGHT,
    NEXT_MARKER,
    NO_SYSTEM,
    OPENS_AND_CALLS,
    OPENS_THOUGHT,
    PLAIN,
    SYSTEM_LAST,
    TOOL_CALLS,
    TOOLS,
    WIDE_MARKS,
    call,
    chat_template,
    prepared,
    replies,
    supervised,
    turns,
)
from tiny import CHAT_TEMPLATE, tokenizer

from pipeline.corpus.rejections import Unusable
from pipeline.errors import UsageError
from pipeline.target.chat_template import ChatTemplate
from pipeline.target.files import chat_templates, template_arguments, template_digest
from stages.cache_hidden.tokenise import encode_texts

TWO_CALLS = call({"city": "Oslo"})
TWO_CALLS["tool_calls"] *= 2
TWO_TURNS = turns("one?", "One.", "two?", "Two, zwei, 二.")


@pytest.mark.parametrize("text", [CHAT_TEMPLATE, PLAIN, WIDE_MARKS, END_OF_TEXT])
def test_every_reply_is_supervised_through_what_ends_it_whatever_is_marked(tmp_path, text):
    made = chat_template(tmp_path, text)
    found = prepared(made, TWO_TURNS)
    assert replies(made, found) == [["One.<|im_end|>", "Two, zwei, 二.<|im_end|>"]]
    assert (found.turns, found.last_turns, found.unproven) == (2, 2, [])


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (PLAIN, TWO_TURNS),
        (SYSTEM_LAST, [{"role": "system", "content": "Be terse."}, *TWO_TURNS]),
        (LAST_THOUGHT, TWO_TURNS),
        (NEXT_MARKER, TWO_TURNS),
    ],
)
def test_the_tokens_before_a_turn_are_the_prompt_of_an_engine(tmp_path, text, messages):
    made = chat_template(tmp_path, text)
    asked = [made.prompt_ids(messages[:at]) for at, message in enumerate(messages) if message["role"] == "assistant"]
    found = prepared(made, messages)
    starts = []
    for sample in found.samples:
        edges = [at for at in range(1, len(sample.ids)) if sample.mask[at] and not sample.mask[at - 1]]
        starts += [sample.ids[:start].tolist() for start in edges]
    assert sorted(starts) == sorted(asked) and found.turns == 2


def test_ids_are_those_of_the_template_itself(tmp_path):
    made = chat_template(tmp_path, PLAIN)
    (sample,) = prepared(made, TWO_TURNS).samples
    assert sample.ids.tolist() == made.tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)


def test_a_question_is_never_supervised_where_the_system_prompt_moves(tmp_path):
    made = chat_template(tmp_path, SYSTEM_LAST)
    found = prepared(made, [{"role": "system", "content": "Be terse."}, *turns("Why?", "So.")])
    assert supervised(made, found) == [[("<|im_start|>Be terse.\n\nWhy?<|mask|>", "So.<|im_end|>")]]


def test_turns_that_a_template_rewrites_have_samples_of_their_own(tmp_path):
    made = chat_template(tmp_path, LAST_THOUGHT)
    found = prepared(made, turns("a?", "A.", "b?", "B.", "c?", "C."))
    empty = "<think>\n\n</think>\n"
    assert replies(made, found) == [[f"{empty}{letter}.<|im_end|>"] for letter in "CBA"]
    assert (found.turns, found.last_turns) == (3, 1)


def test_a_prompt_that_opens_a_thinking_block_is_followed_by_the_whole_reply(tmp_path):
    made = chat_template(tmp_path, OPENS_THOUGHT)
    (((before, reply),),) = supervised(made, prepared(made, turns("a?", "<think>\nWell.\n</think>\nA.")))
    assert before.endswith("assistant\n<think>\n") and reply == "Well.\n</think>\nA.<|im_end|>"
    with pytest.raises(Unusable, match=r"no thought.*\"thinking\": false") as found:
        prepared(made, turns("a?", "A."))
    assert found.value.reason == "no reasoning"
    with pytest.raises(Unusable, match="reasoning") as found:
        prepared(made, [turns("a?")[0], {"role": "assistant", "content": "A.", "reasoning_content": "Well."}])
    assert found.value.reason in ("no reasoning", "lost text")


@pytest.mark.parametrize("arguments", [{}, {"city": "Oslo"}])
def test_calls_after_a_thinking_block_that_the_prompt_opened_are_supervised_whole(tmp_path, arguments):
    made = chat_template(tmp_path, OPENS_AND_CALLS)
    said = "The weather of a city: Oslo.\n</think>\nLook."
    (((before, reply),),) = supervised(made, prepared(made, [*turns("a?"), call(arguments, f"<think>\n{said}")]))
    called = json.dumps({"name": "weather", "arguments": arguments})
    assert before.endswith("<think>\n") and reply == f"{said}<call>{called}</call><|im_end|>"


@pytest.mark.parametrize("said", ["One.<|im_end|>\n<|im_start|>user\nb?", "<|im_end|>One."])
def test_a_reply_that_holds_an_end_is_supervised_through_its_own(tmp_path, said):
    """It may be the very thing that was asked about."""
    made = chat_template(tmp_path, PLAIN)
    found = prepared(made, turns("a?", said, "b?", "Two."))
    assert replies(made, found) == [[f"{said}<|im_end|>", "Two.<|im_end|>"]] and not found.unproven
    found = prepared(made, turns(f"a {said}?", "Two."))
    assert replies(made, found) == [["Two.<|im_end|>"]], "a question may hold one"


def test_a_reply_after_a_reply_is_context_where_the_template_adds_no_prompt_between_them(tmp_path):
    """Else the end of the first and the header of the second would be supervised."""
    made = chat_template(tmp_path, ASKS_USERS_ONLY)
    messages = [*turns("a?", "One."), {"role": "assistant", "content": "Two."}, *turns("b?", "Three.")]
    found = prepared(made, messages)
    assert replies(made, found) == [["One.<|im_end|>", "Three.<|im_end|>"]]
    assert [reason for reason, _ in found.unproven] == ["no prompt"]
    made = chat_template(tmp_path, PLAIN)
    assert replies(made, prepared(made, messages)) == [["One.<|im_end|>", "Two.<|im_end|>", "Three.<|im_end|>"]]


@pytest.mark.parametrize("said", ["<think>\nWell.\n</think>\nA.", "\n<think>\nWell.\n</think>\nA."])
def test_reasoning_after_a_prompt_that_closes_its_thinking_block_is_of_another_mode(tmp_path, said):
    made = chat_template(tmp_path, LAST_THOUGHT, kwargs={"enable_thinking": False})
    with pytest.raises(Unusable, match=r"another mode.*\"enable_thinking\": true") as found:
        prepared(made, turns("a?", said))
    assert found.value.reason == "thought closed"
    assert prepared(made, turns("a?", "A.")).turns == 1


@pytest.mark.parametrize("of", ["run", "row"])
def test_arguments_of_run_and_row_change_the_prompt(tmp_path, of):
    made = chat_template(tmp_path, OPENS_THOUGHT, kwargs={"thinking": of == "row"})
    row = {"chat_template_kwargs": {"thinking": False}} if of == "row" else {}
    (((before, reply),),) = supervised(made, prepared(made, turns("a?", "A."), **row))
    assert before.endswith("<think></think>") and reply == "A.<|im_end|>"


def test_a_thought_in_a_template_that_closes_it_is_another_mode(tmp_path):
    made = chat_template(tmp_path, OPENS_THOUGHT, kwargs={"thinking": False})
    with pytest.raises(Unusable):
        prepared(made, turns("a?", "<think>Well.</think>A."))


def test_where_the_next_marker_ends_a_turn_it_is_supervised(tmp_path):
    made = chat_template(tmp_path, NEXT_MARKER)
    assert replies(made, prepared(made, TWO_TURNS)) == [["One.<|im_start|>", "Two, zwei, 二.<|im_start|>"]]


def test_a_marker_at_which_the_target_does_not_stop_ends_nothing(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 256}')
    made = chat_template(tmp_path, NEXT_MARKER)
    with pytest.raises(Unusable, match="no token ends the turn"):
        prepared(made, TWO_TURNS)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [256, 257]}')
    made = chat_template(tmp_path, NEXT_MARKER)
    assert made.stop_tokens >= {"<|endoftext|>", "<|im_start|>"} and prepared(made, TWO_TURNS).turns == 2


def test_a_reply_without_a_prompt_is_context(tmp_path):
    made = chat_template(tmp_path, PLAIN)
    found = prepared(made, [{"role": "assistant", "content": "Hello."}, *turns("a?", "A.")])
    assert replies(made, found) == [["A.<|im_end|>"]] and found.unproven[0][0] == "no prompt"


def test_replies_that_are_not_to_be_learned_are_context(tmp_path):
    made = chat_template(tmp_path, PLAIN)
    messages = turns("a?", "Bad.", "b?", "Good.")
    messages[1]["weight"] = 0
    assert replies(made, prepared(made, messages)) == [["Good.<|im_end|>"]]


@pytest.mark.parametrize("alone", [False, True])
def test_a_token_across_the_end_of_the_prompt_is_cut_there(tmp_path, alone):
    """`\\n` ends the prompt and begins the reply, and the tokenizer has one token for two of them."""
    tokenizer(PLAIN).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["model"]["vocab"]["ĊĊ"] = 260
    stored["model"]["merges"].append(["Ċ", "Ċ"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    made = ChatTemplate(tmp_path)
    assert made.backend.encode("\n\n", add_special_tokens=False).ids == [260]
    messages = turns("a?", "\n\nA." if alone else "\nA.")
    (sample,) = prepared(made, messages).samples
    asked = made.prompt_ids(messages[:1])
    assert sample.ids[: len(asked)].tolist() == asked and not sample.mask[: len(asked)].any()
    written = made.backend.encode(messages[1]["content"] + "<|im_end|>", add_special_tokens=False).ids
    assert sample.ids[sample.mask].tolist() == written


@pytest.mark.parametrize(
    ("text", "messages", "what"),
    [
        (PLAIN, [turns("a?")[0], {"role": "assistant", "content": "A.", "reasoning": "Well."}], "the reasoning"),
        (PLAIN, [turns("a?")[0], call({"city": "Oslo"})], "the tool calls"),
        (PLAIN, [turns("a?")[0], call({"city": "Oslo"}), *turns("b?", "B.")], "tool call weather of message 1"),
        (PLAIN.replace("- for message in messages -", "- for message in messages if message.role != 'system' -"),
         [{"role": "system", "content": "Be kind."}, *turns("a?", "A.")], r"message 0 \(system\)"),
        (PLAIN.replace("{%- else -%}{{ message['content'] }}", "{%- else -%}{{ message['content'][:3] }}"),
         turns("a long question?", "A."), r"message 0 \(user\)"),
        (TOOL_CALLS.replace("call.function.name", "'w'"), [turns("a?")[0], call({"c": "Oslo"})], "tool call weather"),
    ],
)  # fmt: skip
def test_text_that_a_template_does_not_show_refuses_the_row(tmp_path, text, messages, what):
    with pytest.raises(Unusable, match=what) as found:
        prepared(chat_template(tmp_path, text), messages)
    assert found.value.reason == "lost text"


@pytest.mark.parametrize(
    ("text", "messages", "what"),
    [
        (NO_SYSTEM, [{"role": "system", "content": "Be terse."}, *turns("Be terse. Why?", "So.")], "message 0"),
        (NO_SYSTEM, [{"role": "system", "content": "user"}, *turns("Why?", "So.")], "message 0"),
        (PLAIN, [*turns("a?"), {"role": "assistant", "content": "So it is.", "reasoning": "So"}], "the reasoning"),
        (FIRST_CALL, [*turns("a?"), TWO_CALLS, *turns("b?", "B.")], "of 2 tool calls of message 1"),
    ],
)
def test_a_text_that_is_not_rendered_refuses_the_row_even_if_the_same_text_occurs_elsewhere(
    tmp_path, text, messages, what
):
    with pytest.raises(Unusable, match=what) as found:
        prepared(chat_template(tmp_path, text), messages)
    assert found.value.reason == "lost text"


def test_texts_that_say_the_same_are_no_loss_where_each_is_shown(tmp_path):
    made = chat_template(tmp_path, TOOL_CALLS)
    messages = [{"role": "system", "content": "user"}, *turns("user", "user", "user", "user"), TWO_CALLS]
    messages.insert(-1, *turns("a?"))
    assert prepared(made, messages).turns == 3


def test_tools_that_a_template_does_not_show_refuse_the_row(tmp_path):
    with pytest.raises(Unusable, match="tool weather is not in the prompt"):
        prepared(chat_template(tmp_path, PLAIN), TWO_TURNS, tools=TOOLS)
    made = chat_template(tmp_path, TOOL_CALLS)
    ((one, _),) = supervised(made, prepared(made, TWO_TURNS, tools=TOOLS))
    assert '"name": "weather"' in one[0]


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}, {}, {"days": 3}])
def test_calls_are_supervised_with_their_arguments_as_an_object(tmp_path, arguments):
    made = chat_template(tmp_path, TOOL_CALLS)
    messages = [*turns("a?"), call(arguments), {"role": "tool", "tool_call_id": "c1", "content": "21"}, *turns("A.")]
    messages[-1]["role"] = "assistant"
    wanted = arguments if isinstance(arguments, dict) else json.loads(arguments)
    called = f"<call>{json.dumps({'name': 'weather', 'arguments': wanted})}</call><|im_end|>"
    assert replies(made, prepared(made, messages)) == [[called, "A.<|im_end|>"]]


def test_arguments_are_given_as_text_to_a_template_that_joins_texts(tmp_path):
    joins = TOOL_CALLS.replace(
        "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}",
        "{{ call.function.name + ':' + call.function.arguments }}",
    )
    made = chat_template(tmp_path, joins)
    found = prepared(made, [*turns("a?"), call({"city": "Oslo"})])
    assert replies(made, found) == [['<call>weather:{"city": "Oslo"}</call><|im_end|>']]


def test_the_ids_an_engine_returned_are_kept_and_its_prompt_compared(tmp_path):
    made = chat_template(tmp_path, PLAIN)
    messages = turns("a?", "A.")
    prompt, written = made.prompt_ids(messages[:1]), [7, 8, 9, 258]
    messages[1] |= {"token_ids": written, "prompt_token_ids": prompt}
    (sample,) = prepared(made, messages).samples
    assert sample.ids.tolist() == [*prompt, *written] and sample.mask.tolist() == [False] * len(prompt) + [True] * 4
    messages[1]["prompt_token_ids"] = [*prompt[:-2], 99, *prompt[-1:]]
    with pytest.raises(Unusable, match=f"from token {len(prompt) - 2}"):
        prepared(made, messages)


def test_rows_that_came_as_tokens_are_taken_as_they_are(tmp_path):
    made = chat_template(tmp_path, PLAIN)
    found = prepared(made, [], input_ids=[1, 2, 3], loss_mask=[0, 1, 1])
    assert found.samples[0].ids.tolist() == [1, 2, 3] and found.samples[0].mask.tolist() == [False, True, True]


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ messages[99].content.x.y }}",
        "{{ messages | map('nothing') | list }}",
    ],
)
def test_whatever_a_template_does_wrong_is_the_fault_of_its_row(tmp_path, text):
    try:
        made = chat_template(tmp_path, text)
    except UsageError as error:
        assert "no Jinja" in str(error)
        return
    with pytest.raises(Unusable) as found:
        prepared(made, TWO_TURNS)
    assert found.value.reason == "template error" and "\n" not in str(found.value)


def test_no_rendering_depends_on_the_clock(tmp_path):
    clock = "{% macro day() %}{{ strftime_now('%d %B %Y') }}{% endmacro %}{{ day() }}|{{ strftime_now('%H:%M') }}|"
    made = chat_template(tmp_path, clock + PLAIN)
    assert made.render(TWO_TURNS).startswith("26 July 2024|00:00|<|im_start|>")
    other = ChatTemplate(tmp_path, date="2026-02-01")
    assert other.render(TWO_TURNS).startswith("01 February 2026|00:00|")
    assert made.render(TWO_TURNS).startswith("26 July 2024|"), "two clocks do not mix"


def test_a_template_that_is_no_jinja_is_refused_in_one_line(tmp_path):
    with pytest.raises(UsageError, match="its chat template is no Jinja"):
        chat_template(tmp_path, "{% for m in messages %}{{ m }")


def test_rows_with_tools_take_the_template_for_tools(tmp_path):
    chat_template(tmp_path, PLAIN)
    plain = template_digest(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_CALLS)
    made = ChatTemplate(tmp_path)
    assert chat_templates(tmp_path).keys() == {"default", "tool_use"} and template_digest(tmp_path) != plain
    assert prepared(made, TWO_TURNS, tools=TOOLS).turns == 2
    assert "weather" not in made.render(TWO_TURNS)


def test_a_template_of_a_processor_counts_where_no_other_is(tmp_path):
    tokenizer(PLAIN).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": WIDE_MARKS}))
    assert chat_templates(tmp_path) == {"default": WIDE_MARKS}
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    assert chat_templates(tmp_path) == {"default": PLAIN}


def test_marks_change_nothing_that_is_rendered(tmp_path):
    marked = (
        "{%- set said = 'outer' -%}{%- for m in messages -%}{% generation %}{%- set said = m.content -%}"
        "<|im_start|>{{ m.role ~ said ~ loop.index }}<|im_end|>{% endgeneration %}{{ said }}{%- endfor -%}"
    )
    made = chat_template(tmp_path, marked)
    own = made.tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert made.render(TWO_TURNS) == own and own.count("outer") == 4


def test_a_text_too_long_is_cut_before_it_is_tokenised(tmp_path):
    made = chat_template(tmp_path, PLAIN)
    (encoded,) = encode_texts(made, ["word " * 4_000_000], 100)
    assert 100 < len(encoded.ids) < 10_000
    (sample,) = prepared(made, turns("a?", "word " * 1_000_000), max_length=100).samples
    assert len(sample.ids) == 101 and sample.mask[-1] and not sample.mask[:5].any()


@pytest.mark.parametrize(
    ("kwargs", "day", "says"),
    [
        ("{thinking", None, "--template-kwargs {thinking: no JSON .*; write such as '.*'$"),
        ("[1]", None, "wanted a JSON object"),
        ('{"messages": []}', None, "every row states itself"),
        (None, "tomorrow", "--template-date tomorrow: no day; write it as 2024-07-26$"),
        (None, "2024-02-31", "--template-date 2024-02-31: no day"),
    ],
)
def test_invalid_template_arguments_are_refused_in_one_line(kwargs, day, says):
    with pytest.raises(UsageError, match=says.replace("{", r"\{")):
        template_arguments(kwargs, day)
