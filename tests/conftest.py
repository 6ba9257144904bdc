import functools
import importlib
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Why a test is not run, where a few words for all such tests say it.
SLOW, CUDA = "slow (give --slow)", "cuda (no CUDA device)"
CIFAR10 = "CIFAR-10 (LOWDINO_CIFAR10 is not set)"


def pytest_configure(config):
    for line in (
        "slow: takes more than a few seconds; run with --slow",
        "cuda: needs a CUDA device; skips itself where there is none",
    ):
        config.addinivalue_line("markers", line)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long tests too")


def pytest_collection_modifyitems(config, items):
    missing = {"slow": None if config.getoption("--slow") else SLOW}
    missing["cuda"] = None if torch.cuda.is_available() else CUDA
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    """One line at the end: how many tests were not run, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.write_line("not run: " + not_run([r.longrepr[2] for r in skipped]))


def not_run(reasons):
    """What pytest says of each skipped test, counted by reason in one line."""
    counts, packages = Counter(), Counter()
    for reason in reasons:
        reason = reason.removeprefix("Skipped: ")
        if reason.startswith("could not import "):
            packages[reason.split("'")[1]] += 1
        else:
            counts[reason] += 1
    parts = [f"{counts.pop(known)} {known}" for known in (SLOW, CUDA, CIFAR10) if known in counts]
    if packages:
        parts.append(f"{packages.total()} optional packages ({', '.join(sorted(packages))})")
    if counts:
        more = f"; {len(counts) - 3} more reasons" if len(counts) > 3 else ""
        parts.append(f"{counts.total()} other ({'; '.join(sorted(counts)[:3])}{more})")
    return ", ".join(parts) or "nothing was skipped"


@pytest.fixture
def run_script():
    """Run a script of the project from outside.

    run_script("train.py", "--flag", ..., ranks=1) -> CompletedProcess
    """

    def run(script, *flags, ranks=1, check=True, cwd=None, timeout=280):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        own = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        env = {name: value for name, value in os.environ.items() if name not in own}
        env["OMP_NUM_THREADS"] = "1" if ranks > 1 else "2"
        command += [str(ROOT / script), *map(str, flags)]
        done = subprocess.run(
            command, cwd=cwd, env=env, text=True, timeout=timeout, capture_output=True
        )
        if check and done.returncode != 0:
            raise failure(script, flags, done)
        return done

    return run


def failure(script, flags, done):
    said = f"{done.stdout}\n{done.stderr}"
    return AssertionError(f"{script} {flags} gave {done.returncode}\n{said}")


def restore_signals():
    """As they are in a new process; a script that ends leaves them ignored."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def drawn_once():
    """The demo's splits, which take seconds to draw, once for all tests.

    Tensors are shared, as nothing writes into them; lists and dicts are each caller's own.
    """
    demo = importlib.import_module("lowdino.demo")

    def remembered(draw):
        cached = functools.cache(draw)

        def images_of(indices, *more):
            return (cached if isinstance(indices, range) else draw)(indices, *more)

        return images_of

    scenes = remembered(demo.demo_scenes)

    def own_scenes(*drawn):
        images, targets = scenes(*drawn)
        return images, [dict(target) for target in targets]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_images", remembered(demo.demo_images))
        patch.setattr(demo, "demo_scenes", own_scenes)
        yield


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    """The same random numbers whichever tests came before, and no signal that one left ignored."""
    torch.manual_seed(0)
    yield
    restore_signals()


@pytest.fixture
def call_script(capfd, monkeypatch):
    """As run_script, but by main() in this process: a new one takes seconds to import torch.

    It runs modules, as `python -m` does, by their names too.
    """

    def call(script, *flags, check=True, cwd=None):
        monkeypatch.chdir(cwd or ROOT)
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capfd.readouterr()
        code = 0
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        except SystemExit as stop:
            code = stop.code
        restore_signals()
        done = subprocess.CompletedProcess(sys.argv, code, *capfd.readouterr())
        if check and code:
            raise failure(script, flags, done)
        return done

    return call


@pytest.fixture
def stopped_after_a_checkpoint(call_script, monkeypatch):
    """As call_script, but the run fails right after it has saved its first checkpoint."""
    checkpoint = importlib.import_module("lowdino.checkpoint")
    save = checkpoint.save_checkpoint

    def save_and_stop(folder, state):
        save(folder, state)
        raise ValueError("stopped")

    def call(script, *flags):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_checkpoint", save_and_stop)
            assert "stopped" in call_script(script, *flags, check=False).stderr

    return call


@pytest.fixture(scope="session")
def photos():
    """Natural-looking images that need no file: sums of random waves and edges.

    (12, 3, 48, 48) uint8
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:48, 0:48]
    images = []
    for _ in range(12):
        image = np.zeros((3, 48, 48))
        for _ in range(12):
            fx, fy, phase = rng.normal(0, 0.25, 2).tolist() + [rng.uniform(0, 7)]
            image += rng.normal(0, 40, (3, 1, 1)) * np.sin(fx * x + fy * y + phase)
        a, b, c = rng.normal(size=3)
        image += np.where(a * x + b * y > 24 * (a + b) + 5 * c, 60, -60)
        images.append((image + 128).clip(0, 255).round().astype(np.uint8))
    return torch.from_numpy(np.stack(images))


@pytest.fixture(scope="session")
def cifar10():
    """The folder of CIFAR-10 as JPEG files, train/<class>/*.jpg and test/<class>/*.jpg."""
    folder = os.environ.get("LOWDINO_CIFAR10")
    if not folder:
        pytest.skip(CIFAR10)
    return Path(folder)


@pytest.fixture
def picture_folder(tmp_path):
    return draw_pictures(tmp_path / "pictures")


def draw_pictures(top):
    """A small labelled folder: train/ and val/ with two classes of 32 x 40 pictures."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for shade, name in ((60, "dark"), (200, "light")):
            folder = top / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                values = rng.integers(shade - 40, shade + 40, (40, 32, 3))
                Image.fromarray(values.astype(np.uint8)).save(folder / f"{i}.png")
    return top


def draw(top, *names):
    """A small picture of each name below a folder, in the format of its suffix."""
    for name in names:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {".jfif": "JPEG"}.get(path.suffix)
        Image.new("RGB", (32, 32), (len(name), 60, 200)).save(path, kind)
    return top


def numbered(folder, count, suffix="png"):
    return [f"{folder}/{i:02}.{suffix}" for i in range(count)]


def classes(split, count, names="ab"):
    return [path for name in names for path in numbered(f"{split}/{name}", count)]


@pytest.fixture
def one_thread():
    """This process computes with one thread, as those do that tests of whole runs start."""
    runs = importlib.import_module("runs")
    with runs.one_thread():
        yield


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Images, and the output folder of an unhurt run on them by one thread."""
    runs = importlib.import_module("runs")
    folder = tmp_path_factory.mktemp("whole")
    pictures = draw_pictures(folder / "pictures")
    with runs.one_thread():
        runs.train_here(runs.stepwise(pictures, folder / "out"))
    return pictures, folder / "out"


def demo_array(indices):
    """Demo images as a data set."""
    from lowdino import data, demo

    return data.ImageArray(*demo.demo_images(indices), view_side=demo.SIDE // 2)


def losses_on_a_batch(method, views, batch):
    """The losses of twelve steps of Adam on one batch and its views."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(parameters, lr=2e-3), []
    for step in range(12):
        loss = method(views, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
