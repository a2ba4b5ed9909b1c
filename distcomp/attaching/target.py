"""What a method is attached to: a model as the training loop calls it, and what is inside."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distcomp.errors import DistcompError
from distcomp.methods import Method, parse
from distcomp.private_torch import inside_compiled
from distcomp.runtime.saved_state import Place

if TYPE_CHECKING:  # takes seconds to import, and who has a mesh has imported it
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Replicas:
    """Those who hold the same shard of an FSDP2 model, ``ranks`` (a process group, or a mesh of one
    dimension), where gradients are reduced by the method ``inside``, too, among those who hold a model
    together: cheap bits inside, few bits across.

    ::

        distcomp.attach(model, optimizer, "qsgd:bits=1", weights="qsgd:bits=8",
                        replicas=distcomp.Replicas(mesh["replicate"], inside="qsgd:bits=8"))

    Raises DistcompError for a method that is none of gradients.
    """

    ranks: Any
    inside: Method | str

    def __post_init__(self) -> None:
        method = parse(self.inside) if isinstance(self.inside, str) else self.inside
        if not isinstance(method, Method):
            raise DistcompError(
                f"inside={self.inside!r} is no method of gradients, which are what those who hold a model "
                "together reduce; give one such as 'qsgd:bits=8' or 'identity'"
            )
        object.__setattr__(self, "inside", method)


AcrossReplicas: TypeAlias = "dist.ProcessGroup | DeviceMesh | Replicas"
"""Those who hold the same shard: a group, a mesh of one dimension, or more than that."""


@dataclass(frozen=True)
class Target:
    """``called`` by the training loop; ``module`` holds the parameters; ``ddp`` lies between, if any."""

    called: nn.Module
    module: nn.Module
    ddp: DistributedDataParallel | None
    group: dist.ProcessGroup
    """The ranks that exchange."""
    shards: dist.ProcessGroup | None = None
    """The ranks that an FSDP model is sharded over."""
    replicas: dist.ProcessGroup | None = None
    """Across which a method exchanges an FSDP model's shards: the replicas of a hybrid mesh."""
    inside: Method | None = None
    """What reduces gradients among the shards, beside the method across replicas."""

    @staticmethod
    def of(model: nn.Module, replicas: AcrossReplicas | None = None) -> Target:
        """Looks under torch.compile's wrapper. A plain module exchanges over the default process group, an
        FSDP model over its mesh, or across ``replicas``, a group or a mesh of one dimension.

        Raises DistcompError where that group does not exist, or where ``replicas`` mean nothing.
        """
        inner = inside_compiled(model)
        if isinstance(replicas, Replicas):
            return Target.of(model, replicas.ranks).with_inside(cast("Method", replicas.inside))
        if replicas is not None and not isinstance(replicas, dist.ProcessGroup):
            replicas = _group_of(replicas)
        if is_sharded(inner):
            return _sharded(model, inner, replicas)
        if replicas is not None:
            raise DistcompError(
                f"replicas are those of an FSDP model's shards, and {type(inner).__name__} is none; leave "
                "them out"
            )
        if isinstance(inner, DistributedDataParallel):
            return Target(model, inner.module, inner, inner.process_group)
        if not dist.is_initialized():
            raise DistcompError(
                "there is no process group; call torch.distributed.init_process_group before distcomp.attach"
            )
        world = dist.group.WORLD
        assert world is not None
        return Target(model, inner, None, world)

    @property
    def key(self) -> nn.Module:
        """What belongs to the model for good, a process group for instance, is kept under this."""
        return self.ddp if self.ddp is not None else self.module

    @property
    def ignored(self) -> frozenset[str]:
        """The names that DistributedDataParallel was told to leave alone: each rank's own."""
        own = {name for name, parameter in self.module.named_parameters() if is_of_rank(parameter)}
        return ignored_by(self.ddp) | own

    def with_inside(self, method: Method) -> Target:
        """Where ``method`` reduces gradients inside: all ranks of the job exchange with each other.

        Raises DistcompError where those are more than the replicas of all shards.
        """
        assert self.shards is not None
        assert self.replicas is not None
        count = dist.get_world_size(self.shards) * dist.get_world_size(self.replicas)
        if count != dist.get_world_size():
            raise DistcompError(
                f"{dist.get_world_size(self.replicas)} replicas of {dist.get_world_size(self.shards)} shards "
                f"are not all {dist.get_world_size()} ranks of the job, which exchange where gradients are "
                "reduced inside and across; give replicas= the group alone, or start the job with those ranks"
            )
        return replace(self, group=self.everyone, inside=method)

    @property
    def everyone(self) -> dist.ProcessGroup:
        """The ranks that each have a part of a checkpoint."""
        world = dist.group.WORLD
        assert world is not None
        return self.group if self.shards is None else world

    @property
    def place(self) -> Place:
        """Names this rank's part of a checkpoint: ranks of several groups save into one."""
        return Place(dist.get_rank(), tuple(sorted(dist.get_process_group_ranks(self.everyone))))

    @property
    def shard_place(self) -> Place:
        """As :attr:`place`, where what is saved is this rank's shard of it: replicas of other shards save
        something else."""
        if self.shards is None:
            return self.place
        shard = f"{dist.get_rank(self.shards) + 1} of {dist.get_world_size(self.shards)}"
        return Place(dist.get_rank(), tuple(sorted(dist.get_process_group_ranks(self.group))), shard)

    @property
    def shapes_digest(self) -> str:
        """Names, shapes and types of all parameters that ranks have alike, in short: what is each rank's own
        (experts, groups) has other shapes on another, and its checkpoint names its parts itself."""
        alike = [(name, p) for name, p in self.module.named_parameters() if not is_of_rank(p)]
        shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in alike]
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
        return f"{len(shapes)} tensors, digest {digest}"

    def as_ddp(self) -> DistributedDataParallel:
        """The DDP model. Raises DistcompError where there is none: gradients are taken from DDP's buckets."""
        if self.ddp is None:
            raise DistcompError(
                f"a gradient method needs a DistributedDataParallel or FSDP model, not "
                f"{type(self.module).__name__}; wrap it first: model = DistributedDataParallel(model)"
            )
        return self.ddp


def ignored_by(ddp: DistributedDataParallel | None) -> frozenset[str]:
    """The names that DistributedDataParallel was told to leave alone. Of the outermost module's own it asks
    for ``.name`` when it reduces, and for ``name``, as everybody, when it copies."""
    names = getattr(ddp, "parameters_to_ignore", None) or ()
    return frozenset(name.removeprefix(".") for name in names)


OF_RANK = "distcomp_of_rank"
"""An attribute of parameters that are each rank's own, under whatever wrapper: experts that live on one
rank."""


def is_of_rank(parameter: object) -> bool:
    """Whether a parameter is this rank's alone, and nobody exchanges its gradient for it."""
    return bool(getattr(parameter, OF_RANK, False))


def refuse_reduced(target: Target) -> None:
    """Raise DistcompError for a parameter of this rank's own that DistributedDataParallel reduces."""
    if target.ddp is None:
        return
    told = getattr(target.ddp, "parameters_to_ignore", None) or ()
    for name, parameter in target.module.named_parameters():
        asked = name if "." in name else f".{name}"  # by the reducer, see ignored_by
        if is_of_rank(parameter) and asked not in told:
            raise DistcompError(
                f"{name} is this rank's own and DistributedDataParallel reduces it; call "
                "distcomp.conditional.keep_experts_local(model) before it"
            )


def has_process_group() -> bool:
    """Whether this process is a rank of anything yet."""
    return dist.is_available() and dist.is_initialized()


def is_sharded(module: nn.Module) -> bool:
    """Whether this is an FSDP2 module. FSDP takes seconds to import, and who has not imported it has none."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _group_of(replicas: DeviceMesh) -> dist.ProcessGroup:
    """The process group of a mesh of one dimension."""
    if not hasattr(replicas, "get_group"):
        raise DistcompError(
            f"replicas= is a {type(replicas).__name__}; give a process group, or the mesh's dimension along "
            "which ranks hold the same shard: mesh['replicate']"
        )
    if replicas.ndim != 1:
        raise DistcompError(
            f"replicas= is a mesh of {replicas.ndim} dimensions; name the one along which ranks hold the "
            "same shard: replicas=mesh['replicate']"
        )
    return replicas.get_group()


def _sharded(called: nn.Module, inner: nn.Module, replicas: dist.ProcessGroup | None) -> Target:
    """An FSDP model, whose parameters all lie on one mesh of one dimension."""
    from torch.distributed.tensor import DTensor

    for name, parameter in inner.named_parameters():
        if isinstance(parameter, DTensor) and sum(not one.is_replicate() for one in parameter.placements) > 1:
            dims = parameter.device_mesh.mesh_dim_names or ("unnamed",)
            raise DistcompError(
                f"{name} is cut along several dimensions of a mesh ({', '.join(dims)}): tensor or expert "
                "parallelism beside FSDP, whose shards are no rows of whole parameters; shard it by "
                "fully_shard alone, or leave compression out"
            )
    parameters = [parameter for parameter in inner.parameters() if not is_of_rank(parameter)]
    meshes = {parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)}
    if not all(isinstance(parameter, DTensor) for parameter in parameters) or len(meshes) != 1:
        raise DistcompError(
            f"the parameters lie on {len(meshes)} meshes, or some on none; call fully_shard on the model "
            "itself, and with the same mesh for all its modules"
        )
    (mesh,) = meshes
    if mesh.ndim != 1:
        raise DistcompError(
            f"the model lies on a mesh of {mesh.ndim} dimensions, whose replicas FSDP averages in full "
            "precision before anybody is asked; shard over one dimension and name the other: "
            "fully_shard(model, mesh=mesh['shard']), then "
            "distcomp.attach(..., replicas=mesh.get_group('replicate'))"
        )
    if any(isinstance(one, DTensor) and one.placements[0].is_replicate() for one in parameters):
        raise DistcompError(
            f"{type(inner).__name__} was wrapped by replicate(), whose gradients FSDP sums by itself, past "
            "every hook; use DistributedDataParallel, or fully_shard"
        )
    shards = mesh.get_group()
    if replicas is None and dist.get_world_size(shards) == 1:
        replicas = shards  # FSDP scatters nothing on one rank; the hook after it is called all the same
    return Target(called, inner, None, replicas or shards, shards, replicas)
