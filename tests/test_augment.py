"""Views against Pillow and torchvision, at the same parameters; drawn parameters against torchvision's."""

import numpy as np
import PIL
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps

from lowdino import augment


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def levels(image):
    """(3, H, W) in [0, 1] -> (H, W, 3) in 0..255, float64."""
    return image.permute(1, 2, 0).numpy().astype(np.float64) * 255


def random_crops(count, side, rng, smallest=4):
    height, width = rng.integers(smallest, side + 1, (2, count))
    top, left = (
        (rng.random(count) * (side - height + 1)).astype(int),
        (rng.random(count) * (side - width + 1)).astype(int),
    )
    return np.stack([top, left, height, width], axis=1)


def pillow_resize(image, size):
    """Pillow 13's own; the same order of its passes, one at a time, from an older one."""
    if int(PIL.__version__.split(".")[0]) >= 13:
        return image.resize((size, size), Image.BICUBIC)
    height_first = image.height > size and image.height - size > 2 * (image.width - size)
    halfway = (image.width, size) if height_first else (size, image.height)
    return image.resize(halfway, Image.BICUBIC).resize((size, size), Image.BICUBIC)


def crop_errors(images, out_size, boxes, flips):
    """Of uint8 and of float images, which may go different ways."""
    ours = [
        augment.resized_crop(x, torch.from_numpy(boxes), out_size, torch.from_numpy(flips))
        for x in (images, augment.to_float(images))
    ]
    errors = []
    for image, (top, left, height, width), flip, *views in zip(images, boxes, flips, *ours):
        pil = pillow_resize(to_pil(image).crop((left, top, left + width, top + height)), out_size)
        expected = np.asarray(ImageOps.mirror(pil) if flip else pil).astype(np.float64)
        errors.append([np.abs(levels(view) - expected) for view in views])
    return np.stack(errors)


@pytest.mark.parametrize("out_size", [9, 16, 32, 48, 64, 224])
def test_resized_crop_is_pillows(photos, out_size):
    rng = np.random.default_rng(out_size)
    errors = crop_errors(
        photos, out_size, random_crops(len(photos), 48, rng), rng.random(len(photos)) < 0.5
    )
    assert errors.max() <= 2.1 and errors.mean() <= 0.4


@pytest.mark.parametrize("out_size", [16, 32, 64, 96])
def test_resized_crop_is_pillows_on_cifar10(cifar10, out_size):
    files = sorted(cifar10.glob("test/*/*.jpg"))[::50]
    images = torch.stack(
        [torch.from_numpy(np.array(Image.open(f).convert("RGB"))).permute(2, 0, 1) for f in files]
    )
    rng = np.random.default_rng(out_size)
    errors = crop_errors(
        images, out_size, random_crops(len(images), 32, rng), rng.random(len(images)) < 0.5
    )
    assert errors.max() <= 2.1 and errors.mean() <= 0.4


def test_resized_crop_of_part_of_a_canvas_sees_nothing_beyond_it(photos):
    canvas = torch.full((len(photos), 3, 80, 80), 255, dtype=torch.uint8)
    canvas[:, :, :48, :48] = photos
    boxes = torch.tensor([[0, 0, 48, 48]]).expand(len(photos), 4)
    torch.testing.assert_close(
        augment.resized_crop(canvas, boxes, 31), augment.resized_crop(photos, boxes, 31)
    )


def test_vertical_flip_turns_the_rows(photos):
    boxes = torch.tensor([[3, 5, 30, 22]]).expand(len(photos), 4)
    upright = augment.resized_crop(photos, boxes, 16)
    turned = augment.resized_crop(
        photos, boxes, 16, vertical_flip=torch.ones(len(photos), dtype=torch.bool)
    )
    torch.testing.assert_close(turned, upright.flip(2))


def test_resized_crop_is_differentiable():
    images = (
        torch.rand(1, 3, 12, 12, dtype=torch.float64).mul(0.2).add(0.4).float().requires_grad_()
    )
    augment.resized_crop(images, torch.tensor([[2, 2, 8, 8]]), 8).sum().backward()
    inside = torch.zeros(12, 12)
    inside[2:10, 2:10] = 1  # same size: the identity inside the box, nothing outside
    torch.testing.assert_close(images.grad[0, 0], inside, atol=1e-5, rtol=0)


@pytest.mark.parametrize("picks", [True, False])  # as on a CPU, as on a GPU
def test_color_jitter_is_torchvisions_in_every_order(picks, photos, monkeypatch):
    from itertools import permutations

    monkeypatch.setattr(augment, "picks", lambda images: picks)
    rng = torch.Generator().manual_seed(0)
    orders = torch.tensor(list(permutations(range(4))))
    images = augment.to_float(photos[torch.arange(len(orders)) % len(photos)])
    factors = 0.6 + 0.8 * torch.rand(len(orders), 3, generator=rng)
    hues = 0.2 * torch.rand(len(orders), generator=rng) - 0.1
    factors[::7], hues[::7] = 1, 0  # some at rest
    ours = augment.color_jitter(images, factors, hues, orders)
    for image, factor, hue, order, view in zip(images, factors, hues, orders, ours):
        steps = [
            lambda x: TF.adjust_brightness(x, factor[0].item()),
            lambda x: TF.adjust_contrast(x, factor[1].item()),
            lambda x: TF.adjust_saturation(x, factor[2].item()),
            lambda x: TF.adjust_hue(x, hue.item()),
        ]
        for operation in order:
            image = steps[operation](image)
        assert (view - image).abs().max() * 255 < 0.1


def test_color_jitter_at_rest_changes_nothing(photos):
    images = augment.to_float(photos)
    n = len(images)
    for turns in (0.0, 1.0):  # left out, and gone all through
        still = augment.color_jitter(
            images, torch.ones(n, 3), torch.full((n,), turns), torch.arange(4).expand(n, 4)
        )
        torch.testing.assert_close(still, images, atol=2e-6, rtol=0)


def test_views_are_the_same_whether_an_operation_picks_or_not(photos, monkeypatch):
    sizes = torch.full((len(photos), 2), photos.shape[2])
    views = []
    for picks in (True, False):
        monkeypatch.setattr(augment, "picks", lambda images: picks)
        views += [augment.MultiCrop(32, 16, 2)(photos, sizes, augment.seeded_generator("cpu", 0))]
    for one, other in zip(*views):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_autocast_changes_no_view(photos, monkeypatch):
    monkeypatch.setattr(augment, "picks", lambda images: False)  # as on a GPU
    sizes = torch.full((len(photos), 2), photos.shape[2])
    views = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            views += [
                [
                    *augment.MultiCrop(32, 16, 2)(
                        photos, sizes, augment.seeded_generator("cpu", 0)
                    ),
                    augment.central_view(photos, sizes, 32),
                ]
            ]
    for one, other in zip(*views):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "at_once", [1, 3, 9, 20]
)  # parts of the views, one view of all images, or two
def test_views_are_the_same_in_blocks_of_any_size(at_once, photos, monkeypatch):
    images, sizes = photos[:8], torch.full((8, 2), photos.shape[2])
    whole = augment.MultiCrop(32, 16, 3)(images, sizes, augment.seeded_generator("cpu", 0))
    monkeypatch.setattr(augment, "BLOCK", at_once * 12 * 16 * 16)
    blocks = augment.blocks(images, 24, 16)
    assert max(crops.stop - crops.start for _, crops in blocks) <= at_once < 24 and len(blocks) > 1
    assert sorted(i for _, crops in blocks for i in range(24)[crops]) == list(range(24))
    for one, other in zip(
        whole, augment.MultiCrop(32, 16, 3)(images, sizes, augment.seeded_generator("cpu", 0))
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("out_size", [32, 160])  # by weighted sums, and by torch's resize
def test_several_crops_of_an_image_are_those_made_one_at_a_time(out_size, photos):
    rng = np.random.default_rng(0)
    boxes = torch.from_numpy(random_crops(3 * len(photos), 48, rng))
    flips = torch.from_numpy(rng.random((2, len(boxes))) < 0.5)
    together = augment.resized_crop(photos, boxes, out_size, *flips)
    single = [
        augment.resized_crop(photos, *parts[:1], out_size, *parts[1:])
        for parts in zip(*(v.split(len(photos)) for v in (boxes, *flips)))
    ]
    torch.testing.assert_close(together, torch.cat(single))


def test_grayscale_and_solarize_are_pillows(photos):
    for image in photos:
        grey = np.asarray(to_pil(image).convert("L")).astype(np.float64)
        ours = augment.grayscale(augment.to_float(image[None]))[0, 0].numpy() * 255
        assert np.abs(ours - grey).max() <= 1
        solar = np.asarray(ImageOps.solarize(to_pil(image))).astype(np.float64)
        assert (
            np.abs(levels(augment.solarize(augment.to_float(image[None]))[0]) - solar).max() < 1e-3
        )


def test_blur_is_torchvisions(photos):
    images = augment.to_float(photos)
    sigmas = torch.linspace(0.1, 2.0, len(images))
    for image, sigma, ours in zip(images, sigmas, augment.gaussian_blur(images, sigmas)):
        assert (ours - TF.gaussian_blur(image, [9, 9], [sigma.item()] * 2)).abs().max() < 1e-5
    torch.testing.assert_close(
        augment.gaussian_blur(images, torch.zeros(len(images))), images, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("size", [(32, 32), (20, 90), (90, 20)])
@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.4, 1.0)])
def test_boxes_have_torchvisions_distribution(size, scale):
    n = 20_000
    boxes = augment.random_boxes(
        torch.tensor([size]).expand(n, 2), scale, augment.seeded_generator("cpu", 1)
    ).numpy()
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    theirs = np.array(
        [T.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)]
    )
    assert (boxes == boxes.round()).all() and (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= size[0]).all() and (
        boxes[:, 1] + boxes[:, 3] <= size[1]
    ).all()
    for column in range(4):
        assert (
            largest_gap(boxes[:, column], theirs[:, column]) < 0.02
        )  # Kolmogorov-Smirnov: p = 0.001 is at 0.0195


def largest_gap(a, b):
    """Kolmogorov and Smirnov's statistic: the largest distance between two empirical distribution functions."""
    at = np.unique(np.concatenate([a, b]))
    return np.abs(
        np.searchsorted(np.sort(a), at, "right") / len(a)
        - np.searchsorted(np.sort(b), at, "right") / len(b)
    ).max()


def test_drawn_jitter_flips_and_blur_have_torchvisions_distribution(monkeypatch):
    """Catch the parameters on their way to the operations, and compare with torchvision's ColorJitter's draws."""
    seen = {}

    def spy(name, *positions):
        original = getattr(augment, name)

        def wrapper(*arguments, **named):
            seen.setdefault(name, []).append(([arguments[i] for i in positions], named))
            return original(*arguments, **named)

        monkeypatch.setattr(augment, name, wrapper)

    spy("color_jitter", 1, 2), spy("where_chosen", 0, 2, -1), spy("resized_crop", 1)
    n = 4000
    images, sizes = torch.full((n, 3, 8, 8), 100, dtype=torch.uint8), torch.full((n, 2), 8)
    crop = augment.MultiCrop(8, 8, 1, vertical_flip=0.3)
    crop(images, sizes, augment.seeded_generator("cpu", 0, 0, 0))
    # Two global views, then a local one, each drawn by itself.
    views = [
        draws
        for (factors, hue), named in seen["color_jitter"]
        for draws in zip(factors.split(n), hue.split(n), named["order"].split(n))
    ]
    assert len(views) == 3

    torch.manual_seed(0)
    jitter = T.ColorJitter(0.4, 0.4, 0.2, 0.1)
    theirs = [
        jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(n)
    ]
    for factors, hue, order in views:
        on = (factors[:, 0] != 1).numpy()
        assert abs(on.mean() - 0.8) < 0.03
        ours = torch.cat([factors, hue[:, None]], dim=1).numpy()[on]
        for i in range(4):
            assert largest_gap(ours[:, i], np.array([float(draw[i + 1]) for draw in theirs])) < 0.05
        orders = np.unique(order.numpy(), axis=0, return_counts=True)
        assert len(orders[0]) == 24 and orders[1].min() > n / 24 * 0.6
    blurs = [
        draws
        for (chosen, operation, sigma), _ in seen["where_chosen"]
        if operation == augment.gaussian_blur
        for draws in zip(chosen.split(n), sigma.split(n))
    ]
    for (chosen, sigma), probability in zip(blurs, (1.0, 0.1, 0.5), strict=True):
        blurred = sigma[chosen].numpy()
        assert abs(len(blurred) / n - probability) < 0.03
        assert largest_gap(blurred, np.random.default_rng(0).uniform(0.1, 2.0, 20_000)) < 0.1
    for (boxes, named), scale in zip(
        seen["resized_crop"], ((0.4, 1.0), (0.05, 0.4)), strict=True
    ):  # global, local
        area = boxes[0][:, 2] * boxes[0][:, 3] / 64
        assert abs(area.mean() - sum(scale) / 2) < 0.03
        assert abs(named["flip"].float().mean() - 0.5) < 0.03
        assert abs(named["vertical_flip"].float().mean() - 0.3) < 0.03


def test_views_are_a_function_of_seed_step_and_rank(photos):
    sizes = torch.full((len(photos), 2), 48)
    crop = augment.MultiCrop(32, 16, 2)

    def views(*numbers):
        return crop(photos, sizes, augment.seeded_generator("cpu", *numbers))

    first = views(0, 5, 0)
    assert [tuple(v.shape[1:]) for v in first] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, views(0, 5, 0)))
    for other in ((1, 5, 0), (0, 6, 0), (0, 5, 1)):
        assert not torch.equal(first[0], views(*other)[0])
    assert not torch.equal(first[2], first[3])


def test_solarisation_and_grey_reach_the_views_they_belong_to(photos):
    n = 2000
    images = torch.full((n, 3, 8, 8), 250, dtype=torch.uint8)
    images[:, 2] = 240
    crop = augment.MultiCrop(8, 8, 1, jitter=(0, 0, 0, 0), mean=(0, 0, 0), std=(1, 1, 1))
    views = crop(images, torch.full((n, 2), 8), augment.seeded_generator("cpu", 0))
    for view, solar in zip(views, (0.0, 0.2, 0.0)):
        assert abs((view[:, 0, 4, 4] < 0.5).float().mean() - solar) < 0.03
        assert abs((view[:, 0, 4, 4] == view[:, 2, 4, 4]).float().mean() - 0.2) < 0.03


def test_central_view_is_resize_and_centre_crop(photos):
    """Pillow's pipeline rounds the resized side to whole pixels first, so sizes are chosen where it has nothing to round."""
    wide = photos[:, :, :32, :]  # 32 x 48
    view = augment.central_view(
        wide, torch.tensor([[32, 48]]).expand(len(wide), 2), 32, (0, 0, 0), (1, 1, 1)
    )
    for image, ours in zip(wide, view):
        expected = np.asarray(TF.center_crop(to_pil(image), [32, 32])).astype(np.float64)
        assert np.abs(levels(ours) - expected).max() < 0.01
    view = augment.central_view(photos, torch.full((len(photos), 2), 48), 168, (0, 0, 0), (1, 1, 1))
    for image, ours in zip(photos, view):
        expected = TF.center_crop(to_pil(image).resize((192, 192), Image.BICUBIC), [168, 168])
        margin = 8  # the pipeline's resize sees beyond the crop's edge
        error = np.abs(levels(ours) - np.asarray(expected))[margin:-margin, margin:-margin]
        assert error.max() <= 2.1
