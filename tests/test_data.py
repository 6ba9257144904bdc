"""Data sets, the order of batches, loaders, the copy to the device; the demo images."""

import numpy as np
import pytest
import torch
from conftest import demo_array
from PIL import Image
from torch.utils.data import Subset
from torchvision.ops import masks_to_boxes

from lowdino import annotations, augment, data, datasets, demo, distributed, evaluate, masks


def gradient(dtype=np.uint8, top=255):
    return (np.linspace(0, 1, 20 * 30).reshape(20, 30) * top).round().astype(dtype)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "bmp", "webp", "ppm", "pgm"])
def test_every_mode_and_type_becomes_pillows_rgb(tmp_path, mode, ending):
    image = Image.fromarray(
        np.stack([gradient(), gradient().T.copy().reshape(20, 30), 255 - gradient()], axis=2)
    ).convert(mode)
    path = tmp_path / f"picture.{ending}"
    try:
        image.save(path)
    except (OSError, KeyError):
        pytest.skip(f"{ending} holds no {mode}")
    read = data.read_image(str(path))
    assert read.shape == (3, 20, 30) and read.dtype == torch.uint8
    np.testing.assert_array_equal(
        read.permute(1, 2, 0).numpy(), np.asarray(Image.open(path).convert("RGB"))
    )


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, ending):
    path = tmp_path / f"deep.{ending}"
    Image.fromarray(gradient(np.uint16, 65535)).save(path)
    np.testing.assert_array_equal(
        data.read_image(str(path))[1].numpy(), (gradient(np.uint16, 65535) / 257).round()
    )


def test_values_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(gradient(np.float32, 1)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match="float.tif: floating-point values have no known range"):
        data.read_image(str(tmp_path / "float.tif"))
    Image.fromarray(gradient(np.int32, 10**6)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match="wide.tif: values 0 to 1000000 do not fit 16 bits"):
        data.read_image(str(tmp_path / "wide.tif"))


def test_damaged_file_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match="cannot read image .*broken.jpg"):
        data.read_image(str(tmp_path / "broken.jpg"))


@pytest.mark.parametrize("size", [(300, 200), (90, 1000), (40, 30), (20, 120), (20, 300)])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_large_images_are_reduced(tmp_path, size, ending):
    path = tmp_path / f"large.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(
        path
    )
    height, width = data.read_image(str(path), max_side=64).shape[1:]
    shrink = min(64 / min(size), 1)  # the shorter side is kept, whatever the longer one is
    assert abs(height - size[0] * shrink) <= 1 and abs(width - size[1] * shrink) <= 1


def test_collate_puts_images_in_the_corner_of_one_canvas():
    images = [torch.full((3, h, w), 9, dtype=torch.uint8) for h, w in ((4, 7), (6, 2))]
    batch = data.collate([(images[0], 1, 5, []), (images[1], 0, 8, ["a.png", "b.png"])])
    assert batch.images.shape == (2, 3, 6, 7)
    assert batch.sizes.tolist() == [[4, 7], [6, 2]]
    assert batch.labels.tolist() == [1, 0] and batch.indices.tolist() == [5, 8]
    assert list(batch.bad) == ["a.png", "b.png"]
    assert batch.images[0, :, :4].min() == 9 and batch.images[0, :, 4:].max() == 0
    assert batch.images[1, :, :6, :2].min() == 9 and batch.images.sum() == 9 * 3 * (28 + 12)


def test_one_panorama_does_not_quadruple_a_batch():
    """The canvas is the smallest rectangle, and views do not depend on the canvas."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(40, 160), (60, 40), (40, 40)]  # one wide, one tall
    images = [torch.randint(256, (3, *s), dtype=torch.uint8, generator=generator) for s in sizes]
    batch = data.collate([(image, 0, i, []) for i, image in enumerate(images)])
    assert batch.images.shape == (3, 3, 60, 160) and batch.sizes.tolist() == list(map(list, sizes))
    square = torch.zeros(3, 3, 160, 160, dtype=torch.uint8)
    square[:, :, :60] = batch.images
    for i, image in enumerate(images):
        alone = augment.central_view(image[None], batch.sizes[i : i + 1], 32)
        for canvas in (batch.images, square):
            view = augment.central_view(canvas, batch.sizes, 32)[i : i + 1]
            torch.testing.assert_close(view, alone, rtol=0, atol=0.04)  # 2 of 255 steps
    same = data.collate([(images[0], 0, 0, []), (images[0], 0, 1, [])])
    assert same.images.shape == (2, 3, 40, 160) and torch.equal(same.images[1], images[0])


def test_only_an_unreadable_image_is_replaced(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path in paths[1:]:
        Image.new("RGB", (8, 8)).save(path)
    files = data.ImageFiles(paths)
    with pytest.raises(distributed.UserError, match="cannot read image .*0.png"):
        files[0]
    files.replace_bad = True
    pixels, _, index, bad = files[0]
    assert index != 0 and len(bad) >= 1 and "0.png" in bad[0] and pixels.shape == (3, 8, 8)

    def bug(*_):
        raise ValueError("too many values to unpack (expected 2)")

    monkeypatch.setattr(data, "read_image", bug)
    with pytest.raises(ValueError, match="too many values") as caught:
        files[1]
    assert not isinstance(caught.value, distributed.UserError)  # a bug is no unreadable image


def test_size_that_suits_the_images(tmp_path):
    def folder(name, sizes):
        (tmp_path / name).mkdir()
        for i, size in enumerate(sizes):
            Image.new("RGB", size).save(tmp_path / name / f"{i}.png")
        return datasets.load(str(tmp_path / name)).pretrain

    assert data.suitable_size(folder("small", [(20, 30)])) == 32
    assert data.suitable_size(folder("middle", [(100, 99), (40, 40), (130, 97)])) == 96
    assert data.suitable_size(demo_array(range(3))) == 32
    assert data.suitable_size(folder("large", [(640, 480)] * 3)) == 224


def test_batches_are_a_permutation_an_epoch_and_resume_anywhere():
    everything = list(data.TrainingBatches(23, 4, seed=3, start=0, stop=15))
    for epoch in range(3):
        images = sum(everything[epoch * 5 : epoch * 5 + 5], [])
        assert len(set(images)) == 20 and max(images) < 23
    assert everything[0] != everything[5]
    for start in (1, 5, 7, 14):
        assert list(data.TrainingBatches(23, 4, seed=3, start=start, stop=15)) == everything[start:]
    assert everything != list(data.TrainingBatches(23, 4, seed=4, start=0, stop=15))
    halves = [
        list(data.TrainingBatches(23, 2, seed=3, start=0, stop=15, rank=r, world=2)) for r in (0, 1)
    ]
    assert [a + b for a, b in zip(*halves)] == everything
    with pytest.raises(ValueError, match="7 images are fewer than one batch of 2 x 4"):
        data.TrainingBatches(7, 4, seed=0, start=0, stop=1, world=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_same_batches_with_any_number_of_workers(picture_folder, workers):
    images = datasets.load(str(picture_folder)).pretrain
    batches = data.TrainingBatches(len(images), 5, seed=0, start=2, stop=7)
    for batch, indices in zip(
        data.open_loader(images, workers, batch_sampler=batches, pin_memory=False),
        batches,
        strict=True,
    ):
        assert batch.indices.tolist() == indices
        assert torch.equal(batch.images[2, :, :40, :32], images[indices[2]][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_those_of_the_files(picture_folder, workers):
    Image.new("RGB", (50, 20), (10, 200, 30)).save(picture_folder / "train" / "dark" / "wide.png")
    (picture_folder / "train" / "light" / "1.png").write_text("not a picture")
    files = datasets.load(str(picture_folder)).pretrain
    files.replace_bad, files.max_side = True, 24
    cached = data.cached(files, "host", torch.device("cpu"), workers)
    indices = list(range(len(files)))
    for expected, kept in zip(
        data.collate([files[i] for i in indices]),
        data.collate([cached[i] for i in indices]),
        strict=True,
    ):
        if isinstance(expected, torch.Tensor):
            assert torch.equal(expected, kept)
        else:
            assert expected == kept
    for loader in (
        data.evaluation_loader(cached, 4, 2),
        data.open_loader(cached, 2, batch_sampler=[[0]], pin_memory=False),
    ):
        assert loader.num_workers == 0


def test_images_on_a_gpu_have_no_other_processes(monkeypatch):
    monkeypatch.setattr(data, "lacks_shared_memory", lambda: False)
    array = demo_array(range(3))
    assert data.loader_processes(array, 2) == 2
    elsewhere = data.ImageArray(array.images.to("meta"))
    assert data.loader_processes(elsewhere, 2) == 0
    assert data.loader_processes(Subset(elsewhere, [0]), 2) == 0


def test_cached_images_have_no_other_processes(picture_folder):
    files = data.ImageFiles(sorted(map(str, picture_folder.rglob("*.png"))))
    cached = data.CachedImages(files, torch.device("cpu"), 0)
    for asked in (None, 2):
        assert data.loader_processes(Subset(cached, [0, 1]), asked) == 0


def test_loader_processes_are_for_files_alone(monkeypatch, picture_folder):
    """Pictures in memory need none, whatever holds them, but for those asked for."""
    monkeypatch.setattr(data, "cores", lambda: 4)
    monkeypatch.setattr(data, "lacks_shared_memory", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    scenes = annotations.Scenes(range(2))
    painted = masks.MaskedArrays(scenes.images, scenes.images[:, 0])
    for held in (demo_array(range(3)), scenes, painted):
        assert data.loader_processes(Subset(Subset(held, [1, 0]), [1]), None) == 0
        assert data.loader_processes(held, 3) == 3
    files = datasets.load(str(picture_folder)).pretrain
    assert data.loader_processes(Subset(files, [0]), None) == 2
    assert data.loader_processes(files, 0) == 0


def device_batches(device, picture_folder):
    """Compare the batches of `on_device`, during long work, with those of the loader itself."""
    Image.new("RGB", (50, 20), (10, 200, 30)).save(picture_folder / "train" / "dark" / "wide.png")
    images = datasets.load(str(picture_folder)).pretrain
    batches = data.TrainingBatches(len(images), 5, seed=0, start=2, stop=14)
    expected = list(data.open_loader(images, 0, batch_sampler=batches, pin_memory=False))
    loader = data.open_loader(images, 0, batch_sampler=batches, pin_memory=device.type == "cuda")
    work = torch.randn(2000, 2000, device=device) if device.type == "cuda" else torch.eye(2)
    moved = []
    for batch in data.on_device(loader, device):
        assert batch.images.device.type == batch.sizes.device.type == device.type
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)
        sums = batch.images.sum(dim=(1, 2, 3))
        moved.append((batch.images.clone(), sums, batch.sizes, batch.labels, batch.indices))
    assert len(moved) == len(expected) == 12
    for ours, theirs in zip(moved, expected):
        copy, sums, sizes, labels, indices = (tensor.cpu() for tensor in ours)
        assert torch.equal(copy, theirs.images) and torch.equal(sizes, theirs.sizes)
        assert torch.equal(sums, theirs.images.sum(dim=(1, 2, 3)))
        assert torch.equal(labels, theirs.labels) and torch.equal(indices, theirs.indices)
    assert list(data.on_device([], device)) == []


def test_batches_reach_the_cpu_in_order(picture_folder):
    device_batches(torch.device("cpu"), picture_folder)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_reach_cuda_in_order(picture_folder):
    device_batches(torch.device("cuda", 0), picture_folder)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_cached_on_cuda_give_the_batches_of_the_files(picture_folder):
    device = torch.device("cuda", 0)
    files = datasets.load(str(picture_folder)).pretrain
    batches = data.TrainingBatches(len(files), 5, seed=0, start=0, stop=6)
    expected = data.open_loader(files, 0, batch_sampler=batches, pin_memory=False)
    cached = data.cached(files, "device", device, 0)
    loader = data.open_loader(cached, 2, batch_sampler=batches, pin_memory=False)
    for batch, theirs in zip(data.on_device(loader, device), expected, strict=True):
        assert batch.images.device == device and batch.indices.tolist() == theirs.indices.tolist()
        assert torch.equal(batch.images.cpu(), theirs.images)


def test_where_auto_caches_follows_from_the_decoded_size(picture_folder, monkeypatch):
    files, cpu = datasets.load(str(picture_folder)).pretrain, torch.device("cpu")
    size = 24 * 3 * 40 * 32
    assert files.decoded_bytes() == size
    monkeypatch.setattr(data, "CACHE_BYTES", size)
    assert data.where_to_cache(files, cpu) == "host"
    monkeypatch.setattr(data, "CACHE_BYTES", size - 1)
    assert data.where_to_cache(files, cpu) == "none"
    assert data.cached(files, "none", cpu, 0) is files
    array = demo_array(range(3))
    assert array.decoded_bytes() == 3 * 3 * 64 * 64 and data.cached(array, "host", cpu, 0) is array
    assert torch.equal(
        data.cached(array, "device", cpu, 0).__getitems__([2, 0]).images, array.images[[2, 0]]
    )


def test_demo_is_deterministic_by_index_and_balanced():
    (several, labels), (one, _) = demo.demo_images([3, 14, 1_000_007]), demo.demo_images([14])
    assert several.shape == (3, 3, 64, 64) and several.dtype == torch.uint8
    assert labels.tolist() == [3, 4, 7] and labels.dtype == torch.int64
    assert torch.equal(several[1], one[0])
    assert not torch.equal(demo.demo_images([4])[0][0], one[0])


def test_demo_scenes_are_deterministic_by_index_and_say_what_they_show():
    several, one = (demo.demo_scenes(i)[0] for i in ([5, 1_000_002], [1_000_002]))
    assert several.shape == (2, 3, 96, 96) and several.dtype == torch.uint8
    assert torch.equal(several[1], one[0])
    counts = []
    for image, target in zip(*demo.demo_scenes(range(30))):
        counts.append(len(target["labels"]))
        assert target["boxes"].dtype == torch.float32 and target["labels"].dtype == torch.int64
        assert 1 <= target["labels"].min() and target["labels"].max() <= 10
        # torchvision's own way from masks to boxes counts the last pixel, not its far side.
        edges = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
        assert torch.equal(target["boxes"], edges)
        shown = demo.semantic_mask(target)
        assert set(shown.unique().tolist()) == {0, *target["labels"].tolist()}
        # Glyphs are brighter than the clouds about them.
        light = image.float().mean(dim=0)
        assert light[shown > 0].mean() > light[shown == 0].mean() + 20
    assert 2 <= min(counts) < max(counts) <= demo.CANDIDATES


def test_demo_is_not_solved_by_pixels():
    splits = range(1000), range(demo.TEST_START, demo.TEST_START + 500)
    (train, train_labels), (test, labels) = map(demo.demo_images, splits)
    pixels = [images.flatten(1).float() for images in (train, test)]
    scores = evaluate.knn_classify(pixels[0], train_labels, pixels[1])
    assert evaluate.accuracy(scores, labels) < 0.35


def test_evaluation_loader_shares_images_among_ranks():
    images = demo_array(range(7))
    parts = [
        torch.cat([b.indices for b in data.evaluation_loader(images, 2, 0, rank, 2)]).tolist()
        for rank in (0, 1)
    ]
    assert parts == [[0, 2, 4, 6], [1, 3, 5]]
    with pytest.raises(ValueError, match="3 images to evaluate are fewer than the 4 ranks"):
        data.evaluation_loader(demo_array(range(3)), 2, 0, 0, 4)
