"""The comparisons behind the tables of RESULTS.md run through, small: each trains and prints a
table, a row for each way."""

import re
import sys
from xml.etree import ElementTree

import bench_dense
import bench_papers
import bench_probe
import bench_start
import pytest
import torch
import whole_runs
from runs import options, small

from lowdino import demo, evaluate
from lowdino.pictures import draw_curves, ticks


def rows(printed):
    return re.findall(r"^\| (\S.*?) \|.*\d.* \|$", printed, re.MULTILINE)


@pytest.mark.slow
def test_what_starts_it(capsys, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN", 256)
    monkeypatch.setattr(demo, "TEST", 20)
    monkeypatch.setattr(bench_start, "VARIANTS", [bench_start.VARIANTS[0], bench_start.VARIANTS[4]])
    monkeypatch.setattr(sys, "argv", ["bench_start.py", "--epochs", "1"])
    bench_start.main()
    expected = ["as it is", "... and depthwise filters near the mean"]
    assert rows(capsys.readouterr().out)[-2:] == expected


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "emp"])
def test_a_training_is_timed_between_bare_passes(preset, tmp_path):
    run = "mobilevit_xxs", 32, 8, tmp_path, torch.device("cpu")
    row = whole_runs.measure_train(whole_runs.training_flags(*run, preset=preset), 24)
    assert [record["step"] for record in whole_runs.logged(tmp_path)] == [10, 20, 24]
    assert 0 < row["train_images_per_s"] and 0 < row["floor_images_per_s"]
    # A step is more than its passes; a patch dictionary is much beside 8 images, and other
    # programs may have slowed either.
    assert 0.1 < row["train_over_floor"] < 1.5


@pytest.mark.slow
def test_what_a_recipe_gives_for_the_time(picture_folder, tmp_path, run_script):
    flags = "--archs mobilevit_xxs mobilevit_xxs:mobilevit_xxs --minutes 0.2 --seeds 0"
    flags = options(flags, data_path=picture_folder, output_dir=tmp_path)
    printed = run_script("tests/bench_recipe.py", *flags, "--device", "cpu").stdout
    found = rows(printed)
    assert found[-4:-2] == ["`mobilevit_xxs`", "`mobilevit_xxs:mobilevit_xxs`"]
    assert found[-2:] == ["mobilevit_xxs, random weights", "raw pixels"]
    # The teacher's end; each run has a plan, which is said again where it is corrected.
    assert printed.count("epochs in 0.13 minutes") == 1 and printed.count("plan: ") >= 3
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")


def test_curves_are_drawn_on_their_axes():
    curves = {"one": {1: 0.31, 10: 0.5, 100: 0.69}, "raw pixels": {1: 0.35, 10: 0.35, 100: 0.35}}
    picture = ElementTree.fromstring(
        draw_curves(curves, "minutes", "k-NN accuracy", logarithmic=True)
    )
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in picture.iter() if c.get("cx")]
    # From 0.3, at 340, to 0.7, at 40; minutes by their logarithm.
    assert dots[:3] == [(60, 332.5), (300, 190), (540, 47.5)]
    assert ticks(0.31, 0.69) == [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7]
    assert ticks(0, 312) == [0, 50, 100, 150, 200, 250, 300, 350] and ticks(2, 2) == [2]
    assert ticks(0, 9.5) == [0, 2, 4, 6, 8, 10]
    words = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert {"0.3", "0.7", "1", "10", "100", "one", "raw pixels"} <= set(words)


def test_what_a_pyramid_costs(monkeypatch, capsys):
    flags = "--archs mobilevit_xxs resnet5m --image_size 32 --batch_size 2 --rounds 1 --device cpu"
    monkeypatch.setattr(sys, "argv", ["bench_dense.py", *options(flags)])
    bench_dense.main()
    assert rows(capsys.readouterr().out) == ["`mobilevit_xxs`", "`resnet5m`"]


@pytest.mark.slow
def test_where_the_time_goes(tmp_path, run_script):
    flags = "--archs mobilevit_xxs --sizes 32 --batch 32 --repeats 1 --steps 20 --device cpu"
    flags = options(flags, output_dir=tmp_path)
    printed = run_script("tests/bench_speed.py", *flags, timeout=900).stdout
    headings = re.findall(r"^\| (.*) \|\n\|(?:---\|)+$", printed, re.MULTILINE)
    assert len(headings) == 7 and "k-NN, 50,000 x 10,000 x 640: " in printed
    assert (tmp_path / "speed.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--table methods --rows 6 3 --label_fraction 0.5", ["`simclr`", "`byol`"]),
        ("--table terms --rows 0 6", ["L1", "L1 + L2 + L3"]),
        (
            "--table teachers --rows 1 4",
            ["EMA, and 4 local ones", "student of the step before, two views"],
        ),
        ("--table balance --rows 5 --label_fraction 0.5 --finetune", ["`moco`, balanced"]),
        ("--table distillation --rows 0 3", ["no teacher", "similarity"]),
    ],
)
def test_a_table_has_a_row_for_each_way(flags, expected, picture_folder, tmp_path, run_script):
    flags = options(flags, data_path=picture_folder, output_dir=tmp_path / "runs")
    if "distillation" in flags:
        teacher = tmp_path / "teacher"
        run_script("train.py", *small("--epochs 1", data_path=picture_folder, output_dir=teacher))
        flags += options(teacher=teacher / "backbone.pth")
    more = "--arch mobilevit_xxs --seeds 0 --epochs 1 --finetune_epochs 1 --device cpu"
    common = options("-- --batch_size_per_gpu 8")
    done = run_script("tests/bench_papers.py", *flags, *options(more), *common)
    found = rows(done.stdout)
    floors = ["`mobilevit_xxs`, random weights"] if "--label_fraction" in flags else []
    assert found[-len(expected + floors) - 1 :] == [*expected, *floors, "raw pixels"], done.stdout


def test_all_rows_of_a_table_cost_the_same():
    """Passes an image over the whole training, from the flags of its ways."""
    args = bench_papers.get_parser().parse_args(["--table", "teachers", "--epochs", "60"])
    args.teacher, args.teacher_head = "t.pth", True
    for name, table in bench_papers.TABLES.items():
        for way in table(args).values():
            parsed = dict(zip(way, way[1:]))
            local = int(parsed.get("--local_crops_number", 0))
            method = parsed.get("--method", "mvmr" if "mvmr_small" in way else "dino")
            passes = bench_papers.PASSES[method] + 3 * local
            if objective := parsed.get("--objective"):  # a student of two views, mvmr's of three
                passes = 9 if objective == "mvmr" else 6
            assert abs(int(parsed["--epochs"]) * passes - 360) <= passes / 2, (name, way)


@pytest.mark.slow
def test_what_centring_and_sharpening_are_for(picture_folder, tmp_path, run_script):
    flags = options("--arch mobilevit_xxs", data_path=picture_folder, output_dir=tmp_path)
    more = options("-- --epochs 2 --batch_size_per_gpu 8 --device cpu --log_freq 1")
    printed = run_script("tests/bench_collapse.py", *flags, *more).stdout
    assert rows(printed)[-4:] == ["both", "no sharpening", "no centring", "none"]
    for name in ("entropy", "kl"):
        picture = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        assert len([x for x in picture.iter() if x.tag.endswith("polyline")]) >= 4


def test_what_the_probes_choice_costs(tmp_path, monkeypatch, capsys):
    x, labels = torch.randn(90, 4), torch.arange(90) % 2
    x[:, 0] += 6 * labels  # two clusters: even the worst setting beats chance
    split = evaluate.Features(x, labels, [str(i) for i in range(90)])
    path = str(tmp_path / "features.npz")
    evaluate.save_features(path, "two clusters", {"train": split, "test": split})
    monkeypatch.setattr(sys, "argv", ["bench_probe.py", path, *"--labels 30 --seeds 0".split()])
    bench_probe.main()
    cells = capsys.readouterr().out.splitlines()[-2].strip("| ").split(" | ")
    assert cells[0] == "30" and len(cells) == len(bench_probe.COLUMNS)
    best, worst, lost = map(float, cells[4:7])
    assert 90 < best <= 100 and worst <= best and 0 <= lost <= best - worst + 0.01
