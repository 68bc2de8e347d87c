"""Ways to start training: scripts, the `deepnarrow` command, and its supervision of DeepSpeed's launcher."""

import sys as _sys
from pathlib import Path as _Path

# ``python -m launch.cli`` puts the working directory first on the path: a file model.py there would be imported in
# place of ours, here and in processes that are started from here. `import deepnarrow` has seen to that already.
if "deepnarrow" not in _sys.modules and (_root := str(_Path(__file__).resolve().parent.parent)) != _sys.path[0]:
    _sys.path.insert(0, _root)
