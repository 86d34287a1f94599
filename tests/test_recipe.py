"""Recipes: names, files, efforts, overrides, and what a mistyped one is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from packed import some_bits

from bitstep.errors import UsageError
from bitstep.methods import METHODS
from bitstep.methods.base import Calibration, Method, UniformWeights
from bitstep.methods.binarydm import BinaryWeights
from bitstep.recipe import parse_bits, resolve


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("effort", ["quick", "standard", "full"])
def test_every_method_resolves_at_every_effort(name: str, effort: str) -> None:
    method = resolve(name, some_bits(METHODS[name]), effort).method  # type: ignore[arg-type]
    assert (method.name, method.efforts) == (name, {})


def test_full_effort_is_the_published_setting() -> None:
    (phase,) = resolve("efficientdm", "W4A4", "full").method.training
    assert (phase.iterations, phase.batch_size) == (16_000, 4)


def test_best_is_what_wins_at_the_width(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: best\ncalibration: {images: 8}\n")
    widths = {
        "best-wide": ("W6A6", "W8A8"),
        "best-blocks": ("W3A8", "W4A4", "W4A32"),
        "best-binary": ("W1A4", "W1.1A4", "W2A8"),
    }
    for name, some in widths.items():
        for bits in some:
            wins = resolve(name, bits, "full")
            assert resolve("best", bits, "full") == wins
            assert resolve(path, bits, "full").method.weights == wins.method.weights
    assert resolve("best", "W4A4", "quick").method.name == "best-adapters"  # no time for every block
    assert resolve("best", "W2A8", "quick").method.name == "best-binary"
    assert resolve("best", "W8A8", "quick").method.rewrites == resolve("best", "W8A8", "full").method.rewrites


def test_overrides_reach_nested_slots() -> None:
    recipe = resolve("efficientdm", "W4A8", "full", ["training.0.learning_rates.adapter=0.01", "weights.rank=8"])
    assert (recipe.weight_bits, recipe.activation_bits) == (4, 8)
    assert recipe.method.training[0].learning_rates.adapter == 0.01
    assert isinstance(recipe.method.weights, UniformWeights)
    assert recipe.method.weights.rank == 8


def test_a_file_mixes_slots(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: efficientdm\nweights: {rank: 4, symmetric: false}\n"
        "layers: {coverage: efficientdm, rules: [{match: '*.to_out.0', weight_bits: 8}]}\n"
    )
    method = resolve(path, "W4A4", "full").method
    assert method.name == "mine"
    assert method.weights == UniformWeights(rank=4, symmetric=False)
    assert method.training == METHODS["efficientdm"].training
    assert method.layers.rules[0].weight_bits == 8


def test_another_kind_starts_from_its_own_defaults() -> None:
    assert resolve("mse", "W1A4", "quick", ["weights.kind=binary"]).method.weights == BinaryWeights()


def test_a_file_without_a_base_starts_from_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("weights: {kind: uniform, symmetric: false}\n")
    method = resolve(path, "W4A4", "full", ["calibration.images=2"]).method
    assert method == Method(name="mine", weights=UniformWeights(symmetric=False), calibration=Calibration(images=2))


def test_a_file_has_the_last_word_over_the_effort_of_its_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: efficientdm\ncalibration: {images: 7}\nefforts: {quick: {weights.rank: 3}}\n")
    quick = resolve(path, "W4A4", "quick").method
    short = resolve("efficientdm", "W4A4", "quick").method
    assert quick.calibration.images == 7
    assert quick.weights == UniformWeights(rank=3)
    assert quick.training == short.training
    assert resolve(path, "W4A4", "standard").method.weights == UniformWeights(rank=32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("base: [a]", "unknown recipe"),
        ("base: efficientdm\nweigths: {rank: 4}", "did you mean 'weights'"),
        ("base: efficientdm\nefforts: 4", "efforts: expected full"),
        ("base: efficientdm\nefforts: {full: 4}", "efforts: expected full"),
        ("base: [", "cannot read recipe"),
        ("- a", "no mapping of slots"),
        ("\udcff", "cannot read recipe"),
    ],
)
def test_mistakes_in_a_file_get_one_clear_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=message) as caught:
        resolve(path, "W4A4", "full")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "bits", "overrides", "message"),
    [
        ("eficientdm", "W4A4", [], "did you mean 'efficientdm'"),
        ("efficientdm", "4/4", [], "WxAy"),
        ("efficientdm", "W9A4", [], "1 to 8"),
        ("efficientdm", "W4A1", [], "2 to 8"),
        ("efficientdm", "W1A4", [], "do not suit recipe 'efficientdm'"),
        ("efficientdm", "W4A4", ["weights.rnk=3"], "did you mean 'rank'"),
        ("best", "W2A8", ["weights.rank=3"], "where kind is 'binary'; known: kind, evolvable, allocation$"),
        ("mse", "W4A4", ["training.0.iterations=3"], "'training.0.iterations': the list there is empty$"),
        ("mse", "W4A4", ["weights.rank=4"], "adapters, and nothing is trained: leave it at 0$"),
        ("mse", "W4A4", ["layers.rules=[{match: '*'}]"], r"'\*' changes nothing: give weight_bits"),
        ("mse", "W4A4", ["layers.rules=[{match: '*', foo: 3}]"], "foo'; known: match, type, weight_bits, "),
        ("mse", "W4A4", ["layers=5"], r"layers: expected settings \(key: value\), got 5"),
        ("mse", "W4A4", ["calibration.images=many"], "calibration.images: expected a whole number, got 'many'"),
        ("mse", "W4A4", ["rewrites=smoothing"], "rewrites: expected a list, got 'smoothing'"),
        ("efficientdm", "W4A4", ["wieghts.rank=3"], "did you mean 'weights'"),
        ("efficientdm", "W4A4", ["bits=W2A2"], "unknown recipe key 'bits'(?!.*mean 'bits')"),
        (
            "dilatequant",
            "W4A4",
            ["weights.rank=8"],
            "do not go together: weights.rank asks for adapters, whose learning",
        ),
        (
            "efficientdm",
            "W4A4",
            ["training.0.learning_rates.weight=0.1"],
            "weight has nothing to train, set it to 0: uniform",
        ),
        ("dilatequant", "W4A4", ["training.0.learning_rates.weight_zero_point=1"], "weight_zero_point has nothing to"),
        ("best-binary", "W2A4", ["training.0.learning_rates.rounding=0.1"], "have weight, weight_scale"),
        ("binarydm", "W1.1A4", ["activations.signed=false"], "the lsq range is symmetric"),
        ("efficientdm", "W4A4", ["weights.symmetric=false", "weights.range=lsq"], "the lsq range is symmetric"),
        ("efficientdm", "W4A4", ["training.0.techniques=[{kind: soft-rounding}]"], "needs weights of kind adaround"),
        (
            "binarydm",
            "W1.1A4",
            ["training.0.techniques=[{kind: evolvable-basis}]"],
            "only weights.evolvable=true gives",
        ),
        ("binary-baseline", "W1A4", ["weights.evolvable=true"], "only the technique evolvable-basis takes away"),
        ("binarydm-ebb", "W1A4", ["training.0.techniques.0.share=1"], "less than 1"),
        (
            "dilatequant",
            "W4A4",
            ["training.0.techniques=[{kind: mimicking}]"],
            "runs the whole denoiser, not blockwise",
        ),
        ("efficientdm", "W4A4", ["training.0.memory=0"], "greater than 0"),
        ("mse", "W4A4", ["layers.rules=[{match: '*', weight_bits: 1}]"], "asks for 1 bit, uniform weights take 2"),
        ("efficientdm", "W4A4", ["weights.rank=-3"], "greater than or equal to 0"),
        ("efficientdm", "W4A4", ["training.7.iterations=3"], "below 1"),
        ("efficientdm", "W4A4", ["training.0.objective.kind=trajectry"], "did you mean 'trajectory'"),
        ("efficientdm", "W4A4", ["weights.rank"], "slot.key=value"),
        ("efficientdm", "W4A4", ["weights.rank=[1"], "expected YAML"),
        ("efficientdm", "W4A4", ["weights.rank.x=1"], "'weights.rank' is a single value"),
        ("nowhere.yaml", "W4A4", [], "cannot read recipe"),
    ],
)
def test_mistakes_get_one_clear_line(recipe: str, bits: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        resolve(recipe, bits, "full", overrides)
    assert "\n" not in str(caught.value)


def test_bits() -> None:
    assert parse_bits("W1.1A32") == (1.1, 32)
