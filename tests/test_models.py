"""Backbones against timm: recorded values without it, and the package itself where it is installed."""

import hashlib

import numpy as np
import pytest
import torch

import lowdino
from lowdino import models

SIZES = (256, 256), (224, 320), (96, 96), (33, 47)

# From timm 1.0.31 in float64, num_classes=0: the first 16 digits of the SHA-256 over the sorted names and shapes of the
# state dict; then for weights and images of `fill` and `picture`, at each of SIZES, the features 0, 1 and -1 and the
# standard deviation over all.
TIMM = {
    "mobilevit_xxs": ("fa8c4596dcb9aabb", [[3.969588, 0.09315662, 0.8308195, 2.902822], [4.162982, 0.1180883, 0.4839534, 2.953429], [2.634102, 0.9661405, 1.416138, 1.662772], [0.1933198, -0.2591804, 0.4242793, 0.6854051]]),
    "mobilevit_xs": ("39c35278f44cc72f", [[0.8747294, 0.3095319, 0.1209671, 2.068705], [1.018637, 0.3693341, 0.301341, 2.151772], [0.9025475, 0.6140871, 0.2832647, 1.302992], [0.6130594, 0.577177, -0.10809, 0.385773]]),
    "mobilevit_s": ("1b353ad307569cda", [[4.666781, 0.05967079, 1.078682, 3.111922], [5.123061, 0.03117525, 1.224611, 3.139009], [1.361098, -0.04195922, 2.472892, 1.63975], [0.02489563, 0.3218085, 2.700736, 0.6602906]]),
}  # fmt: skip

PARAMETERS = {  # parameters, width; torchvision's from its documentation, less the classifier
    "mobilevit_xxs": (951_024, 320),
    "mobilevit_xs": (1_932_848, 384),
    "mobilevit_s": (4_937_632, 640),
    "resnet5m": (4_956_480, 512),
    "resnet18": (11_689_512 - 513_000, 512),
    "resnet34": (21_797_672 - 513_000, 512),
    "resnet50": (25_557_032 - 2_049_000, 2048),
    "mobilenet_v2": (3_504_872 - 1_281_000, 1280),
    "mobilenet_v3_small": (2_542_856 - 577 * 1024 - 1025 * 1000, 576),
}


def fill(model):
    for i, (name, value) in enumerate(sorted(model.state_dict().items())):
        if value.is_floating_point():
            noise = torch.from_numpy(np.random.RandomState(i).randn(*value.shape))
            scale = (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
            centre = 1 if value.ndim == 1 and not name.endswith(("bias", "mean")) else 0
            value.copy_(centre + scale * noise)


def picture(height, width):
    return torch.from_numpy(np.random.RandomState(0).randn(1, 3, height, width))


@pytest.mark.parametrize("arch", TIMM)
def test_mobilevit_is_timms(arch):
    model = lowdino.build_backbone(arch).double().eval()
    names = "\n".join(f"{k} {tuple(v.shape)}" for k, v in sorted(model.state_dict().items()))
    digest, expected = TIMM[arch]
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == digest
    fill(model)
    for (height, width), values in zip(SIZES, expected):
        with torch.no_grad():
            f = model(picture(height, width))[0]
        np.testing.assert_allclose([f[0], f[1], f[-1], f.std()], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arch", TIMM)
def test_mobilevit_weights_go_both_ways_with_timm(arch):
    timm = pytest.importorskip("timm")
    theirs, ours = timm.create_model(arch, num_classes=0).eval(), lowdino.build_backbone(arch).eval()
    for value in theirs.state_dict().values():  # off its initialisation, where some norms are zero
        if value.is_floating_point() and value.ndim == 1:
            value.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", models.ARCHS)
def test_contract(arch):
    model = lowdino.build_backbone(arch).eval()
    assert (sum(p.numel() for p in model.parameters()), model.embed_dim) == PARAMETERS[arch]
    for height, width in ((32, 32), (33, 47), (64, 96)):
        x = torch.randn(2, 3, height, width)
        with torch.no_grad():
            features, feature_map = model(x), model.forward_features(x)
        assert features.shape == (2, model.embed_dim)
        assert feature_map.shape[:2] == (2, model.embed_dim)
        torch.testing.assert_close(features, feature_map.mean(dim=(2, 3)))


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_torchvisions_networks_are_torchvisions(arch):
    import torchvision

    theirs, ours = getattr(torchvision.models, arch)(weights=None).eval(), lowdino.build_backbone(arch).eval()
    weights = theirs.state_dict()
    ours.load_state_dict({k: weights[k] for k in ours.state_dict()}, strict=True)
    setattr(theirs, "fc" if arch.startswith("resnet") else "classifier", torch.nn.Identity())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="unknown architecture 'vit_giant'; choose from mobilevit_xxs"):
        lowdino.build_backbone("vit_giant")


@pytest.mark.parametrize("arch", ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s"])
def test_features_of_a_shifted_image_agree_at_initialisation(arch):
    """What self-distillation bootstraps from: 0.57 to 0.70 here, where He's initialisation alone has 0.01 to 0.04."""
    torch.manual_seed(0)
    model = lowdino.build_backbone(arch).train()
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.normal(size=(64, 3, 17, 17))).float()
    images = torch.nn.functional.interpolate(images, size=(68, 68), mode="bicubic")  # smooth, as photographs are
    with torch.no_grad():
        a, b = model(images[:, :, :64, :64]), model(images[:, :, 4:, 4:])
    assert torch.cosine_similarity(a - a.mean(0), b - b.mean(0)).mean() > 0.5
