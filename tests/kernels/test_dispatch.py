"""Which backend serves which tensor, and what is refused."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from distcomp import kernels
from distcomp.errors import DistcompError
from distcomp.kernels import dispatch


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice remembered from before, and none left behind."""
    monkeypatch.delenv("DISTCOMP_KERNELS", raising=False)
    caches = dispatch.forced, dispatch._choose, dispatch._load
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if these had never been installed."""
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_the_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCOMP_KERNELS", "reference")
    assert kernels.backend() == "reference"
    assert kernels.backend("cuda") == "reference"


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels.backend()
    monkeypatch.setenv("DISTCOMP_KERNELS", "fortran")
    assert kernels.backend() == before


def test_without_the_extension_the_reference_serves_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "distcomp.kernels.cpu")
    with pytest.warns(RuntimeWarning, match=r"plain-torch reference.*install a C compiler"):
        assert kernels.backend() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.all_finite(torch.ones(3))


def test_a_forced_backend_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "distcomp.kernels.cpu")
    monkeypatch.setenv("DISTCOMP_KERNELS", "cpu")
    with pytest.raises(DistcompError, match=r"not available.*install a C compiler"):
        kernels.backend()


@pytest.mark.parametrize(("forced", "device"), [("cpu", "cuda"), ("triton", "cpu")])
def test_a_backend_forced_on_the_wrong_device_is_an_error(
    monkeypatch: pytest.MonkeyPatch, forced: str, device: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("DISTCOMP_KERNELS", forced)
    with pytest.raises(DistcompError, match=f"cannot serve a tensor on {device}"):
        kernels.backend(device)


def test_an_unknown_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCOMP_KERNELS", "fortran")
    with pytest.raises(DistcompError, match="choose one of reference, cpu, triton"):
        kernels.backend()


def test_a_device_without_kernels_is_served_by_the_reference() -> None:
    assert kernels.backend("meta") == "reference"


X, CODES, SCALES = torch.zeros(10), torch.zeros(5, dtype=torch.uint8), torch.zeros(1)

REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "bits": ("bits=9", lambda: kernels.quantize(X, CODES, SCALES, bits=9)),
    "block": ("block=0", lambda: kernels.quantize(X, CODES, SCALES, bits=4, block=0)),
    "offset": ("first=3", lambda: kernels.quantize(X, CODES, SCALES, bits=4, first=3)),
    "dtype": ("torch.float64", lambda: kernels.quantize(X.double(), CODES, SCALES, bits=4)),
    "shape": ("2-D", lambda: kernels.quantize(X.view(2, 5), CODES, SCALES, bits=4)),
    "strides": ("strided", lambda: kernels.quantize(torch.zeros(20)[::2], CODES, SCALES, bits=4)),
    "device": ("on meta", lambda: kernels.quantize(X, CODES.to("meta"), SCALES, bits=4)),
    "codes": ("5 elements where 10", lambda: kernels.quantize(X, CODES, SCALES, bits=8)),
    "scales": ("2 elements where 1", lambda: kernels.quantize(X, CODES, torch.zeros(2), bits=4)),
    "sign": ("at once", lambda: kernels.dequantize(CODES, SCALES, X, bits=4, add=True, subtract=True)),
    "checksum": ("checksum takes", lambda: kernels.checksum(X)),
    "finite": ("all_finite takes", lambda: kernels.all_finite(CODES)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(what: str) -> None:
    message, call = REFUSED[what]
    with pytest.raises(DistcompError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
