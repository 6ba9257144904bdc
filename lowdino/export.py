"""A trained backbone as a file for other places: a phone, a browser, C++, another library.

    python -m lowdino.export runs/first/backbone.pth backbone.onnx --normalise

OUT's suffix names the format. `.pt2` is torch.export's program, for C++ and ExecuTorch; `.onnx`
needs onnx and onnxscript; `.safetensors` holds the weights alone, by their names in timm for
MobileViT, and needs safetensors. Programs take float32 images (batch, channels, height, width) of
any batch and any height and width in whole 32s, those of a Vision Transformer only one size. The
file also holds `arch`, `mean`, `std`, `image_size` and, for images of more than 8 bits,
`value_range`; a program also `input`, which describes its input in words.

The file is run, and refused where its features differ by more than 1e-4 of their root mean square.
`torch.export.load(FILE).module()` runs a .pt2. timm takes the weights of MobileViT by
`timm.create_model("mobilevit_s", num_classes=0, checkpoint_path="backbone.safetensors")`. Its own
configuration says mean 0 and std 1, so normalise by the file's mean and std.
"""

import copy
import importlib.util
import io
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.fx.experimental._config as symbols
from torch import Tensor, nn

import lowdino
from lowdino import checkpoint, distributed, settings, vit
from lowdino.distributed import UserError, user_errors
from lowdino.methods import Flag

# Largest difference to PyTorch's features, relative to their root mean square. Rounding in another
# order gives a few 1e-6.
TOLERANCE = 1e-4

Function = Callable[[Tensor], Tensor]


class Normalised(nn.Module):
    """A backbone with the normalisation that its weights expect: it takes pixels in [0, 1]."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        for name in ("mean", "std"):
            value = torch.tensor(getattr(backbone, name), dtype=torch.float32)
            self.register_buffer(name, value.view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone((x - self.mean) / self.std)


# -- Programs --------------------------------------------------------------------------------------


def at_one_size(backbone: vit.VisionTransformer, side: int) -> vit.VisionTransformer:
    """A copy for square images of one side, its position embedding resized for good.

    torch.export cannot resize it to a size that it does not know.
    """
    backbone = copy.deepcopy(backbone)
    with torch.no_grad():
        backbone.pos_embed = nn.Parameter(backbone.positions(side, side))
    backbone.grid = side // backbone.patch_size
    return backbone


def program_of(backbone: nn.Module, side: int, normalise: bool) -> torch.export.ExportedProgram:
    """A program for any batch and any height and width in whole 32s; of a ViT for `side` alone."""
    channels, height, width = len(backbone.mean), 96, 160
    shape = {0: torch.export.Dim("batch", min=1)}
    if isinstance(backbone, vit.VisionTransformer):
        backbone, height, width = at_one_size(backbone, side), side, side
    else:  # torch 2.4 needs a maximum
        dims = (torch.export.Dim(name, min=1, max=2**20) for name in ("rows", "columns"))
        shape |= {axis: 32 * dim for axis, dim in enumerate(dims, start=2)}
    network = Normalised(backbone) if normalise else backbone
    images = torch.zeros(2, channels, height, width)
    # Else newer versions of torch refuse maps of one pixel: those of 32 pixels at stride 32.
    wanted = {"backed_size_oblivious": True} if hasattr(symbols, "backed_size_oblivious") else {}
    with symbols.patch(wanted):
        return torch.export.export(network, (images,), dynamic_shapes=(shape,), strict=False)


def input_of(backbone: nn.Module, side: int, normalise: bool) -> str:
    """The input of a program, in words."""
    channels = len(backbone.mean)
    words = f"float32 images (batch, {channels}, height, width) of {'RGB ' * (channels == 3)}pixels"
    words += " in [0, 1]" if normalise else " in [0, 1], minus mean, over std"
    if isinstance(backbone, vit.VisionTransformer):
        return f"{words}, {side} x {side} alone (torch.export cannot resize positions)"
    return f"{words}, height and width in whole 32s"


# --------------------------------------------------------------------------------------------------
# Formats: a writer of the file's bytes, a reader that makes a function of them, required packages
# --------------------------------------------------------------------------------------------------


def about(backbone: nn.Module, side: int) -> dict[str, str]:
    """The notes in every file."""
    notes = {"arch": backbone.arch, "image_size": str(side)}
    for name in ("mean", "std", "value_range"):  # the last: the files' values at pixels 0 and 1
        if value := getattr(backbone, name, None):
            notes[name] = json.dumps(list(value))
    return notes


def about_program(backbone: nn.Module, side: int, normalise: bool) -> dict[str, str]:
    return about(backbone, side) | {"input": input_of(backbone, side, normalise)}


def write_pt2(backbone: nn.Module, side: int, normalise: bool) -> bytes:
    file, notes = io.BytesIO(), about_program(backbone, side, normalise)
    torch.export.save(program_of(backbone, side, normalise), file, extra_files=notes)
    return file.getvalue()


def read_pt2(content: bytes, backbone: nn.Module) -> tuple[str, Function]:
    return "torch.export", torch.export.load(io.BytesIO(content)).module()


def write_onnx(backbone: nn.Module, side: int, normalise: bool) -> bytes:
    program = program_of(backbone, side, normalise)
    names = {"input_names": ["images"], "output_names": ["features"]}
    try:
        model = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"the exporter of torch {torch.__version__} cannot write a {backbone.arch} as .onnx: "
            "take a newer torch (2.14 can), or .pt2"
        ) from error
    graph, dims = model.graph, ("batch", "channels", "height", "width")
    del graph.value_info[:]  # shapes in between, in torch's own names of the sizes
    for value in (*graph.input, *graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim, dims):
            if dim.dim_param:
                dim.dim_param = name
    for key, value in about_program(backbone, side, normalise).items():
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
        from onnx import load_from_string
        from onnx.reference import ReferenceEvaluator

        by, run = "onnx's reference evaluator", ReferenceEvaluator(load_from_string(content)).run
    return by, lambda x: torch.from_numpy(run(None, {"images": x.numpy()})[0])


def write_safetensors(backbone: nn.Module, side: int, normalise: bool) -> bytes:
    from safetensors.torch import save

    weights = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    return save(weights, metadata=about(backbone, side))


def read_safetensors(content: bytes, backbone: nn.Module) -> tuple[str, Function]:
    from safetensors.torch import load

    network = copy.deepcopy(backbone)
    for value in network.state_dict().values():
        value.zero_()
    network.load_state_dict(load(content))
    return "a network of these weights", network


FORMATS = {
    ".pt2": (write_pt2, read_pt2, ()),
    ".onnx": (write_onnx, read_onnx, ("onnx", "onnxscript")),
    ".safetensors": (write_safetensors, read_safetensors, ("safetensors",)),
}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# -- Export, and a run of the file -----------------------------------------------------------------


class Exported(NamedTuple):
    """Properties of a written file, run at batch 1 by one thread."""

    megabytes: float
    by: str  # what ran it
    difference: float  # the largest to PyTorch's features, relative to their root mean square
    ms: float  # milliseconds of processor time per image
    torch_ms: float  # the same of the network itself
    side: int  # of the image that it was run on, in pixels
    takes: str  # its input in words


def problem(path: str, normalise: bool) -> str | None:
    """Why a file of this name cannot be written, in one sentence, or None."""
    suffix, folder = Path(path).suffix.lower(), Path(path).parent
    if suffix not in FORMATS:
        return f"{path} should end in {' or '.join(FORMATS)}, which names the format"
    if suffix == ".onnx" and torch.__version__ < (2, 6):
        return f".onnx needs torch 2.6 or newer, not {torch.__version__}; .pt2 does not"
    lacking = [package for package in FORMATS[suffix][2] if not installed(package)]
    if lacking:
        return f"{suffix} needs {' and '.join(lacking)}: pip install {' '.join(lacking)}"
    if suffix == ".safetensors" and normalise:
        return "--normalise needs .pt2 or .onnx: .safetensors holds weights alone"
    if not os.access(folder, os.W_OK):
        return f"{path}: no folder {folder} that can be written to"
    return None


def relative_difference(features: Tensor, expected: Tensor) -> float:
    """The largest difference over the root mean square of what was expected."""
    size = expected.square().mean().sqrt().clamp(min=torch.finfo().tiny)
    return ((features - expected).abs().max() / size).item()


def milliseconds(functions: list[Function], x: Tensor, repeats: int = 11) -> list[float]:
    """Median processor time of each function on x, in milliseconds, by one thread.

    They run in turns, of which the first is not counted. Processor time is that of an idle machine,
    whatever else runs. A function of onnxruntime has chosen its own threads.
    """

    def seconds(function: Function) -> float:
        start = time.process_time()
        function(x)
        return time.process_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [[seconds(function) for function in functions] for _ in range(1 + repeats)]
    finally:
        torch.set_num_threads(threads)
    return [1e3 * statistics.median(times) for times in zip(*rounds[1:])]


@torch.no_grad()
def export(
    backbone: nn.Module, path: str, image_size: int | None = None, normalise: bool = False
) -> Exported:
    """Write a backbone in the format that the path's suffix names, once the content was run.

    Args:
        backbone: of `lowdino.load_backbone` or `lowdino.build_backbone`; it stays as it is.
        image_size: side in pixels at which the file is run and, for a Vision Transformer, its only
            input size; default: the backbone's own, or 224 where it has none.
        normalise: whether `mean` and `std` are applied in the file, so that it takes pixels.

    Raises:
        UserError: where the file cannot be written, or its features differ by more than TOLERANCE.
    """
    if sentence := problem(path, normalise):
        raise UserError(sentence)
    side = image_size or getattr(backbone, "image_size", 224)
    unit = getattr(backbone, "patch_size", 32)
    if side < unit or side % unit:
        near = max(round(side / unit), 1) * unit
        raise UserError(f"image size {side} is not in whole {unit}s: give --image_size {near}")
    write, read, _ = FORMATS[Path(path).suffix.lower()]
    backbone = copy.deepcopy(backbone).cpu().float().eval()
    content = write(backbone, side, normalise)
    by, function = read(content, backbone)
    network = Normalised(backbone) if normalise else backbone
    x = torch.rand(1, len(backbone.mean), side, side, generator=torch.Generator().manual_seed(0))
    difference = relative_difference(function(x), network(x))
    if not difference <= TOLERANCE:
        raise UserError(
            f"{path} is not written: its features differ from PyTorch's by {difference:.1e} of "
            f"their root mean square, more than {TOLERANCE:.0e}"
        )
    with user_errors(), checkpoint.atomic(path) as file:
        file.write(content)
    times, takes = milliseconds([function, network], x), input_of(backbone, side, normalise)
    return Exported(len(content) / 1e6, by, difference, *times, side, takes)


def get_parser() -> settings.Parser:
    file = Flag("backbone", "a file that load_backbone reads; ARCH=FILE for a plain state dict")
    out = Flag("out", f"file to write, ending in {' or '.join(FORMATS)}")
    flags = (
        Flag("normalise", "the file takes pixels in [0, 1]: mean and std are in it", bool),
        Flag("image_size", "side in pixels to run it at, a ViT's only one; default: its own", int),
    )
    return settings.Parser("python -m lowdino.export", __doc__, {"flags": flags}, (file, out))


def run(args: settings.Settings) -> None:
    arch, _, file = args.backbone.partition("=")
    named = arch in lowdino.ARCHS and file
    backbone = lowdino.load_backbone(file, arch) if named else lowdino.load_backbone(args.backbone)
    exported = export(backbone, args.out, args.image_size, args.normalise)
    side, megabytes = exported.side, f"{exported.megabytes:.1f} MB"
    print(f"{args.out}: {backbone.arch}, {backbone.embed_dim} features, {megabytes}")
    if not args.out.lower().endswith(".safetensors"):
        print(f"takes {exported.takes}")
    print(
        f"run by {exported.by} at 1 x {side} x {side} pixels, one thread: {exported.ms:.1f} ms, "
        f"PyTorch {exported.torch_ms:.1f} ms; largest difference {exported.difference:.1e} of the "
        "features' root mean square"
    )


def main() -> None:
    check = lambda args: problem(args.out, args.normalise)
    parse = lambda: get_parser().parse(None, check)
    distributed.launch("lowdino.export", parse, lambda args, ranks: run(args))


if __name__ == "__main__":
    main()
