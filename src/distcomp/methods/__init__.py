"""What do the workers say to each other, round by round?"""

from distcomp.methods.base import Method, Outcome, PerParameter, Turn
from distcomp.methods.basic import bf16, except_small, fp16, identity, none, qsgd, with_feedback
from distcomp.methods.choose import Choose, Rule
from distcomp.methods.feedback import ErrorFeedback
from distcomp.methods.lift import AllReduce, GatherAndSum, ScatterReduce, lift
from distcomp.methods.registry import METHODS, Entry, parse, register

__all__ = [
    "METHODS",
    "AllReduce",
    "Choose",
    "Entry",
    "ErrorFeedback",
    "GatherAndSum",
    "Method",
    "Outcome",
    "PerParameter",
    "Rule",
    "ScatterReduce",
    "Turn",
    "bf16",
    "except_small",
    "fp16",
    "identity",
    "lift",
    "none",
    "parse",
    "qsgd",
    "register",
    "with_feedback",
]
