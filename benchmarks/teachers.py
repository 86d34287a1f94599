"""How near a teacher's pictures are to those it learned from: the table of its model card.

bitstep sample demo:cifar10 --num 10000 --steps 50 --seed 7 --device cuda --out cifar10.npz
python benchmarks/teachers.py models/cifar10 --images cifar10.npz --real ../shared/data/cifar10
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from pages import ROOT, markdown, put, write
from quality import BATCH, SHARED

from bitstep.metrics import frechet_distance
from bitstep.stages.features import extract, load_features
from bitstep.stages.sample import read

NETWORKS = ("resnet56_cifar10_features", "mobilenetv2_imagenet_features")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="folder of the pipeline, and of its README.md")
    parser.add_argument("--images", type=Path, required=True, help="what it made, an .npz file")
    parser.add_argument("--real", type=Path, required=True, help="folder of mosaics")
    parser.add_argument("--tile", type=int, default=32)
    arguments = parser.parse_args()

    made, real = read(arguments.images), read(arguments.real, arguments.tile)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    some, others = order[: len(made)], order[len(made) :]
    distances = {}
    for name in NETWORKS:
        network = load_features(SHARED / "features" / f"{name}.pt")
        of_made, of_real = (extract(network, images, BATCH) for images in (made, real))
        distances[name] = [frechet_distance(of_made, of_real), frechet_distance(of_real[some], of_real[others])]
        print(name, distances[name], flush=True)
    write(
        ROOT / "benchmarks/results" / f"teacher-{arguments.teacher.name}.json",
        json.dumps({"num_images": len(made), "distances": distances}, indent=2) + "\n",
    )
    columns = ("features", f"Fréchet distance of {len(made):,} samples to all real images", "of as many real images")
    lines = [[f"`{name}`", *(f"{value:.2f}" for value in values)] for name, values in distances.items()]
    put(arguments.teacher / "README.md", "distances", markdown(columns, lines))


if __name__ == "__main__":
    main()
