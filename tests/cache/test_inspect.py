"""What people see of a cache and of its verification."""

from pipeline.cache.inspect import verify_table
from pipeline.visible_tables import VisibleConsole


def test_of_many_shards_that_are_not_captured_the_first_are_listed_and_of_damage_all(capsys):
    found = [{"file": f"shards/{at:06d}", "what": "not captured yet"} for at in range(5000)]
    report = {"files": 3, "bytes": 9, "damaged": found[:30], "missing": found, "foreign": [], "incomplete": []}
    VisibleConsole().print(verify_table(report))
    lines = capsys.readouterr().out.splitlines()
    assert "5000 not captured yet:" in lines and "  and 4,980 more; --json lists them" in lines
    assert len(lines) == 1 + (1 + 30) + (1 + 20 + 1)
