"""Text from others, as it may be printed: what would act on a terminal, or hide, is written out.

A corpus, a file's name or an imported record may hold escape sequences (they recolour, clear or retitle a terminal, or
answer in its user's name), line breaks, and marks that turn the direction of writing. None of them may reach a
terminal, a card or a table.
"""

import re

# Controls of ASCII and Latin-1, line and paragraph separators, marks of direction, invisible spaces, half surrogates.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")


def visible(text: str) -> str:
    """Return the text on one line, with whatever acts on a terminal or cannot be seen as its escape: \\x1b, \\u202e."""
    return _UNSEEN.sub(lambda found: _escape(found[0]), text)


def _escape(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
