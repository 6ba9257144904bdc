"""The house's own rules: how long things may be, who imports whom, what can be copied alone."""

import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

# Files that can be copied alone: they import no sibling.
GROUND = (
    "models vit heads augment losses descriptors schedules ema optim evaluate probe health "
    "image_io demo checkpoint distributed logger"
).split()
# Each of these knows the ground floor, and of the others only those before it.
FIRST = (
    "data dense __init__ datasets features methods baselines distillation recipes settings"
).split()
SECOND = (
    "export budget pictures report annotations masks linear classification segmentation detection "
    "engine"
).split()
UPSTAIRS = [*FIRST, *SECOND]
PATH = "train.py lowdino/methods.py lowdino/losses.py lowdino/recipes.py lowdino/engine.py".split()
SCRIPTS = "train distill eval_knn eval_linear".split()
SCRIPT_FILES = [f"{name}.py" for name in SCRIPTS]
TABLES = 6  # at most so many true tables keep their own layout, by `fmt: skip`

FILES = [*ROOT.glob("*.py"), *(ROOT / "lowdino").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
NAMES = [str(path.relative_to(ROOT)) for path in sorted(FILES)]


def definitions(path):
    """Every function and class of a file, with its number of lines, decorators not counted."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, kinds):
            yield node, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("name", NAMES)
def test_lengths(name):
    path = ROOT / name
    lines = path.read_text().splitlines()
    assert len(lines) <= 600, f"{name} has {len(lines)} lines"
    wide = [number for number, line in enumerate(lines, 1) if len(line) > 100]
    assert not wide, f"{name}: lines of more than 100 columns: {wide}"
    long = {
        node.name: length
        for node, length in definitions(path)
        if length > 60 and not isinstance(node, ast.ClassDef)
    }
    assert not long, f"{name}: functions of more than 60 lines: {long}"


def test_only_tables_keep_their_own_layout():
    mark = "# fmt" + ": "  # in two, so that this line is none
    found = [
        (name, line)
        for name in NAMES
        for line in (ROOT / name).read_text().splitlines()
        if mark in line
    ]
    assert len(found) <= TABLES, found
    for name, line in found:
        code, comment = line.split("#", 1)
        assert code.strip() and set(code.strip()) <= set(")]}:"), f"{name}: {line}"
        assert comment.strip() == "fmt" + ": skip", f"{name}: {line}"


def test_dino_and_the_loop_fit_on_a_screen():
    lengths = {
        (path, node.name): length
        for path in ("methods", "engine")
        for node, length in definitions(ROOT / f"lowdino/{path}.py")
    }
    assert lengths["methods", "DINO"] <= 60  # with its flags
    assert lengths["engine", "train"] <= 60


def lines(name):
    return len((ROOT / name).read_text().splitlines())


def test_the_house_is_small():
    files = sorted((ROOT / "lowdino").glob("*.py"))
    assert len(files) <= 38
    assert sum(lines(path) for path in files) <= 11_800


def test_the_readers_path_is_five_short_files():
    assert sum(map(lines, PATH)) < 1_900
    assert lines("train.py") <= 110


def test_settings_are_made_in_sixty_lines():
    lengths = {node.name: length for node, length in definitions(ROOT / "lowdino/settings.py")}
    assert lengths["resolve"] + lengths["fit_to_data"] <= 60


def test_classes_have_one_job():
    """A class that is no module, parser or optimizer has at most 120 lines."""
    long = {
        node.name: length
        for path in (ROOT / "lowdino").glob("*.py")
        for node, length in definitions(path)
        if isinstance(node, ast.ClassDef) and length > 120
        if not any("Module" in ast.unparse(b) or "Optimizer" in ast.unparse(b) for b in node.bases)
    }
    assert not long


def test_nobody_writes_to_settings():
    """No file assigns to an attribute of `args`, `s` or `settings`."""
    for path in [*(ROOT / "lowdino").glob("*.py"), *(ROOT / name for name in SCRIPT_FILES)]:
        for node in ast.walk(ast.parse(path.read_text())):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for target in filter(None, targets):
                for part in ast.walk(target):
                    written = isinstance(part, ast.Attribute) and ast.unparse(part.value)
                    assert written not in ("args", "s", "settings"), f"{path.name}: {part.attr}"


def test_there_is_one_user_error():
    classes = [
        (path.stem, node.name)
        for path in (ROOT / "lowdino").glob("*.py")
        for node, _ in definitions(path)
        if node.name == "UserError"
    ]
    assert classes == [("distributed", "UserError")]


# ---------------------------------------------------------------------------------------------
# Floors
# ---------------------------------------------------------------------------------------------


def imports(path):
    """Full names of what a file imports, wherever in it: `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def siblings(path):
    """The files of lowdino/ that a file imports; what is in the package itself is `__init__`."""
    found = {
        name.split(".")[1] if "." in name else "__init__"
        for name in imports(path)
        if name.split(".")[0] == "lowdino"
    }
    known = {file.stem for file in (ROOT / "lowdino").glob("*.py")}
    return {name if name in known else "__init__" for name in found}


def test_there_are_no_other_files():
    """A new file is written into GROUND or UPSTAIRS, where its floor is decided."""
    found = {path.stem for path in (ROOT / "lowdino").glob("*.py")}
    assert found == {*GROUND, *UPSTAIRS}


@pytest.mark.parametrize("name", GROUND)
def test_ground_floor_imports_no_sibling(name):
    allowed = {"torch", "torchvision", "numpy", "PIL", *sys.stdlib_module_names}
    found = {imported.split(".")[0] for imported in imports(ROOT / f"lowdino/{name}.py")}
    assert found <= allowed


def test_floors_are_in_order():
    for i, name in enumerate(UPSTAIRS):
        higher = siblings(ROOT / f"lowdino/{name}.py") - {*GROUND, *UPSTAIRS[:i]}
        assert not higher, f"{name} imports {higher}, of its own floor or above"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_no_script(name):
    found = {imported.split(".")[0] for imported in imports(ROOT / f"{name}.py")}
    assert not found & {*SCRIPTS, "tests"}


def test_the_library_imports_no_script():
    for name in (*GROUND, *UPSTAIRS):
        found = {imported.split(".")[0] for imported in imports(ROOT / f"lowdino/{name}.py")}
        assert not found & {*SCRIPTS, "tests"}, name


def test_each_ground_floor_file_imports_alone(tmp_path):
    """Every file from an empty folder of its own, with nothing of this project within reach."""
    for name in GROUND:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"lowdino/{name}.py", tmp_path / name)
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    sys.path.insert(0, name)\n"
        "    importlib.import_module(name)\n"
        "    del sys.path[0], sys.modules[name]\n"
    )
    command = [sys.executable, "-c", code, *GROUND]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
