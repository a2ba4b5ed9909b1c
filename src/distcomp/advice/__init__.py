"""Will this help me? Predict a method's step time, advise, and train a thousand workers in one process."""

from distcomp.advice.calibrate import calibrate
from distcomp.advice.predict import Machine, Prediction, predict, rehearse
from distcomp.advice.problem import Problem, problem_of
from distcomp.advice.scenario import Scenario
from distcomp.advice.simulate import Setting, Simulation

__all__ = [
    "Machine",
    "Prediction",
    "Problem",
    "Scenario",
    "Setting",
    "Simulation",
    "calibrate",
    "predict",
    "problem_of",
    "rehearse",
]
