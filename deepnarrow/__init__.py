"""deepnarrow from Python: trained weights as a PyTorch module, text from them, and what they lose on text.

    import deepnarrow

    model, tokenizer = deepnarrow.load("runs/tiny-stdlib-574187f")
    print(deepnarrow.generate(model, tokenizer, "def ", max_tokens=40, temperature=0.7))
    print(deepnarrow.evaluate(model, tokenizer, ["import os\\n"]).perplexity)

Training starts from the command, ``deepnarrow train``. The packages that this one stands on (`model`, `parallel`,
`conf`, `train`, `launch`) are not for import by others: their names are everybody's.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepnarrow.weights import Evaluation, evaluate, generate, load
    from launch.speech import Tokenizer
    from model.problems import BadInput

__all__ = ["BadInput", "Evaluation", "Tokenizer", "__version__", "evaluate", "generate", "load"]

_ROOT = Path(__file__).resolve().parent.parent
_FLOORS = ("model", "parallel", "conf", "train", "launch")
_FROM = {"BadInput": "model.problems", "Tokenizer": "launch.speech"}


def _take_floors() -> None:
    """Import the packages below from beside this one, whatever of these names the path would find first.

    A file `model.py` of a user's own, in the working directory or on PYTHONPATH, is imported in their place otherwise.

    Raises:
        ImportError: one of the names is another's in this process already.
    """
    foreign = {name: sys.modules[name] for name in _FLOORS if name in sys.modules and not _is_ours(name)}
    for name, module in foreign.items():
        where = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ["?"])), "?")
        raise ImportError(
            f"{name}: deepnarrow has a package of this name, and this process has imported {where} as {name} already; "
            "importing deepnarrow in a process of its own, or another name for that file, would work"
        )
    for name in _FLOORS:
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, _ROOT / name / "__init__.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _is_ours(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and Path(file).resolve() == _ROOT / name / "__init__.py"


def __getattr__(name: str) -> object:
    """Import what is asked for: a command that asks for nothing of PyTorch does not wait for it."""
    if name == "__version__":
        from train.version import installed

        return installed("deepnarrow") or "unknown"
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM.get(name, "deepnarrow.weights")), name)


def __dir__() -> list[str]:
    """List what there is for others."""
    return sorted(__all__)


_take_floors()
