"""What may one worker ask of the others?"""

from distcomp.collectives.rounds import *  # noqa: F403
