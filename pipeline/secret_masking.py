"""Mask secrets in text that is written down or printed: command lines, requests, error messages.

Masked by `***` are the values of options and fields whose name says so (--api-key X, --hf-token=X, password=X,
"token": "X"), the user and password of a URL, the forms in which known services issue keys, and wherever they occur
the values of environment variables such as OPENAI_API_KEY and HF_TOKEN.
"""

import os
import re
from collections.abc import Mapping, Sequence

MASK = "***"
SHORTEST = 6  # characters of a variable's value that is sought in text: shorter ones are words, or 0 and 1
# The last word of a name. `mask_token_id`, `--batch-tokens` and `--api-key-env`, a variable's name, are none.
_KEYS = r"(?:api|access|secret|private)[-_]?key"
_WORD = rf"(?:{_KEYS}|token|secret|passw(?:or)?d|passphrase|credentials?)"
_NAMED = re.compile(rf"(?:^|[-_.]){_WORD}$", re.IGNORECASE)
_VARIABLE = re.compile(rf"(?:^|_){_WORD}S?$|_KEY$|_PASS$", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"""(?P<name>[\w.-]{{0,40}}{_WORD}(?:=|["']\s*:\s*)|--[\w-]{{0,40}}{_WORD}\s+)"""
    r"""(?P<value>"[^"]*"|'[^']*'|[^\s,;&"']+)""",
    re.IGNORECASE,
)
_URL_USER = re.compile(r"(?<=://)[^\s/@?#]+@")
_ISSUED = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{12,}|(?<=Bearer )\S+")


def masked(text: object, environment: Mapping[str, str] = os.environ) -> str:
    """Return text with every secret masked."""
    text = str(text)
    for name, value in environment.items():
        if len(value) >= SHORTEST and _VARIABLE.search(name):
            text = text.replace(value, MASK)
    text = _URL_USER.sub(f"{MASK}@", text)
    text = _ISSUED.sub(MASK, text)
    return _ASSIGNED.sub(lambda found: found["name"] + MASK, text)


def masked_command(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return a command line with every secret masked, word by word."""
    shown, hide = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide:
            shown.append(MASK)
        elif equals and _NAMED.search(name):
            shown.append(f"{masked(name, environment)}={MASK}")
        else:
            shown.append(masked(argument, environment))
        hide = argument.startswith("-") and not equals and _NAMED.search(argument) is not None and not hide
    return shown
