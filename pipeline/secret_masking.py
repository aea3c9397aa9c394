"""Mask secrets in text that is written down or printed: command lines, requests, error messages.

Masked by `***` are the values of options and fields whose name says so (--api-key X, --hf-token=X, password: X,
"token": "X"), of HTTP's Authorization, the user and password of a URL, the forms in which known services issue keys,
and wherever they occur the values of environment variables such as OPENAI_API_KEY and PGPASSWORD. Words, paths and
special tokens (eos_token=</s>) stay as they are.
"""

import os
import re
from collections.abc import Mapping, Sequence

MASK = "***"
# Special tokens are no secrets.
_SPECIAL = "eos|bos|pad|unk|mask|sep|cls|stop|start|end|special|image|video|audio|vision"
_TOKEN = "".join(f"(?<!{word}[-_])" for word in _SPECIAL.split("|")) + "token"
_KEY = r"(?:(?:api|access|secret|private)[-_]?key|passw(?:or)?d|passphrase)"
# The last word of a name. `mask_token_id`, `--batch-tokens` and `--api-key-env`, a variable's name, are none.
_WORD = rf"(?:{_KEY}|{_TOKEN}|secret|credentials?)"
_NAMED = re.compile(rf"(?:^|[-_.]){_WORD}$", re.IGNORECASE)
_VARIABLE = re.compile(rf"(?:{_KEY}|(?:^|_)(?:token|secret|credential|pass))S?$", re.IGNORECASE)
_RANDOM = re.compile(r"(?=.{8})(?=.*\d|(?=.*[a-z]).+[A-Z])", re.DOTALL)  # no word: a digit, or capitals within
_ASSIGNED = re.compile(
    rf"""(?P<name>{_WORD}(?:=|["']\s*:\s*)|(?<![\w-])--[\w-]{{0,40}}{_WORD}\s+|{_KEY}[ \t]?[:=][ \t]*"""
    # "the first token: 5" is prose.
    rf"""|{_WORD}[ \t]?[:=][ \t]*(?=["']?[^\s,;&"']{{8}})(?=\S{{0,99}}\d|(?-i:(?=\S{{0,99}}[a-z])\S{{1,99}}[A-Z])))"""
    r"""(?:"[^"]*"|'[^']*'|[^\s,;&"']+)""",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(
    r"""(?P<name>\bauthorization["']?\s*[:=]\s*["']?(?:(?:basic|bearer|digest|token)\s+)?)[^\s"',;]+""", re.IGNORECASE
)
# Up to the last @: a password may hold @ and /. https://host:80/a@b and https://host/a@b name no user.
_URL_USER = re.compile(
    r"""(?<=://)(?:[^\s"'`/?#@]{1,999}@(?:[^\s"'`]{0,999}@)?"""
    r"""|(?!\[)[^\s"'`/?#@:]{0,99}:(?!\d{1,5}[/?#,;)])[^\s"'`]{0,999}@)"""
)
_ISSUED = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{34,}|gh[oprsu]_[A-Za-z0-9]{36,}|github_pat_\w{82}|glpat-[\w-]{20,}|xox[abeprs]-\d[\w-]{16,}"
    r"|sk-(?:(?:admin|ant|or|proj|svcacct)-[\w-]{20,}|[A-Za-z0-9]{32,})|(?:AKIA|ASIA)[A-Z0-9]{16})(?!\w)"
    r"|(?<=Bearer )\S+|(?<=Basic )(?=[A-Za-z0-9+/]*(?:\d|[a-z][A-Za-z0-9+/]*[A-Z]))[A-Za-z0-9+/]{8,}={0,2}"
)


def masked(text: object, environment: Mapping[str, str] = os.environ) -> str:
    """Return text with every secret masked."""
    text = str(text)
    values = {value for name, value in environment.items() if _VARIABLE.search(name) and _RANDOM.match(value)}
    for value in sorted(values, key=len, reverse=True):  # one may be part of another
        text = text.replace(value, MASK)
    text = without_url_users(text)
    text = _ISSUED.sub(MASK, text)
    text = _AUTHORIZATION.sub(rf"\g<name>{MASK}", text)
    return _ASSIGNED.sub(rf"\g<name>{MASK}", text)


def without_url_users(text: str) -> str:
    """Return text with the user and password of every URL masked, and nothing else: paths stay what they are."""
    return _URL_USER.sub(f"{MASK}@", text)


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
