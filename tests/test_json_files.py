"""Files of strangers: none is followed to where it never ends."""

import os

import pytest

from pipeline.errors import first_line
from pipeline.json_files import (
    MAX_DEPTH,
    ends_with_checksum,
    parse_checksummed,
    parse_json,
    parse_strict_json,
    read_file,
    record_bytes,
    with_checksum,
)


def test_a_regular_file_is_read_up_to_a_size(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "file", 5) == read_file(tmp_path / "link", 5) == b"12345"
    with pytest.raises(ValueError, match="it has 5 bytes, and at most 4 are read"):
        read_file(tmp_path / "file", 4)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), ("/dev/zero", "a device")):
        with pytest.raises(ValueError, match=f"it is {kind} and no file"):
            read_file(path, 100)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none", 100)


@pytest.mark.parametrize("text", ["", "{", "[1,]", "NaN", '{"a": -Infinity}', b"\xff", "[" * 10**6, '{"a":' * 10**5])
def test_what_is_no_json_or_too_deep_is_a_value_error_in_one_line(text):
    with pytest.raises(ValueError) as refused:
        parse_strict_json(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 100


def test_json_is_followed_to_a_fixed_depth():
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(ValueError, match="deeper than"):
        parse_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


@pytest.mark.parametrize("text", ['{"a": 1}', '{\n "a": [\n  1\n ]\n}', '{"digests": ["0123456789abcdef"]}'])
def test_a_record_of_which_any_bit_changes_is_refused(text):
    whole = with_checksum(text, "before")
    assert parse_checksummed(whole, "before")[0] == parse_checksummed(text.encode())[0] and not ends_with_checksum(
        text.encode()
    )
    for bit in range(8 * (len(whole) - 1)):  # what comes after its last brace is no part of it
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            parse_checksummed(bytes(changed), "before")
        assert ends_with_checksum(bytes(changed))
    with pytest.raises(ValueError):
        parse_checksummed(whole, "another line")


def test_a_record_says_what_it_was_given():
    facts = {"a": "ü\x1b", "b": [1.5, None]}
    assert parse_checksummed(record_bytes(facts))[0] == facts


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n one\n two"), "one"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 500), "x" * 160),
    ],
)
def test_an_error_of_another_library_is_quoted_by_its_first_line(error, line):
    assert first_line(error) == line
