"""Feature networks, and what sets of images are compared by in their features.

Numbers in the features of different networks cannot be compared. Those of ``inception``, the network of FID as
torch-fidelity has it (its own resizing, TensorFlow's weights), can be put beside published ones.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitstep.errors import BitstepError, UsageError
from bitstep.metrics import NEIGHBOURS, frechet_distance, precision_recall

INCEPTION = "inception"
_SPATIAL_CHANNELS = 7  # of Mixed_6d, 17x17 pixels each, channels last: sFID's 2,023 features
_PARTS = (2048, 2023, 1008)
_SPLITS = 10  # of the images, for the Inception Score


class Inception(nn.Module):
    """uint8 images ``[N, 3, H, W]`` -> ``[N, 5079]``: 2048 pooled features, sFID's 2023 (arXiv 2103.03841), 1008 logits
    without bias.

    Raises UsageError where torch-fidelity cannot be imported, BitstepError where the weights cannot be had (they are
    downloaded once, to torch.hub's folder).
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
            raise UsageError(
                f'--features inception needs torch-fidelity, pip install "bitstep[fid]": {error}'
            ) from error
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
        except OSError as error:
            raise BitstepError(f"cannot download the weights of the Inception network: {error}") from error

    def forward(self, images: Tensor) -> Tensor:
        found: list[Tensor] = []
        with self.network.Mixed_6d.register_forward_hook(lambda *call: found.append(call[-1])):
            pooled, logits = self.network(images.to(torch.uint8))
        return torch.cat([pooled, found[0][:, :_SPATIAL_CHANNELS].movedim(1, -1).flatten(1), logits], 1)


def load_features(features: str | Path) -> nn.Module:
    """A network that takes images ``[N, 3, H, W]`` in 0..255 and returns features ``[N, D]``: :class:`Inception` by its
    name, or one from a TorchScript file."""
    if features == INCEPTION:
        return Inception().eval()
    if not Path(features).is_file():
        raise UsageError(f"no feature network at {features}: expected a TorchScript file, or {INCEPTION}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather have torch.export's format
        try:
            network: nn.Module = torch.jit.load(features, map_location="cpu")
        except RuntimeError as error:
            raise BitstepError(f"cannot load {features}: expected a TorchScript network") from error
    return network.eval()


def check_features(network: nn.Module, images: Tensor) -> None:
    """Raise BitstepError where ``network`` makes no features ``[N, D]`` of images such as these."""
    try:
        features = extract(network, images, 1)
    except Exception as error:  # TorchScript ends a long message with what went wrong
        *_, reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BitstepError(f"the feature network fails on images {list(images.shape)}: {reason}") from error
    if features.ndim != 2:
        found, given = list(features.shape), list(images.shape)
        raise BitstepError(f"the feature network makes {found} of images {given}: expected features [N, D]")


@torch.no_grad()
def extract(network: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Features ``[N, D]`` of uint8 images ``[N, H, W, C]``; grey images are repeated over three channels."""
    batches = torch.split(images, batch_size)
    return torch.cat([network(batch.movedim(-1, 1).float().expand(-1, 3, -1, -1)) for batch in batches])


def compare(network: nn.Module, images: Tensor, reference: Tensor, batch_size: int) -> dict[str, float | None]:
    """Uint8 images ``[N, H, W, C]`` beside those of a reference ``[M, H, W, C]``, as sets; None where they are too few.

    frechet_distance, precision, recall: see :mod:`bitstep.metrics`
    fid, sfid, inception_score: of :class:`Inception` only; its Fréchet distance is the FID
    """
    ours, theirs = (extract(network, each, batch_size) for each in (images, reference))
    if not isinstance(network, Inception):
        return _compared(ours, theirs)
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    (pooled, spatial, logits), (real_pooled, real_spatial, _) = (each.split(_PARTS, 1) for each in (ours, theirs))
    numbers = _compared(pooled, real_pooled)
    score = isc_features_to_metric(logits, _SPLITS)[KEY_METRIC_ISC_MEAN] if len(logits) >= _SPLITS else None
    fid, sfid = numbers["frechet_distance"], frechet_distance(spatial, real_spatial)
    return {**numbers, "fid": fid, "sfid": sfid, "inception_score": score}


def _compared(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    enough = min(len(ours), len(theirs)) > NEIGHBOURS
    precision, recall = precision_recall(ours, theirs) if enough else (None, None)
    return {"frechet_distance": frechet_distance(ours, theirs), "precision": precision, "recall": recall}
