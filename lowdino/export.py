"""A trained backbone as a file for other places: a phone, a browser, C++, another library.

    python -m lowdino.export runs/first/backbone.pth backbone.onnx --normalise

OUT's suffix names the format. `.pt2` is torch.export's program, for C++ and ExecuTorch; `.onnx`
needs onnx and onnxscript; `.safetensors` holds the weights alone, by their names in timm for
MobileViT, and needs safetensors. Programs take float32 images (batch, channels, height, width) of
any batch and any height and width in whole 32s, those of a Vision Transformer only one size. Files
hold `arch`, `mean`, `std`, `image_size`, for images of more than 8 bits `value_range`, and programs
`input`, their input in words.

The file is run, and refused where its features differ by more than 1e-4 of their root mean square.
`torch.export.load(FILE).module()` runs a .pt2. timm takes the weights of MobileViT by
`timm.create_model("mobilevit_s", num_classes=0, checkpoint_path=FILE)`, with the file's mean and
std: its own are 0 and 1.
"""

import copy
import importlib.util
import io
import json
import math
import os
import statistics
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.fx.experimental._config as symbols
from torch import Tensor, nn

import lowdino
from lowdino import checkpoint, distributed, settings, vit
from lowdino.distributed import UserError, user_errors
from lowdino.methods import Flag

TOLERANCE = 1e-4  # of the features' root mean square; rounding in another order gives a few 1e-6
Function = Callable[[Tensor], Tensor]


class Normalised(nn.Module):
    """A backbone with the normalisation that its weights expect: it takes pixels in [0, 1]."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(backbone, name)).float().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone((x - self.mean) / self.std)


def program_of(backbone: nn.Module, side: int, normalise: bool) -> torch.export.ExportedProgram:
    """A program for any batch and any height and width in whole 32s; of a ViT for `side` alone."""
    height, width, shape = 96, 160, {0: torch.export.Dim("batch", min=1)}
    if isinstance(backbone, vit.VisionTransformer):
        backbone, height, width = copy.deepcopy(backbone), side, side
        # torch.export cannot resize positions to a size that it does not know.
        backbone.pos_embed = nn.Parameter(backbone.positions(side, side).detach())
        backbone.grid = side // backbone.patch_size
    else:  # torch 2.4 needs a maximum
        dims = (torch.export.Dim(name, min=1, max=2**20) for name in ("rows", "columns"))
        shape |= {axis: 32 * dim for axis, dim in enumerate(dims, start=2)}
    network = Normalised(backbone) if normalise else backbone
    images = torch.zeros(2, len(backbone.mean), height, width)
    # Else newer versions of torch refuse maps of one pixel: those of 32 pixels at stride 32.
    wanted = {"backed_size_oblivious": True} if hasattr(symbols, "backed_size_oblivious") else {}
    with symbols.patch(wanted):
        return torch.export.export(network, (images,), dynamic_shapes=(shape,), strict=False)


def input_of(backbone: nn.Module, side: int, normalise: bool) -> str:
    """The input of a program, in words."""
    c, one_size = len(backbone.mean), isinstance(backbone, vit.VisionTransformer)
    rgb, scale = "RGB " * (c == 3), "" if normalise else ", minus mean, over std"
    sizes = f"{side} x {side} alone" if one_size else "height and width in whole 32s"
    return f"float32 images (batch, {c}, height, width) of {rgb}pixels in [0, 1]{scale}, {sizes}"


def about(backbone: nn.Module, side: int) -> dict[str, str]:
    """The notes in every file. `value_range` are the values of an image at pixels 0 and 1."""
    values = {name: getattr(backbone, name, None) for name in ("mean", "std", "value_range")}
    notes = {name: json.dumps(list(value)) for name, value in values.items() if value}
    return {"arch": backbone.arch, "image_size": str(side)} | notes


def write_pt2(backbone: nn.Module, side: int, normalise: bool) -> bytes:
    file, program = io.BytesIO(), program_of(backbone, side, normalise)
    notes = about(backbone, side) | {"input": input_of(backbone, side, normalise)}
    torch.export.save(program, file, extra_files=notes)
    return file.getvalue()


def read_pt2(content: bytes, backbone: nn.Module) -> tuple[str, Function]:
    return "torch.export", torch.export.load(io.BytesIO(content)).module()


def write_onnx(backbone: nn.Module, side: int, normalise: bool) -> bytes:
    program = program_of(backbone, side, normalise)
    names = {"input_names": ["images"], "output_names": ["features"]}
    try:
        model = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    except torch.onnx.OnnxExporterError as error:
        failed = f"torch {torch.__version__} cannot write a {backbone.arch} as .onnx"
        raise UserError(f"{failed}: take a newer torch (2.14 can), or .pt2") from error
    del model.graph.value_info[:]  # shapes in between, by torch's names of the sizes
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        for dim, name in zip(dims, ("batch", "channels", "height", "width")):
            if dim.dim_param:
                dim.dim_param = name
    notes = about(backbone, side) | {"input": input_of(backbone, side, normalise)}
    for key, value in notes.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def read_onnx(content: bytes, backbone: nn.Module) -> tuple[str, Function]:
    """By onnxruntime on one thread where it is installed, else by onnx's own reference."""
    if installed("onnxruntime"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        by, run = "onnxruntime", onnxruntime.InferenceSession(content, options).run
    else:
        from onnx.reference import ReferenceEvaluator

        by, run = "onnx's reference evaluator", ReferenceEvaluator(content).run
    return by, lambda x: torch.from_numpy(run(None, {"images": x.numpy()})[0])


def write_safetensors(backbone: nn.Module, side: int, normalise: bool) -> bytes:
    from safetensors.torch import save

    weights = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    return save(weights, metadata=about(backbone, side))


def read_safetensors(content: bytes, backbone: nn.Module) -> tuple[str, Function]:
    from safetensors.torch import load

    network = copy.deepcopy(backbone)
    network.load_state_dict(load(content))
    return "a network of these weights", network


FORMATS = {  # (a writer of the file's bytes, a reader that makes a function of them, packages)
    ".pt2": (write_pt2, read_pt2, ()),
    ".onnx": (write_onnx, read_onnx, ("onnx", "onnxscript")),
    ".safetensors": (write_safetensors, read_safetensors, ("safetensors",)),
}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class Exported(NamedTuple):
    """Properties of a written file, run at batch 1 by one thread."""

    megabytes: float
    by: str  # what ran it
    difference: float  # the largest to PyTorch's features, relative to their root mean square
    ms: float  # milliseconds of processor time per image
    torch_ms: float  # the same of the network itself
    side: int  # of the image that it was run on, in pixels


def problem(path: str, normalise: bool) -> str | None:
    """The reason why a file of this name cannot be written, in one sentence, or None."""
    suffix, folder = Path(path).suffix.lower(), Path(path).parent
    if suffix not in FORMATS:
        return f"{path} should end in {' or '.join(FORMATS)}, which names the format"
    if suffix == ".onnx" and torch.__version__ < (2, 6):
        return f".onnx needs torch 2.6 or newer, not {torch.__version__}; .pt2 does not"
    if lacking := [package for package in FORMATS[suffix][2] if not installed(package)]:
        return f"{suffix} needs {' and '.join(lacking)}: pip install {' '.join(lacking)}"
    if suffix == ".safetensors" and normalise:
        return "--normalise needs .pt2 or .onnx: .safetensors holds weights alone"
    return None if os.access(folder, os.W_OK) else f"{path}: no writable folder {folder}"


def milliseconds(functions: list[Function], x: Tensor, repeats: int = 11) -> list[float]:
    """Median processor time of each function on x, in milliseconds, by one thread.

    They run in turns, the first not counted. Other processes do not change processor time.
    """
    timers = [timeit.Timer(partial(function, x), timer=time.process_time) for function in functions]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [[timer.timeit(1) for timer in timers] for _ in range(1 + repeats)]
    finally:
        torch.set_num_threads(threads)
    return [1e3 * statistics.median(times) for times in zip(*rounds[1:])]


@torch.no_grad()
def export(backbone, path: str, image_size: int | None = None, normalise=False) -> Exported:
    """Write a backbone in the format of the path's suffix, once the content was run; a UserError
    where it cannot be written, or features differ by more than TOLERANCE.

    Args:
        backbone: of `lowdino.load_backbone` or `lowdino.build_backbone`; it does not change.
        image_size: side in pixels at which the file is run, the only one for a Vision Transformer;
            default: that of the backbone in whole 32s or patches, or 224.
        normalise: whether the file applies `mean` and `std`, so that it takes pixels.
    """
    if sentence := problem(path, normalise):
        raise UserError(sentence)
    unit = getattr(backbone, "patch_size", 32)
    side = image_size or math.ceil(getattr(backbone, "image_size", 224) / unit) * unit
    if side < unit or side % unit:
        near = max(round(side / unit), 1) * unit
        raise UserError(f"image size {side} is not in whole {unit}s: give --image_size {near}")
    write, read, _ = FORMATS[Path(path).suffix.lower()]
    backbone = copy.deepcopy(backbone).cpu().float().eval()
    content = write(backbone, side, normalise)
    by, function = read(content, backbone)
    network = Normalised(backbone) if normalise else backbone
    x = torch.rand(1, len(backbone.mean), side, side, generator=torch.Generator().manual_seed(0))
    expected = network(x)
    rms = expected.square().mean().sqrt().clamp(min=torch.finfo().tiny)
    difference = ((function(x) - expected).abs().max() / rms).item()
    if not difference <= TOLERANCE:
        by = f"by {difference:.1e} of their root mean square, more than {TOLERANCE:.0e}"
        raise UserError(f"{path} is not written: its features differ from PyTorch's {by}")
    with user_errors(), checkpoint.atomic(path) as file:
        file.write(content)
    times = milliseconds([function, network], x)
    return Exported(len(content) / 1e6, by, difference, *times, side)


def run(args: settings.Settings, ranks: distributed.Ranks) -> None:
    arch, _, file = args.backbone.partition("=")
    named = arch in lowdino.ARCHS and file
    backbone = lowdino.load_backbone(file, arch) if named else lowdino.load_backbone(args.backbone)
    e = export(backbone, args.out, args.image_size, args.normalise)
    print(f"{args.out}: {backbone.arch}, {backbone.embed_dim} features, {e.megabytes:.1f} MB")
    if not args.out.lower().endswith(".safetensors"):
        print(f"takes {input_of(backbone, e.side, args.normalise)}")
    print(
        f"run by {e.by} at 1 x {e.side} x {e.side} pixels, one thread: {e.ms:.1f} ms, PyTorch "
        f"{e.torch_ms:.1f} ms; largest difference {e.difference:.1e} of the root mean square"
    )


def get_parser() -> settings.Parser:
    file = Flag("backbone", "a file that load_backbone reads; ARCH=FILE for a plain state dict")
    out = Flag("out", f"file to write, ending in {' or '.join(FORMATS)}")
    pixels = Flag("normalise", "the file takes pixels in [0, 1]: mean and std are in it", bool)
    side = Flag("image_size", "side in pixels, a ViT's only one; default: the backbone's", int)
    flags = {"flags": (pixels, side)}
    return settings.Parser("python -m lowdino.export", __doc__, flags, (file, out))


def main() -> None:
    check = lambda args: problem(args.out, args.normalise)
    distributed.launch("lowdino.export", lambda: get_parser().parse(None, check), run)


if __name__ == "__main__":
    main()
