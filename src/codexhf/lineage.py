"""The lineage as one table: each stage, where it writes, and what its result is called.

Read by run, hub, push, model_card, picture and the report; the Makefile has it as file targets.
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
        dark: the same on a dark page.
        task: the hub's pipeline tag of a model; None for what is not a model.
    """

    name: str
    folder: str
    symbol: str
    title: str
    colour: str = "#56606b"
    dark: str = "#9da5ae"
    task: str | None = None


WRITES, SCORES = "text-generation", "text-classification"
STAGES = (
    Stage("tokenizer", "tokenizer", "tokenizer", "tokenizer"),
    Stage("pretrain", "m0", "M0", "M0, the pretrained model", "#7d8590", "#9aa2ac", WRITES),
    Stage("sft", "m1", "M1", "M1, after supervised fine-tuning", "#0072b2", "#4ba3dc", WRITES),
    Stage("preferences", "prefs", "pairs", "preference pairs"),
    Stage("reward_model", "rm", "R", "R, the reward model", "#009e73", "#2fbf95", SCORES),
    Stage("ppo", "m2", "M2", "M2, after PPO", "#d55e00", "#f0813a", WRITES),
    Stage("evaluation", "evaluation", "evaluation", "evaluation"),
)
"""In the order in which they run."""

BY_NAME = {stage.name: stage for stage in STAGES}
BY_FOLDER = {stage.folder: stage for stage in STAGES}
