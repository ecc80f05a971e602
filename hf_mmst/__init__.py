"""Train large encoders in a fraction of the memory, stage by stage, with Hugging Face's Trainer."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import MMSTConfig as MMSTConfig
    from .cut.layers import find_layers as find_layers
    from .cut.partition import Partition as Partition
    from .inference.early_exit import EarlyExit as EarlyExit
    from .inference.early_exit import calibrate as calibrate
    from .inference.truncation import truncate as truncate
    from .method.engine import Stagewise as Stagewise
    from .method.heads import StageHeads as StageHeads
    from .planning.planner import plan as plan
    from .records.stages import Stages as Stages
    from .records.stages import load_stages as load_stages
    from .trainer.mmst_trainer import MMSTTrainer as MMSTTrainer
    from .trials import pilot as pilot

_MODULE_OF = {
    "EarlyExit": "inference.early_exit",
    "MMSTConfig": "config",
    "MMSTTrainer": "trainer.mmst_trainer",
    "Partition": "cut.partition",
    "StageHeads": "method.heads",
    "Stages": "records.stages",
    "Stagewise": "method.engine",
    "calibrate": "inference.early_exit",
    "find_layers": "cut.layers",
    "load_stages": "records.stages",
    "pilot": "trials",
    "plan": "planning.planner",
    "truncate": "inference.truncation",
}

__version__ = version("hf-mmst")
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    """Import what a name needs when it is first used, so that `import hf_mmst` stays light."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'hf_mmst' has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
