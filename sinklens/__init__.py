"""sinklens: causal mechanistic interpretability of attention sinks, on TransformerLens.

Names load on first use, so that `import sinklens` and `sinklens --help` do not pay for torch and transformers; the stub
beside this file says where each is.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
