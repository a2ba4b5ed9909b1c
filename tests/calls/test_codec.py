"""The codec of a call by its name: what it costs to ask for it again and again."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from distcomp.calls import collectives
from distcomp.calls.codec import codec_for
from distcomp.errors import DistcompError
from distcomp.plugins import lookup
from distcomp.registry import COMPRESSORS, METHODS


def test_installed_packages_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are in one table alone (qsgd is a method's, sign both's) and one that is in none."""
    looked: list[str] = []
    found = metadata.entry_points
    monkeypatch.setattr(metadata, "entry_points", lambda **which: looked.append("") or found(**which))
    assert lookup(COMPRESSORS, "qsgd") is None
    looked.clear()
    for name in ("qsgd", "sign", "quantize", "nobody"):
        for table in (COMPRESSORS, METHODS):
            lookup(table, name)
        for _ in range(2):
            if name != "nobody":
                codec_for(name, torch.float32)
    assert looked == []


def test_a_text_stands_for_the_same_codec_each_time() -> None:
    first, again = (codec_for("qsgd:bits=4,block=64", torch.float32) for _ in range(2))
    assert first == again
    assert first != codec_for("qsgd:bits=4,block=128", torch.float32)
    for _ in range(2):
        with pytest.raises(DistcompError, match="qsgd has no setting"):
            codec_for("qsgd:bitts=4", torch.float32)


def test_a_method_is_read_from_its_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    collectives._method_named.cache_clear()
    read: list[str] = []
    parse = collectives.parse
    monkeypatch.setattr(collectives, "parse", lambda text: read.append(text) or parse(text))
    asked = [collectives._method(text, torch.float32) for text in ("topk:ratio=0.25", "topk:ratio=0.5") * 2]
    assert asked[:2] == asked[2:]
    assert asked[0] != asked[1]
    assert read == ["topk:ratio=0.25", "topk:ratio=0.5"]
