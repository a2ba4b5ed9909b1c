#!/usr/bin/env bash
# Between so many and so many nodes. Say the same on each; the node at MASTER_ADDR keeps the list and must stay:
#   MASTER_ADDR=node0 NODES=2:4 launchers/torchrun/elastic.sh train.py --its-options
# Where nodes do not know each other by their host names: LOCAL_ADDR is a node's own address, and IS_HOST is 1 at
# MASTER_ADDR and 0 elsewhere.
set -euo pipefail

# Otherwise torchrun keeps one store for all its rounds, in which workers find addresses of workers that are gone.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
    --nnodes "${NODES:?at least and at most, as in 2:4}" \
    --nproc-per-node "${PER_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "${MASTER_ADDR:?the host that stays}:${MASTER_PORT:-29500}" \
    --rdzv-id "${JOB:-distcomp}" \
    --rdzv-conf "last_call_timeout=${LAST_CALL_S:-30}${IS_HOST:+,is_host=$IS_HOST}" \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    --max-restarts "${RESTARTS:-100}" \
    "$@"
