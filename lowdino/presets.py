"""Presets, and the recipe of runs without one. A flag given by hand wins over all of them.

Without --preset the method is the one whose flags are given, --out_dim or --alpha of `dino`,
--descriptors of `mvmr`, else `emp`; its settings are those for small pictures and minutes or hours.
--optimizer brings its own learning rate and weight decay. A step of `emp` has 512 / views images on
each rank, and never more than there are. Without --epochs and --minutes a run has 30 epochs, or
what 2,000 steps take where that is more; warm-ups take a tenth of it at most.

On 1.3 million images of 224 pixels and eight GPUs that is `emp` with 8 views of 64 images a GPU:
512 images and 4,096 views a step, 2,502 steps an epoch, 30 epochs, which cost as much as 58 of
DINO's with 2 x 224 + 8 x 96 pixels. The learning rate is the same, for Muon's step has one length
whatever the batch; the coding rate is of all 512 images. Nobody has made that run with these
settings, which were chosen on 45,000 images of 32 pixels. --preset dino is what DINO's authors ran.

`small` takes 4,000 to 100,000 pictures, batches of 32 to 256 and random weights: DINO's loss, and
InfoNCE between two views, which fades; the teacher's momentum follows from the number of steps.
`lowdino` starts from ImageNet weights in the paper, --init. `mvmr` and `emp` have neither a teacher
nor a contrast.
"""

import argparse

from lowdino import vit
from lowdino.methods import METHODS

PRESETS = {
    # One small machine, thousands of pictures, random weights: two views, a head of LowDINO's size
    # with batch norm, and InfoNCE beside DINO's loss, fading. Chosen by runs of minutes on the demo
    # images and CIFAR-10. AdamW's rate is one for batches of 64 to 256.
    "small": dict(
        epochs=30, batch_size_per_gpu=64, lr=2e-3, lr_reference_batch=0, min_lr=1e-6,
        warmup_epochs=0.3, optimizer="adamw", weight_decay=0.04, weight_decay_end=0.04,
        clip_grad=3.0, out_dim=1024, hidden_dim=512, norm_last_layer=True, use_bn_in_head=True,
        momentum_teacher=None, teacher_temp=0.04, warmup_teacher_temp=0.04,
        warmup_teacher_temp_epochs=0, student_temp=0.1, freeze_last_layer=0, infonce_weight=1.0,
        global_crops_scale=[0.2, 1.0], local_crops_number=0,
    ),
    # EMP-SSL (Tong et al., 2023) for small pictures and minutes or hours: 8 views of few images,
    # and Muon. Chosen by runs of equal compute on held-out training images of CIFAR-10, where more
    # views, the coding rate, Muon and the rarer grey each gained.
    "emp": dict(
        method="emp", epochs=30, batch_size_per_gpu=64, lr=0.12, lr_reference_batch=0,
        min_lr=1e-6, warmup_epochs=0.3, optimizer="muon", weight_decay=0.04,
        weight_decay_end=0.04, clip_grad=3.0, projector=[512, 512, 256],
        global_crops_number=8, global_crops_scale=[0.2, 1.0], local_crops_number=0,
        grayscale=0.1,
    ),
    # Table 2 of Prathapaneni and Shashank (2023); resnet5m takes 10 crops, see LOWDINO_RESNET5M.
    # hidden_dim is that of the authors' code, the flip's probability ours; blur, solarisation and a
    # warm-up from 0 are DINO's, where their text blurs local views by up to 0.5 pixels and warms up
    # from min_lr.
    "lowdino": dict(
        epochs=100, batch_size_per_gpu=64, lr=5e-4, lr_reference_batch=64, min_lr=1e-6,
        warmup_epochs=10, optimizer="sgd", weight_decay=0.04, weight_decay_end=0.4,
        clip_grad=2.0, out_dim=1024, hidden_dim=512, norm_last_layer=False, use_bn_in_head=False,
        momentum_teacher=0.9995, teacher_temp=0.04, warmup_teacher_temp=0.04,
        warmup_teacher_temp_epochs=0, student_temp=0.1, freeze_last_layer=0,
        global_crops_size=224, global_crops_scale=[0.4, 1.0], local_crops_number=2,
        local_crops_size=224, local_crops_scale=[0.05, 0.4], vertical_flip=0.5,
    ),
    # Caron et al. (2021): the defaults of the authors' main_dino.py.
    "dino": dict(
        epochs=100, batch_size_per_gpu=64, lr=5e-4, lr_reference_batch=256, min_lr=1e-6,
        warmup_epochs=10, optimizer="adamw", weight_decay=0.04, weight_decay_end=0.4,
        clip_grad=3.0, out_dim=65536, hidden_dim=2048, norm_last_layer=True,
        use_bn_in_head=False, momentum_teacher=0.996, teacher_temp=0.04,
        warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=0, student_temp=0.1,
        freeze_last_layer=1, global_crops_size=224, global_crops_scale=[0.4, 1.0],
        local_crops_number=8, local_crops_size=96, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0,
    ),
    # Kinakh et al., MV-MR on STL-10: learning rate, decay, batch and projector of the authors'
    # configuration, the epochs of their paper; AdamW for Adam, a warm-up from 0, and DINO's
    # augmentation of both views.
    "mvmr": dict(
        method="mvmr", epochs=1000, batch_size_per_gpu=64, lr=1e-4, lr_reference_batch=0,
        min_lr=0.0, warmup_epochs=10, optimizer="adamw", weight_decay=1e-6,
        weight_decay_end=1e-6, clip_grad=0.0, projector=[8192, 8192, 8192],
        global_crops_scale=[0.08, 1.0], local_crops_number=0, vertical_flip=0.0,
    ),
    # The same for one small machine: the projector and AdamW's settings of "small".
    "mvmr_small": dict(
        method="mvmr", epochs=30, batch_size_per_gpu=64, lr=2e-3, lr_reference_batch=0,
        min_lr=1e-6, warmup_epochs=0.3, optimizer="adamw", weight_decay=0.04,
        weight_decay_end=0.04, clip_grad=3.0, projector=[512, 512, 512],
        global_crops_scale=[0.2, 1.0], local_crops_number=0,
    ),
    # Tan et al. (2023), DINO with balanced views on ConvNets: the authors' configuration;
    # SSLIGHT_VIT has that of ViTs.
    "sslight": dict(
        epochs=200, batch_size_per_gpu=128, lr=0.48, lr_reference_batch=256, min_lr=4.8e-3,
        warmup_epochs=10, optimizer="lars", weight_decay=1e-6, weight_decay_end=1e-6,
        clip_grad=0.0, out_dim=4096, hidden_dim=2048, norm_last_layer=True, use_bn_in_head=True,
        momentum_teacher=0.996, teacher_temp=0.07, warmup_teacher_temp=0.04,
        warmup_teacher_temp_epochs=50, student_temp=0.1, freeze_last_layer=1, alpha=0.4,
        global_crops_size=224, global_crops_scale=[0.3, 1.0], local_crops_number=6,
        local_crops_size=128, local_crops_scale=[0.05, 0.3], vertical_flip=0.0,
    ),
    # The papers' settings for ImageNet and ResNet-50, those of their code where the two differ. A
    # batch of 4,096 is 64 GPUs of 64 images: the learning rate follows the batch, its end is that
    # of the paper's. Colours, blur and solarisation are DINO's, which BYOL, VICReg and Barlow Twins
    # have too; MoCo, SwAV and SimCLR blur every view with probability 0.5, solarise none, and have
    # jitter of 0.4 0.4 0.4 0.1 (MoCo) and 0.8 0.8 0.8 0.2. Biases and norms neither decay nor get
    # LARS's rates; MoCo's code decays them, and that of SwAV does both.
    # Grill et al. (2020), with 1,000 epochs.
    "byol": dict(
        method="byol", epochs=1000, batch_size_per_gpu=64, lr=0.2, lr_reference_batch=256,
        min_lr=0.0, warmup_epochs=10, optimizer="lars", weight_decay=1.5e-6,
        weight_decay_end=1.5e-6, clip_grad=0.0, projector=[4096, 256], momentum_teacher=0.996,
        global_crops_size=224, global_crops_scale=[0.08, 1.0], local_crops_number=0,
    ),
    # Chen, Fan, Girshick and He (2020), MoCo v2 with 200 epochs.
    "moco": dict(
        method="moco", epochs=200, batch_size_per_gpu=32, lr=0.03, lr_reference_batch=256,
        min_lr=0.0, warmup_epochs=0, optimizer="sgd", weight_decay=1e-4, weight_decay_end=1e-4,
        clip_grad=0.0, projector=[2048, 128], momentum_teacher=0.999, queue_size=65536,
        temperature=0.2, global_crops_size=224, global_crops_scale=[0.2, 1.0],
        local_crops_number=0,
    ),
    # Caron et al. (2020), SwAV with batches of 256 and 200 epochs.
    "swav": dict(
        method="swav", epochs=200, batch_size_per_gpu=64, lr=0.6, lr_reference_batch=256,
        min_lr=6e-4, warmup_epochs=0, optimizer="lars", weight_decay=1e-6, weight_decay_end=1e-6,
        clip_grad=0.0, projector=[2048, 128], out_dim=3000, student_temp=0.1, teacher_temp=0.05,
        freeze_last_layer=1, queue_size=3840, queue_epochs=15, global_crops_size=224,
        global_crops_scale=[0.14, 1.0], local_crops_number=6, local_crops_size=96,
        local_crops_scale=[0.05, 0.14],
    ),
    # Chen et al. (2020), SimCLR with batches of 4,096 and 100 epochs, as in the paper and its first
    # code; since SimCLR v2 that has a weight decay of 1e-4 and a projector of three layers.
    "simclr": dict(
        method="simclr", epochs=100, batch_size_per_gpu=64, lr=0.3, lr_reference_batch=256,
        min_lr=0.0, warmup_epochs=10, optimizer="lars", weight_decay=1e-6, weight_decay_end=1e-6,
        clip_grad=0.0, projector=[2048, 128], temperature=0.1, global_crops_size=224,
        global_crops_scale=[0.08, 1.0], local_crops_number=0,
    ),
    # Bardes et al. (2022), with 1,000 epochs.
    "vicreg": dict(
        method="vicreg", epochs=1000, batch_size_per_gpu=64, lr=0.2, lr_reference_batch=256,
        min_lr=1.6e-3, warmup_epochs=10, optimizer="lars", weight_decay=1e-6,
        weight_decay_end=1e-6, clip_grad=0.0, projector=[8192] * 3, global_crops_size=224,
        global_crops_scale=[0.08, 1.0], local_crops_number=0,
    ),
    # Zbontar et al. (2021), with 1,000 epochs; their biases have a smaller rate.
    "barlow": dict(
        method="barlow", epochs=1000, batch_size_per_gpu=64, lr=0.2, lr_reference_batch=256,
        min_lr=1.6e-3, warmup_epochs=10, optimizer="lars", weight_decay=1e-6,
        weight_decay_end=1e-6, clip_grad=0.0, projector=[8192] * 3, global_crops_size=224,
        global_crops_scale=[0.08, 1.0], local_crops_number=0,
    ),
}  # fmt: skip
LOWDINO_RESNET5M = dict(local_crops_number=8)
SSLIGHT_VIT = dict(
    optimizer="adamw", lr=5e-4, min_lr=1e-5, weight_decay=0.04, weight_decay_end=0.4,
    out_dim=65536, norm_last_layer=False, use_bn_in_head=False, warmup_teacher_temp_epochs=30,
    local_crops_number=10,
)  # fmt: skip


def preset(name: str, arch: str) -> dict:
    """The settings of a preset for an architecture."""
    found = dict(PRESETS[name])
    if name == "lowdino" and arch == "resnet5m":
        found |= LOWDINO_RESNET5M
    if name == "sslight" and arch in vit.ARCHS:
        found |= SSLIGHT_VIT
    return found


# Without --preset a method takes the settings of this one, others those of "emp".
RECIPES = {"dino": "small", "mvmr": "mvmr_small"}

# Of "emp" in its place: two views of 128 images, and networks and queues for thousands of images.
# The rates are those of a few that took a mobilevit_xxs furthest on the demo in 155 steps: Muon's
# 0.12, which suits the others, is too fast for keys and targets that move with the student.
TWO_VIEWS = dict(global_crops_number=2, batch_size_per_gpu=128)
SMALL = {
    "byol": TWO_VIEWS | dict(projector=[512, 256], momentum_teacher=None, lr=0.02),
    "moco": TWO_VIEWS
    | dict(projector=[512, 128], queue_size=4096, momentum_teacher=0.99)
    | dict(optimizer="adamw", lr=2e-3),
    "swav": TWO_VIEWS | dict(projector=[512, 128], out_dim=512),
    "simclr": TWO_VIEWS | dict(projector=[512, 128], temperature=0.2),
    "vicreg": TWO_VIEWS | dict(projector=[1024] * 3),
    "barlow": TWO_VIEWS | dict(projector=[1024] * 3, lr=0.02),
}

# What distillation has in place of the preset's. Chosen as that was, for a mobilevit_xxs taught by
# a resnet5m, see tests/RESULTS.md: Muon, the similarities, one view of many images, and hardly any
# crop where the teacher's features are of the whole image.
DISTILLATION = dict(
    global_crops_number=1, batch_size_per_gpu=128, projector=[512] * 3, objective=["similarity"]
)
OF_WHOLE_IMAGES = dict(global_crops_scale=[0.9, 1.0])
OF_KD = {"teacher_head", "temperature", "kd_weight", "match"}  # flags of its other objective

# What an optimizer given by hand takes where the preset's settings are another's. That of SGD is
# He's for ResNets, that of LARS SSLight's.
RATES = {
    "muon": dict(
        lr=0.12, lr_reference_batch=0, min_lr=1e-6, weight_decay=0.04, weight_decay_end=0.04
    ),
    "adamw": dict(
        lr=2e-3, lr_reference_batch=0, min_lr=1e-6, weight_decay=0.04, weight_decay_end=0.04
    ),
    "sgd": dict(
        lr=0.1, lr_reference_batch=256, min_lr=1e-6, weight_decay=1e-4, weight_decay_end=1e-4
    ),
    "lars": dict(
        lr=0.48, lr_reference_batch=256, min_lr=4.8e-3, weight_decay=1e-6, weight_decay_end=1e-6
    ),
}

VIEWS_A_STEP = 512  # on a rank, of the recipe "emp"; see tests/RESULTS.md


def recipe(args: argparse.Namespace, by_hand: set[str]) -> dict:
    """The settings of --preset or, without it, of the method, fitted to the flags given by hand."""
    method = getattr(args, "method", "distillation")
    found = METHODS[method].defaults if method in METHODS else {}
    found = found | preset(args.preset or RECIPES.get(method, "emp"), args.arch)
    if not args.preset:
        found |= SMALL.get(method, {})
    if "optimizer" in by_hand and args.optimizer != found["optimizer"]:
        rates = RATES[args.optimizer].items()
        # A rate given by hand keeps its meaning.
        found |= {k: v for k, v in rates if "lr" not in by_hand or "lr" not in k}
    if method == "distillation":
        found |= recipe_of_distillation(args, by_hand)
    if args.preset:
        return found
    if method == "emp" and "global_crops_number" in by_hand:
        found["batch_size_per_gpu"] = max(VIEWS_A_STEP // max(args.global_crops_number, 1), 16)
    if "alpha" in by_hand:
        found["local_crops_number"] = PRESETS["sslight"]["local_crops_number"]
    return found


def recipe_of_distillation(args: argparse.Namespace, by_hand: set[str]) -> dict:
    """What distill.py has in place of the settings of a preset."""
    objective = {"objective": ["kd"]} if by_hand & OF_KD else {}
    if args.preset:
        return objective
    found = DISTILLATION | objective
    if args.cache_teacher or str(args.teacher).endswith((".npy", ".npz")):
        found |= OF_WHOLE_IMAGES
    if "dino" in args.objective:
        found["global_crops_number"] = 2
    return found
