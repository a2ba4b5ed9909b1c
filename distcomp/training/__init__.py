"""When does what happen in a training step?"""

from distcomp.training.clock import Listener, Source, TrainingClock, clock_of, uncompiled

__all__ = ["Listener", "Source", "TrainingClock", "clock_of", "uncompiled"]
