"""scripts/benchmark_data.py in small: it runs, and counts what it should."""

import re

import pytest

from scripts import benchmark_data


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "json"])
def test_the_second_start_finds_the_rows_checked(tmp_path, capfd, form):
    flags = ["--form", form, "--rows", "300", "--num_workers", "1", "--seconds", "1", "--work_dir", str(tmp_path)]
    benchmark_data.main(flags)
    lines = [line for line in capfd.readouterr().out.splitlines() if "start: " in line]
    assert len(lines) == 2
    for line, which in zip(lines, ("first", "second")):
        expected = rf"{which} start: \d+ s to the first batch of 300 rows \(30 of text only\); .* GB of mapped"
        assert re.match(expected, line), line
    benchmark_data.main(flags)  # again on the same file
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == [f"300.{form}"]
