"""Layouts and flat buffers for properties."""

from __future__ import annotations

from hypothesis import strategies as st

from distcomp.layout import Layout

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
layouts = st.lists(shapes, max_size=8).map(
    lambda shapes: Layout.of([(f"p{index}", shape) for index, shape in enumerate(shapes)])
)
grains = st.integers(1, 40)
