"""Every recipe, one complete row each: all that decides what a training computes.

`--preset NAME` takes a row. Without it a method takes its first row: `--method dino` is `small`,
and `--preset dino` is the paper's. The default is the first row of all, EMP-SSL. `--preset sslight`
of a ViT is `sslight_vit`, `--preset lowdino --arch resnet5m` is `lowdino_resnet5m`. Flags that are
typed win over the row. A size of None is chosen by the images, and without --preset the epochs are
too; a momentum of None by the number of steps, see `settings.fit_to_data`. An `alpha` of None is
the mean over all pairs of views.

The first row on 1.3 million images of 224 pixels and eight GPUs: 4 views of 128 images per GPU, 30
epochs of 1,251 steps, which cost as much as 29 of DINO's with 2 x 224 + 8 x 96 pixels. The patch
dictionary sees images of 32 pixels, costs minutes and fades. Nobody has made that run; --preset
dino is what DINO's authors ran.
"""

from types import SimpleNamespace

from lowdino.baselines import BYOL, BarlowTwins, MoCo, SimCLR, SwAV, VICReg
from lowdino.distillation import Distillation
from lowdino.methods import DINO, EMP, MVMR, OF_THE_PAPER

RECIPES = {
    # EMP-SSL (Tong et al., 2023) with Muon, begun by a dictionary of the images' patches, for small
    # pictures and minutes or hours. Chosen by runs of equal compute on held-out training images of
    # CIFAR-10: tests/RESULTS.md, "The start from patches".
    "emp": dict(
        method=EMP, epochs=30, batch_size_per_gpu=128, drop_path_rate=0.1,
        optimizer="muon", lr=0.12, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0.3,
        weight_decay=0.04, weight_decay_end=0.04, clip_grad=3.0,
        global_crops_number=4, global_crops_size=None, global_crops_scale=[0.4, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.1, blur=1.0, solarize=0.2,
        projector=[512, 512, 256], cosine_weight=200.0, rate_eps=0.2, patches_weight=300.0,
    ),
    # DINO for one small machine, thousands of pictures, random weights: a head of LowDINO's size
    # with batch norm, and InfoNCE beside DINO's loss, fading. Chosen by runs of minutes on the demo
    # and CIFAR-10. AdamW's rate suits batches of 64 to 256.
    "small": dict(
        method=DINO, epochs=30, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="adamw", lr=2e-3, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0.3,
        weight_decay=0.04, weight_decay_end=0.04, clip_grad=3.0,
        global_crops_number=2, global_crops_size=None, global_crops_scale=[0.2, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        out_dim=1024, hidden_dim=512, use_bn_in_head=True, norm_last_layer=True,
        freeze_last_layer=0, momentum_teacher=None, teacher_update="momentum", student_temp=0.1,
        teacher_temp=0.04, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=0,
        centering="softmax", center_momentum=0.9, alpha=None, koleo_weight=0.0,
        infonce_weight=1.0, patches_weight=0.0,
    ),
    # MV-MR likewise: the optimizer of "small" and a smaller projector.
    "mvmr_small": dict(
        method=MVMR, epochs=30, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="adamw", lr=2e-3, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0.3,
        weight_decay=0.04, weight_decay_end=0.04, clip_grad=3.0,
        global_crops_number=2, global_crops_size=None, global_crops_scale=[0.2, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        projector=[512] * 3, descriptors=[*OF_THE_PAPER], invariance_weight=1.0,
        variance_weight=1.0, dependence_weight=1.0, representation_weight=1.0,
    ),
    # The compared methods on one small machine: as "emp", but with two views, and with networks and
    # queues for thousands of images. Each rate is the best of a few for mobilevit_xxs on the demo
    # in 155 steps: Muon's 0.12 is too fast for keys and targets that move with the student.
    "byol_small": dict(
        method=BYOL, epochs=30, batch_size_per_gpu=128, drop_path_rate=0.1,
        optimizer="muon", lr=0.02, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0.3,
        weight_decay=0.04, weight_decay_end=0.04, clip_grad=3.0,
        global_crops_number=2, global_crops_size=None, global_crops_scale=[0.2, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.1, blur=1.0, solarize=0.2,
        projector=[512, 256], momentum_teacher=None, alpha=None,
    ),
    "moco_small": dict(
        method=MoCo, epochs=30, batch_size_per_gpu=128, drop_path_rate=0.1,
        optimizer="adamw", lr=2e-3, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0.3,
        weight_decay=0.04, weight_decay_end=0.04, clip_grad=3.0,
        global_crops_number=2, global_crops_size=None, global_crops_scale=[0.2, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.1, blur=1.0, solarize=0.2,
        projector=[512, 128], queue_size=4096, temperature=0.2, momentum_teacher=0.99, alpha=None,
    ),
    "swav_small": dict(
        method=SwAV, epochs=30, batch_size_per_gpu=128, drop_path_rate=0.1,
        optimizer="muon", lr=0.12, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0.3,
        weight_decay=0.04, weight_decay_end=0.04, clip_grad=3.0,
        global_crops_number=2, global_crops_size=None, global_crops_scale=[0.2, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.1, blur=1.0, solarize=0.2,
        projector=[512, 128], out_dim=512, student_temp=0.1, teacher_temp=0.05,
        freeze_last_layer=1, queue_size=3840, queue_epochs=15, alpha=None,
    ),
    "simclr_small": dict(
        method=SimCLR, epochs=30, batch_size_per_gpu=128, drop_path_rate=0.1,
        optimizer="muon", lr=0.12, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0.3,
        weight_decay=0.04, weight_decay_end=0.04, clip_grad=3.0,
        global_crops_number=2, global_crops_size=None, global_crops_scale=[0.2, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.1, blur=1.0, solarize=0.2,
        projector=[512, 128], temperature=0.2,
    ),
    "vicreg_small": dict(
        method=VICReg, epochs=30, batch_size_per_gpu=128, drop_path_rate=0.1,
        optimizer="muon", lr=0.12, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0.3,
        weight_decay=0.04, weight_decay_end=0.04, clip_grad=3.0,
        global_crops_number=2, global_crops_size=None, global_crops_scale=[0.2, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.1, blur=1.0, solarize=0.2,
        projector=[1024] * 3, invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0,
    ),
    "barlow_small": dict(
        method=BarlowTwins, epochs=30, batch_size_per_gpu=128, drop_path_rate=0.1,
        optimizer="muon", lr=0.02, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0.3,
        weight_decay=0.04, weight_decay_end=0.04, clip_grad=3.0,
        global_crops_number=2, global_crops_size=None, global_crops_scale=[0.2, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.1, blur=1.0, solarize=0.2,
        projector=[1024] * 3, redundancy_weight=5.1e-3,
    ),
    # Distillation of a teacher's similarities, chosen as "emp" was, for a mobilevit_xxs taught by a
    # resnet5m: Muon, and one view of many images.
    "distill": dict(
        method=Distillation, epochs=30, batch_size_per_gpu=128, drop_path_rate=0.0,
        optimizer="muon", lr=0.12, lr_reference_batch=0, min_lr=1e-6, warmup_epochs=0.3,
        weight_decay=0.04, weight_decay_end=0.04, clip_grad=3.0,
        global_crops_number=1, global_crops_size=None, global_crops_scale=[0.2, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.1, blur=1.0, solarize=0.2,
        objective=["similarity"], temperature=3.0, kd_weight=1.0, match="projector",
        queue_size=4096, projector=[512] * 3, student_temp=0.1, teacher_temp=0.04,
        momentum_teacher=None,
    ),
    # Caron et al. (2021): the defaults of the authors' main_dino.py.
    "dino": dict(
        method=DINO, epochs=100, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="adamw", lr=5e-4, lr_reference_batch=256, min_lr=1e-6, warmup_epochs=10,
        weight_decay=0.04, weight_decay_end=0.4, clip_grad=3.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.4, 1.0],
        local_crops_number=8, local_crops_size=96, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        out_dim=65536, hidden_dim=2048, use_bn_in_head=False, norm_last_layer=True,
        freeze_last_layer=1, momentum_teacher=0.996, teacher_update="momentum", student_temp=0.1,
        teacher_temp=0.04, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=0,
        centering="softmax", center_momentum=0.9, alpha=None, koleo_weight=0.0,
        infonce_weight=0.0, patches_weight=0.0,
    ),
    # Table 2 of Prathapaneni and Shashank (2023), from ImageNet weights (--init). hidden_dim is the
    # one of the authors' code, the flip's probability ours. Blur, solarisation and a warm-up from 0
    # are DINO's; the paper blurs local views by up to 0.5 pixels and warms up from min_lr.
    "lowdino": dict(
        method=DINO, epochs=100, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="sgd", lr=5e-4, lr_reference_batch=64, min_lr=1e-6, warmup_epochs=10,
        weight_decay=0.04, weight_decay_end=0.4, clip_grad=2.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.4, 1.0],
        local_crops_number=2, local_crops_size=224, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.5, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        out_dim=1024, hidden_dim=512, use_bn_in_head=False, norm_last_layer=False,
        freeze_last_layer=0, momentum_teacher=0.9995, teacher_update="momentum", student_temp=0.1,
        teacher_temp=0.04, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=0,
        centering="softmax", center_momentum=0.9, alpha=None, koleo_weight=0.0,
        infonce_weight=0.0, patches_weight=0.0,
    ),
    # The same with the ten crops that the paper gives resnet5m.
    "lowdino_resnet5m": dict(
        method=DINO, epochs=100, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="sgd", lr=5e-4, lr_reference_batch=64, min_lr=1e-6, warmup_epochs=10,
        weight_decay=0.04, weight_decay_end=0.4, clip_grad=2.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.4, 1.0],
        local_crops_number=8, local_crops_size=224, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.5, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        out_dim=1024, hidden_dim=512, use_bn_in_head=False, norm_last_layer=False,
        freeze_last_layer=0, momentum_teacher=0.9995, teacher_update="momentum", student_temp=0.1,
        teacher_temp=0.04, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=0,
        centering="softmax", center_momentum=0.9, alpha=None, koleo_weight=0.0,
        infonce_weight=0.0, patches_weight=0.0,
    ),
    # Tan et al. (2023), DINO with balanced views: the authors' configuration for ConvNets.
    "sslight": dict(
        method=DINO, epochs=200, batch_size_per_gpu=128, drop_path_rate=0.1,
        optimizer="lars", lr=0.48, lr_reference_batch=256, min_lr=4.8e-3, warmup_epochs=10,
        weight_decay=1e-6, weight_decay_end=1e-6, clip_grad=0.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.3, 1.0],
        local_crops_number=6, local_crops_size=128, local_crops_scale=[0.05, 0.3],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        out_dim=4096, hidden_dim=2048, use_bn_in_head=True, norm_last_layer=True,
        freeze_last_layer=1, momentum_teacher=0.996, teacher_update="momentum", student_temp=0.1,
        teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=50,
        centering="softmax", center_momentum=0.9, alpha=0.4, koleo_weight=0.0,
        infonce_weight=0.0, patches_weight=0.0,
    ),
    # Their configuration for ViTs.
    "sslight_vit": dict(
        method=DINO, epochs=200, batch_size_per_gpu=128, drop_path_rate=0.1,
        optimizer="adamw", lr=5e-4, lr_reference_batch=256, min_lr=1e-5, warmup_epochs=10,
        weight_decay=0.04, weight_decay_end=0.4, clip_grad=0.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.3, 1.0],
        local_crops_number=10, local_crops_size=128, local_crops_scale=[0.05, 0.3],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        out_dim=65536, hidden_dim=2048, use_bn_in_head=False, norm_last_layer=False,
        freeze_last_layer=1, momentum_teacher=0.996, teacher_update="momentum", student_temp=0.1,
        teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=30,
        centering="softmax", center_momentum=0.9, alpha=0.4, koleo_weight=0.0,
        infonce_weight=0.0, patches_weight=0.0,
    ),
    # Kinakh et al., MV-MR on STL-10: learning rate, decay, batch and projector of the authors'
    # configuration, epochs of the paper; AdamW for Adam, a warm-up from 0, and DINO's augmentation
    # of both views.
    "mvmr": dict(
        method=MVMR, epochs=1000, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="adamw", lr=1e-4, lr_reference_batch=0, min_lr=0.0, warmup_epochs=10,
        weight_decay=1e-6, weight_decay_end=1e-6, clip_grad=0.0,
        global_crops_number=2, global_crops_size=None, global_crops_scale=[0.08, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        projector=[8192] * 3, descriptors=[*OF_THE_PAPER], invariance_weight=1.0,
        variance_weight=1.0, dependence_weight=1.0, representation_weight=1.0,
    ),
    # The papers' settings for ImageNet and ResNet-50, or those of their code where the two differ.
    # Batches of 4,096 (BYOL, SimCLR) or 2,048 (VICReg, Barlow Twins) are 64 or 32 GPUs of 64
    # images. Colours, blur and solarisation are DINO's, which BYOL, VICReg and Barlow Twins have
    # too; MoCo, SwAV and SimCLR blur every view with probability 0.5, solarise none, and have
    # jitter of 0.4 0.4 0.4 0.1 (MoCo) and 0.8 0.8 0.8 0.2. Biases and norms neither decay nor get
    # LARS's rates; MoCo's code decays them, that of SwAV does both.
    # Grill et al. (2020), with 1,000 epochs.
    "byol": dict(
        method=BYOL, epochs=1000, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="lars", lr=0.2, lr_reference_batch=256, min_lr=0.0, warmup_epochs=10,
        weight_decay=1.5e-6, weight_decay_end=1.5e-6, clip_grad=0.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.08, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        projector=[4096, 256], momentum_teacher=0.996, alpha=None,
    ),
    # Chen, Fan, Girshick and He (2020), MoCo v2 with 200 epochs.
    "moco": dict(
        method=MoCo, epochs=200, batch_size_per_gpu=32, drop_path_rate=0.1,
        optimizer="sgd", lr=0.03, lr_reference_batch=256, min_lr=0.0, warmup_epochs=0,
        weight_decay=1e-4, weight_decay_end=1e-4, clip_grad=0.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.2, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        projector=[2048, 128], queue_size=65536, temperature=0.2, momentum_teacher=0.999,
        alpha=None,
    ),
    # Caron et al. (2020), SwAV with batches of 256 and 200 epochs.
    "swav": dict(
        method=SwAV, epochs=200, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="lars", lr=0.6, lr_reference_batch=256, min_lr=6e-4, warmup_epochs=0,
        weight_decay=1e-6, weight_decay_end=1e-6, clip_grad=0.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.14, 1.0],
        local_crops_number=6, local_crops_size=96, local_crops_scale=[0.05, 0.14],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        projector=[2048, 128], out_dim=3000, student_temp=0.1, teacher_temp=0.05,
        freeze_last_layer=1, queue_size=3840, queue_epochs=15, alpha=None,
    ),
    # Chen et al. (2020), SimCLR with batches of 4,096 and 100 epochs, as in the paper and its first
    # code; SimCLR v2 has a weight decay of 1e-4 and a projector of three layers.
    "simclr": dict(
        method=SimCLR, epochs=100, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="lars", lr=0.3, lr_reference_batch=256, min_lr=0.0, warmup_epochs=10,
        weight_decay=1e-6, weight_decay_end=1e-6, clip_grad=0.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.08, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        projector=[2048, 128], temperature=0.1,
    ),
    # Bardes et al. (2022), with 1,000 epochs.
    "vicreg": dict(
        method=VICReg, epochs=1000, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="lars", lr=0.2, lr_reference_batch=256, min_lr=1.6e-3, warmup_epochs=10,
        weight_decay=1e-6, weight_decay_end=1e-6, clip_grad=0.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.08, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        projector=[8192] * 3, invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0,
    ),
    # Zbontar et al. (2021), with 1,000 epochs; their biases have a smaller rate.
    "barlow": dict(
        method=BarlowTwins, epochs=1000, batch_size_per_gpu=64, drop_path_rate=0.1,
        optimizer="lars", lr=0.2, lr_reference_batch=256, min_lr=1.6e-3, warmup_epochs=10,
        weight_decay=1e-6, weight_decay_end=1e-6, clip_grad=0.0,
        global_crops_number=2, global_crops_size=224, global_crops_scale=[0.08, 1.0],
        local_crops_number=0, local_crops_size=None, local_crops_scale=[0.05, 0.4],
        vertical_flip=0.0, jitter=1.0, grayscale=0.2, blur=1.0, solarize=0.2,
        projector=[8192] * 3, redundancy_weight=5.1e-3,
    ),
}  # fmt: skip

METHODS = {row["method"].name: row["method"] for row in RECIPES.values()}

# An optimizer that is typed brings its rates where the row has another one: SGD's are He's for
# ResNets, LARS's are SSLight's.
OPTIMIZERS = {
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


def default_recipe(method: str) -> str:
    """The name of the first row of a method."""
    return next(name for name, row in RECIPES.items() if row["method"].name == method)


def preset_for(name: str, arch: str) -> str:
    """The row of a preset for an architecture or its family, where it has one of its own."""
    own = f"{name}_{arch}", f"{name}_{arch.partition('_')[0]}"
    return next((row for row in own if row in RECIPES), name)


def options(method: str, **given) -> SimpleNamespace:
    """Settings of a method for one's own loop, by the row of its name, but for those given.

    That is its paper's row. `emp` and `distillation` have only ours. MV-MR with "scattering" needs
    `global_crops_size`, the side of its views. A ValueError for an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    row = RECIPES[method] if method in RECIPES else RECIPES[default_recipe(method)]
    values = {flag.name: row[flag.name] for flag in METHODS[method].flags if flag.name in row}
    return SimpleNamespace(**values | given)
