"""The store: activations at named sites, streamed to disk in one forward pass.

`capture(model, items, sites=..., out=DIR)` writes, `open_store(DIR)` reads.
"""

from mechinterp.store.moments import Statistics
from mechinterp.store.reading import ActivationStore, open_store
from mechinterp.store.writing import capture

__all__ = ["ActivationStore", "Statistics", "capture", "open_store"]
