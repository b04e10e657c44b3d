"""Sweeps: the full grid stage x layer x position x unit x edit x direction, on every prompt, for any readout.

:func:`sinklens.sweep` plans (``planning``), runs (``worker``, by ``local`` or another engine), streams to disk
(``store``) and gives a :class:`SweepResult`. The grid is arithmetic (``grid``): no list of patches is ever made.
"""

from sinklens.sweeps.companions import Companion
from sinklens.sweeps.gather import gather
from sinklens.sweeps.grid import Grid, StageAxis, Task, Tasks
from sinklens.sweeps.local import Interrupted
from sinklens.sweeps.plan import Plan
from sinklens.sweeps.result import SweepResult
from sinklens.sweeps.run import sweep
from sinklens.sweeps.tensor import LabelledTensor
from sinklens.sweeps.worker import Worker

__all__ = [
    "Companion",
    "Grid",
    "Interrupted",
    "LabelledTensor",
    "Plan",
    "StageAxis",
    "SweepResult",
    "Task",
    "Tasks",
    "Worker",
    "gather",
    "sweep",
]
