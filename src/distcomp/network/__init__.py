"""What would another network do? Describe it (:class:`Fabric`), or stand it up here (:func:`emulate`)."""

from distcomp.network.emulate import Net, Support, Traffic, emulate, support
from distcomp.network.fabric import Fabric, Rack
from distcomp.network.launch import Job, Outcome
from distcomp.network.netns import Refused
from distcomp.network.qdisc import read_qdisc_bytes
from distcomp.network.units import UNSHAPED, format_rate, format_time, parse_rate, parse_time
from distcomp.network.wiretest import LinkTest

__all__ = [
    "UNSHAPED",
    "Fabric",
    "Job",
    "LinkTest",
    "Net",
    "Outcome",
    "Rack",
    "Refused",
    "Support",
    "Traffic",
    "emulate",
    "format_rate",
    "format_time",
    "parse_rate",
    "parse_time",
    "read_qdisc_bytes",
    "support",
]
