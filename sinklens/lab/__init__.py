"""The pre-training lab: small models, trained with variants of attention, watched while they train.

:func:`train` trains them; what it writes is opened by :func:`sinklens.load_model`, and so by everything else here.
"""

from sinklens.lab.arms import train
from sinklens.lab.checkpoint import checkpoints
from sinklens.lab.data import BigramBackcopy, Data, Text, open_data
from sinklens.lab.record import read_record
from sinklens.lab.settings import Settings
from sinklens.lab.sizes import SIZES, Size
from sinklens.lab.training import Trained, train_arm
from sinklens.lab.watch import measured

__all__ = [
    "SIZES",
    "BigramBackcopy",
    "Data",
    "Settings",
    "Size",
    "Text",
    "Trained",
    "checkpoints",
    "measured",
    "open_data",
    "read_record",
    "train",
    "train_arm",
]
