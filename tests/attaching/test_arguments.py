"""What stands in the wrong place, or is of the wrong kind, is said before anything is attached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distcomp
from distcomp.errors import DistcompError

MODEL = nn.Linear(2, 2)
SGD = torch.optim.SGD(MODEL.parameters(), 0.1)

MISPLACED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "a text for the optimizer": ((MODEL, "qsgd:bits=4"), {}, "in the optimizer's place"),
    "a method for the optimizer": ((MODEL, distcomp.qsgd(bits=4)), {}, "in the optimizer's place"),
    "an averaging for the optimizer": ((MODEL, distcomp.choco()), {}, "in the optimizer's place"),
    "an optimizer for the method": ((MODEL, None, SGD), {}, "an optimizer stands in the method's place"),
    "an optimizer for the model": ((SGD, MODEL), {}, "the model is a SGD"),
    "a method that was not called": ((MODEL, SGD, distcomp.qsgd), {}, "qsgd was not called"),
    "a list of parameters": ((MODEL, list(MODEL.parameters())), {}, "the optimizer is a list"),
    "half a seed": ((MODEL, SGD, "bf16"), {"seed": 0.5}, "the seed is 0.5"),
    "no time": ((MODEL, SGD, "bf16"), {"timeout_s": 0}, "timeout_s is 0"),
    "text for a time": ((MODEL, SGD, "bf16"), {"timeout_s": "60"}, "timeout_s is '60'"),
}


@pytest.mark.parametrize("asked", [None, "bf16"])
@pytest.mark.parametrize("what", MISPLACED)
def test_what_stands_in_the_wrong_place_is_named(
    what: str, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked is None:
        monkeypatch.delenv("DISTCOMP_METHOD", raising=False)
    else:
        monkeypatch.setenv("DISTCOMP_METHOD", asked)
    given, options, said = MISPLACED[what]
    with pytest.raises(DistcompError, match=said) as told:
        distcomp.attach(*given, **options)
    assert ";" in str(told.value)


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(2, 2))
        with pytest.raises(DistcompError, match="the SGD steps on no parameter of this model"):
            distcomp.attach(model, SGD, "qsgd:bits=4")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with distcomp.attach(model, optimizer, "qsgd: bits=3, block=512") as handle:
            assert repr(handle) == "<Handle of qsgd:bits=3, rank 0 of 1>"
            assert handle.stats()["method"] == handle.method == "qsgd:bits=3"
    finally:
        dist.destroy_process_group()
