"""How do workers average models: rarely, with neighbours only, or both?"""

from distcomp.averaging.recipes import *  # noqa: F403
from distcomp.averaging.recipes import __all__ as __all__
