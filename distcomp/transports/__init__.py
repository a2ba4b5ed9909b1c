"""Who carries a request? torch.distributed, point-to-point connections, MPI or Horovod."""

import atexit

from distcomp.transports.ending import wait_for_threads

atexit.register(wait_for_threads)
