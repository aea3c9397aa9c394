"""Text from others where people read it: characters that would steer a terminal are shown, not obeyed.

A corpus, a report, a published draft or a file's name may hold escape sequences (a title, a colour, a cleared screen),
line ends that forge a line of ours, or marks that turn the order of what is read. Every command prints through here.
"""

import re

import click

# Controls (C0, DEL, C1), line and paragraph separators, halves of surrogate pairs, and format characters: bidirectional
# marks, invisible operators, tags. The joiners U+200C and U+200D stay: words and emoji are spelt with them.
_STEERS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff"
)
_ANY = re.compile(f"[\t\n{_STEERS}]")
_BUT_LAYOUT = re.compile(f"[{_STEERS}]")


def visible(text: object) -> str:
    r"""Return text as one line in which every character is visible: ESC as `\x1b`, a line end as `\n`."""
    return _ANY.sub(_escaped, str(text))


def visible_lines(text: object) -> str:
    """Return text whose line ends and tabs stay, as of a reply, and every other character is visible."""
    return _BUT_LAYOUT.sub(_escaped, str(text))


def _escaped(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode()


def say(text: object, err: bool = False) -> None:
    """Print lines of ours. A value of others in them goes through `visible` first, or its line ends stay."""
    click.echo(visible_lines(text), err=err)


_MARKS = re.compile(r"[\\`*\[\]<>~|&#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=\bwww)\.")


def in_markdown(text: object) -> str:
    """Return text as one line of Markdown that shows it, and is neither a mark, a link, HTML nor a table's edge."""
    return _MARKS.sub(lambda found: f"&#{ord(found[0])};", visible(text))


def as_code(text: object) -> str:
    """Return text as a code span of Markdown; a backtick in it, which would end the span, is shown as an apostrophe."""
    return f"`{visible(text).replace('`', chr(39))}`"
