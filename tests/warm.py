"""What a process has imported from which the ranks of the tests are forked: each would import it anew, for
seconds. It runs no threads, and does nothing."""

import gc

import hypothesis
import pytest
import torch._dynamo  # the first optimizer of a process brings it
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.optim

import distcomp.attaching.handle
import distcomp.averaging.recipes

__all__ = ["distcomp", "hypothesis", "pytest", "torch"]

gc.freeze()  # no rank looks through what is here, which would copy it
