"""When does what happen in a training step?"""

from distcomp.training.clock import Listener, TrainingClock, clock_of, uncompiled

__all__ = ["Listener", "TrainingClock", "clock_of", "uncompiled"]
