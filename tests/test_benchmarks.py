"""The comparisons behind the README's tables run through, small: each trains and prints a table with a row for each way."""

import re
import sys

import bench_start
import pytest
from test_scripts import SMALL

from lowdino import data


def rows(printed):
    return re.findall(r"^\| (\S.*?) \|.*\d.* \|$", printed, re.MULTILINE)


def test_what_starts_it(capsys, monkeypatch):
    monkeypatch.setattr(data, "DEMO_TRAIN", 256)
    monkeypatch.setattr(data, "DEMO_TEST", 20)
    monkeypatch.setattr(bench_start, "VARIANTS", [bench_start.VARIANTS[0], bench_start.VARIANTS[4]])
    monkeypatch.setattr(sys, "argv", ["bench_start.py", "--epochs", "1"])
    bench_start.main()
    assert rows(capsys.readouterr().out)[-2:] == [
        "as it is",
        "... and depthwise filters near the mean",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags, expected",
    [
        ("bench_recipe.py", ["--archs", "mobilevit_xxs"], ["`mobilevit_xxs`", "raw pixels"]),
        (
            "bench_mvmr.py",
            ["--arch", "mobilevit_xxs"],
            ["L1", "L1 + L2 + L3", "all terms, hog alone"],
        ),
        (
            "bench_distill.py",
            ["--arch", "mobilevit_xxs", "--objectives", "similarity"],
            ["no teacher, train.py", "similarity"],
        ),
    ],
)
def test_a_table_has_a_row_for_each_way(
    script, flags, expected, picture_folder, tmp_path, run_script
):
    if script == "bench_distill.py":
        run_script(
            "train.py",
            *SMALL,
            "--data_path",
            picture_folder,
            "--epochs",
            1,
            "--output_dir",
            tmp_path / "teacher",
        )
        flags = [*flags, "--teacher", tmp_path / "teacher" / "backbone.pth"]
    done = run_script(
        f"tests/{script}",
        *flags,
        "--seeds",
        0,
        "--data_path",
        picture_folder,
        "--output_dir",
        tmp_path / "runs",
        "--",
        "--epochs",
        1,
        "--batch_size_per_gpu",
        8,
        "--device",
        "cpu",
    )
    assert set(expected) <= set(rows(done.stdout)), done.stdout
