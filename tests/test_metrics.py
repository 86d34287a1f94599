"""Image metrics against closed forms and independent computations."""

from __future__ import annotations

import math

import pytest
import torch

from bitstep.metrics import frechet_distance, precision_recall, psnr, ssim


def images(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 16, 20, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_psnr_of_a_known_error() -> None:
    a = torch.full((2, 16, 16, 3), 100, dtype=torch.uint8)
    assert psnr(a, a + 5) == pytest.approx(10 * math.log10(255**2 / 25))
    assert psnr(a, a) == math.inf


def test_many_images_are_the_mean_of_each() -> None:
    a, b = images(0, 35), images(1, 35)
    for metric in (psnr, ssim):
        each = [metric(a[i : i + 1], b[i : i + 1]) for i in range(len(a))]
        assert metric(a, b) == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = torch.full((1, 16, 16, 3), 100, dtype=torch.uint8), torch.full((1, 16, 16, 3), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))


def test_ssim_matches_one_window_computed_by_hand() -> None:
    a, b = images(0)[:1, :11, :11, :1], images(1)[:1, :11, :11, :1]
    squared = (torch.arange(11.0) - 5).double().square()
    weight = torch.exp(-(squared[:, None] + squared[None, :]) / (2 * 1.5**2))
    weight /= weight.sum()
    x, y = a[0, :, :, 0].double(), b[0, :, :, 0].double()
    mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
    var_x, var_y = (weight * (x - mean_x) ** 2).sum(), (weight * (y - mean_y) ** 2).sum()
    cov = (weight * (x - mean_x) * (y - mean_y)).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    assert ssim(a, b) == pytest.approx(expected.item())
    assert ssim(a, a) == pytest.approx(1)


@pytest.mark.parametrize(("n", "m", "d"), [(50, 60, 5), (8, 9, 20)])  # more and fewer samples than dimensions
def test_frechet_distance_matches_the_matrix_square_root(n: int, m: int, d: int) -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(n, d, generator=generator, dtype=torch.float64) * 2
    b = torch.randn(m, d, generator=generator, dtype=torch.float64) + 1
    cov_a, cov_b = a.T.cov(), b.T.cov()
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)  # of a product of positive matrices: real
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_a_shifted_set_is_the_squared_shift() -> None:
    a = torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(4 * 9, rel=1e-6)


@pytest.mark.parametrize("together", [2**26, 24])  # all at once, and three points at a time
def test_precision_and_recall_of_sets_that_overlap_by_halves(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitstep.metrics._DISTANCES", together)
    line = torch.arange(8.0)[:, None]
    near, far = line, line + 1000
    half = torch.cat([near[:4] + 0.01, far[:4]])  # of its images half are real; its far points cover no real one
    precision, recall = precision_recall(half, near, neighbours=1)
    assert precision == 0.5
    assert recall == pytest.approx(5 / 8)  # 0..3, and 4 within the ball of 3.01
    assert precision_recall(far, near, neighbours=1) == (0, 0)
    assert precision_recall(near, near, neighbours=1) == (1, 1)
