"""Theory as tests: factored training has no poor local minimum, and a fixed projection is a broken codec."""

from __future__ import annotations

import numpy as np
import torch


def test_deep_linear_networks_reach_the_closed_form_optimum() -> None:
    """Kawaguchi 2016: every local minimum of a deep linear network's squared loss is global.

    Its value is that of reduced-rank regression, min over matrices of rank 2 of |Y - W X|^2.
    """
    draw = np.random.default_rng(0)
    x, noise = draw.standard_normal((6, 40)), draw.standard_normal((5, 40))
    y = draw.standard_normal((5, 6)) @ x + noise
    ordinary = y @ x.T @ np.linalg.inv(x @ x.T) @ x
    u, _, _ = np.linalg.svd(ordinary, full_matrices=False)
    best = np.square(y - u[:, :2] @ u[:, :2].T @ ordinary).mean()
    inputs, outputs = torch.from_numpy(x), torch.from_numpy(y)
    for seed in range(4):
        assert abs(reached(inputs, outputs, seed) - best) < 1e-5 * best


def reached(inputs: torch.Tensor, outputs: torch.Tensor, seed: int) -> float:
    """The loss of three factors of rank 2, from a random start."""
    torch.manual_seed(seed)
    shapes = ((2, 6), (2, 2), (5, 2))
    factors = [(0.5 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]
    optimizer = torch.optim.LBFGS(
        factors, max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14, tolerance_grad=1e-10
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (outputs - factors[2] @ factors[1] @ factors[0] @ inputs).square().mean()
        value.backward()
        return value

    for _ in range(3):
        last = float(optimizer.step(loss))
    return last


def projected_descent(redraw: bool, steps: int = 300) -> tuple[float, float]:
    """Error feedback around x -> S^T (S S^T)^-1 S x, a quarter of the numbers: residual, and distance to the
    goal."""
    draw = torch.Generator().manual_seed(0)
    goal = torch.randn(64, generator=draw)
    x, residual = torch.zeros(64), torch.zeros(64)
    sketch = torch.randn(16, 64, generator=draw)
    for _ in range(steps):
        if redraw:
            sketch = torch.randn(16, 64, generator=draw)
        wanted = x - goal + residual
        sent = sketch.T @ torch.linalg.solve(sketch @ sketch.T, sketch @ wanted)
        residual = wanted - sent
        x = x - 0.1 * sent
    return float(residual.norm()), float((x - goal).norm())


def test_a_fixed_projection_on_the_wire_never_arrives_and_one_drawn_anew_does() -> None:
    fixed, drawn_anew = projected_descent(False), projected_descent(True)
    assert fixed[0] > 500  # what is never sent piles up, step after step
    assert fixed[1] > 5
    assert drawn_anew[0] < 50
    assert drawn_anew[1] < 1e-3
