"""Will this help me? Predict a method's step time, advise, and train a thousand workers in one process."""

from distcomp.advice.calibrate import calibrate
from distcomp.advice.predict import Machine, Prediction, predict, profile_method
from distcomp.advice.rounds import RoundsSimulation
from distcomp.advice.scenario import Scenario
from distcomp.advice.simulate import Setting, Simulation
from distcomp.advice.task import TrainingTask, task_of

__all__ = [
    "Machine",
    "Prediction",
    "RoundsSimulation",
    "Scenario",
    "Setting",
    "Simulation",
    "TrainingTask",
    "calibrate",
    "predict",
    "profile_method",
    "task_of",
]
