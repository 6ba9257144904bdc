"""Fixed image descriptors, the representations of MV-MR (Kinakh et al.), without gradient.

Each is a function or module from images (B, C, H, W), on any device, to descriptors (B, D) with D:
    pixels          C H W                       the image itself
    local_std       C H W                       standard deviation in 3 x 3 pixels
    hog             C 24 (H // 8) (W // 8)      histograms of oriented gradients
    Scattering      C 81 (H // 4) (W // 4)      second-order scattering, J = 2, L = 8
    PatchDictionary 512                         responses to patches of the pictures themselves
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def pixels(x: Tensor) -> Tensor:
    return x.float().flatten(1)


@torch.no_grad()
def local_std(x: Tensor) -> Tensor:
    """Standard deviation in 3 x 3 pixels, edges replicated (Narendra and Fitch, 1981)."""
    x = F.pad(x.float(), (1, 1, 1, 1), mode="replicate")
    mean = F.avg_pool2d(x, 3, stride=1)
    return (F.avg_pool2d(x * x, 3, stride=1) - mean * mean).clamp_min(0).sqrt().flatten(1)


@torch.no_grad()
def hog(x: Tensor, bins: int = 24, cell: int = 8) -> Tensor:
    """Histograms of oriented gradients (Dalal and Triggs, 2005) by channel, not block-normalised.

    Gradients are central differences. `bins` orientations divide [0, pi); a pixel shares the length
    of its gradient between the two nearest, and cells of `cell` x `cell` pixels average the shares.
    """
    B, C, H, W = x.shape
    x = F.pad(x.float(), (1, 1, 1, 1), mode="replicate")
    dx = (x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2]) / 2  # (B, C, H, W)
    dy = (x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]) / 2
    orientation = torch.atan2(dy, dx) / math.pi % 1 * bins  # in bins
    lower = orientation.floor()
    share = orientation - lower
    length = (dx * dx + dy * dy).sqrt()
    votes = torch.zeros(B, C, bins, H, W, device=x.device)
    lower = lower.long()[:, :, None]
    votes.scatter_add_(2, lower % bins, (length * (1 - share))[:, :, None])
    votes.scatter_add_(2, (lower + 1) % bins, (length * share)[:, :, None])
    return F.avg_pool2d(votes.flatten(1, 2), cell).flatten(1)


# -- Scattering ------------------------------------------------------------------------------------


def gabor(height: int, width: int, sigma: float, theta: float, xi: float, slant: float) -> Tensor:
    """A Gaussian envelope times a wave exp(i xi u), made periodic: (height, width) complex128.

    u runs along the direction `theta`, v across, from the corner. The envelope, of sum about 1, is
    exp(-(u^2 + (slant v)^2) / (2 sigma^2)); five periods are added up along each axis.
    """
    y, x = (torch.arange(-2 * n, 3 * n, dtype=torch.float64) for n in (height, width))
    y, x = y[:, None], x[None, :]
    u, v = math.cos(theta) * y + math.sin(theta) * x, -math.sin(theta) * y + math.cos(theta) * x
    wave = torch.polar(torch.exp(-(u**2 + (slant * v) ** 2) / (2 * sigma**2)), xi * u)
    folded = wave.unflatten(1, (5, width)).unflatten(0, (5, height)).sum(dim=(0, 2))
    return folded * slant / (2 * math.pi * sigma**2)


def morlet(height: int, width: int, sigma: float, theta: float, xi: float, slant: float) -> Tensor:
    """A Gabor wavelet minus a multiple of its envelope, so that its sum is 0: (height, width)."""
    wave = gabor(height, width, sigma, theta, xi, slant)
    envelope = gabor(height, width, sigma, theta, 0.0, slant)
    return wave - wave.sum() / envelope.sum() * envelope


def cut(spectrum: Tensor, level: int) -> Tensor:
    """A filter's spectrum for maps of 1 / 2^level the side, without the frequencies they lack."""
    for dim in (-2, -1):
        side = spectrum.shape[dim]
        start, length = side >> (level + 1), side - (side >> level)
        keep = torch.ones(side, dtype=spectrum.dtype)
        keep[start : start + length] = 0
        shape = [-1, 1] if dim == -2 else [1, -1]
        spectrum = (spectrum * keep.view(shape)).unflatten(dim, (1 << level, side >> level))
        spectrum = spectrum.sum(dim=dim - 1)
    return spectrum


def subsample(spectrum: Tensor, level: int) -> Tensor:
    """The spectrum of every 2^level-th pixel of a map: the mean over aliased frequencies."""
    for dim in (-2, -1):
        side = spectrum.shape[dim]
        spectrum = spectrum.unflatten(dim, (1 << level, side >> level)).mean(dim=dim - 1)
    return spectrum


class Scattering(nn.Module):
    """Second-order scattering by Morlet wavelets (Bruna and Mallat, 2013): (B, C, H, W) -> (B, D).

    With psi_{j,l} the wavelet of scale 2^j and direction l pi / L, and phi a Gaussian of scale 2^J,
    the channels are
        x * phi,  |x * psi_{j1,l1}| * phi,  ||x * psi_{j1,l1}| * psi_{j2,l2}| * phi,  j1 < j2 < J,
    1 + J L + L^2 J (J - 1) / 2 of them at every 2^J-th pixel; J is `scales` and L `directions`.
    Maps are subsampled as soon as their bandwidth allows. Wavelets, padding and order are those of
    kymatio's Scattering2D (Andreux et al., 2020). Sides below 2^(J + 1) pixels are a ValueError.
    """

    def __init__(self, height: int, width: int, scales: int = 2, directions: int = 8):
        super().__init__()
        self.scales, self.directions = scales, directions
        step = 2**scales
        self.padded = [((side + step) // step + 1) * step for side in (height, width)]
        if min(height, width) < 2 * step:
            small = f"images of {height} x {width} pixels are too small for scattering"
            raise ValueError(f"{small} with J = {scales}: {2 * step} at least")
        extra = [padded - side for padded, side in zip(self.padded, (height, width))]
        self.border = (extra[1] // 2, (extra[1] + 1) // 2, extra[0] // 2, (extra[0] + 1) // 2)

        def spectrum(filter: Tensor, level: int) -> Tensor:
            return cut(torch.fft.fft2(filter).real, level).float()

        smooth = gabor(*self.padded, 0.8 * 2 ** (scales - 1), 0.0, 0.0, 1.0)
        for level in range(scales):
            self.register_buffer(f"phi_{level}", spectrum(smooth, level), persistent=False)
        for j in range(scales):
            waves = [
                morlet(
                    *self.padded,
                    0.8 * 2**j,
                    (directions // 2 - 1 - l) * math.pi / directions,
                    0.75 * math.pi / 2**j,
                    4 / directions,
                )
                for l in range(directions)
            ]
            for level in range(j + 1):  # (L, h, w), for maps subsampled by 2^level
                self.register_buffer(
                    f"psi_{j}_{level}",
                    torch.stack([spectrum(w, level) for w in waves]),
                    persistent=False,
                )

    def averaged(self, spectrum: Tensor, level: int) -> Tensor:
        """A map of the level, averaged by phi, sampled at every 2^J-th pixel, without padding."""
        spectrum = subsample(spectrum * getattr(self, f"phi_{level}"), self.scales - level)
        return torch.fft.ifft2(spectrum).real[..., 1:-1, 1:-1]

    def modulus(self, spectrum: Tensor, j: int, level: int) -> Tensor:
        """Spectra of |map * psi| of scale 2^j, sampled at 2^j: (..., h, w) -> (..., L, h', w')."""
        waves = subsample(spectrum[..., None, :, :] * getattr(self, f"psi_{j}_{level}"), j - level)
        return torch.fft.fft2(torch.fft.ifft2(waves).abs())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.fft2(F.pad(x.float(), self.border, mode="reflect"))  # (B, C, H', W')
        first, second = [], []
        for j1 in range(self.scales):
            u1 = self.modulus(x, j1, 0)  # (B, C, L, h, w)
            first.append(self.averaged(u1, j1))
            deeper = [
                self.averaged(self.modulus(u1, j2, j1), j2) for j2 in range(j1 + 1, self.scales)
            ]  # (B, C, L, L, ...)
            if deeper:  # the second wavelets of a first one are neighbours
                second.append(torch.cat(deeper, dim=3).flatten(2, 3))
        return torch.cat([self.averaged(x, 0)[:, :, None], *first, *second], dim=2).flatten(1)


# -- Patch dictionary ------------------------------------------------------------------------------


def reduced(x: Tensor, side: int = 32) -> Tensor:
    """Images larger than `side` x `side`, reduced to it by area means."""
    return F.adaptive_avg_pool2d(x, side) if max(x.shape[-2:]) > side else x


class PatchDictionary(nn.Module):
    """Responses to a dictionary of the pictures' own patches (Coates, Lee and Ng, 2011).

    A patch x of w x w pixels, all channels together, is contrast-normalised and whitened, and
    compared with K unit atoms d_k, which spherical k-means chooses among such patches:
        x' = (x - mean(x)) / sqrt(var(x) + 10 / 255^2)
        z  = (Cov(x') + 0.1)^(-1/2) (x' - E[x'])
        r_k = max(d_k . z - t, 0), and r_{K+k} = max(-d_k . z - t, 0), with t = 0.35
    Responses of all positions are averaged in G x G cells and standardised. They are projected on
    the D leading principal components of the pictures, each over its eigenvalue^(1/4).

    `fit(images, seed)`, with images (N, C, S, S) in [0, 1] and 10,000 of them enough, learns atoms
    and components, without label or gradient: the same ones for the same images and seed.
    forward((B, C, S, S)) -> (B, D) float32; sides above 32 are reduced to 32 by area means.
    forward_features((B, C, H, W)) -> (B, 2 K, H / 4, W / 4): responses at every fourth position,
    pictures not reduced. `mean`, `std` and `image_size` are those of a backbone.
    """

    image_size, embed_dim = 32, 512

    def __init__(self, channels: int = 3, width: int = 8, atoms: int = 256, grid: int = 3):
        super().__init__()
        self.width, self.grid, self.threshold = width, grid, 0.35
        self.mean, self.std = (0.0,) * channels, (1.0,) * channels
        codes = 2 * atoms * grid**2
        self.register_buffer("filters", torch.zeros(atoms, channels, width, width))
        self.register_buffer("offset", torch.zeros(atoms, 1, 1))
        self.register_buffer("code_mean", torch.zeros(codes))
        self.register_buffer("projection", torch.zeros(codes, self.embed_dim))

    def responses(self, x: Tensor, stride: int = 1) -> Tensor:
        """r of every `stride`-th patch: (B, C, H, W) -> (B, 2 K, h, w)."""
        window = dict(kernel_size=self.width, stride=stride)
        mean = F.avg_pool2d(x.mean(dim=1, keepdim=True), **window)
        variance = F.avg_pool2d((x * x).mean(dim=1, keepdim=True), **window) - mean * mean
        scale = (variance.clamp_min(0) + CONTRAST).rsqrt()
        # The filters sum to 0, which takes a patch's mean away.
        r = F.conv2d(x, self.filters, stride=stride) * scale - self.offset
        return torch.cat([F.relu(r - self.threshold), F.relu(-r - self.threshold)], dim=1)

    def codes(self, x: Tensor) -> Tensor:
        """Mean responses of the cells: (B, C, S, S) -> (B, 2 K G^2)."""
        x = reduced(x).contiguous(memory_format=torch.channels_last)
        # On a CPU, blocks whose responses stay in its cache are three times as fast.
        blocks = x.split(8) if x.device.type == "cpu" else [x]
        cells = [F.adaptive_avg_pool2d(self.responses(block), self.grid) for block in blocks]
        return torch.cat(cells).flatten(1)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (self.codes(x.float()) - self.code_mean) @ self.projection

    @torch.no_grad()
    def forward_features(self, x: Tensor) -> Tensor:
        border = (self.width - 4) // 2
        return self.responses(F.pad(x.float(), [border] * 4, mode="replicate"), stride=4)

    @torch.no_grad()
    def fit(self, images: Tensor, seed: int = 0) -> None:
        home = self.filters.device
        if home.type == "mps":  # which has neither eigh nor svd
            self.cpu()
        images = reduced(images.float().to(self.filters.device))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            patches = contrast_normalised(random_patches(images, self.width))
            mean = patches.mean(dim=0)
            covariance = (patches - mean).T @ (patches - mean) / len(patches)
            values, vectors = torch.linalg.eigh(covariance)
            whitening = vectors * (values + 0.1).rsqrt() @ vectors.T
            z = (patches - mean) @ whitening
            filters = spherical_kmeans(z, len(self.filters)) @ whitening  # (K, C w w)
            self.offset.copy_((filters @ mean).view(-1, 1, 1))
            filters -= filters.mean(dim=1, keepdim=True)
            self.filters.copy_(filters.view_as(self.filters))
            codes = torch.cat([self.codes(part) for part in images.split(256)])
            self.code_mean.copy_(codes.mean(dim=0))
            std = codes.std(dim=0) + 1e-3
            standard = (codes - self.code_mean) / std
            rank = min(self.embed_dim, *codes.shape)
            _, singular, directions = torch.pca_lowrank(standard, rank, center=False)
            values = singular**2 / len(codes)
            values = values.clamp_min(1e-6 * values[0])  # those below are rounding
            self.projection.zero_()
            self.projection[:, :rank] = directions * values**-0.25 / std[:, None]
        self.to(home)


CONTRAST = 10 / 255**2  # added to the variance of a patch, so that flat ones stay small


def contrast_normalised(patches: Tensor) -> Tensor:
    """Patches (n, D) in [0, 1], each minus its mean, over its standard deviation."""
    variance, mean = torch.var_mean(patches, dim=1, keepdim=True, unbiased=False)
    return (patches - mean) * (variance + CONTRAST).rsqrt()


def random_patches(images: Tensor, width: int) -> Tensor:
    """Patches of `width` x `width` pixels at random places: (N, C, H, W) -> (n, C width^2).

    n is 100,000 for three channels, fewer for more.
    """
    N, C, H, W = images.shape
    n = min(100_000, 20_000_000 // (C * width**2))
    which, top, left = (torch.randint(0, end, (n,)) for end in (N, H - width + 1, W - width + 1))
    steps = torch.arange(width)
    rows, columns = top[:, None] + steps, left[:, None] + steps  # (n, width)
    index = [i.to(images.device) for i in (which[:, None, None], rows[:, :, None], columns)]
    patches = images.permute(0, 2, 3, 1)[index[0], index[1], index[2][:, None]]
    return patches.permute(0, 3, 1, 2).flatten(1)  # (n, C width^2)


def spherical_kmeans(z: Tensor, number: int, rounds: int = 10) -> Tensor:
    """Unit atoms (number, D) of points (n, D); the nearest atom has the largest |d . z|.

    In a round an atom becomes the direction of its points' sum, each weighted by d . z, plus itself
    (Coates and Ng, 2012, section 3.1).
    """
    atoms = F.normalize(torch.randn(number, z.shape[1]).to(z), dim=1)
    for _ in range(rounds):
        similarity = z @ atoms.T
        nearest = similarity.abs().argmax(dim=1)
        weights = similarity.gather(1, nearest[:, None])
        atoms = F.normalize(atoms.index_add(0, nearest, z * weights), dim=1)
    return atoms
