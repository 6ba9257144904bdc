"""Pyramids of maps, and torchvision's detectors and segmenters on them; mean IoU."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import lowdino
from lowdino import dense, distributed, models, vit

CONVNETS = models.ARCHS


def small(arch, **options):
    torch.manual_seed(0)
    if arch in vit.ARCHS:
        options = dict(image_size=64) | options
    return lowdino.build_backbone(arch, **options)


@pytest.mark.parametrize("arch", CONVNETS)
@pytest.mark.parametrize("size", [(64, 96), (75, 33)])
def test_pyramid_of_convnets(arch, size):
    network = small(arch).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps, last = network.forward_pyramid(x), network.forward_features(x)
    assert torch.equal(maps[-1], last) and network.pyramid_dims[-1] == network.embed_dim
    strides = (4, 8, 16) if arch == "resnet5m" else (4, 8, 16, 32)
    assert network.pyramid_strides == strides
    for map, dim, stride in zip(maps, network.pyramid_dims, strides, strict=True):
        assert map.shape == (2, dim, *(-(-side // stride) for side in size))


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_pyramid_against_torchvisions_feature_extractor(arch):
    network = small(arch).eval()
    ends = {"mobilenet_v2": (3, 6, 13, 18), "mobilenet_v3_small": (1, 3, 8, 12)}.get(arch)
    nodes = [f"features.{end}" for end in ends] if ends else [f"layer{n}" for n in range(1, 5)]
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = create_feature_extractor(network, nodes)(x)
        for map, node in zip(network.forward_pyramid(x), nodes, strict=True):
            assert torch.equal(map, expected[node])


def test_pyramid_of_a_vit_is_its_one_map():
    network = small("vit_tiny", patch_size=8).eval()
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        (map,) = network.forward_pyramid(x)
        assert torch.equal(map, network.forward_features(x))
    assert map.shape == (1, 192, 8, 6)
    assert network.pyramid_strides == (8,) and network.pyramid_dims == (192,)


@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("strides", [(4, 8, 16, 32, 64), (8, 16, 32, 64, 128)])
def test_fpn_of_a_vit_has_all_strides(patch, strides):
    body = dense.fpn_backbone(small("vit_tiny", patch_size=patch), 16, strides)
    maps = body(torch.randn(1, 3, 128, 128))
    expected = [128 // stride for stride in strides]
    assert [map.shape[1:] for map in maps.values()] == [(16, n, n) for n in expected]


@pytest.mark.parametrize("patch", [14, 16])
def test_fpn_of_a_vit_needs_no_finer_map_than_its_own(patch):
    body = dense.fpn_backbone(small("vit_tiny", patch_size=patch), 8, (16, 32))
    maps = body(torch.randn(1, 3, 128, 128))
    assert [map.shape[1:] for map in maps.values()] == [(8, 8, 8), (8, 4, 4)]


def test_fpn_of_convnets_has_all_strides():
    for arch in ("mobilevit_xxs", "resnet5m"):
        body = dense.fpn_backbone(small(arch), 16)
        maps = body(torch.randn(1, 3, 64, 128))
        assert list(maps) == ["0", "1", "2", "3", "4"] and body.out_channels == 16
        sides = [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]
        assert [map.shape[1:] for map in maps.values()] == [(16, *side) for side in sides]


def target(masks=False):
    target = dict(boxes=torch.tensor([[4.0, 8.0, 40.0, 50.0]]), labels=torch.tensor([3]))
    if masks:
        target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
        target["masks"][0, 8:50, 4:40] = 1
    return target


def step(detector, **masks):
    """One training step on one picture; the first convolution's weights before and after."""
    weight = models.stem_of(detector)[1].weight
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    losses = detector.train()([torch.rand(3, 64, 64)], [target(**masks)])
    loss = sum(losses.values())
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    return before, weight


def mask_rcnn(arch):
    body = dense.fpn_backbone(small(arch), freeze_bn=False)
    return MaskRCNN(body, num_classes=91, min_size=64, max_size=64)


@pytest.mark.parametrize("arch", ["mobilevit_xxs", "resnet5m", "vit_tiny"])
def test_mask_rcnn_trains(arch):
    before, after = step(mask_rcnn(arch), masks=True)
    assert not torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted({*lowdino.ARCHS} - {"mobilevit_xxs", "resnet5m"}))
def test_mask_rcnn_trains_on_every_backbone(arch):
    before, after = step(mask_rcnn(arch), masks=True)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet, FCOS])
def test_other_detectors_of_torchvision_train(kind):
    body = dense.fpn_backbone(small("mobilevit_xxs"), 32, (8, 16, 32, 64, 128), freeze_bn=False)
    # FCOS normalises within a map, which wants more than one cell of the coarsest.
    before, after = step(kind(body, num_classes=4, min_size=256, max_size=256))
    assert not torch.equal(before, after)


def test_frozen_batch_norm_stays_and_gives_the_same_maps():
    network = small("resnet5m").eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(1, 3, 64, 64)
    expected = network.forward_features(x)
    body = dense.fpn_backbone(network, 16)
    names = {type(module) for module in body.backbone.modules()}
    assert FrozenBatchNorm2d in names and torch.nn.BatchNorm2d not in names
    body.train()
    torch.testing.assert_close(body.backbone.forward_features(x), expected, rtol=1e-4, atol=1e-4)


def test_bad_strides_are_refused():
    for strides in ((4, 16), (6, 12, 24), (), (0, 0)):
        with pytest.raises(distributed.UserError, match="powers of 2, each twice the one before"):
            dense.fpn_backbone(small("resnet5m"), strides=strides)
    for strides in ((32, 64), (4, 8)):
        message = (
            rf"strides must reach the backbone's coarsest, 16, not \({strides[0]}, {strides[1]}\)"
        )
        for network in (small("resnet5m"), small("vit_tiny", patch_size=14, image_size=56)):
            with pytest.raises(distributed.UserError, match=message):
                dense.fpn_backbone(network, strides=strides)


@pytest.mark.parametrize("arch", ["mobilevit_xxs", "vit_tiny"])
def test_segmenter_gives_logits_of_every_pixel_and_trains(arch):
    network = dense.segmenter(small(arch), classes=5)
    x, mask = torch.randn(2, 3, 64, 96), torch.randint(0, 5, (2, 64, 96))
    logits = network(x)["out"]
    assert logits.shape == (2, 5, 64, 96)
    F.cross_entropy(logits, mask).backward()
    assert models.stem_of(network)[1].weight.grad.abs().sum() > 0


def test_mean_iou_against_sets_of_pixels():
    generator = np.random.default_rng(0)
    mask, predicted = generator.integers(0, 4, (2, 20, 30))
    mask[:, :3] = 255
    ious = []
    for name in range(6):
        true, here = ((array == name) & (mask != 255) for array in (mask, predicted))
        if (true | here).any():
            ious.append((true & here).sum() / (true | here).sum())
    matrix = dense.confusion(torch.from_numpy(predicted), torch.from_numpy(mask), 6)
    assert len(ious) == 4 and dense.mean_iou(matrix) == pytest.approx(np.mean(ious))


@pytest.mark.parametrize("patch", [14, 16])
def test_maps_of_a_vit_lie_where_detectors_take_them_to_be(patch):
    """A bright spot is found in the map at its place over the stride."""
    backbone = small("vit_tiny", patch_size=patch).eval()
    body = dense.fpn_backbone(backbone, 16)
    seen = []
    backbone.forward_pyramid = lambda x: (
        seen.append(F.avg_pool2d(x, patch)) or [torch.zeros(1, 192, *seen[-1].shape[2:])]
    )
    x = torch.zeros(1, 3, 320, 480)
    x[:, :, 200:216, 400:416] = 1
    maps = body(x)
    assert seen[0].shape[2:] == maps["2"].shape[2:] == (20, 30)
    assert divmod(int(seen[0][0, 0].argmax()), 30) == (200 // 16, 400 // 16)
