"""A step that stops for its exchanges: rows go to experts on other ranks, and computing waits for them.

Such a step is a chain: it computes, waits for an exchange, computes. What it takes on a network of limited
rate follows from the same step on one without limits, which lasts ``U`` and whose i-th exchange takes ``w_i``
of the rank that comes last, the one that waits for nobody (so ``w_i`` is copying and carrying, on whatever
cores the ranks share)::

    T = U + sum_i (m_i + min(m_i, wake)),   m_i = max(0, wire_i + l - c_i - w_i)

``wire_i``: the bytes of the busiest link, out of or into a rank or a rack, over its rate, and the delay of
the network; sizes are those that each rank sends to each other, so uneven rows count as they are. ``l``:
the shortest of the ``w_i``, what a message takes that weighs nothing. ``c_i``: what a link that shapes by a
token bucket lets through at once, ``burst`` seconds of its rate after a pause as long, which refill while
computing goes on. ``wake``: what computing loses after a wait that is long (the core has gone idle), where
it was measured. Carrying goes on while the wire is busy, so the longer of both counts, not their sum;
computing is in ``U``, with all that ranks on shared cores do to each other. What a rank sends beside
computing (gradients in buckets) counts as if it were waited for, in the order in which it was asked for.
"""

from __future__ import annotations

from distcomp.attaching.observe_waits import WaitingStep
from distcomp.network.fabric import Fabric
from distcomp.network.model import ALONE, Host


def waiting_step_s(step: WaitingStep, fabric: Fabric, host: Host = ALONE, burst_s: float = 0.0) -> float:
    """Seconds of the step on ``fabric``, whose links let ``burst_s`` of their rate through after a pause.

    At least ``step.step_s`` and at most that, the seconds of all bytes on the busiest link, and delays; with
    ``step.wake_s`` for each exchange.
    """
    more_s, saved_s = 0.0, burst_s
    for wait in step.waits:
        cost = wait.ask.exchange(fabric).cost(fabric, host)
        saved_s = min(burst_s, saved_s + wait.after_s)
        wire_s = cost.seconds - min(saved_s, cost.transfer_s)
        lasts_s = max(wait.took_s, wire_s + step.least_s)
        saved_s = min(burst_s, max(0.0, saved_s + lasts_s - cost.transfer_s))
        longer_s = lasts_s - wait.took_s
        more_s += longer_s + min(longer_s, step.wake_s)
    return step.step_s + more_s
