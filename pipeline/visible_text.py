"""Escape control characters in untrusted text before it is printed, so that it cannot steer a terminal.

A corpus, a report, a published draft or a file name may hold escape sequences (a title, a colour, a cleared screen),
line ends that forge a line of output, or marks that reverse the reading order. Every command prints through here, its
tables through `visible_tables.py`.
"""

import re

import click

# Controls (C0, DEL, C1), line and paragraph separators, halves of surrogate pairs, and format characters: bidirectional
# marks, invisible operators, tags; and what no XML may hold. The joiners U+200C and U+200D stay: words and emoji are
# spelt with them.
_CONTROLS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufffe\uffff\U000e0000-\U000e0fff"
)
_ANY_CONTROL = re.compile(f"[\t\n{_CONTROLS}]")
_CONTROL_BUT_LAYOUT = re.compile(f"[{_CONTROLS}]")


def visible(text: object) -> str:
    r"""Return text as one line in which every character is visible: ESC as `\x1b`, a line end as `\n`."""
    return _ANY_CONTROL.sub(_escaped, str(text))


def visible_lines(text: object) -> str:
    """Return text with its line ends and tabs, as a reply has them, and every other control character escaped."""
    return _CONTROL_BUT_LAYOUT.sub(_escaped, str(text))


def _escaped(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode()


def print_visible(text: object, err: bool = False) -> None:
    """Print text, control characters escaped but line ends kept: pass untrusted values in it through `visible`."""
    click.echo(visible_lines(text), err=err)


_MARKS = re.compile(r"[\\`*\[\]<>~|&#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=\bwww)\.")


def escape_markdown(text: object) -> str:
    """Return text as one line of Markdown with everything escaped that could be markup, a link, HTML or a cell edge."""
    return _MARKS.sub(lambda found: f"&#{ord(found[0])};", visible(text))


def markdown_code(text: object) -> str:
    """Return text as a Markdown code span; a backtick in it, which would end the span, becomes an apostrophe."""
    return f"`{visible(text).replace('`', chr(39))}`"
