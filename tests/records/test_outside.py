"""A function that reads a file is named, whatever it calls what it reads with; any other is left alone."""

from __future__ import annotations

import pytest

from sinklens.records.fingerprint import unstable_in
from tests.helpers.cells import run_cells

READS = {
    "a renamed function": "from torch import load as x\ndef f(l): return l @ x('a.pt')",
    "a module's function": "import scipy.io\ndef f(l): return scipy.io.loadmat('a')",
    "a module that is not imported yet": "import scipy\ndef f(l): return scipy.io.loadmat('a')",
    "a renamed module": "import pyarrow.parquet as z\ndef f(l): return z.read_table('a')",
    "another word for it": "import pyarrow.parquet as z\ndef f(l): return z.read_pandas('a')",
    "a function of C": "from pyarrow.csv import read_csv as z\ndef f(l): return z('a')",
    "a dispatcher of NumPy": "from numpy import loadtxt as z\ndef f(l): return z('a')",
    "a class": "import numpy as np\nz = np.memmap\ndef f(l): return z('a')",
    "a class of files": "from zipfile import ZipFile as Z\ndef f(l): return Z('a')",
    "Python's own": "def f(l): return open('a').read()",
    "Python's own, renamed": "o = open\ndef f(l): return o('a').read()",
    "code, renamed": "e = eval\ndef f(l): return e('1')",
    "a path": "from pathlib import Path\ndef f(l): return Path('a').read_text()",
    "a method of paths": "from pathlib import Path\nr = Path.read_bytes\ndef f(l): return r(Path('a'))",
    "a bound method": "from pathlib import Path\nr = Path('a').read_text\ndef f(l): return r()",
    "a method by its name": "from operator import methodcaller\nr = methodcaller('read_text')\ndef f(l): return r(l)",
    "a partial function": "import functools, numpy as np\nf = functools.partial(np.load, 'a')",
    "a closure": "import numpy as np\ndef make(g): return lambda l: g('a')\nf = make(np.load)",
    "a default": "import numpy as np\ndef f(l, g=np.load): return g('a')",
    "a module in a default": "import numpy as np\ndef f(l, g=np): return g.load('a')",
    "a module in a closure": "import numpy as np\ndef make(g): return lambda l: g.load('a')\nf = make(np)",
    "a module by a local name": "import torch\ndef f(l):\n    z = torch.jit\n    return z.load('a')",
    "a name in a text": "import numpy as np\ndef f(l): return getattr(np, 'load')('a')",
    "a name in a getter": "import numpy as np, operator\ng = operator.attrgetter('load')\ndef f(l): return g(np)",
    "an import inside": "def f(l):\n    import numpy as np\n    return np.load('a')",
    "a renamed import inside": "def f(l):\n    from numpy import load as z\n    return z('a')",
    "a relative import inside": "def f(l):\n    from . import z\n    return z",
    "a table of functions": "import torch\nD = {'a': torch.load}\ndef f(l): return D['a']('b')",
    "a helper": "from torch import load as x\ndef h(name): return x(name)\ndef f(l): return h('a')",
    "a method": "from torch import load as x\nclass A:\n    def __call__(self, l): return x('a')\nf = A()",
    "an inner function": "import numpy as np\ndef f(l): return [np.load(x) for x in 'ab']",
    "a class's way to load": "from transformers import AutoModel as M\ndef f(l): return M.from_pretrained('a')",
    "that way, bound": "from transformers import AutoModel\nm = AutoModel.from_pretrained\ndef f(l): return m('a')",
    "weights": "from safetensors.torch import load_file as z\ndef f(l): return z('a')",
    "weights one by one": "from safetensors import safe_open as z\ndef f(l): return z('a')",
    "the environment": "from os import environ as e\ndef f(l): return e['a']",
    "another program": "from subprocess import run\ndef f(l): return run('a')",
    "a model": "import sinklens as sl\ndef f(l): return sl.load_model('a')",
}
DOES_NOT = {
    "torch": "import torch\ndef f(l): return torch.linalg.norm(torch.nn.functional.softmax(l, -1).to(torch.float32))",
    "numpy": "import numpy as np\ndef f(l, r): return np.linalg.norm(l) * np.pi + np.random.default_rng(0).normal()",
    "a text in JSON": "import json\ndef f(l, r): return json.loads('1')",
    "what it prints": "import sys\ndef f(l, r): print(l, file=sys.stderr)",
    "what it logs": "import logging\nlog = logging.getLogger('x')\ndef f(l, r): log.info('a')",
    "weights that are there": "import torch\nnet = torch.nn.ReLU()\ndef f(l): net.load_state_dict({}); return net(l)",
    "operators": "import torch\ndef f(l, r): return torch.ops.aten.mm(l, l)",
    "a distribution": "from scipy import stats\ndef f(l, r): return stats.norm.cdf(1.0)",
    "metrics": "import sinklens as sl\ndef f(l, r): return sl.metrics.entropy(l)",
    "a function of that name": "import torch\n@torch.no_grad()\ndef load(x): return x\ndef f(l): return load(l)",
    "an error": "def f(l, r):\n    try: return l.x\n    except FileNotFoundError as e: raise TypeError from e",
    "a class": "from torch import Tensor\ndef f(l: Tensor, r): return isinstance(l, Tensor) and Tensor.mean(l)",
}


@pytest.mark.parametrize("cells", READS.values(), ids=READS)
def test_what_reads_a_file_is_named(cells: str) -> None:
    assert unstable_in(run_cells(cells)["f"])


@pytest.mark.parametrize("cells", DOES_NOT.values(), ids=DOES_NOT)
def test_what_does_not_is_left_alone(cells: str) -> None:
    assert unstable_in(run_cells(cells)["f"]) == []
