"""The pre-training lab: small models, trained with variants of attention, watched while they train.

:func:`train` trains them; what it writes is opened by :func:`sinklens.load_model`, and so by everything else here.
:func:`compare` puts several beside one another.
"""

from sinklens.lab.arms import train
from sinklens.lab.checkpoint import checkpoints
from sinklens.lab.compare import Comparison, compare, final_values
from sinklens.lab.data import BigramBackcopy, Data, Text, open_data
from sinklens.lab.record import read_record
from sinklens.lab.runs import Run, read_run
from sinklens.lab.settings import Settings
from sinklens.lab.sizes import SIZES, Size
from sinklens.lab.training import Trained, train_arm
from sinklens.lab.watch import measured

__all__ = [
    "SIZES",
    "BigramBackcopy",
    "Comparison",
    "Data",
    "Run",
    "Settings",
    "Size",
    "Text",
    "Trained",
    "checkpoints",
    "compare",
    "final_values",
    "measured",
    "open_data",
    "read_record",
    "read_run",
    "train",
    "train_arm",
]
