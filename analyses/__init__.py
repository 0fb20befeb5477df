"""One file per question: checkpoints and a task in, tidy tables out. Each is also a script."""

import sys
from pathlib import Path

# A script's own folder leads sys.path, and there `import probes` would find analyses/probes.py.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
