"""Views against Pillow and torchvision at the same parameters; the draws against torchvision's."""

from itertools import permutations

import numpy as np
import PIL
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from lowdino import augment


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def levels(image):
    """(3, H, W) in [0, 1] -> (H, W, 3) in 0..255, float64."""
    return image.permute(1, 2, 0).numpy().astype(np.float64) * 255


def random_crops(count, side, rng, smallest=4):
    height, width = rng.integers(smallest, side + 1, (2, count))
    top = (rng.random(count) * (side - height + 1)).astype(int)
    left = (rng.random(count) * (side - width + 1)).astype(int)
    return np.stack([top, left, height, width], axis=1)


def pillow_resize(image, size, width_first=False):
    """Pillow 13's own resize. An older one, or `width_first`, goes along one axis at a time."""
    if int(PIL.__version__.split(".")[0]) >= 13 and not width_first:
        return image.resize((size, size), Image.BICUBIC)
    tall = image.height > size and image.height - size > 2 * (image.width - size)
    halfway = (image.width, size) if tall and not width_first else (size, image.height)
    return image.resize(halfway, Image.BICUBIC).resize((size, size), Image.BICUBIC)


def crop_errors(images, out_size, boxes, flips, width_first=False):
    """In levels, of uint8 and of float images, which may go different ways: (N, 2, h, w, 3)."""
    ours = [
        augment.resized_crop(x, torch.from_numpy(boxes), out_size, torch.from_numpy(flips))
        for x in (images, augment.to_float(images))
    ]
    errors = []
    for image, (top, left, height, width), flip, *views in zip(images, boxes, flips, *ours):
        pil = to_pil(image).crop((left, top, left + width, top + height))
        pil = pillow_resize(pil, out_size, width_first)
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
    images = np.stack([np.array(Image.open(f).convert("RGB")) for f in files])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    rng = np.random.default_rng(out_size)
    errors = crop_errors(
        images, out_size, random_crops(len(images), 32, rng), rng.random(len(images)) < 0.5
    )
    assert errors.max() <= 2.1 and errors.mean() <= 0.4


def on_gpu(monkeypatch):
    """Go the way of a GPU, on a CPU."""
    monkeypatch.setattr(augment, "on_cpu", lambda images: False)


@pytest.mark.parametrize("out_size", [9, 16, 32, 64, 224])
def test_resized_crop_on_a_gpu_is_pillows_along_the_width_first(out_size, photos, monkeypatch):
    on_gpu(monkeypatch)
    rng = np.random.default_rng(out_size)
    images, boxes = photos.repeat(4, 1, 1, 1), random_crops(4 * len(photos), 48, rng)
    flips = rng.random(len(boxes)) < 0.5
    errors = crop_errors(images, out_size, boxes, flips, width_first=True)
    assert errors.max() <= 2.1 and errors.mean() <= 0.4
    # Tall boxes differ from those of Pillow >= 13 by some levels, at sharp edges only.
    errors = crop_errors(images, out_size, boxes, flips)
    tall = augment.height_first(torch.from_numpy(boxes), out_size).numpy()
    assert tall.any() == (out_size < 48)
    assert errors[~tall].max() <= 2.1
    assert not tall.any() or (errors[tall].max() <= 12 and errors[tall].mean() <= 0.5)


def spy_on_resample(monkeypatch):
    shapes, resample = [], augment.resample

    def spy(x, indices, weights):
        shapes.append((tuple(x.shape), len(indices)))
        return resample(x, indices, weights)

    monkeypatch.setattr(augment, "resample", spy)
    return shapes


def test_a_gpu_resamples_every_view_once_along_each_axis(photos, monkeypatch):
    on_gpu(monkeypatch)
    shapes = spy_on_resample(monkeypatch)
    crop = augment.MultiCrop(32, 16, 3, blur_sigma=(0.1, 0.2))  # blur would resample, too
    B, side = len(photos), photos.shape[2]
    crop(photos, torch.full((B, 2), side), augment.seeded_generator("cpu", 0))
    assert shapes == [
        ((B, side, 3 * side), 2 * B),  # columns: the images themselves, not a copy for each view
        ((2 * B, side, 3 * 32), 2 * B),  # rows
        ((B, side, 3 * side), 3 * B),
        ((3 * B, side, 3 * 16), 3 * B),
    ]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_host_reads_no_value_from_a_gpu(device):
    """Fake tensors have shapes but no values, so that whatever needs a value on the host fails."""
    with FakeTensorMode():
        images = torch.zeros(4, 3, 48, 64, dtype=torch.uint8, device=device)
        sizes, crop = torch.ones(4, 2, device=device), augment.MultiCrop(32, 16, 3).to(device)
        if device == "cpu":  # which works on some of the images: the failure that is looked for
            with pytest.raises(DynamicOutputShapeException):
                crop(images, sizes, None)
        else:
            views = crop(images, sizes, None)
            assert [view.shape[-1] for view in views] == [32, 32, 16, 16, 16]


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("out_size", [16, 160])  # by weighted sums, and by torch's resize
@pytest.mark.parametrize("upright", [False, True])
def test_a_panorama_leaves_the_crops_of_its_batch_as_they_are(
    on_cpu, out_size, upright, photos, monkeypatch
):
    monkeypatch.setattr(augment, "on_cpu", lambda images: on_cpu)
    panorama = torch.cat([*photos[:3], photos[3, :, :, :16]], dim=2)  # 48 x 160
    images = [panorama, photos[4, :, :40, :30], photos[5, :, :20], photos[6, :, :, :33]]
    images = [image.transpose(1, 2) if upright else image for image in images]
    sizes = torch.tensor([image.shape[1:] for image in images])
    H, W = sizes.amax(dim=0).tolist()
    assert sorted((H, W)) == [48, 160]
    canvas = torch.full((len(images), 3, H, W), 255, dtype=torch.uint8)
    for place, image in zip(canvas, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    boxes = augment.random_boxes(sizes.repeat(5, 1), (0.05, 1.0), torch.Generator().manual_seed(0))
    flips = torch.rand(2, len(boxes)) < 0.5
    shapes = spy_on_resample(monkeypatch)
    together = augment.resized_crop(canvas, boxes, out_size, *flips)
    assert bool(shapes) == (not on_cpu or out_size == 16)
    if shapes:
        assert shapes[0][0] == (len(images), W, 3 * H)  # no square
    for i, crop in enumerate(together):
        box, flip = boxes[i : i + 1], flips[:, i : i + 1]
        alone = augment.resized_crop(images[i % len(images)][None], box, out_size, *flip)
        torch.testing.assert_close(crop[None], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        augment.central_view(canvas, sizes, out_size),
        torch.cat(
            [augment.central_view(x[None], s[None], out_size) for x, s in zip(images, sizes)]
        ),
        atol=1e-4,  # 1e-5 and less, divided by std
        rtol=0,
    )


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
    images = torch.rand(1, 3, 12, 12).mul(0.2).add(0.4).requires_grad_()
    augment.resized_crop(images, torch.tensor([[2, 2, 8, 8]]), 8).sum().backward()
    inside = torch.zeros(12, 12)
    inside[2:10, 2:10] = 1  # same size: the identity inside the box, nothing outside
    torch.testing.assert_close(images.grad[0, 0], inside, atol=1e-5, rtol=0)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_color_jitter_is_torchvisions_in_every_order(on_cpu, photos, monkeypatch):
    monkeypatch.setattr(augment, "on_cpu", lambda images: on_cpu)
    rng = torch.Generator().manual_seed(0)
    orders = torch.tensor(list(permutations(range(4))))
    images = augment.to_float(photos[torch.arange(len(orders)) % len(photos)])
    factors = 0.6 + 0.8 * torch.rand(len(orders), 3, generator=rng)
    hues = 0.2 * torch.rand(len(orders), generator=rng) - 0.1
    factors[::7], hues[::7] = 1, 0  # some at rest
    steps = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    ours = augment.color_jitter(images, factors, hues, orders)
    for image, factor, hue, order, view in zip(images, factors, hues, orders, ours):
        amounts = [*factor.tolist(), hue.item()]
        for step in order.tolist():
            image = steps[step](image, amounts[step])
        assert (view - image).abs().max() * 255 < 0.1


def test_color_jitter_at_rest_changes_nothing(photos):
    images = augment.to_float(photos)
    n = len(images)
    for turns in (0.0, 1.0):  # left out, and gone all through
        still = augment.color_jitter(
            images, torch.ones(n, 3), torch.full((n,), turns), torch.arange(4).expand(n, 4)
        )
        torch.testing.assert_close(still, images, atol=2e-6, rtol=0)


def test_views_are_the_same_on_a_cpu_and_a_gpu(photos, monkeypatch):
    # But for the order of the axes, which only a CPU chooses.
    monkeypatch.setattr(augment, "height_first", lambda boxes, size: boxes[:, 0] < 0)
    sizes = torch.full((len(photos), 2), photos.shape[2])
    views = []
    for on_cpu in (True, False):
        monkeypatch.setattr(augment, "on_cpu", lambda images, on_cpu=on_cpu: on_cpu)
        views += [augment.MultiCrop(32, 16, 2)(photos, sizes, augment.seeded_generator("cpu", 0))]
    for one, other in zip(*views):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_autocast_changes_no_view(photos, monkeypatch):
    on_gpu(monkeypatch)
    sizes = torch.full((len(photos), 2), photos.shape[2])
    crop, views = augment.MultiCrop(32, 16, 2), []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            drawn = crop(photos, sizes, augment.seeded_generator("cpu", 0))
            views += [[*drawn, augment.central_view(photos, sizes, 32)]]
    for one, other in zip(*views):
        assert torch.equal(one, other)


@pytest.mark.parametrize("at_once", [1, 3, 9, 20])  # part of a view, one view of all, or two
def test_views_are_the_same_in_blocks_of_any_size(at_once, photos, monkeypatch):
    images, sizes = photos[:8], torch.full((8, 2), photos.shape[2])
    crop = augment.MultiCrop(32, 16, 3)
    whole = crop(images, sizes, augment.seeded_generator("cpu", 0))
    monkeypatch.setattr(augment, "BLOCK", at_once * 12 * 16 * 16)
    blocks = augment.blocks(images, 24, 16)
    assert max(crops.stop - crops.start for _, crops in blocks) <= at_once < 24 and len(blocks) > 1
    assert sorted(i for _, crops in blocks for i in range(24)[crops]) == list(range(24))
    for one, other in zip(whole, crop(images, sizes, augment.seeded_generator("cpu", 0))):
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
        ours = levels(augment.solarize(augment.to_float(image[None]))[0])
        assert np.abs(ours - solar).max() < 1e-3


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
    sizes, generator = torch.tensor([size]).expand(n, 2), augment.seeded_generator("cpu", 1)
    boxes = augment.random_boxes(sizes, scale, generator).numpy()
    torch.manual_seed(0)
    image = torch.empty(1, *size)
    get_params = T.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)])
    assert (boxes == boxes.round()).all() and (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()
    for column in range(4):  # Kolmogorov-Smirnov: p = 0.001 is at 0.0195
        assert largest_gap(boxes[:, column], theirs[:, column]) < 0.02


def largest_gap(a, b):
    """The Kolmogorov-Smirnov statistic: the largest distance between two empirical CDFs."""
    at = np.unique(np.concatenate([a, b]))
    cdfs = [np.searchsorted(np.sort(x), at, "right") / len(x) for x in (a, b)]
    return np.abs(cdfs[0] - cdfs[1]).max()


def test_drawn_jitter_flips_and_blur_have_torchvisions_distribution(monkeypatch):
    """Catch the parameters on their way to the operations, and compare with ColorJitter's draws."""
    seen = {}

    def spy(name, *positions):
        original = getattr(augment, name)

        def wrapper(*arguments):
            seen.setdefault(name, []).append([arguments[i] for i in positions])
            return original(*arguments)

        monkeypatch.setattr(augment, name, wrapper)

    spy("color_jitter", 1, 2, 3), spy("apply_where", 0, 2, -1), spy("resized_crop", 1, 3, 4)
    n = 4000
    images, sizes = torch.full((n, 3, 8, 8), 100, dtype=torch.uint8), torch.full((n, 2), 8)
    crop = augment.MultiCrop(8, 8, 1, vertical_flip=0.3)
    crop(images, sizes, augment.seeded_generator("cpu", 0, 0, 0))
    # Two global views, then a local one, each drawn by itself.
    views = [draws for group in seen["color_jitter"] for draws in zip(*(v.split(n) for v in group))]
    assert len(views) == 3

    torch.manual_seed(0)
    jitter = T.ColorJitter(0.4, 0.4, 0.2, 0.1)
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [jitter.get_params(*ranges)[1:] for _ in range(n)]
    theirs = np.array(theirs, dtype=np.float64)
    for factors, hue, order in views:
        on = (factors[:, 0] != 1).numpy()
        assert abs(on.mean() - 0.8) < 0.03
        ours = torch.cat([factors, hue[:, None]], dim=1).numpy()[on]
        for i in range(4):
            assert largest_gap(ours[:, i], theirs[:, i]) < 0.05
        orders = np.unique(order.numpy(), axis=0, return_counts=True)
        assert len(orders[0]) == 24 and orders[1].min() > n / 24 * 0.6
    blurs = [
        draws
        for mask, operation, sigma in seen["apply_where"]
        if operation == augment.gaussian_blur
        for draws in zip(mask.split(n), sigma.split(n))
    ]
    for (mask, sigma), probability in zip(blurs, (1.0, 0.1, 0.5), strict=True):
        blurred = sigma[mask].numpy()
        assert abs(len(blurred) / n - probability) < 0.03
        assert largest_gap(blurred, np.random.default_rng(0).uniform(0.1, 2.0, 20_000)) < 0.1
    scales = (0.4, 1.0), (0.05, 0.4)  # global, local
    for (boxes, flip, vertical_flip), scale in zip(seen["resized_crop"], scales, strict=True):
        area = boxes[:, 2] * boxes[:, 3] / 64
        assert abs(area.mean() - sum(scale) / 2) < 0.03
        assert abs(flip.float().mean() - 0.5) < 0.03
        assert abs(vertical_flip.float().mean() - 0.3) < 0.03


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


@pytest.mark.parametrize("global_number", [1, 2, 4])
def test_any_number_of_global_views(global_number, photos):
    crop = augment.MultiCrop(32, 16, 1, solarize=0.3, global_number=global_number)
    others = global_number - 1
    assert crop.groups == [
        (32, (0.4, 1.0), (1.0,) + (0.1,) * others, (0.0,) + (0.3,) * others),
        (16, (0.05, 0.4), (0.5,), (0.0,)),
    ]
    sizes = torch.full((len(photos), 2), 48)
    views = crop(photos, sizes, augment.seeded_generator("cpu", 0))
    shapes = [tuple(view.shape) for view in views]
    n = len(photos)
    assert shapes == [(n, 3, 32, 32)] * global_number + [(n, 3, 16, 16)]
    assert len({view.sum().item() for view in views}) == len(views)  # each drawn by itself


def test_two_global_views_are_the_default_and_none_is_refused(photos):
    assert augment.MultiCrop().groups == augment.MultiCrop(global_number=2).groups
    with pytest.raises(ValueError, match="at least one global view"):
        augment.MultiCrop(global_number=0)


def test_the_views_describe_themselves():
    def describe(*sizes, sigma=2.0):
        return augment.MultiCrop(*sizes, blur_sigma=(0.1, sigma)).describe()

    assert describe(224, 96, 8) == "2 global views of 224 px, 8 local views of 96 px"
    assert describe(64, 32, 0) == "2 global views of 64 px, no local views"
    off = "; blur is off below 0.3 px"
    start = "2 global views of 32 px, 1 local view of 32 px"
    assert describe(32, 32, 1, sigma=2 * 32 / 224) == start + off
    assert describe(32, 32, 1, sigma=0.3) == start + off
    assert describe(32, 32, 1, sigma=0.301) == start


@pytest.mark.parametrize("high, blurred", [(0.3, False), (0.31, True)])
def test_views_are_blurred_where_the_description_says_so(high, blurred, photos, monkeypatch):
    calls, blur = [], augment.gaussian_blur
    monkeypatch.setattr(augment, "gaussian_blur", lambda *args: (calls.append(1), blur(*args))[1])
    crop = augment.MultiCrop(32, 16, 0, blur_sigma=(0.1, high))
    crop(photos, torch.full((len(photos), 2), 48), augment.seeded_generator("cpu", 0))
    assert bool(calls) == blurred == ("blur is off" not in crop.describe())


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
    """Pillow rounds the resized side to whole pixels, so sizes here leave nothing to round."""
    wide = photos[:, :, :32, :]  # 32 x 48
    sizes, plain = torch.tensor([[32, 48]]).expand(len(wide), 2), ((0, 0, 0), (1, 1, 1))
    view = augment.central_view(wide, sizes, 32, *plain)
    for image, ours in zip(wide, view):
        expected = np.asarray(TF.center_crop(to_pil(image), [32, 32])).astype(np.float64)
        assert np.abs(levels(ours) - expected).max() < 0.01
    view = augment.central_view(photos, torch.full((len(photos), 2), 48), 168, *plain)
    for image, ours in zip(photos, view):
        expected = TF.center_crop(to_pil(image).resize((192, 192), Image.BICUBIC), [168, 168])
        margin = 8  # the pipeline's resize sees beyond the crop's edge
        error = np.abs(levels(ours) - np.asarray(expected))[margin:-margin, margin:-margin]
        assert error.max() <= 2.1
