"""The page shows the faults that the tests inject, and no others."""

from tests.faults.table import all_faults, committed


def test_the_page_has_the_rows_of_the_tests():
    expected = [f"| {f.what} | {f.stage} | {f.outcome} |" for faults in all_faults().values() for f in faults]
    rows = [row.rsplit(" | ", 1) for row in committed()]
    assert [f"{row} |" for row, _ in rows] == expected
    assert all(result.strip(" |") for _, result in rows)
