"""How far apart images are: pairwise (PSNR, SSIM) and as sets (Fréchet distance of features).

Images are uint8 ``[N, H, W, C]``, the form in which samples are saved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

SSIM_WINDOW = 11
NEIGHBOURS = 3  # of precision and recall
CHUNK = 16  # images that are compared at once: float64 takes eight times their bytes, and SSIM a dozen times that
_DISTANCES = 2**26  # between features, computed at once: half a gigabyte


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over the pairs; infinite when a pair is equal."""
    errors = torch.cat([(x.double() - y.double()).square().flatten(1).mean(1) for x, y in _parts(a, b)])
    return float((10 * torch.log10(255**2 / errors)).mean())


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity (Wang et al., IEEE TIP 2004): Gaussian 11x11 window of sigma 1.5, per channel.

    Only windows that lie inside the image count, so images need at least 11 pixels a side.
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    gauss = torch.exp(-offsets.square() / (2 * 1.5**2))
    gauss = gauss / gauss.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, gauss.reshape(1, 1, -1, 1)), gauss.reshape(1, 1, 1, -1))

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        x, y = (images.double().movedim(-1, 1).flatten(0, 1).unsqueeze(1) for images in (a, b))
        mean_x, mean_y = blur(x), blur(y)
        variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        covariance = blur(x * y) - mean_x * mean_y
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
        structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
        similar: Tensor = luminance * structure
        return similar.reshape(len(a), -1).mean(1)

    return float(torch.cat([similarity(*part) for part in _parts(a, b)]).mean())


def _parts(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(a.split(CHUNK), b.split(CHUNK), strict=True)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features ``[N, D]`` and ``[M, D]``.

        |mean_a - mean_b|^2 + Tr(A + B - 2 (A B)^(1/2)),   A and B the covariances

    With X and Y the centred features over the square root of their count minus one, A = X'X and B = Y'Y, and the trace
    of (A B)^(1/2) is the nuclear norm of X Y'. It is taken from the triangular factors of X and Y, so no covariance is
    formed and no matrix square root is iterated.
    """
    a, b = a.double(), b.double()
    x, y = ((features - features.mean(0)) / math.sqrt(len(features) - 1) for features in (a, b))
    r_x, r_y = (torch.linalg.qr(centred, mode="r").R for centred in (x, y))
    cross = torch.linalg.svdvals(r_x @ r_y.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross)


def precision_recall(a: Tensor, b: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features ``[N, D]`` of images against those of a reference
    ``[M, D]``: the share of ``a`` that lies in the reference's manifold, and of ``b`` that lies in that of the images.

    A set's manifold is the union of balls around its points, each as wide as its distance to the ``neighbours``-th
    nearest other one; a set needs more points than that.
    """

    def covered(points: Tensor, manifold: Tensor) -> float:
        rows = max(1, _DISTANCES // len(manifold))
        nearest = [torch.cdist(part, manifold).kthvalue(neighbours + 1).values for part in manifold.split(rows)]
        radii = torch.cat(nearest)  # (the nearest of all is itself)
        inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in points.split(rows)]
        return float(torch.cat(inside).double().mean())

    a, b = a.double(), b.double()
    return covered(a, b), covered(b, a)
