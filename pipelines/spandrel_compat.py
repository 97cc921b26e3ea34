"""spandrel without torchvision (WTS-8): two of its forty architectures, which enlarge nothing, import it."""

from __future__ import annotations

import sys
import threading
import warnings
from types import ModuleType
from typing import Any

_MODULES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
_FUNCTIONS = ("InterpolationMode", "normalize", "rotate")
_lock = threading.Lock()


def read_upscaler(state: dict[str, Any]) -> Any:
    """Spandrel's descriptor of a model: its architecture is told by its tensors, which must be all there.

    Raises:
        Exception: whatever spandrel raises of tensors that it does not know.
    """
    spandrel = load_spandrel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers of old: torch.meshgrid without its argument
        return spandrel.MAIN_REGISTRY.load(spandrel.canonicalize_state_dict(state))


def esrgan() -> Any:
    """The class of the commonest architecture, by default four times as wide and high with 17 M parameters."""
    load_spandrel()
    from spandrel.architectures.ESRGAN import ESRGAN

    return ESRGAN


def load_spandrel() -> Any:
    """The package, imported with stand-ins for what is not installed; they are gone afterwards."""
    with _lock:
        if "spandrel" in sys.modules:
            return sys.modules["spandrel"]
        before = {name: sys.modules.get(name) for name in _MODULES}
        try:
            for name in _MODULES:
                sys.modules[name] = ModuleType(name)
            for function in _FUNCTIONS:
                setattr(sys.modules[_MODULES[-1]], function, _missing)
            import spandrel

            return spandrel
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module


def _missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("LaMa and RestoreFormer need torchvision, which this project does without")
