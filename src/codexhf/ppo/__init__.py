"""PPO on `transformers.Trainer`: `PPOTrainer` and its `PPOConfig`.

Each is imported when it is asked for, so that reading a configuration loads no models.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codexhf.ppo.config import PPOConfig
    from codexhf.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]


def __getattr__(name: str) -> Any:
    modules = {"PPOConfig": "codexhf.ppo.config", "PPOTrainer": "codexhf.ppo.trainer"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(modules[name]), name)
