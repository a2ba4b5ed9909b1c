#!/usr/bin/env bash
# A fixed number of nodes. Say the same on each, with its own NODE_RANK:
#   MASTER_ADDR=node0 NODES=2 NODE_RANK=0 launchers/torchrun/nodes.sh train.py --its-options
set -euo pipefail

exec torchrun \
    --nnodes "${NODES:?how many nodes}" \
    --node-rank "${NODE_RANK:?which of them this is, from 0}" \
    --nproc-per-node "${PER_NODE:-1}" \
    --master-addr "${MASTER_ADDR:?the host of node 0}" \
    --master-port "${MASTER_PORT:-29500}" \
    "$@"
