"""Fresh memory in large pages: the same tensors, and a wish that nobody may grant."""

import pytest
import torch

from distcomp.kernels import memory
from distcomp.kernels.dispatch import backend


@pytest.mark.parametrize("numel", [0, 1, memory.LARGE_BYTES // 4 - 1, memory.LARGE_BYTES // 4 + 7])
def test_it_is_a_flat_tensor_like_any_other(numel: int) -> None:
    out = memory.empty(numel, torch.device("cpu"))
    assert out.shape == (numel,)
    assert out.dtype == torch.float32
    assert out.is_contiguous()
    wanted = torch.arange(numel, dtype=torch.float32)
    assert torch.equal(out.copy_(wanted), wanted)


def test_large_tensors_alone_ask_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    if backend("cpu") != "cpu":
        pytest.skip("the C extension is not built")
    from distcomp.kernels import cpu

    asked = []

    class Extension:
        @staticmethod
        def large_pages(address: int, size_bytes: int) -> None:
            asked.append((address, size_bytes))

    monkeypatch.setattr(cpu, "_cpu", Extension)
    memory.empty(100, torch.device("cpu"))
    large = memory.empty(memory.LARGE_BYTES // 4, torch.device("cpu"))
    assert asked == [(large.data_ptr(), memory.LARGE_BYTES)]


def test_what_cannot_be_a_range_is_refused() -> None:
    if backend("cpu") != "cpu":
        pytest.skip("the C extension is not built")
    from distcomp.kernels._cpu import large_pages

    large_pages(0, 0)
    large_pages(5, 100)  # no whole page: nothing is asked for
    for at, size_bytes in ((0, -1), (2**64 - 10, 100)):
        with pytest.raises(ValueError, match="cannot be"):
            large_pages(at, size_bytes)
