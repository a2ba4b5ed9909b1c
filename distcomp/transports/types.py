"""Types of torch.distributed that its stubs show in one place only. At run time they are its public names."""

from torch._C._distributed_c10d import GradBucket, HashStore, PrefixStore, ProcessGroup, Store, TCPStore

__all__ = ["GradBucket", "HashStore", "PrefixStore", "ProcessGroup", "Store", "TCPStore"]
