import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; run with --slow")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long; run with --slow"))


@pytest.fixture
def run_script():
    """Run a script of the project from outside: run_script("train.py", "--flag", ..., ranks=1) -> CompletedProcess."""

    def run(script, *flags, ranks=1, check=True, cwd=None, timeout=280):
        command = [sys.executable, str(ROOT / script)]
        if ranks > 1:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={ranks}",
                "--standalone",
                str(ROOT / script),
            ]
        environment = {
            k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        environment["OMP_NUM_THREADS"] = "1" if ranks > 1 else "2"
        done = subprocess.run(
            command + [str(f) for f in flags],
            cwd=cwd,
            env=environment,
            text=True,
            timeout=timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"{script} {flags} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    return run


def restore_signals():
    """As they are in a new process; a script that ends leaves them ignored."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    """The same random numbers whichever tests came before, and no signal that one of them left ignored."""
    torch.manual_seed(0)
    yield
    restore_signals()


@pytest.fixture
def call_script(capfd, monkeypatch):
    """As run_script, but by main() in this process, without the seconds that a new one spends on importing torch."""

    def call(script, *flags, check=True, cwd=None):
        monkeypatch.chdir(cwd or ROOT)
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        capfd.readouterr()
        code = 0
        try:
            importlib.import_module(Path(script).stem).main()
        except SystemExit as stop:
            code = stop.code
        restore_signals()
        done = subprocess.CompletedProcess(sys.argv, code, *capfd.readouterr())
        if check and code:
            raise AssertionError(f"{script} {flags} gave {code}\n{done.stdout}\n{done.stderr}")
        return done

    return call


@pytest.fixture
def stopped_after_a_checkpoint(call_script, monkeypatch):
    """As call_script, but the run fails right after it has saved its first checkpoint."""
    checkpoint = importlib.import_module("lowdino.checkpoint")
    save = checkpoint.save_checkpoint

    def save_and_stop(folder, state):
        save(folder, state)
        raise OSError("stopped")

    def call(script, *flags):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_checkpoint", save_and_stop)
            assert "stopped" in call_script(script, *flags, check=False).stderr

    return call


@pytest.fixture(scope="session")
def photos():
    """Natural-looking images that need no file: sums of random waves and edges, (12, 3, 48, 48) uint8."""
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
    """The folder of CIFAR-10 as JPEG files, train/<class>/ and test/<class>/."""
    folder = os.environ.get("LOWDINO_CIFAR10")
    if not folder:
        pytest.skip(
            "LOWDINO_CIFAR10 does not name a folder with train/<class>/*.jpg and test/<class>/*.jpg"
        )
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


def losses_on_a_batch(method, views, batch):
    """The losses of twelve steps of Adam on one batch and its views."""
    optimizer, losses = torch.optim.Adam(method.network.parameters(), lr=2e-3), []
    for step in range(12):
        loss, _ = method.objective(method.network, views, batch, step, False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
