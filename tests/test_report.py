"""The report of a run, its pictures and its table in the terminal."""

import base64
import io
import json
import math
import re
import sys
import types
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT, demo_array
from PIL import Image
from runs import is_one_sentence, options, small, train_here

import lowdino
from lowdino import budget, datasets, logger, pictures, report

# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------

K = 64
ARGS = {
    "arch": "mobilevit_xxs",
    "lr": 0.5,
    "batch_size_per_gpu": 10,
    "world": 2,
    "epochs": 3,
    "total_steps": 5000,
}
RUN = {"version": "0.1.0", "machine": "a <small> one", "images": "some", "out_dim": K}


def a_log(steps=300, **changed):
    """Records of a run that is well, every tenth step, and k-NN at the start and the end."""
    records = [{"step": 0, "epoch": 0, "knn": 0.25}]
    for step in range(10, steps + 1, 10):
        values = dict(loss=4 - step / 100, cross_entropy=3 - step / 300, entropy=1.0)
        values |= dict(entropy_of_mean=3.0, feature_std=0.5, effective_rank=9.0, lr=0.1)
        values |= dict(loss_over_lnk=values["cross_entropy"] / math.log(K), images_per_s=200.0)
        values |= dict(step=step, epoch=0, eta_s=(steps - step) * 0.1)
        records.append(values | changed)
    return records + [{"step": steps, "epoch": 0, "knn": 0.75}]


def folder_of(path, records, unusual=("lr",)):
    path.mkdir()
    (path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (path / "args.json").write_text(json.dumps(ARGS | {"run": RUN, "unusual": list(unusual)}))
    for name in ("crops", "neighbours"):
        Image.new("RGB", (40, 30)).save(path / f"{name}.png")
    return path


class Page(HTMLParser):
    """Checks that tags are closed in order, and that the page asks for nothing."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.headings, self.words, self.codes = [], [], [], [], []
        self.feed(text)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())
        self.svgs = [ElementTree.fromstring(s) for s in re.findall("<svg.*?</svg>", text, re.S)]
        assert "url(" not in text and "@import" not in text
        assert not re.search(r"https?://(?!www.w3.org/2000/svg)", text)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "iframe", "object")
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data"):
                assert value.startswith("data:"), value
            assert not name.startswith("on")
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_startendtag(self, tag, attributes):
        """An element of SVG that closes itself."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        if self.open and self.open[-1] not in ("style",):
            self.words.append(words)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(words)
        if self.open and self.open[-1] == "code":
            self.codes.append(words)

    def pictures(self):
        prefix = "data:image/png;base64,"
        assert all(source.startswith(prefix) for source in self.images)
        contents = (base64.b64decode(source[len(prefix) :]) for source in self.images)
        return [Image.open(io.BytesIO(content)) for content in contents]


def page_of(*folders):
    return Page(report.page([report.RunRecord(folder) for folder in folders]))


def curves_of(svg):
    """The polylines of an SVG's curves, as lists of points."""
    lines = (e for e in svg.iter() if e.tag.endswith("polyline") and e.get("class") != "grid")
    return [[tuple(map(float, p.split(","))) for p in e.get("points").split()] for e in lines]


DINOS = ["k-NN accuracy", "Loss", "Entropy of the teacher", "KL divergence", "Effective rank"]


def test_a_page_shows_what_the_log_has(tmp_path):
    page = page_of(folder_of(tmp_path / "run", a_log()))
    assert page.headings[:3] == [str(tmp_path / "run"), "No sign of collapse", "Curves"]
    assert page.headings[3:10] == [*DINOS, "Learning rate", "Throughput"]
    assert page.headings[10:] == [
        "What the network sees",
        "Views",
        "Nearest neighbours",
        "Settings",
    ]
    assert len(page.svgs) == 7 and [p.size for p in page.pictures()] == [(40, 30)] * 2
    for words in (
        "k-NN accuracy 25.0 → 75.0 %",
        "loss / ln K 0.713 → 0.481",
        "finished after 300 steps",
        "time of the steps 0:00:30",  # 300 steps of 20 images at 200 images/s
        "a <small> one",
        "lr 0.5",
    ):
        assert words in page.text, words
    (knn,) = curves_of(page.svgs[0])  # from 0 to 80 %, and to step 300
    assert knn == [
        (60, pytest.approx(340 - 300 * 25 / 80, abs=0.1)),
        (540, pytest.approx(58.8, abs=0.1)),
    ]
    entropies = curves_of(page.svgs[2])
    assert len(entropies) == 3 + 3  # with those of the legend
    assert {"nats", "step"} <= {e.text for e in page.svgs[2].iter() if e.tag.endswith("text")}


def test_without_prototypes_and_labels_there_are_fewer_figures(tmp_path):
    gone = ("cross_entropy", "entropy", "entropy_of_mean", "loss_over_lnk")
    records = [{k: v for k, v in r.items() if k not in gone} for r in a_log() if "knn" not in r]
    page = page_of(folder_of(tmp_path / "run", records))
    expected = ["Loss", "Effective rank", "Learning rate", "Throughput"]
    assert page.headings[3:7] == expected and len(page.svgs) == 4
    assert "No k-NN accuracy is known: judge by the nearest neighbours" in page.text
    (loss,) = curves_of(page.svgs[0])
    assert len(loss) == 30 and loss[0][1] < loss[-1][1]  # downwards on the page


@pytest.mark.parametrize("hole", [math.nan, math.inf, None])
def test_what_is_not_finite_is_a_gap(hole, tmp_path):
    records = a_log()
    for record in records[10:12]:
        record |= dict(loss=hole, cross_entropy=hole, loss_over_lnk=hole)
    page = page_of(folder_of(tmp_path / "run", records))
    assert list(map(len, curves_of(page.svgs[1]))) == [9, 19]  # the loss
    assert list(map(len, curves_of(page.svgs[3]))) == [9, 19]  # KL
    assert "In a gap it is not finite" in page.text and "No sign of collapse" in page.text
    records[-2]["loss"] = hole  # the last
    page = page_of(folder_of(tmp_path / "other", records))
    assert "Diverging loss" in page.headings and "--lr" in page.codes
    everything = [dict(record, **dict.fromkeys(("loss", "lr"), hole)) for record in records]
    assert "Learning rate" not in page_of(folder_of(tmp_path / "third", everything)).headings


@pytest.mark.parametrize(
    "changed, heading, flag",
    [
        (dict(entropy=4.15, entropy_of_mean=4.15), "Uniform collapse", "--infonce_weight"),
        (dict(effective_rank=1.0), "Dead features", "--lr"),
    ],
)
def test_the_verdict_comes_first_with_the_flag_to_change(changed, heading, flag, tmp_path):
    page = page_of(folder_of(tmp_path / "run", a_log(**changed)))
    assert page.headings[1] == heading and flag in page.codes
    page = page_of(folder_of(tmp_path / "short", a_log(steps=150, **changed)))
    assert page.headings[1] == "Too short to tell"
    assert f"141 steps, a verdict needs 200; seen so far: {heading.lower()}" in page.text


def test_a_run_that_is_not_over_and_one_that_has_just_begun(tmp_path):
    records = a_log()[:-2]
    assert "290 of 5,000 steps, 0:00:01 left" in page_of(folder_of(tmp_path / "run", records)).text
    begun = page_of(folder_of(tmp_path / "begun", records[:1]))
    assert "before the first step" in begun.text and len(begun.svgs) == 1


def test_runs_beside_each_other(tmp_path):
    ours = folder_of(tmp_path / "ours", a_log())
    theirs = folder_of(tmp_path / "<b> & co", a_log(steps=500, lr=0.2), unusual=())
    (theirs / "args.json").write_text(json.dumps(ARGS | {"epochs": 7, "run": RUN}))
    page = page_of(ours, theirs)
    assert page.headings[0] == "2 runs" and page.headings.count("No sign of collapse") == 2
    # A chart a number: two entropies, and no line for ln K.
    assert "Entropy of the teacher, of an image" in page.headings and len(page.svgs) == 8
    assert [len(curve) for curve in curves_of(page.svgs[1])] == [30, 50, 2, 2]
    names = [e.text for e in page.svgs[1].iter() if e.tag.endswith("text")]
    assert names[-2:] == [str(ours), str(theirs)]
    assert len(page.images) == 4 and f"Views, {theirs}" in page.headings
    table = page.text[page.text.index("or between the runs.") :]
    assert "epochs 3 7" in table[: table.index("The ")]  # beside what is unusual in one


def test_many_points_are_thinned_and_a_gap_stays():
    curve = {float(x): x / 2 for x in range(1000)} | {500.0: None}
    thin = pictures.thinned(curve)
    assert len(thin) == 334 and thin[2.0] == pytest.approx(0.5)
    assert [x for x, y in thin.items() if y is None] == [500.0]
    few = {1.0: 2.0, 2.0: None}
    assert pictures.thinned(few) == few


def test_the_command_writes_where_it_is_told(tmp_path, call_script):
    def call(*words):
        return call_script("lowdino.report", *words, cwd=tmp_path)

    for name in ("a", "b"):
        folder_of(tmp_path / name, a_log())
    assert call("a").stdout == "a/report.html\n"
    assert call("a", "b").stdout == "report.html\n"
    assert call("a", "--output", "c.html").returncode == 0
    assert Page((tmp_path / "c.html").read_text()).headings[0] == "a"
    assert Page((tmp_path / "report.html").read_text()).headings[0] == "2 runs"
    # A line that is being written now, or that a killed run has left.
    with open("a/log.jsonl", "a") as file:
        file.write('{"step": 31')
    assert call("a").returncode == 0


@pytest.mark.parametrize(
    "log, settings, output, message",
    [
        (None, "{}", "x.html", r"run holds no readable log.jsonl: give the --output_dir"),
        ("", "{}", "x.html", r"log.jsonl has no line yet"),
        ('{"step": 1}\n{"st\n{"step": 2}\n', "{}", "x.html", r"log.jsonl is damaged: line 2 is no"),
        ('{"loss": 1}\n', "{}", "x.html", r"damaged: line 1 is not a JSON object with a step"),
        ('{"step": 1}\n', "{", "x.html", r"args.json is damaged"),
        ('{"step": 1}\n', "{}", "no/x.html", r"no/x.html: No such file or directory"),
    ],
)
def test_what_cannot_be_reported(log, settings, output, message, tmp_path, call_script):
    run = tmp_path / "run"
    run.mkdir()
    if log is not None:
        (run / "log.jsonl").write_text(log)
    (run / "args.json").write_text(settings)
    flags = run, "--output", output
    done = call_script("lowdino.report", *flags, check=False, cwd=tmp_path)
    assert is_one_sentence(done, "^report: error: .*" + message), done.stderr


# --------------------------------------------------------------------------------------------------
# In a run
# --------------------------------------------------------------------------------------------------


def test_a_run_with_labels_keeps_its_report(picture_folder, tmp_path, call_script):
    flags = small("--epochs 1 --num_workers 0", data_path=picture_folder, output_dir=tmp_path)
    printed = call_script("train.py", *flags).stdout
    page = Page((tmp_path / "report.html").read_text())
    assert [h for h in page.headings if h in DINOS] == DINOS
    seen = page.headings.index("What the network sees")
    assert page.headings[seen + 1 :] == ["Views", "Nearest neighbours", "Feature maps", "Settings"]
    for words in ("too short to tell", "finished after 6 steps", lowdino.__version__, "torch 2"):
        assert words in page.text.lower(), words
    maps = Image.open(tmp_path / "maps.png")
    assert maps.size == (4 * 161 + 1, 4 * 161 + 1)  # eight images
    assert "8 x 8 cells" in maps.info["caption"] and "enlarged from the 32" in maps.info["caption"]
    # Settings are printed once, and only those that were typed or fitted, these with a reason.
    (typed,) = re.findall("typed: (.*)$", printed, re.M)
    listed = [pair.split("=") for pair in typed.split(", ")]
    assert ["out_dim", "16"] in listed and ["method", "dino"] in listed
    assert not {"lr", "seed", "weight_decay", "projector"} & {name for name, _ in listed}
    unusual = set(json.loads((tmp_path / "args.json").read_text())["unusual"])
    assert set(dict(listed)) <= unusual
    for name in unusual - set(dict(listed)):
        assert re.search(f"^{name} .+: .+$", printed, re.M), name


def test_a_vit_without_labels_shows_neighbours_and_attention(picture_folder, tmp_path):
    flags = "--arch vit_tiny --patch_size 8 --epochs 1 --num_workers 0"
    train_here(small(flags, data_path=picture_folder / "train", output_dir=tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    assert "k-NN accuracy" not in page.headings and "Attention" in page.headings
    attention, neighbours = (Image.open(tmp_path / f"{n}.png") for n in ("attention", "neighbours"))
    assert attention.size == (4 * 97 + 1, 8 * 97 + 1)  # an image and three heads
    assert neighbours.size == (9 * 71 + 1, 8 * 71 + 1)
    # Without labels all frames are grey.
    assert {neighbours.getpixel((71 * i + 2, 2)) for i in range(9)} == {(128, 128, 128)}
    assert "the nearest of 24 random images" in neighbours.info["caption"]


def test_pictures_take_a_fiftieth_of_the_time(tmp_path, monkeypatch):
    clock, drawn = types.SimpleNamespace(now=100.0), []

    def save_all(*args):
        clock.now += 2.0
        drawn.append(args)

    monkeypatch.setattr(report, "save_all", save_all)
    fake = types.SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(report, "time", fake)
    reporter = report.Reporter(tmp_path, 32, torch.device("cpu"))
    assert reporter.due
    reporter.write(None, None, page=False)
    assert len(drawn) == 1 and not reporter.due
    clock.now += 99.9
    assert not reporter.due
    clock.now += 0.2
    assert reporter.due


def test_minutes_have_room_for_the_last_report(monkeypatch):
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(budget, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    plan = budget.Budget(minutes=2, started=clock.now)
    with plan.reporting():
        clock.now += 3.0
    assert plan.plan(0, 0.5) == (int((116 - 3 - 3.3) / 0.5), 0)
    clock.now += 50 * 0.5
    with plan.reporting():  # which is no step's time
        clock.now += 3.0
    assert plan.correction(50, 400) == (50 + int((116 - 3 - 25 - 3 - 3.3) / 0.5), 0)


# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


def test_principal_components_are_those_of_numpys_svd():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(3, 7, 4, 5)) * np.array([9, 5, 3, 1, 1, 1, 1])[:, None, None]
    colours = pictures.principal_components(torch.from_numpy(maps))
    assert colours.shape == (3, 3, 4, 5) and colours.min() == 0 and colours.max() == 1
    cells = maps.transpose(0, 2, 3, 1).reshape(-1, 7)
    cells = cells - cells.mean(axis=0)
    axes = np.linalg.svd(cells, full_matrices=False)[2][:3]
    axes = axes * np.sign(axes[np.arange(3), abs(axes).argmax(axis=1)])[:, None]
    scores = cells @ axes.T
    low, high = np.percentile(scores, [1, 99], axis=0)
    expected = ((scores - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(colours.permute(0, 2, 3, 1).reshape(-1, 3), expected, atol=1e-4)


def test_maps_without_spread_are_one_colour():
    assert pictures.principal_components(torch.ones(2, 5, 3, 3)).unique().numel() == 1


def test_attention_is_that_of_the_last_blocks_queries_and_keys():
    network = lowdino.build_backbone("vit_tiny", patch_size=8, image_size=32, registers=2).eval()
    x, inputs = torch.randn(2, 3, 32, 48), []
    network.blocks[-1].attn.qkv.register_forward_hook(lambda m, given, made: inputs.append(made))
    with torch.no_grad():
        maps = pictures.attention_maps(network, x)
        weights = network.get_last_selfattention(x)
    tokens = 1 + 2 + 4 * 6
    assert maps.shape == (2, 3, 4, 6) and weights.shape == (2, 3, tokens, tokens)
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 3, tokens))
    qkv = inputs[0].numpy().astype(np.float64)  # (2, N, 3 * 192)
    for image in range(2):
        for head in range(3):
            q = qkv[image, 0, 64 * head : 64 * (head + 1)]  # the class token's
            k = qkv[image, :, 192 + 64 * head : 192 + 64 * (head + 1)]
            e = np.exp(k @ q / 8)
            expected = (e / e.sum())[3:].reshape(4, 6)
            np.testing.assert_allclose(maps[image, head], expected, rtol=1e-4)


@pytest.mark.parametrize("arch, size, side", [("mobilevit_xxs", 32, 256), ("resnet5m", 288, 288)])
def test_maps_have_eight_cells_a_side_at_least(arch, size, side):
    backbone = lowdino.build_backbone(arch).eval()
    with torch.no_grad():
        assert pictures.map_side(backbone, size, torch.device("cpu")) == side
        assert backbone.forward_features(torch.zeros(1, 3, side, side)).shape[-1] >= 8


def test_an_image_is_not_its_own_neighbour(monkeypatch):
    images, drawn = demo_array(range(10)), []
    monkeypatch.setattr(pictures, "save_rows", lambda *args: drawn.append(args))
    angles = torch.arange(10) * 0.1
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    features[1] = features[0]  # a copy, which may come before the image itself
    pictures.save_neighbours(None, images, images, (features, features), range(3))
    _, _, rows, _, near, names, _ = drawn[0]
    assert list(rows) == [0, 1, 2] and names is None
    assert near[0][0] == 1 and near[1][0] == 0 and near[2][0] in (0, 1, 3)
    assert [len(row) for row in near] == [8] * 3
    assert all(query not in row for query, row in zip(rows, near))


def test_neighbours_bear_the_names_of_their_classes(tmp_path):
    cells = torch.zeros(2, 3, 70, 70)
    pictures.label_cells(cells, ["cat", ""])
    assert cells[0, :, 55:67, 3:40].max() > 0.9 and cells[0, :, :55].max() == 0
    assert cells[1].max() == 0


@pytest.mark.parametrize("part", ["", "train"])  # with labels and without
def test_maps_alone(part, picture_folder, tmp_path, call_script):
    file = tmp_path / "maps.jpg"
    data = picture_folder / part
    done = call_script("eval_knn.py", *options(arch="vit_tiny", data_path=data, maps=file))
    assert Image.open(file).size == (4 * 161 + 1, 4 * 161 + 1)  # of eight images
    assert done.stdout == f"{file}: PCA maps of vit_tiny at random initialisation, seed 0\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--pixels --maps x.png", "--maps needs a backbone"),
        ("--arch resnet5m --maps x.png --features y.npz", "--features is not for --maps"),
        ("--arch resnet5m --maps x", "--maps x should end as a picture's name does"),
        ("--arch resnet5m --maps no/x.png", "--maps no/x.png: no folder no that can be written"),
        ("--from_features x.npz --maps x.png", "--maps needs a backbone, --weights or --arch"),
        ("--from_features x.npz --neighbours x.png", "--neighbours is not for --from_features"),
        ("--pixels --pool max", "--pool is not for --pixels"),
    ],
)
def test_maps_that_cannot_be(flags, message, call_script):
    done = call_script("eval_knn.py", *flags.split(), check=False)
    assert is_one_sentence(done, re.escape(message)), done.stderr


# --------------------------------------------------------------------------------------------------
# The terminal
# --------------------------------------------------------------------------------------------------

SPEED = dict(lr=1e-4, weight_decay=0.1, memory_mb=512.0, images_per_s=1234.5, data_wait=0.01)


def test_the_table_keeps_to_120_columns():
    table = logger.Table()
    metrics = {f"a_long_metric_{i}": -1.23456e10 for i in range(9)} | {"effective_rank": 3.25}
    values = dict(loss=-1.23456e-10, **metrics, **SPEED, eta_s=400 * 3600.0)
    large = values | dict(memory_mb=139_000.0, loss=math.nan)
    for step in ("7/9", "1000000/2000000"):
        table = logger.Table()
        lines = [line for _ in range(41) for line in table.lines(step, 12345, values)]
        lines += table.lines(step, 0, large)
        assert {len(line) for line in lines} == {len(lines[0])} and len(lines[0]) <= 120
        heads = [i for i, line in enumerate(lines) if line.split()[0] == "step"]
        assert heads == [0, 41]  # again after forty rows
        names = lines[0].split()
        assert names[:8] == "step epoch loss lr images/s wait memory left".split()
        assert names[-1] == "effective_rank" and len(names) > 9  # first chosen, in the log's order
        cells = dict(zip(names, lines[1].replace(" MB", "MB").split()))
        assert cells["step"] == step and cells["left"] == "400:00:00"
        assert float(cells["loss"]) == pytest.approx(-1.2e-10, rel=0.05)
        assert cells["effective_rank"] == "3.25" and cells["memory"] == "512MB"
        ends = [lines[0].index(name) + len(name) for name in names]
        assert all(lines[1][end - 1] != " " for end in ends)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals_alone(terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    log = logger.Log(tmp_path)
    log.progress(3, 4, 65.0)
    log.progress(4, 4, 0.0)  # too soon after the other
    log.say("a line")
    bar = "[" + "#" * 22 + "." * 8 + "]  75%  0:01:05 left"
    wiped = f"{bar}\r{' ' * len(bar)}\r" if terminal else ""
    assert capsys.readouterr().out == f"{wiped}a line\n"
    silent = logger.Log(tmp_path, active=False)
    silent.progress(1, 2, 3.0)
    assert capsys.readouterr().out == ""


def test_the_version_is_that_of_the_package():
    assert f'version="{lowdino.__version__}"' in (ROOT / "setup.py").read_text()


def test_a_folders_classes_have_its_names(picture_folder):
    assert datasets.load(str(picture_folder)).names == ["dark", "light"]
