"""How fast are circulant layers, and what do Winograd's and MEC's convolutions cost in error, memory and
time?

    python -m benchmarks.structured_speed        # a minute; writes results/structured_speed.json

CPU seconds of one thread, which other processes on the machine hardly change; batch 64 for dense layers;
medians. Errors are against float64, relative to the largest output.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._common import arguments_of, median, write
from distcomp import blocks, structured


def seconds(run: Callable[[], Any], repeats: int = 7) -> float:
    """CPU seconds, the median."""
    run()
    times = []
    for _ in range(repeats):
        began_s = time.process_time()
        run()
        times.append(time.process_time() - began_s)
    return median(times)


def dense_layers() -> dict[str, Any]:
    """A circulant layer of one block, by FFT and by index, beside the dense layer: forward, and forward with
    backward."""
    rows: dict[str, Any] = {}
    for size in (64, 128, 256, 512, 1024, 2048, 4096):
        x = torch.randn(64, size, requires_grad=True)
        row: dict[str, float] = {}
        for name, fft in (("dense", None), ("by FFT", True), ("by index", False)):
            if name == "by index" and size > 2048:
                continue
            layer: nn.Module = nn.Linear(size, size)
            if fft is not None:
                structured.circulant(layer, size, fft=fft)

            def forward(layer: nn.Module = layer, x: Tensor = x) -> None:
                with torch.no_grad():
                    layer(x)

            def both(layer: nn.Module = layer, x: Tensor = x) -> None:
                layer(x).sum().backward()

            row[f"{name}: forward_s"], row[f"{name}: both_s"] = seconds(forward), seconds(both, 5)
        rows[str(size)] = row
    return rows


def channel_blocks() -> dict[str, Any]:
    """A 3 x 3 convolution of 128 channels on 14 x 14, batch 8: blocks of channels by FFT, and by index."""
    x, rows = torch.randn(8, 128, 14, 14), {}
    layer: nn.Module = nn.Conv2d(128, 128, 3, padding=1)
    with torch.no_grad():
        rows["dense"] = {"forward_s": seconds(lambda: layer(x))}
        for block in (8, 16, 32, 64, 128):
            for name, fft in (("by FFT", True), ("by index", False)):
                made = structured.circulant(nn.Conv2d(128, 128, 3, padding=1), block, fft=fft)
                rows[f"b = {block}, {name}"] = {"forward_s": seconds(lambda m=made: m(x), 5)}  # type: ignore[misc]
    return rows


def rounded(x: Tensor, bits: int = 8) -> Tensor:
    """To ``bits`` bits, symmetric, one scale for all of a tensor."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax() / top
    return torch.round(x / scale) * scale


def winograd_8_bits(x: Tensor, w: Tensor, tile: int) -> Tensor:
    """Inputs and weights are rounded after they were transformed: what an 8-bit unit would multiply."""
    from distcomp.blocks.winograd import _transformed, transforms

    v, u, (n, _, rows, columns, side, _) = _transformed(x, w, tile, (1, 1))
    _, _, at = transforms(tile, x)
    products = (rounded(u) @ rounded(v)).view(side, side, w.shape[0], n, rows, columns)
    y = at @ products.permute(3, 2, 4, 5, 0, 1) @ at.T
    return y.permute(0, 1, 2, 4, 3, 5).reshape(n, w.shape[0], rows * tile, columns * tile)


def winograd() -> dict[str, Any]:
    """Errors in float32, bf16 and at 8 bits, and times, of 64 channels on 32 x 32, batch 4."""
    torch.manual_seed(0)
    x, w = (
        torch.randn(4, 64, 32, 32, dtype=torch.float64),
        torch.randn(64, 64, 3, 3, dtype=torch.float64) / 24,
    )
    exact = nn.functional.conv2d(x, w, padding=1)

    def error(y: Tensor) -> float:
        return float((y.double() - exact).abs().max() / exact.abs().max())

    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "PyTorch (oneDNN)": lambda x, w: nn.functional.conv2d(x, w, padding=1),
        "F(2x2, 3x3)": lambda x, w: blocks.winograd_conv2d(x, w, 2),
        "F(4x4, 3x3)": lambda x, w: blocks.winograd_conv2d(x, w, 4),
    }
    rows = {}
    for name, way in ways.items():
        row = {f"{kind} error": error(way(x.to(kind_), w.to(kind_))) for kind, kind_ in
               (("float32", torch.float32), ("bf16", torch.bfloat16))}  # fmt: skip
        single = x.float(), w.float()
        row["forward_s"] = seconds(lambda way=way, single=single: way(*single))  # type: ignore[misc]
        rows[name] = row
    rows["PyTorch (oneDNN)"]["8 bits error"] = error(nn.functional.conv2d(rounded(x), rounded(w), padding=1))
    for tile in (2, 4):
        rows[f"F({tile}x{tile}, 3x3)"]["8 bits error"] = error(winograd_8_bits(x, w, tile))
        rows[f"F({tile}x{tile}, 3x3)"]["fewer multiplications"] = 9 * tile**2 / (tile + 2) ** 2
    return rows


LAYERS = {
    "3 -> 96, 11x11 / 4, 227x227": (3, 96, 11, 4, 0, 227),
    "3 -> 64, 7x7 / 2, 224x224": (3, 64, 7, 2, 3, 224),
    "64 -> 64, 3x3, 56x56": (64, 64, 3, 1, 1, 56),
    "128 -> 128, 3x3, 28x28": (128, 128, 3, 1, 1, 28),
    "32 -> 32, 5x5, 14x14": (32, 32, 5, 1, 0, 14),
}


def mec() -> dict[str, Any]:
    """Bytes of the lowered input and times, beside im2col and PyTorch's convolution, batch 1."""
    rows = {}
    for name, (inputs, outputs, kernel, stride, pad, size) in LAYERS.items():
        x, w = torch.randn(1, inputs, size, size), torch.randn(outputs, inputs, kernel, kernel)
        padded = (1, inputs, size + 2 * pad, size + 2 * pad)
        im2col_bytes, mec_bytes = blocks.lowered_bytes(padded, (kernel, kernel), stride)

        def by_im2col(x: Tensor = x, w: Tensor = w, k: int = kernel, s: int = stride, p: int = pad) -> Tensor:
            return w.flatten(1) @ nn.functional.unfold(x, k, padding=p, stride=s)

        rows[name] = {
            "im2col_bytes": im2col_bytes,
            "mec_bytes": mec_bytes,
            "PyTorch_s": seconds(lambda: nn.functional.conv2d(x, w, stride=stride, padding=pad)),  # noqa: B023
            "im2col_s": seconds(by_im2col),
            "mec_s": seconds(lambda: blocks.mec_conv2d(x, w, stride, (pad, pad))),  # noqa: B023
        }
    return rows


def accnet() -> dict[str, Any]:
    """A bilateral filter, imitated: relative error with and without the activation, at as many parameters."""
    rows = {}
    for activation in (True, False):
        torch.manual_seed(0)
        draw = torch.Generator().manual_seed(0)

        def images(draw: torch.Generator = draw) -> Tensor:
            smooth = nn.functional.interpolate(torch.rand(4, 1, 5, 5, generator=draw), 20, mode="bilinear")
            return (smooth + 0.1 * torch.randn(4, 1, 20, 20, generator=draw)).clamp(0, 1)

        net = blocks.AccNet(cells=7, components=4, kernel=5, activation=activation)
        blocks.imitate(net, blocks.bilateral, images, 150, 1e-2)
        with torch.no_grad():
            x = images()
            wanted = blocks.bilateral(x)
            error = float((net(x) - wanted).norm() / (wanted - wanted.mean()).norm())
            before = float((x - wanted).norm() / (wanted - wanted.mean()).norm())
        name = "with ReLU between" if activation else "linear"
        rows[name] = {"relative error": error, "of the unfiltered image": before,
                      "parameters": sum(p.numel() for p in net.parameters())}  # fmt: skip
    return rows


PARTS = {"dense_layers": dense_layers, "channel_blocks": channel_blocks, "winograd": winograd, "mec": mec,
         "accnet": accnet}  # fmt: skip


def main() -> None:
    arguments_of(__doc__).parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, part in PARTS.items():
        found[name] = part()
        print(name, found[name], flush=True)
    write("structured_speed", found)


if __name__ == "__main__":
    main()
