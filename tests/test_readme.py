"""README, RESULTS.md and CONTRIBUTING.md: lengths, links, commands, figures, code."""

import ast
import importlib
import re
import shlex
import shutil
import sys
from collections import Counter
from functools import cache

import pytest
from conftest import ROOT, draw, draw_pictures
from PIL import Image
from runs import options

import lowdino
from lowdino import checkpoint, demo, distributed, settings

README, RESULTS = "README.md", "tests/RESULTS.md"
PAGES = (README, RESULTS, ".github/CONTRIBUTING.md")
WITH_CHECK = ("train", "distill", "eval_knn", "eval_linear")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


@cache
def text(page):
    return (ROOT / page).read_text()


def blocks(page, kind):
    """The fenced blocks of a kind, without their fences."""
    return [code for found, code in FENCED.findall(text(page)) if found == kind]


@cache
def prose(page):
    """A page without its fenced blocks."""
    return FENCED.sub("", text(page))


def section(page, heading):
    """The text below a heading, down to the next one of any level."""
    _, after = text(page).split(f"\n{heading}\n")
    return re.split(r"^#+ ", after, flags=re.MULTILINE)[0]


def rows(table):
    """The cells of a Markdown table's rows, without its heading."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_readme_is_short():
    lines = text(README).splitlines()
    assert len(lines) <= 200
    assert not [line for line in lines if len(line) > 100]


def test_the_folder_of_pictures_is_small():
    assert sum(path.stat().st_size for path in (ROOT / ".github").rglob("*")) < 10**6


# ---------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------


def anchors(page):
    """The anchors that GitHub makes of a page's headings.

    Lower case without punctuation, spaces become hyphens; one that is there already is numbered.
    """
    seen, found = Counter(), set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def links(page):
    """The targets of links and pictures; a link's text may go over a line's end, code is none."""
    plain = re.sub(r"`[^`]*`", "code", prose(page))
    return re.findall(r"\]\(([^)]*)\)", plain) + re.findall(r'src="([^"]*)"', plain)


def test_anchors_are_githubs(monkeypatch):
    headings = "# A `b_c`: d, e's\n## f (`--g h`)\n# Same\n# Same\n```sh\n# no heading\n```\n"
    monkeypatch.setitem(globals(), "prose", lambda page: FENCED.sub("", headings))
    assert anchors("") == {"a-b_c-d-es", "f---g-h", "same", "same-1"}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    found = links(page)
    assert found
    for target in found:
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.is_relative_to(ROOT) and file.exists(), target
        if anchor:
            assert anchor in anchors(str(file.relative_to(ROOT))), target


def test_the_tree_names_files_that_exist():
    (tree,) = (block for block in blocks(README, "") if "lowdino/" in block)
    names = re.findall(r"\b(?:lowdino/)?(\w+\.py)\b", tree)
    scripts = {path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    assert {*names} >= scripts
    for name in names:
        assert name in scripts or (ROOT / "lowdino" / name).is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:lowdino|tests)/[\w.*]+)`", prose(page))
    assert all(list(ROOT.glob(name)) for name in named), named


# ---------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------


def in_blocks(page):
    """The commands of a page's shell blocks, each as its words."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").replace("&&\n", "&& ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                end = words.index("&&")
                yield words[:end]
                words = words[end + 1 :]
            if words:
                yield words


def commands(page):
    """Those of the shell blocks, and those that stand in the text as code."""
    yield from in_blocks(page)
    for code in re.findall(r"`([^`]*)`", prose(page)):
        if code.startswith(("python ", "torchrun ")):
            yield shlex.split(code)


def script_and_flags(words):
    """The script or module that a command runs, and its flags; None for other programs."""
    words = [word for word in words if word != "..."]
    if words[0] == "torchrun":
        first = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return words[first], words[first + 1 :]
    if words[:2] == ["python", "-m"]:
        return None if words[2] == "pytest" else (words[2], words[3:])
    return (words[1], words[2:]) if words[0] == "python" else None


def parse(script, flags):
    """Let a script's own parser and checks see the flags."""
    name = script.removeprefix("tests/").removesuffix(".py")
    module = importlib.import_module(name)
    parser = module.get_parser()
    if name in ("train", "distill"):
        args = settings.resolve(parser, flags)
    elif isinstance(parser, settings.Parser):
        args = parser.parse(flags, getattr(module, "check", lambda args: None))
    else:
        args = parser.parse_args(flags)
    if more := getattr(args, "flags", None):  # of a script that it calls
        parse("eval_knn.py" if name == "bench_export" else "train.py", more)


@pytest.mark.parametrize("page", [README, RESULTS])
def test_commands_are_accepted(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = 0
    for words in commands(page):
        if words[0] == "ruff" or words[:3] in (
            ["python3", "-m", "venv"],
            ["python", "-m", "pytest"],
        ):
            for word in words:
                if word.startswith("tests"):
                    assert (ROOT / word).exists(), words
        elif found := script_and_flags(words):
            try:
                parse(*found)
            except (SystemExit, distributed.UserError) as stop:
                if getattr(stop, "code", 1):  # --help leaves with 0
                    pytest.fail(f"refused: {' '.join(words)}: {stop}")
            runs += 1
        else:
            assert words[0] in (".", "pip"), words
    assert runs >= 8


def test_a_wrong_command_is_refused():
    for words in ("train.py --epoch 3", "distill.py --teacher a.pth --kd_weight 0.5"):
        script, *flags = words.split()
        with pytest.raises(distributed.UserError):
            parse(script, flags)


TRAINING = "--epochs 1 --batch_size_per_gpu 8 --amp none --num_workers 0"
SHORT = {
    "train.py": TRAINING,
    "distill.py": TRAINING + " --teacher_size 32",
    "eval_linear.py": "--epochs 1",
    "eval_linear.py segmentation": "--epochs 1 --batch_size_per_gpu 2",
    "eval_linear.py detection": "--steps 1 --batch_size_per_gpu 2",
}


@pytest.fixture
def call_small(tmp_path, monkeypatch, call_script):
    """As call_script, in one folder: little data on the CPU, one epoch or step."""
    for name, count in dict(TRAIN=64, TEST=20, SCENE_TRAIN=16, SCENE_TEST=4).items():
        monkeypatch.setattr(demo, name, count)

    def call(script, flags, instead):
        if "--minutes" in flags:
            del flags[(at := flags.index("--minutes")) : at + 2]
        task = next((task for task in ("detection", "segmentation") if task in flags), "")
        flags = [*flags, *options(SHORT.get(f"{script} {task}".strip(), ""))]
        if script != "lowdino.export":
            flags += ["--device", "cpu"]
        return call_script(script, *(instead.get(flag, flag) for flag in flags), cwd=tmp_path)

    return call


@pytest.mark.slow
def test_commands_of_the_readme_run(tmp_path, call_small):
    """In the README's order."""
    draw_pictures(tmp_path / "pictures")
    teacher = lowdino.build_backbone("vit_tiny", image_size=32)
    checkpoint.save_backbone(
        tmp_path / "dinov2_vits14_pretrain.pth", teacher, "vit_tiny", image_size=32, epoch=1
    )
    done = 0
    for script, flags in filter(None, map(script_and_flags, commands(README))):
        instead = {"0.1": "0.5", "backbone.onnx": "backbone.pt2"}  # few images; no other package
        call_small(script, flags, instead)
        done += 1
    assert done >= 10
    assert (tmp_path / "output/log.jsonl").is_file() and (tmp_path / "backbone.pt2").is_file()


@pytest.mark.slow
def test_commands_of_the_results_run(tmp_path, call_small):
    """Those of the scripts, each table's as a reader of it alone would give them.

    The benchmarks have tests of their own, see `test_every_benchmark_has_a_test`.
    """
    draw_pictures(tmp_path / "pictures")
    few = {"DATA": "pictures", "0.01": "0.5", "0.1": "0.5", "0.3": "0.5"}
    done = 0
    for script, flags in filter(None, map(script_and_flags, commands(RESULTS))):
        if script.removesuffix(".py") not in WITH_CHECK:
            continue
        output = flags[flags.index("--output_dir") + 1] if "--output_dir" in flags else "output"
        shutil.rmtree(tmp_path / output, ignore_errors=True)  # another table's
        backbone = tmp_path / "runs/mobilevit_xxs/backbone.pth"
        if f"{backbone.relative_to(tmp_path)}" in flags:  # of a row, whose command has no folder
            backbone.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save_backbone(
                backbone, lowdino.build_backbone("mobilevit_xxs"), "mobilevit_xxs", 32, 1
            )
        call_small(script, flags, few)
        done += 1
    assert done >= 20


def test_every_benchmark_has_a_test():
    named = {words[1] for words in commands(RESULTS) if "/bench_" in words[1]}
    called = " ".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) >= 8
    assert {
        name
        for name in named
        if f'"{name}"' not in called
        and not re.search(rf"\b{name.removeprefix('tests/').removesuffix('.py')}\.main\(\)", called)
    } == set()


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def figures(words):
    """Accuracies as they are written, with their standard deviation."""
    return re.findall(r"0\.\d{3}(?: ± 0\.\d{3})?", words)


def test_figures_of_the_readme_are_those_of_the_results():
    known = set(figures(text(RESULTS))) | set(re.findall(r"0\.\d{3}", text(RESULTS)))
    found = figures(text(README))
    assert len(found) > 30
    assert not [figure for figure in found if figure not in known]


def test_rows_of_the_readmes_results():
    """A row's accuracies and time stand in one row of RESULTS.md, beside the same network."""
    lines = [line for line in text(RESULTS).splitlines() if line.startswith("|")]
    table = rows(section(README, "## Results"))
    assert len(table) >= 5
    for images, network, trained, time, before, after, pixels, patches in table:
        seconds = time.removesuffix(" s")
        wanted = [network, before, after, seconds]
        wanted += [f"{trained.strip('`')}"] if trained.startswith("`--") else ["taught"]
        assert any(all(part in line for part in wanted) for line in lines), (images, network, time)
        for name, floor in (("raw pixels", pixels), ("patch dictionary", patches)):
            assert any(name in line and floor in line for line in lines), (name, floor)


def test_figures_of_the_methods_stand_beside_them():
    """`name` (a note) 0.xxx is in one row of RESULTS.md."""
    lines = [line for line in text(RESULTS).splitlines() if line.startswith("| ")]
    first = section(README, "## Which method, when").split("\n- ")[1]
    number = r"0\.\d{3}(?: ± 0\.\d{3})?"
    pairs = re.findall(rf"`(\w+)`(?: \([^)]*\))?\s({number})", first)
    assert [value for _, value in pairs] == re.findall(number, first) and len(pairs) > 5
    for name, value in pairs:
        assert any(f"`{name}`" in line and f"| {value} " in line for line in lines), (name, value)


# ---------------------------------------------------------------------------------------------
# Code
# ---------------------------------------------------------------------------------------------


def test_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = lowdino.build_backbone("mobilevit_xxs")
    (tmp_path / "output").mkdir()
    checkpoint.save_backbone("output/backbone.pth", backbone, "mobilevit_xxs", 64, 1)
    draw(tmp_path, "picture.jpg")
    (code,) = blocks(README, "python")
    names = {}
    exec(code, names)
    assert names["features"].shape == (1, 320) and names["map"].shape == (1, 320, 2, 2)


def test_calls_in_the_readmes_text_exist():
    found = re.findall(r"`lowdino\.(\w+)\.(\w+)\(", prose(README))
    assert found
    for module, name in found:
        assert callable(getattr(importlib.import_module(f"lowdino.{module}"), name))


def test_code_of_the_results(tmp_path, monkeypatch):
    """The mosaics are made; the rest, which needs other packages, is Python at least."""
    mosaics, *others = blocks(RESULTS, "python")
    draw(tmp_path, *(f"in/train/a/{i}.png" for i in range(10)))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "in"), str(tmp_path / "out")])
    exec(mosaics, {})
    assert Image.open(tmp_path / "out/train/a/0.png").size == (96, 96)
    for code in others:
        ast.parse(code)


def definitions(tree):
    """Names of a file's functions and classes, with the methods as Class.method."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name in definitions(node))


def test_names_of_the_equations_exist():
    table = rows(section(README, "## Equations"))
    papers = {name for row in table for name in row[0].split("; ")}
    assert papers >= {"LowDINO", "DINO", "DINOv2", "SSLight", "MV-MR"}
    for paper, equation, link, names in table:
        label, path = re.fullmatch(r"\[(\w+\.py)\]\((lowdino/\w+\.py)\)", link).groups()
        assert path == f"lowdino/{label}"
        found = {*definitions(ast.parse((ROOT / path).read_text()))}
        listed = re.findall(r"`([\w.]+)`", names)
        assert listed and equation, paper
        assert {*listed} <= found, (paper, {*listed} - found)
