"""Will this help me? Predict a method's step time, advise, and train a thousand workers in one process."""

from distcomp.advice.buckets import BucketAdvice, advise_buckets
from distcomp.advice.calibrate import calibrate
from distcomp.advice.mixtures import Mixture, MixtureAdvice, advise_experts, mixtures_seen
from distcomp.advice.predict import Machine, Prediction, predict, profile_method
from distcomp.advice.rounds import RoundsSimulation
from distcomp.advice.scenario import Scenario
from distcomp.advice.simulate import Setting, Simulation
from distcomp.advice.task import TrainingTask, task_of

__all__ = [
    "BucketAdvice",
    "Machine",
    "Mixture",
    "MixtureAdvice",
    "Prediction",
    "RoundsSimulation",
    "Scenario",
    "Setting",
    "Simulation",
    "TrainingTask",
    "advise_buckets",
    "advise_experts",
    "calibrate",
    "mixtures_seen",
    "predict",
    "profile_method",
    "task_of",
]
