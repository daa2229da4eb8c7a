"""PPO on `transformers.Trainer`: `PPOTrainer` and its `PPOConfig`."""

from codexhf.ppo.config import PPOConfig
from codexhf.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
