"""What a run and a step are made of, as the flags ask."""

import torch
from torch import Tensor, nn

import lowdino
from lowdino import augment, data, models, optim, schedules, vit
from lowdino.distributed import UserError
from lowdino.features import normalisation

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}

# Streams of random numbers, functions of (stream, seed, step, rank), see augment.derived_seed.
# 0 is the order of the images and 4 what stands in for bad ones, both in data.py.
VIEWS, DROP_PATH = 1, 3

# Peak learning rate of AdamW for what is no matrix, beside Muon, as of the preset "small".
MUON_OTHERS = 2e-3


def choose_amp(args, ranks, saved: dict | None) -> None:
    """Give --amp auto the type of the checkpoint, or of the device; a CPU is left to be timed."""
    if args.amp == "auto":
        of_device = amp_of(ranks.device)
        args.amp = saved["settings"].get("amp", of_device) if saved else of_device
        check_amp(args.amp, ranks.device)


def amp_of(device: torch.device) -> str:
    """What --amp auto is: a GPU's fastest type, `auto` on a CPU, which is timed, else none."""
    if device.type == "cuda":
        # Before Ampere, compute capability 8.0, GPUs have tensor cores for fp16 alone.
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "auto" if device.type == "cpu" else "none"


def check_amp(amp: str, device: torch.device) -> None:
    if amp == "fp16" and device.type != "cuda":
        raise UserError(
            f"--amp fp16 needs a CUDA device, and this is {device.type}; use bf16 or none"
        )


def build_backbone(args) -> nn.Module:
    """The backbone to train, from random weights or from --init, the same on every rank."""
    torch.manual_seed(args.seed)
    is_vit = args.arch in vit.ARCHS
    if args.init:
        backbone = lowdino.load_backbone(args.init, args.arch).train()
        if is_vit and backbone.patch_size != args.patch_size:
            size = backbone.patch_size
            raise UserError(
                f"--init {args.init} has patches of {size} pixels; give --patch_size {size}"
            )
    else:
        options = dict(patch_size=args.patch_size, image_size=args.global_crops_size)
        backbone = lowdino.build_backbone(args.arch, **(options if is_vit else {}))
    try:
        models.set_in_chans(backbone, args.in_chans)
    except ValueError as error:
        raise UserError(f"--init {args.init}: {error} (--in_chans {args.in_chans})") from error
    if is_vit:
        backbone.set_drop_path_rate(args.drop_path_rate)
    return backbone


def build_views(args, backbone: nn.Module | None = None) -> augment.MultiCrop:
    """The views that the flags ask for, normalised as the backbone expects."""
    mean, std = normalisation(backbone)
    return augment.MultiCrop(
        args.global_crops_size,
        args.local_crops_size,
        args.local_crops_number,
        args.global_crops_scale,
        args.local_crops_scale,
        args.vertical_flip,
        # DINO blurs by up to 2 pixels at 224. Smaller views get less in proportion, or the blur
        # would erase them.
        blur_sigma=(0.1, 2 * args.global_crops_size / 224),
        mean=mean,
        std=std,
        jitter=tuple(args.jitter * strength for strength in augment.JITTER),
        blur=tuple(args.blur * probability for probability in augment.BLUR),
        solarize=args.solarize,
        global_number=args.global_crops_number,
        grayscale=args.grayscale,
    )


def build_optimizer(args, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    if args.optimizer == "muon":
        return optim.Muon(optim.muon_groups(model, MUON_OTHERS / args.lr if args.lr else 1.0))
    groups = optim.parameter_groups(model)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=device.type in ("cuda", "cpu"))
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    return optim.LARS(groups)


# ---------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------


def set_schedules(optimizer, args, step: int, total: int, epoch_steps: int, peak_lr: float) -> None:
    """Learning rate and weight decay of every group, as functions of the step."""
    warmup = round(args.warmup_epochs * epoch_steps)
    lr = schedules.cosine(step, total, peak_lr, args.min_lr, warmup)
    weight_decay = schedules.cosine(step, total, args.weight_decay, args.weight_decay_end)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1.0)
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def make_views(multicrop, batch: data.Batch, step: int, args, ranks) -> list[Tensor]:
    """The views of a batch, drawn from the step alone."""
    generator = augment.seeded_generator(ranks.device, VIEWS, args.seed, step, ranks.rank)
    views = multicrop(batch.images, batch.sizes, generator)
    return [view.contiguous(memory_format=torch.channels_last) for view in views]


def forward(model: nn.Module, views: list[Tensor], batch: data.Batch, step: int, args, ranks):
    """The loss under autocast, stochastic depth drawn from the step alone."""
    device = ranks.device.type
    # On a CPU its generator alone: to look for every other kind takes half a millisecond.
    seed = torch.default_generator.manual_seed if device == "cpu" else torch.manual_seed
    seed(augment.derived_seed(DROP_PATH, args.seed, step, ranks.rank))
    with torch.autocast(device, AUTOCAST[args.amp], enabled=args.amp != "none"):
        return model(views, batch, step)


def try_step(run, model: nn.Module, batch: data.Batch) -> None:
    """A step for the time that it takes, without guard and log."""
    views = make_views(run.multicrop, batch, run.step, run.args, run.ranks)
    loss = forward(model, views, batch, run.step, run.args, run.ranks)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for p in run.method.parameters() if p.requires_grad]
    optim.clip_gradients_by_parameter(parameters, run.args.clip_grad)
    run.optimizer.step()
    run.method.after_step(run.step)
