"""Who carries a request? torch.distributed, point-to-point connections, MPI or Horovod."""
