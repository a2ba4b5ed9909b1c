#!/usr/bin/env bash
# Between so many and so many nodes. Say the same on each; the node at MASTER_ADDR keeps the list and must stay:
#   MASTER_ADDR=node0 NODES=2:4 launchers/torchrun/elastic.sh train.py --its-options
# IS_HOST=1 there and IS_HOST=0 elsewhere, if a node cannot tell by its own name that it is MASTER_ADDR.
set -euo pipefail

exec torchrun \
    --nnodes "${NODES:?at least and at most, as in 2:4}" \
    --nproc-per-node "${PER_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${MASTER_ADDR:?the host that stays}:${MASTER_PORT:-29500}" \
    --rdzv-id "${JOB:-distcomp}" \
    --rdzv-conf "last_call_timeout=${LAST_CALL_S:-30}${IS_HOST:+,is_host=$IS_HOST}" \
    --max-restarts "${RESTARTS:-100}" \
    "$@"
