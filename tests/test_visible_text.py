"""What is printed of others' text: nothing of it reaches a terminal as a command."""

import unicodedata

import pytest

from pipeline.visible_text import visible, visible_lines

STEERING = ["\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\r", "\b", "\x7f", "\x00", "\u2028", "\u202e", "\ufeff"]


@pytest.mark.parametrize("text", STEERING)
def test_what_would_steer_a_terminal_is_shown_instead(text):
    for shown in (visible(f"a{text}b"), visible_lines(f"a{text}b")):
        assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b")


def test_every_control_character_has_its_own_name():
    controls = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cs", "Zl", "Zp")]
    shown = [visible(control) for control in controls]
    assert all(text.isascii() and text.isprintable() for text in shown) and len(set(shown)) == len(controls)


def test_a_name_is_one_line_and_a_reply_keeps_its_own():
    assert visible("a\nb\tc\r\n") == "a\\nb\\tc\\r\\n"
    assert visible_lines("a\nb\tc\r\n") == "a\nb\tc\\r\n"


@pytest.mark.parametrize("text", ["plain", "Grüße, 世界", "می‌خواهم", "👩‍🔬 🏳️‍🌈", "[red]a[/red] | `b` <i>\\x1b"])
def test_words_of_every_language_and_marks_of_every_kind_stay_as_they_are(text):
    assert visible(text) == visible_lines(text) == text
