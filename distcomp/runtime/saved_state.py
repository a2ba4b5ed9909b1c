"""A rank's part of a checkpoint: what it says of itself, and what it must be before anything is taken over.

A part says of which method, parameters, step, seed and ranks it is. Whoever reads it trusts nothing: types,
names, shapes and dtypes are those of the state that the attached method would begin with, and every value is
finite, or nothing is taken over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from distcomp.active import ActiveParameters
from distcomp.errors import DistcompError
from distcomp.grammar import Written
from distcomp.methods.base import ByParameter

FORMAT = 2
"""Of a rank's part; another one is refused."""
SHOWN = 8
"""Ranks or names in an error."""
LARGEST = 2**62
"""Whole numbers beyond it are damage: they would overflow where they are counted on."""

PartFields = dict[str, Any]
Cut = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Place:
    """Whose part it is: ``rank`` and the ``ranks`` that share a model, numbered as in the whole job."""

    rank: int
    ranks: tuple[int, ...]
    shard: str | None = None
    """Which shard of a model is saved, where these ranks share no more than that."""

    @property
    def text(self) -> str:
        """The ranks: ``0-3``, or ``0,2`` where they do not follow each other."""
        first, last = self.ranks[0], self.ranks[-1]
        return (
            f"{first}-{last}"
            if self.ranks == tuple(range(first, last + 1))
            else ",".join(map(str, self.ranks))
        )


@dataclass(frozen=True)
class Fingerprint:
    """What a checkpoint must be of, to mean anything here."""

    method: str
    parameters: str


def described(thing: Any) -> str:
    """A method's canonical text; of one put together by hand its settings.

    A field whose metadata say ``{"fingerprint": False}`` is no setting: it may differ in a resumed run.
    """
    if isinstance(thing, Written) and thing.text is not None:
        return thing.text
    if isinstance(thing, tuple):
        return f"({', '.join(map(described, thing))})"
    if isinstance(thing, Written | ActiveParameters) and is_dataclass(thing):
        settings = [f for f in fields(thing) if f.repr and f.metadata.get("fingerprint", True)]
        listed = ", ".join(
            f"{setting.name}={described(getattr(thing, setting.name))}" for setting in settings
        )
        return f"{type(thing).__name__}({listed})"
    return str(thing) if isinstance(thing, str) else repr(thing)


def pack_state(group: Place, fingerprint: Fingerprint, content: Mapping[str, Any]) -> PartFields:
    """A checkpoint of one rank. Its one key names the rank: savers that merge ranks then lose nothing."""
    head = {"format": FORMAT, "world_size": len(group.ranks), "ranks": group.text}
    about = {"method": fingerprint.method, "parameters": fingerprint.parameters}
    shard = {} if group.shard is None else {"shard": group.shard}
    return {f"rank{group.rank}": {**head, **about, **shard, **content}}


Leaves = Callable[[PartFields], ByParameter | None]
"""What a part's state would look like (tensors without values), by what the part says of itself; None where
that is not known yet."""


def unpack_state(
    saved: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    group: Place,
    fingerprint: Fingerprint,
    leaves: Leaves,
    strict: bool = True,
) -> PartFields:
    """This rank's part of a checkpoint, looked at in whole.

    For the same ranks it is what this rank saved. For others, parts of *all* old ranks are needed, and every
    floating tensor becomes their mean: DistributedDataParallel averages, so what n workers owe together is
    the mean of what they owe.

    Without ``strict``, the state that fits by name, shape, dtype and finite values is taken, whatever method,
    settings and parameters it is of; the rest begins anew.

    Raises DistcompError for what is damaged, for parts of different steps, and where a rank's part is
    missing; with ``strict``, for the state of another method or of other parameters.
    """
    parts = _of_shard(_parts(saved), group)
    own = parts.get(f"rank{group.rank}")
    if own is not None and own["ranks"] == group.text:
        return _checked(own, fingerprint, leaves, strict)
    _check_complete(parts, group)
    _check_alike(parts)
    checked = [_checked(part, fingerprint, leaves, strict) for _, part in sorted(parts.items(), key=_number)]
    return {**checked[0], "state": _mean([part["state"] for part in checked])}


def _number(item: tuple[str, PartFields]) -> tuple[int, str]:
    return len(item[0]), item[0]


def _parts(saved: Any) -> dict[str, PartFields]:
    """Every rank's part by its key. Raises DistcompError for what nobody saved."""
    parts: dict[str, PartFields] = {}
    for saver in saved if isinstance(saved, Sequence) and not isinstance(saved, str | bytes) else [saved]:
        if not isinstance(saver, Mapping):
            raise DistcompError(
                f"the checkpoint is a {type(saver).__name__}; pass what handle.state_dict() returned, or a "
                "list of all ranks'"
            )
        parts.update(saver)
    if not parts:
        raise DistcompError(
            "the checkpoint holds no state of any rank; pass what handle.state_dict() returned"
        )
    for key, part in parts.items():
        version = part.get("format") if isinstance(part, Mapping) else None
        if not isinstance(key, str) or type(version) is not int or version != FORMAT:
            raise DistcompError(
                "the checkpoint is not distcomp's, or of another format; pass what "
                "handle.state_dict() returned"
            )
        _check_head(key, part)
    return {key: dict(part) for key, part in parts.items()}


def _of_shard(parts: dict[str, PartFields], place: Place) -> dict[str, PartFields]:
    """The parts of those who held this rank's shard. Raises DistcompError where there are none."""
    same = {key: part for key, part in parts.items() if part.get("shard") == place.shard}
    if not same:
        there = sorted({str(part.get("shard", "a whole model")) for part in parts.values()})
        raise DistcompError(
            f"the checkpoint is of {_listed(there, 'shard ')}, and rank {place.rank} holds "
            f"{f'shard {place.shard}' if place.shard else 'a whole model'}: pieces of weights cannot be told "
            "apart; go on with as many shards, or save the weights by torch.distributed.checkpoint and load "
            "those alone"
        )
    return same


def _listed(shards: list[str], prefix: str) -> str:
    return ", ".join(one if one.startswith("a ") else prefix + one for one in shards[:SHOWN])


def _check_head(key: str, part: Mapping[str, Any]) -> None:
    for name in ("ranks", "method", "parameters"):
        if not isinstance(part.get(name), str):
            raise damaged(key, f"its {name} is no text")
    for name, least in (("world_size", 1), ("iterations", 0)):
        whole_number(key, name, part.get(name), least)
    if type(part.get("seed")) is not int:
        raise damaged(key, "its seed is no whole number")


def damaged(where: str, what: str) -> DistcompError:
    """The sentence for what nobody can have saved."""
    return DistcompError(f"the checkpoint's {where} is damaged: {what}; use another checkpoint")


def whole_number(where: str, name: str, value: object, least: int, most: int = LARGEST) -> int:
    """``value``. Raises DistcompError unless it is a whole number from ``least`` to ``most``."""
    if type(value) is not int or not least <= value <= most:
        raise damaged(where, f"its {name} is no whole number from {least} on that could be")
    return value


def _check_complete(parts: Mapping[str, PartFields], group: Place) -> None:
    """Raise DistcompError unless these are the parts of all ranks of one group."""
    groups = sorted({part["ranks"] for part in parts.values()})
    if len(groups) > 1:
        raise DistcompError(
            f"the checkpoint holds parts of several groups of ranks ({'; '.join(groups[:SHOWN])}), and this "
            f"is rank {group.rank} of {group.text}, which is none of them; pass a list of the parts of the "
            "group whose model this is"
        )
    old_size = max(part["world_size"] for part in parts.values())
    if len(parts) == old_size:
        return
    numbers = _numbers(groups[0], len(parts) + SHOWN)
    missing = [old for old in numbers if f"rank{old}" not in parts][:SHOWN]
    raise DistcompError(
        f"the checkpoint was saved by {old_size} ranks ({groups[0]}) and this is rank {group.rank} of "
        f"{len(group.ranks)}; the parts of ranks {missing}{' and more' if len(missing) == SHOWN else ''} are "
        "missing: pass a list of all ranks' state dicts"
    )


def _numbers(ranks: str, most: int) -> list[int]:
    """The first ranks of a text such as ``0-3`` or ``0,2``."""
    try:
        spans = [[int(end) for end in span.split("-")] for span in ranks.split(",")]
    except ValueError as error:
        raise damaged("ranks", "they are no numbers") from error
    return list(islice(chain.from_iterable(range(span[0], span[-1] + 1) for span in spans), most))


def _check_alike(parts: Mapping[str, PartFields]) -> None:
    """Raise DistcompError for parts that were not saved together."""
    (first_key, first), *others = parts.items()
    for name in ("iterations", "seed", "method", "parameters", "world_size"):
        for key, part in others:
            if part[name] != first[name]:
                raise DistcompError(
                    f"the checkpoint's parts do not belong together: {name} is {first[name]!r} in "
                    f"{first_key} and {part[name]!r} in {key}; use a checkpoint "
                    "that every rank saved in the same step"
                )


def _checked(part: PartFields, fingerprint: Fingerprint, leaves: Leaves, strict: bool) -> PartFields:
    """The part, its state looked at. Raises DistcompError for what it cannot be."""
    state = well_formed(part.get("state"))
    if strict:
        for name, here in (("method", fingerprint.method), ("parameters", fingerprint.parameters)):
            if part[name] != here:
                raise DistcompError(
                    f"the checkpoint is of another {name.removesuffix('s')}: {part[name]!r}, and here is "
                    f"{here!r}; attach what it was saved with, or take over what fits: "
                    "load_state_dict(..., strict=False)"
                )
    expected = leaves({**part, "state": state})
    whole = part["iterations"] > 0
    return {**part, "state": fitting(state, state if expected is None else expected, strict, whole)}


def well_formed(state: object) -> Cut:
    """Parameter name -> path -> tensor. Raises DistcompError unless it is that, and nothing but numbers."""
    if not isinstance(state, Mapping):
        raise damaged("state", "it is no mapping from parameters to tensors")
    for name, leaves in state.items():
        if not isinstance(name, str) or not isinstance(leaves, Mapping):
            raise damaged("state", f"{_short(name)} is no mapping from text to tensors")
        for path, value in leaves.items():
            if not isinstance(path, str) or not isinstance(value, Tensor):
                raise damaged("state", f"{_short(name)} holds no tensor under {_short(path)}")
            special = value.is_meta or value.is_quantized or value.is_nested or hasattr(value, "to_local")
            if value.layout != torch.strided or special:
                raise damaged("state", f"{path} of {name} is no dense tensor with values")
    return {name: {path: value.detach() for path, value in leaves.items()} for name, leaves in state.items()}


def _short(name: object) -> str:
    return repr(name)[:80]


def fitting(state: ByParameter, expected: ByParameter, strict: bool, whole: bool) -> Cut:
    """The state as it is, if all of it is as expected; without ``strict`` what of it is.

    ``whole``: every parameter must be there. Raises DistcompError naming what does not fit.
    """
    if strict:
        strange = [name for name in state if name not in expected]
        missing = [name for name in expected if name not in state] if whole else []
        if strange or missing:
            what, names = ("holds state of", strange) if strange else ("holds no state of", missing)
            raise DistcompError(
                f"the checkpoint {what} {', '.join(map(_short, names[:SHOWN]))}: parameters were "
                "renamed, added or removed since; attach the model it was saved with, or "
                "take over what fits: strict=False"
            )
    kept: Cut = {}
    for name, leaves in state.items():
        wanted = expected.get(name, {})
        for path in dict.fromkeys([*wanted, *leaves]):
            reason = _misfit(leaves.get(path), wanted.get(path))
            if reason is None:
                kept.setdefault(name, {})[path] = leaves[path]
            elif strict:
                raise DistcompError(
                    f"the checkpoint's {_short(path)} of {_short(name)} {reason}; use the checkpoint of "
                    "this method and model, or take over what fits: strict=False"
                )
    return kept


def _misfit(value: Tensor | None, wanted: Tensor | None) -> str | None:
    """Why a tensor cannot be taken for another; None where it can."""
    if value is None:
        return "is missing"
    if wanted is None:
        return "is nothing that this method keeps"
    if value.shape != wanted.shape:
        return f"has the shape {tuple(value.shape)} where {tuple(wanted.shape)} is due"
    if value.dtype != wanted.dtype:
        return f"is of {value.dtype} where {wanted.dtype} is due"
    if not bool(torch.isfinite(value).all()):
        return "holds a NaN or an infinity"
    return None


def _mean(states: list[Cut]) -> Cut:
    """Floating tensors averaged over ranks; others as rank 0 had them. What some rank lacks is left out."""
    first = states[0]
    return {
        name: {
            path: torch.stack([state[name][path] for state in states]).mean(0)
            if value.is_floating_point()
            else value
            for path, value in leaves.items()
            if all(path in state.get(name, {}) for state in states)
        }
        for name, leaves in first.items()
    }
