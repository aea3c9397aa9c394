"""The tables of docs/presets.md and docs/why-offline.md are what docs/cost_table.py prints.

Of the long one, a row of the cheapest; `python docs/cost_table.py --check` computes all of it, in a quarter of an hour.
"""

import sys

import pytest
from documented_lines import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import cost_table


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return cost_table.targets(tmp_path_factory.mktemp("targets"))


def test_the_tables_of_captures_are_the_computed_ones(targets):
    assert cost_table.table_on_page("capture") == cost_table.capture_table(targets)
    assert cost_table.table_on_page("offline") == cost_table.offline_table(targets)


def test_a_row_of_trainings_is_the_computed_one_and_all_are_there(targets):
    rows = cost_table.table_on_page("training")
    cells = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows[2:]]
    assert cells == [[preset, target.name] for preset in cost_table.PRESETS for target in targets]
    (target,) = [target for target in targets if target.name == "gpt-oss-20b"]
    assert cost_table.Training(target, "domino").row() in rows
