"""Backbones against the official code and timm.

Recorded values stand for both. timm itself is compared where it is installed.
"""

import hashlib

import numpy as np
import pytest
import torch

import lowdino
from lowdino import ema, models, vit

SIZES = (256, 256), (224, 320), (96, 96), (33, 47)

# From timm 1.0.31 in float64, num_classes=0. First 16 digits of the SHA-256 over the sorted names
# and shapes of the state dict. Then, for the weights of `fill` and the image of `picture` at each
# of SIZES, features 0, 1 and -1 and the standard deviation over all features.
TIMM = {
    "mobilevit_xxs": (
        "fa8c4596dcb9aabb",
        [
            [3.969588, 0.09315662, 0.8308195, 2.902822],
            [4.162982, 0.1180883, 0.4839534, 2.953429],
            [2.634102, 0.9661405, 1.416138, 1.662772],
            [0.1933198, -0.2591804, 0.4242793, 0.6854051],
        ],
    ),
    "mobilevit_xs": (
        "39c35278f44cc72f",
        [
            [0.8747294, 0.3095319, 0.1209671, 2.068705],
            [1.018637, 0.3693341, 0.301341, 2.151772],
            [0.9025475, 0.6140871, 0.2832647, 1.302992],
            [0.6130594, 0.577177, -0.10809, 0.385773],
        ],
    ),
    "mobilevit_s": (
        "1b353ad307569cda",
        [
            [4.666781, 0.05967079, 1.078682, 3.111922],
            [5.123061, 0.03117525, 1.224611, 3.139009],
            [1.361098, -0.04195922, 2.472892, 1.63975],
            [0.02489563, 0.3218085, 2.700736, 0.6602906],
        ],
    ),
}

PARAMETERS = {  # parameters, width; torchvision's from its documentation, without the classifier
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
    theirs, ours = (
        timm.create_model(arch, num_classes=0).eval(),
        lowdino.build_backbone(arch).eval(),
    )
    for value in theirs.state_dict().values():  # at initialisation some norms' weights are zero
        if value.is_floating_point() and value.ndim == 1:
            value.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


DINOV2 = dict(patch_size=14, image_size=518, layer_scale=True)

# From the official code of DINO and DINOv2 (models dinov2_vits14 and dinov2_vits14_reg) in float64,
# for the weights of `fill` and the image of `picture`. At each size: features 0, 1 and -1 of the
# class token and their standard deviation; the first feature of the first patch token, the last of
# the last, and the standard deviation over all patch tokens. Some sizes are smaller or larger than
# the network's own; two have as many patches but are not square (224 x 230, 112 x 448).
OFFICIAL_VIT = {
    "dino_vits16": (
        dict(patch_size=16),
        {
            (224, 224): [
                -0.4200497,
                1.300849,
                0.6545481,
                1.011308,
                -0.3312162,
                0.3854915,
                1.010104,
            ],
            (96, 96): [-0.9017416, 2.632414, -0.416698, 1.014988, 0.18809, -0.3048382, 1.010045],
            (96, 128): [0.7011385, 0.6266768, -0.152482, 1.004755, 0.5464955, -0.0399425, 1.008784],
            (224, 230): [
                -0.01680148,
                1.699291,
                0.4362755,
                1.002064,
                0.2791214,
                0.03453781,
                1.004708,
            ],
            (112, 448): [
                0.2196669,
                1.066649,
                -0.2748301,
                1.003647,
                0.8370455,
                -0.2513796,
                1.007972,
            ],
            (240, 208): [0.9755872, 1.943329, 0.5437088, 1.010384, 0.7460102, 0.3542555, 1.008488],
            (33, 47): [-0.9291662, 1.717025, -1.445416, 1.007236, -0.9001514, -1.423744, 1.008798],
        },
    ),
    "dino_vits8": (
        dict(patch_size=8),
        {
            (96, 96): [1.012195, 2.262666, -0.8255554, 1.015105, 0.5679399, -0.04347086, 1.007849],
            (100, 60): [-0.5778051, 2.27228, -0.2758856, 1.007279, 0.4409, 0.3261387, 1.009956],
        },
    ),
    "dinov2_vits14": (
        DINOV2,
        {
            (224, 224): [
                -1.559565,
                -0.4742716,
                0.2014133,
                1.005906,
                -1.197624,
                0.5425251,
                1.007895,
            ],
            (98, 126): [
                -1.391308,
                -0.9072002,
                -0.09361583,
                1.0032,
                -1.392301,
                0.04983289,
                1.003804,
            ],
        },
    ),
    "dinov2_vits14_reg": (
        DINOV2 | dict(registers=4),
        {
            (224, 224): [-1.483703, -0.4615688, 0.1878222, 1.00603, -1.207248, 0.5159301, 1.007868],
            (98, 126): [
                -1.226083,
                -0.7741002,
                -0.1922568,
                1.004009,
                -1.164849,
                -0.07072833,
                1.004803,
            ],
        },
    ),
}

# timm's networks, at the sizes where timm resizes the position embedding as the official code: it
# always antialiases. Its names are the official ones but for the registers (`reg_token`) and the
# class token's position, which timm adds to the token where there are registers.
TIMM_VIT = {
    "vit_small_patch16_224.dino": [(224, 224)],
    "vit_small_patch14_dinov2": [(518, 518)],
    "vit_small_patch14_reg4_dinov2": [(224, 224), (98, 126)],
}


def official_names(dim, grid, patch, registers=0, layer_scale=False):
    """Names and shapes of the parameters of the official files, for 12 blocks."""
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + grid**2, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, dim)
    for i in range(12):
        for name, out, inner in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (out, inner), f"blocks.{i}.{name}.bias": (out,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (dim,), f"blocks.{i}.{name}.bias": (dim,)}
        if layer_scale:
            shapes |= {f"blocks.{i}.ls1.gamma": (dim,), f"blocks.{i}.ls2.gamma": (dim,)}
    return shapes


def test_vit_has_the_names_of_the_official_files():
    with torch.device("meta"):  # shapes, no values
        models = [
            (vit.vit_tiny(patch_size=16), official_names(192, 14, 16)),
            (vit.vit_small(patch_size=8), official_names(384, 28, 8)),
            (vit.vit_base(patch_size=16), official_names(768, 14, 16)),
            (vit.vit_small(**DINOV2), official_names(384, 37, 14, 0, True)),
            (vit.vit_base(**DINOV2, registers=4), official_names(768, 37, 14, 4, True)),
        ]
    for model, expected in models:
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected


@pytest.mark.parametrize("name", OFFICIAL_VIT)
def test_vit_is_the_official_codes_at_every_size(name):
    """Class and patch tokens of the network that `like` builds, so a file alone tells the way."""
    options, expected = OFFICIAL_VIT[name]
    with torch.device("meta"):
        weights = vit.vit_small(**options).state_dict()
    model = vit.like(weights).double().eval()
    fill(model)
    for (height, width), values in expected.items():
        with torch.no_grad():
            (f,), (patches,) = model.forward_tokens(picture(height, width))
        first, last = patches[0, 0, 0], patches[-1, -1, -1]
        actual = [f[0], f[1], f[-1], f.std(), first, last, patches.std()]
        np.testing.assert_allclose(actual, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TIMM_VIT)
def test_timms_vit_weights_load(name, tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    for key, value in theirs.named_parameters():
        if "gamma" in key:
            value.data.uniform_(0.5, 1.5)
        else:
            value.data.add_(torch.randn_like(value) * 0.02)
    weights = theirs.state_dict()
    if "reg_token" in weights:
        weights["register_tokens"] = weights.pop("reg_token")
        weights["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), weights["pos_embed"]], dim=1)
    if "dinov2" in name:
        weights["mask_token"] = torch.zeros(1, 384)
    torch.save(weights, tmp_path / "official.pth")
    ours = lowdino.load_backbone(str(tmp_path / "official.pth"))
    assert ours.arch == "vit_small"
    ours.load_state_dict(weights, strict=True)
    for height, width in TIMM_VIT[name]:
        x = torch.randn(1, 3, height, width)
        with torch.no_grad():
            tokens, (own, patches) = theirs.forward_features(x), ours.forward_tokens(x)
        torch.testing.assert_close(own, tokens[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            patches.flatten(2).mT, tokens[:, theirs.num_prefix_tokens :], atol=1e-5, rtol=1e-5
        )


def test_vit_contract():
    for arch, width, parameters in (
        ("vit_tiny", 192, 5_524_416),
        ("vit_small", 384, 21_665_664),
        ("vit_base", 768, 85_798_656),
    ):
        with torch.device("meta"):
            model = lowdino.build_backbone(arch)
        assert (model.embed_dim, sum(p.numel() for p in model.parameters())) == (width, parameters)
    model = lowdino.build_backbone("vit_tiny", patch_size=14, image_size=70).eval()
    for height, width in ((32, 32), (33, 47), (64, 96)):
        x = torch.randn(2, 3, height, width)
        with torch.no_grad():
            features, feature_map = model(x), model.forward_features(x)
            attention = model.get_last_selfattention(x)
        assert features.shape == (2, 192)
        assert feature_map.shape == (2, 192, height // 14, width // 14)
        tokens = 1 + (height // 14) * (width // 14)
        assert attention.shape == (2, 3, tokens, tokens)
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 3, tokens))
    with pytest.raises(ValueError, match="one whole patch at least, 14 x 14 pixels"):
        model(torch.randn(1, 3, 13, 64))


@pytest.mark.parametrize("arch", lowdino.ARCHS)
def test_every_backbone_says_its_normalisation(arch):
    with torch.device("meta"):
        one, other = lowdino.build_backbone(arch), lowdino.build_backbone(arch)
    one.mean, one.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # weights that expect another
    assert other.mean == (0.485, 0.456, 0.406) and other.std == (0.229, 0.224, 0.225)
    teacher = ema.make_teacher(one)
    assert teacher.mean == (0.0, 0.0, 0.0) and teacher.std == (1.0, 1.0, 1.0)


def test_last_selfattention_is_what_the_last_block_uses():
    model = lowdino.build_backbone("vit_tiny", image_size=64).eval()
    attn, x = model.blocks[-1].attn, torch.randn(2, 5, 192)
    with torch.no_grad():
        v = attn.split(x)[2]  # (B, heads, N, C / heads)
        by_hand = attn.proj((attn.weights(x) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attn(x), by_hand)


def test_stochastic_depth_is_the_students_alone():
    model = lowdino.build_backbone("vit_tiny", image_size=32).train()
    model.set_drop_path_rate(0.5)
    assert [round(block.drop_path.p, 3) for block in model.blocks] == [
        round(0.5 * i / 11, 3) for i in range(12)
    ]
    teacher, x = ema.make_teacher(model).train(), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x)) and torch.equal(teacher(x), teacher(x))


@pytest.mark.parametrize(
    "content, arch, message",
    [
        ({"pos_embed": torch.zeros(1, 5, 192)}, None, "no Vision Transformer by the names"),
        (official_names(192, 2, 16), "vit_small", "holds a vit_tiny, not vit_small"),
        (official_names(192, 2, 16), "resnet18", "does not fit this architecture"),
        (official_names(192, 2, 16) | {"norm.bias": (4,)}, None, "1 of another shape"),
        (
            {"conv1.weight": (64, 3, 7, 7)},
            None,
            "does not name its architecture; it is one of mobilevit_xxs",
        ),
        ({"arch": "resnet18", "state_dict": {}}, "resnet50", "holds resnet18, not resnet50"),
    ],
)
def test_wrong_backbone_files_are_one_sentence(content, arch, message, tmp_path):
    torch.save(
        {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in content.items()},
        tmp_path / "file.pth",
    )
    with pytest.raises(ValueError, match=message):
        lowdino.load_backbone(str(tmp_path / "file.pth"), arch)


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

    theirs, ours = (
        getattr(torchvision.models, arch)(weights=None).eval(),
        lowdino.build_backbone(arch).eval(),
    )
    weights = theirs.state_dict()
    ours.load_state_dict({k: weights[k] for k in ours.state_dict()}, strict=True)
    setattr(theirs, "fc" if arch.startswith("resnet") else "classifier", torch.nn.Identity())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_unknown_architecture_is_named():
    with pytest.raises(
        ValueError, match="unknown architecture 'vit_giant'; choose from mobilevit_xxs"
    ):
        lowdino.build_backbone("vit_giant")


@pytest.mark.parametrize("arch", ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s"])
def test_features_of_a_shifted_image_agree_at_initialisation(arch):
    """What self-distillation bootstraps from: 0.57 to 0.70 here, He's alone 0.01 to 0.04."""
    torch.manual_seed(0)
    model = lowdino.build_backbone(arch).train()
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.normal(size=(64, 3, 17, 17))).float()
    # Smooth, as photographs are.
    images = torch.nn.functional.interpolate(images, size=(68, 68), mode="bicubic")
    with torch.no_grad():
        a, b = model(images[:, :, :64, :64]), model(images[:, :, 4:, 4:])
    assert torch.cosine_similarity(a - a.mean(0), b - b.mean(0)).mean() > 0.5


@pytest.mark.parametrize("arch", ["mobilevit_xxs", "resnet5m", "vit_tiny"])
def test_a_network_is_exported_for_any_batch_size(arch, tmp_path):
    model, x = lowdino.build_backbone(arch).eval(), torch.randn(4, 3, 32, 32)
    program = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    torch.export.save(program, str(tmp_path / "backbone.pt2"))
    exported = torch.export.load(str(tmp_path / "backbone.pt2")).module()
    with torch.no_grad():
        for part in (x, x[:1], x[:3]):
            torch.testing.assert_close(exported(part), model(part), rtol=1e-5, atol=1e-5)
