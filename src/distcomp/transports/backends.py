"""What can carry a question on this machine?"""

from __future__ import annotations

import torch.distributed as dist


def available() -> dict[str, bool]:
    """Each backend of torch.distributed that this build of torch may have, and whether it has it."""
    if not dist.is_available():
        return {"gloo": False, "nccl": False, "mpi": False}
    return {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
