"""The tables of docs/why-offline.md are those that its script writes, and the script's arithmetic is right."""

import sys

import pytest
from documented_lines import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import offline_arithmetic as arithmetic


def test_the_page_has_the_tables_that_the_script_writes():
    page = arithmetic.PAGE.read_text()
    assert arithmetic.with_tables(page) == page, "run `python docs/offline_arithmetic.py`"


def test_a_token_takes_what_its_numbers_take():
    assert arithmetic.token_bytes("Qwen3-8B", "raw") == pytest.approx(5.5 * 4096 * 2, rel=1e-3)
    assert arithmetic.token_bytes("Qwen3-4B", "raw") == pytest.approx(5.5 * 2560 * 2, rel=1e-3)
    for codec, share in (("zstd", 0.69), ("int8", 0.51), ("int6", 0.39)):
        raw = arithmetic.token_bytes("Qwen3-8B", "raw")
        assert arithmetic.token_bytes("Qwen3-8B", codec) == pytest.approx(share * raw, rel=0.02)


def test_a_cache_breaks_even_after_as_many_passes_as_its_capture_costs():
    assert arithmetic.saved(0.35, 1.0, 1) == 0
    assert arithmetic.saved(0.35, 2.0, 1) == pytest.approx(-0.35)
    assert arithmetic.saved(0.5, 1.0, 6) == pytest.approx(0.5 * 5 / 6)
    assert arithmetic.saved(0.125, 7.0, 7) == 0
