"""The report: one page that needs nothing else, says what the other verbs say, and trusts no name."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bitstep
from bitstep import api
from bitstep.errors import BitstepError, UsageError
from bitstep.stages.sample import grid


class Page(HTMLParser):
    """What a browser would make of it: tags with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> dict[str, bytes]:
        """By their alternative texts."""
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                data = re.fullmatch(r"data:image/[a-z+]+;base64,(.+)", attributes["src"] or "")
                assert data, "a picture that is not in the page"
                found[str(attributes["alt"])] = base64.b64decode(data[1])
        return found


def test_says_what_the_other_verbs_say(packed_pipeline: Path, plain_pipeline: Path, tmp_path: Path) -> None:
    path = bitstep.report(packed_pipeline, out=tmp_path / "new" / "r.html", against=plain_pipeline, num=4, steps=3)
    page, facts = Page(path), bitstep.inspect(packed_pipeline)
    numbers = bitstep.evaluate(packed_pipeline, against=plain_pipeline, num=4, steps=3)
    assert f"{numbers['psnr']:.1f} dB" in page.text
    assert f"{facts['compression']:.1f}x" in page.text
    assert all(layer["name"] in page.text for layer in facts["layers"])
    images = page.images()
    sources = {str(packed_pipeline): packed_pipeline, f"{plain_pipeline}, full precision": plain_pipeline}
    for title, source in sources.items():
        expected = grid(bitstep.sample(source, num=4, steps=3))
        assert np.array_equal(np.array(Image.open(io.BytesIO(images[title]))), np.array(expected))
    assert b"<svg" in images["Error by timestep"]
    assert list(path.parent.iterdir()) == [path]


def test_needs_no_reference_and_takes_several(packed_pipeline: Path, tmp_path: Path) -> None:
    other = shutil.copytree(packed_pipeline, tmp_path / packed_pipeline.name)
    page = Page(bitstep.report([packed_pipeline, other], out=tmp_path / "r.html", num=2, steps=2))
    assert {str(packed_pipeline), str(other)} <= page.images().keys()
    assert "PSNR" not in page.text
    assert "Error by timestep" not in page.images()


def test_is_the_same_every_time(packed_pipeline: Path, plain_pipeline: Path, tmp_path: Path) -> None:
    pages = [
        bitstep.report([packed_pipeline], out=tmp_path / f"{i}.html", against=plain_pipeline, num=2, steps=2)
        for i in range(2)
    ]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_a_name_is_no_code(packed_pipeline: Path, plain_pipeline: Path, tmp_path: Path) -> None:
    hostile = shutil.copytree(packed_pipeline, tmp_path / r"<script>alert(1)<$\frac$")
    config = hostile / "unet" / "config.json"
    written = json.loads(config.read_text())
    written["quantization_config"]["recipe"] = {"method": {"name": "</pre><img src=x onerror=alert(2)>"}, "bits": "<b>"}
    config.write_text(json.dumps(written))
    page = Page(bitstep.report([hostile], out=tmp_path / "r.html", against=plain_pipeline, num=2, steps=2))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert str(hostile) in page.text


def test_bad_input_leaves_nothing(
    packed_pipeline: Path, plain_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"ends in \.html"):
        bitstep.report([packed_pipeline], out=tmp_path / "r.pdf")
    with pytest.raises(UsageError, match="is a file"):
        bitstep.report([packed_pipeline], out=packed_pipeline / "model_index.json" / "r.html")
    with pytest.raises(BitstepError, match="not packed"):
        bitstep.report([plain_pipeline], out=tmp_path / "r.html", num=2, steps=2)
    with pytest.raises(UsageError, match="at least one packed folder"):
        bitstep.report([], out=tmp_path / "r.html")
    with pytest.raises(UsageError, match="num 1 is too small: expected at least 2"):
        bitstep.report(packed_pipeline, out=tmp_path / "r.html", num=1)
    monkeypatch.setattr(api, "_sample", pytest.fail)
    with pytest.raises(UsageError, match="cannot be compared with demo:fruits32: its denoiser's sample is "):
        bitstep.report(packed_pipeline, out=tmp_path / "r.html", against="demo:fruits32")
    assert not list(tmp_path.iterdir())
