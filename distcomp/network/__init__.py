"""What would another network do? Describe it (:class:`Fabric`), or stand it up here (:func:`emulate`)."""

from distcomp.network.emulate import CableCounters, EmulationSupport, Net, emulate, support
from distcomp.network.fabric import Fabric, Rack
from distcomp.network.launch import Job, LaunchResult
from distcomp.network.link_self_test import LinkTest
from distcomp.network.netns import Refused
from distcomp.network.qdisc import read_qdisc_bytes
from distcomp.network.units import UNSHAPED, format_rate, format_time, parse_rate, parse_time

__all__ = [
    "UNSHAPED",
    "CableCounters",
    "EmulationSupport",
    "Fabric",
    "Job",
    "LaunchResult",
    "LinkTest",
    "Net",
    "Rack",
    "Refused",
    "emulate",
    "format_rate",
    "format_time",
    "parse_rate",
    "parse_time",
    "read_qdisc_bytes",
    "support",
]
