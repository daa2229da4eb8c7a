"""The lineage as one table: each stage, where it writes, and what its result is called.

Read by run.py, hub.py and the report; the Makefile is the same table as file targets.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One stage of the lineage.

    Attributes:
        name: of recipes/<name>.py and <name>.yaml, and what the manifest calls the stage.
        folder: of its result under runs/.
        symbol: what tables and papers call the result; the folder's name where there is none.
        title: of the result, for people.
        colour: of the result in plots: Okabe and Ito's palette, distinct under the common colour
            blindnesses.
        task: the hub's pipeline tag of a model; None for what is not a model.
    """

    name: str
    folder: str
    symbol: str
    title: str
    colour: str = "#56606b"
    task: str | None = None


STAGES = (
    Stage("tokenizer", "tokenizer", "tokenizer", "tokenizer"),
    Stage("pretrain", "m0", "M0", "M0, the pretrained model", "#7d8590", "text-generation"),
    Stage("sft", "m1", "M1", "M1, after supervised fine-tuning", "#0072b2", "text-generation"),
    Stage("preferences", "prefs", "pairs", "preference pairs"),
    Stage("reward_model", "rm", "R", "R, the reward model", "#009e73", "text-classification"),
    Stage("ppo", "m2", "M2", "M2, after PPO", "#d55e00", "text-generation"),
    Stage("evaluation", "evaluation", "evaluation", "evaluation"),
)
"""In the order in which they run."""

BY_NAME = {stage.name: stage for stage in STAGES}
BY_FOLDER = {stage.folder: stage for stage in STAGES}
