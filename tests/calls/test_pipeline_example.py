"""The example of a pipeline runs: two stages, payloads between them."""

from __future__ import annotations

from benchmarks._places import example


def trained(rank, size, *arguments):
    example("bytes_lm")
    pipeline = example("pipeline")
    return pipeline.train(pipeline.options(["--steps", "3", *arguments]))


def test_a_pipeline_trains_in_few_bits(cluster):
    ranks = cluster(2)
    _, packed = ranks.run(trained, "--codec", "qsgd:bits=8")
    _, plain = ranks.run(trained, "--codec", "none")
    assert packed["bytes_per_microbatch"] < plain["bytes_per_microbatch"] / 3.9
    assert abs(packed["test_loss"] - plain["test_loss"]) < 0.02
    assert plain["test_loss"] < 5.6
