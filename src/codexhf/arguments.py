"""One dataclass per stage: what is ours to set, with type, default, bounds and help said once.

Fields that transformers or TRL already name keep their name and stay in the library's own config
class. `codexhf.parsing.parse` fills both from the recipe's YAML and the command line.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from codexhf import hub
from codexhf.execution import UNSAFE_PHRASE
from codexhf.knobs import given, knob, knob_errors, unused
from codexhf.label_words import next_step, waits_for_people
from codexhf.refusals import nearest

# What a path or a name must be: each function returns what is wrong with it, "" if nothing.


def card(path: str) -> str:
    """A data card, a finished stage's folder, which is its own card, or a hub name of either.

    Each may be followed by `#split`.
    """
    path = path.partition("#")[0]
    prefs = Path(path).parent if Path(path).name in ("README.md", "test.md") else Path(path)
    if path and waits_for_people(prefs):
        held_out = Path(path).name == "test.md"
        return f"whose pairs wait for people. {'' if held_out else next_step(prefs)}".strip()
    if path and (Path(path).is_file() or (Path(path) / "README.md").is_file()):
        return ""
    if hub.hub_name(path):
        return ""
    folder = Path(path).parent
    known = [str(p) for p in folder.glob("*.md")] if folder.is_dir() else []
    return f"which does not exist.{nearest(path, known)}" if path else "expected a data card."


def tokenizer_folder(path: str) -> str:
    """A folder with a tokenizer, or a Hub id."""
    return _folder(path, "tokenizer.json")


def model_folder(path: str) -> str:
    """A folder with a model in safetensors, or a Hub id."""
    wrong = _folder(path, "config.json")
    if wrong or not Path(path).is_dir():
        return wrong
    weights = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    if any((Path(path) / file).is_file() for file in weights):
        return ""
    return (
        f"a folder with a config but no safetensors weights ({', '.join(weights[:2])}). Save the "
        "model with save_pretrained, or run its stage again."
    )


def _folder(path: str, file: str) -> str:
    if not path:
        return "expected a folder or a Hub id."
    if (Path(path) / file).is_file() or hub.hub_name(path):
        return ""
    if not Path(path).is_dir():
        return "which is not a folder. Run the stage that makes it first."
    return (
        f"a folder without {file}: that stage has not finished. Run it again (it resumes), or "
        "give another folder."
    )


def output_folder(path: str) -> str:
    """A folder, or a path where one can be made."""
    if not path:
        return "expected a folder."
    return "which is a file, expected a folder." if Path(path).is_file() else ""


def rule_pack(path: str) -> str:
    """A YAML file of safety rules that pass their own test vectors."""
    if not Path(path).is_file():
        return "which does not exist. Copy src/codexhf/safety_rules.yaml and change it."
    from codexhf.safety import load_rules  # only where somebody gives a pack

    try:
        load_rules(path)
    except (ValueError, OSError) as error:
        return f"which is not a rule pack: {error}"
    return ""


PATH_CHECKS = (card, model_folder, tokenizer_folder, output_folder, rule_pack)
"""Checks of the fields that name files: what lies there is compared, not how it is spelled."""


def reward(name: str) -> str:
    """A name from `rewards.REWARDS`, "reward_model", or an importable `module:function`."""
    from codexhf.rewards import REWARD_MODEL, reward_of_name  # only PPO names any

    try:
        if name != REWARD_MODEL:
            reward_of_name(name)
    except ValueError as error:
        return str(error).removeprefix(f"rewards: got {name!r}, ")
    return ""


def unsafe_phrase(phrase: str) -> str:
    """The sentence that switches isolation off, word for word."""
    return "" if phrase == UNSAFE_PHRASE else f"expected {UNSAFE_PHRASE!r} or nothing."


def installed(value: str | bool) -> str:
    """A value that needs no package, or one that is there."""
    package = PACKAGES.get(value)
    if package is None or importlib.util.find_spec(package):
        return ""
    return f"but the package {package} is not installed. Install it, or leave this out."


PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_3"}
PACKAGES[True] = "bitsandbytes"  # load_in_4bit
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"]

# ------------------------------------------------------------------------------ the stages' fields


@dataclass
class StageArguments:
    """Fields of every stage, and the checks that need nothing loaded."""

    dry_run: bool = knob(
        False, "Check everything, show what would be read and made, write nothing."
    )
    restart: bool = knob(
        False, "Set the existing output folder aside (never deleted) and start from the beginning."
    )
    redo_changed: bool = knob(
        False,
        "Restart, as above, where the output folder holds a run with other settings, instead of "
        "refusing. make does this.",
    )
    allow_changed: list[str] = knob(
        [],
        "Settings that may differ from those of the run that is resumed, separated by commas: "
        "learning_rate,save_steps.",
    )

    num_proc: int | None = knob(
        None,
        "Processes that read, check and tokenise data; what comes out is the same for any number. "
        "Default: the cores of the machine, shared among the processes of training.",
        low=1,
        high=1024,
    )

    def __post_init__(self):
        self.allow_changed = [n for names in self.allow_changed for n in names.split(",") if n]

    def errors(self) -> list[str]:
        """What is wrong with these values, one sentence each with its fix; empty if nothing."""
        return [*knob_errors(self), *self.between_fields()]

    def between_fields(self) -> Iterator[str]:
        """Yield what is wrong with several values together."""
        yield from ()


@dataclass
class MixtureArguments(StageArguments):
    """Fields of the stages that mix cards."""

    weights: list[float] | None = knob(
        None,
        "Share of characters (tokenizer) or training tokens wanted from each card; default: all.",
        above=0,
        each="train_cards",
    )
    when_exhausted: Literal["stop", "repeat"] = knob(
        "stop",
        "Where a card has fewer rows than its weight asks for: stop there, or repeat cards until "
        "each was read to its end. The manifest counts the epochs.",
        needs="weights",
    )


@dataclass
class HeldOutArguments(StageArguments):
    """Fields of the stages that must not see held-out data."""

    exclude_cards: list[str] = knob(
        [], "Held-out cards; rows that overlap with them are removed.", check=card
    )


@dataclass
class CodeRunningArguments(StageArguments):
    """Fields of the stages that run what a model wrote."""

    timeout_s: float = knob(3.0, "Seconds one program may run.", low=0.05, high=600)
    unsafe_exec: str | None = knob(
        None,
        f"{UNSAFE_PHRASE!r} lets generated code run without isolation where none can be had; every "
        "manifest and model card then says so.",
        check=unsafe_phrase,
    )


@dataclass
class EvaluatedArguments(CodeRunningArguments):
    """Fields of the stages that run tests of what the model writes while it is trained."""

    eval_cards: list[str] = knob([], "Cards of tasks to evaluate on while training.", check=card)
    eval_tasks: int = knob(
        100, "Tasks of eval_cards in each evaluation while training.", low=1, needs="eval_cards"
    )


@dataclass
class ModelArguments(StageArguments):
    """Fields of the stages that load a model: how its weights lie in memory."""

    dtype: Literal["float32", "bfloat16"] = knob(
        "float32",
        "Dtype of the weights in memory. bfloat16 halves them: right for sampling and for a frozen "
        "base under LoRA; where all weights are trained it rounds small updates away.",
    )
    attn_implementation: Attention | None = knob(
        None, "Implementation of attention; default: what transformers chooses.", check=installed
    )


@dataclass
class LoraArguments(ModelArguments):
    """Fields of the stages that train: all weights, or adapters on a frozen base."""

    use_peft: bool = knob(
        False,
        "Train LoRA adapters; at the end they are folded into the weights, and saved on their own "
        "in the folder `adapter` as well.",
    )
    lora_r: int = knob(16, "LoRA rank.", low=1, needs="use_peft")
    lora_alpha: int = knob(32, "LoRA scale, divided by lora_r.", low=1, needs="use_peft")
    load_in_4bit: bool = knob(
        False,
        "Hold the frozen base in 4 bits (QLoRA); needs bitsandbytes.",
        needs="use_peft",
        check=installed,
    )


@dataclass
class PaddingFreeArguments(LoraArguments):
    """What SFTConfig has under this name, for the stages whose trainers do not know it."""

    padding_free: bool | None = knob(
        None,
        "Give the layers real tokens alone, and attention the bounds of documents instead of a "
        "mask. None: on a GPU in 16 bits, where the model's attention is plain.",
    )


@dataclass
class TokenizerArguments(MixtureArguments, HeldOutArguments):
    output_dir: str = knob(
        "runs/tokenizer", "Folder that receives the tokenizer.", check=output_folder
    )
    train_cards: list[str] = knob(
        [], "Data cards of type language-modeling to learn merges from.", check=card, least=1
    )
    chat_cards: list[str] = knob(
        [],
        "Data cards of type prompt-completion, learned from as well (all of their text).",
        check=card,
    )
    vocab_size: int = knob(
        4096, "Tokens in the vocabulary, special tokens included.", low=300, high=1_000_000
    )
    max_characters: int = knob(
        20_000_000, "Characters of the mix to learn merges from at most.", low=1000
    )
    seed: int = knob(42, "Seed of the mix.", low=0, high=2**32 - 1)


@dataclass
class PretrainArguments(MixtureArguments, HeldOutArguments, PaddingFreeArguments):
    model: str | None = knob(
        None,
        "Continue from this folder or Hub id; default: new weights from `architecture`.",
        check=model_folder,
    )
    architecture: dict | None = knob(
        None, "Model config of a new model: model_type and its fields (JSON on the command line)."
    )
    tokenizer: str = knob(
        "runs/tokenizer",
        "Tokenizer folder or Hub id of a new model; with `model` it is that model's own.",
        check=tokenizer_folder,
    )
    train_cards: list[str] = knob([], "Data cards of type language-modeling.", check=card, least=1)
    max_length: int = knob(512, "Context length: tokens of one packed training sequence.", low=8)
    max_eval_rows: int = knob(
        64, "Held-out sequences per card in evaluations while training.", low=1
    )

    def __post_init__(self):
        super().__post_init__()
        self.asked_tokenizer = self.tokenizer if given(self, "tokenizer") else None
        if self.model is not None:
            self.tokenizer = self.model

    def between_fields(self) -> Iterator[str]:
        if self.model is not None and self.asked_tokenizer not in (None, self.model):
            yield (
                f"tokenizer: got {self.asked_tokenizer!r} with model {self.model!r}, expected that "
                "model's own. Leave tokenizer out, or give the model's folder there as well."
            )
        if self.model is None and not self.architecture:
            yield (
                "architecture: got nothing, expected a mapping with model_type when model is not "
                "given. Copy the block from recipes/pretrain.yaml."
            )
        if self.use_peft and self.model is None:
            yield (
                "use_peft: got true without model: adapters on random weights learn nothing. "
                "Give model, or leave use_peft out."
            )


@dataclass
class SFTArguments(MixtureArguments, HeldOutArguments, LoraArguments, EvaluatedArguments):
    model: str = knob(
        "runs/m0", "M0: folder or Hub id of the model to fine-tune.", check=model_folder
    )
    train_cards: list[str] = knob(
        [], "Data cards of type prompt-completion (demonstrations).", check=card, least=1
    )
    chat_template: Literal["chatml", "plain"] | None = knob(
        None,
        "Chat template for a base model that has none, by name: chatml where the vocabulary has "
        "<|im_start|> and <|im_end|>, plain for any. chat_template_path names a file instead.",
    )
    lora_dropout: float = knob(
        0.0, "Dropout on the LoRA branch.", low=0, high=0.99, needs="use_peft"
    )
    eval_max_new_tokens: int = knob(
        96, "Longest answer to a task of eval_cards, in tokens.", low=1, needs="eval_cards"
    )

    def between_fields(self) -> Iterator[str]:
        if given(self, "timeout_s") and not self.eval_cards:
            yield unused(self, "timeout_s", "eval_cards")


@dataclass
class PreferencesArguments(HeldOutArguments, ModelArguments, CodeRunningArguments):
    output_dir: str = knob("runs/prefs", "Folder that receives the pairs.", check=output_folder)
    model: str = knob(
        "runs/m1", "M1: the model whose completions are compared.", check=model_folder
    )
    prompt_cards: list[str] = knob(
        [], "Data cards of type prompt-only with tests.", check=card, least=1
    )
    samples_per_prompt: int = knob(
        8, "Completions sampled for each prompt at each temperature.", low=2, high=1024
    )
    min_prompts: int = knob(
        512,
        "Prompts written for PPO at least: those of mixed outcome, filled up with others.",
        low=1,
    )
    pairs_per_prompt: int = knob(3, "Pairs kept per prompt at most.", low=1)
    include_reference: bool = knob(
        False, "Let the card's reference completion take part as one more answer."
    )
    label_by: Literal["unit_tests", "people", "both"] = knob(
        "unit_tests",
        "unit_tests: pairs that the tests tell apart. people: pairs for the labelling page, of "
        "prompts without tests too. both: one and the other.",
    )
    pairs_to_label: int = knob(500, "Pairs queued for people at most.", low=2)
    reward_model: str | None = knob(
        None,
        "R: people see those pairs first of which it is least sure; default: none yet.",
        check=model_folder,
    )
    max_prompts: int | None = knob(None, "Prompts to use at most; default: all.", low=2)
    max_new_tokens: int = knob(96, "Longest completion, in tokens.", low=1)
    temperatures: list[float] = knob(
        [1.0],
        "Sampling temperatures; the first one also decides which prompts have a mixed outcome.",
        low=1e-3,
        high=10,
        least=1,
    )
    batch_size: int = knob(256, "Sequences generated at once.", low=1)
    test_share: float = knob(
        0.15, "Share of tasks whose pairs are held out of R's training.", low=0.01, high=0.5
    )
    seed: int = knob(42, "Seed of sampling and pairing.", low=0, high=2**32 - 1)


@dataclass
class RewardModelArguments(PaddingFreeArguments):
    model: str = knob(
        "runs/m1", "M1: the model that the reward model starts from.", check=model_folder
    )
    train_cards: list[str] = knob(
        [],
        "Preference pairs: data cards of type preference, or the preferences stage's folder.",
        check=card,
        least=1,
    )
    eval_cards: list[str] = knob(
        [], "Held-out pairs, of tasks that no training pair is from.", check=card, least=1
    )
    score_samples: int = knob(
        512,
        "M1 completions whose mean and standard deviation of score are saved in the config.",
        low=2,
    )
    score_max_new_tokens: int = knob(
        64, "Longest completion behind score_samples, in tokens: PPO's response_length.", low=1
    )


@dataclass
class PPOArguments(HeldOutArguments, LoraArguments, EvaluatedArguments):
    trainer: Literal["codexhf", "trl"] = knob(
        "codexhf", "codexhf: our PPOTrainer. trl: the class of trl 1.12."
    )
    model: str = knob(
        "runs/m1", "M1: the policy to start from, and the reference.", check=model_folder
    )
    reward_model: str | None = knob(
        "runs/rm",
        "R: folder or Hub id of the reward model; null where no reward and no critic needs it.",
        check=model_folder,
    )
    value_model: str | None = knob(
        None, "Model that the critic starts from; default: the reward model.", check=model_folder
    )
    prompt_cards: list[str] = knob([], "Data cards of type prompt-only.", check=card, least=1)
    sft_cards: list[str] = knob([], "Demonstrations for the alpha_sft term.", check=card)
    safety_rules: str | None = knob(
        None,
        "YAML rule pack of the safety reward; default: the one that codexhf ships.",
        check=rule_pack,
    )
    rewards: list[str] = knob(
        ["reward_model"],
        "Rewards to sum: reward_model, names from rewards.REWARDS, or module:function.",
        check=reward,
        least=1,
    )
    reward_weights: list[float] | None = knob(
        None, "Weight of each reward; default: 1 each.", each="rewards"
    )
    reward_clip: float | None = knob(
        5.0, "Bound on the reward model's normalised score, in standard deviations.", above=0
    )

    @property
    def runs_tests(self) -> bool:
        """Whether a reward runs the tests of the prompts."""
        return any(name.startswith("unit_tests") for name in self.rewards)

    def between_fields(self) -> Iterator[str]:
        if given(self, "timeout_s") and not (self.eval_cards or self.runs_tests):
            yield unused(self, "timeout_s", "eval_cards or a unit_tests reward")
        for name, reader in (("reward_clip", "reward_model"), ("safety_rules", "safety")):
            if given(self, name) and reader not in self.rewards:
                yield unused(self, name, f"{reader} among the rewards")
        if self.reward_model is None and "reward_model" in self.rewards:
            yield "reward_model: got null, expected a folder: rewards name reward_model."


@dataclass
class EvaluationArguments(ModelArguments, CodeRunningArguments):
    output_dir: str = knob(
        "runs/evaluation", "Folder that receives the metrics and samples.", check=output_folder
    )
    models: list[str] = knob(
        ["runs/m0", "runs/m1", "runs/m2"],
        "Checkpoints to compare, each after the one that it was trained from.",
        check=model_folder,
        least=1,
    )
    reference: str = knob(
        "runs/m1", "M1: the model that KL is measured against.", check=model_folder
    )
    reward_model: str | None = knob(
        "runs/rm", "R: scores every answer; null: no reward.", check=model_folder
    )
    heldout_cards: list[str] = knob(
        [], "Held-out tasks with tests and references.", check=card, least=1
    )
    text_cards: list[str] = knob(
        [], "Cards whose held-out documents give bits per byte.", check=card
    )
    safety_rules: str | None = knob(
        None,
        "YAML rule pack of the violation rate; default: the one that codexhf ships.",
        check=rule_pack,
    )
    benchmark_cards: list[str] = knob(
        [], "Cards of public benchmarks; each is reported by itself.", check=card
    )
    benchmark_forms: list[Literal["completion", "chat"]] = knob(
        ["completion", "chat"],
        "Ways to ask the benchmarks: completion continues text, chat asks in a message.",
        least=1,
        needs="benchmark_cards",
    )
    benchmark_tasks: int | None = knob(
        None, "Tasks of each benchmark at most; default: all.", low=1, needs="benchmark_cards"
    )
    benchmark_samples: int = knob(
        0, "Answers sampled per benchmark task; 0: greedy alone.", low=0, needs="benchmark_cards"
    )
    benchmark_temperature: float = knob(
        0.2, "Temperature of benchmark_samples.", low=1e-3, high=10, needs="benchmark_samples"
    )
    benchmark_max_new_tokens: int = knob(
        512, "Longest answer to a benchmark task, in tokens.", low=1, needs="benchmark_cards"
    )
    num_samples: int = knob(4, "Answers n per task for pass@k, at `temperature`.", low=1)
    k: list[int] = knob([1, 4], "The k of pass@k, each at most num_samples.", low=1, least=1)
    temperature: float = knob(1.0, "Sampling temperature.", low=1e-3, high=10)
    max_tasks: int | None = knob(None, "Held-out tasks at most; default: all.", low=1)
    max_new_tokens: int = knob(96, "Longest answer, in tokens.", low=1)
    max_length: int = knob(
        512, "Context length of the bits-per-byte evaluation.", low=8, needs="text_cards"
    )
    max_documents: int = knob(
        64, "Held-out documents per card for bits per byte.", low=1, needs="text_cards"
    )
    batch_size: int = knob(256, "Sequences generated at once.", low=1)
    alpha_sft: float = knob(
        1.0,
        "alpha in U(M) = alpha L_SFT + beta L_RLHF + gamma Omega, which needs a reward model.",
        low=0,
    )
    beta_rlhf: float = knob(1.0, "beta in U(M); L_RLHF is minus the mean normalised reward.", low=0)
    gamma_reg: float = knob(1.0, "gamma in U(M); Omega is kl_coef times the KL.", low=0)
    kl_coef: float = knob(
        0.05, "Coefficient of the KL to the reference in Omega, per nat and completion.", low=0
    )
    samples_in_report: int = knob(6, "Tasks whose answers the report shows side by side.", low=0)
    seed: int = knob(42, "Seed of sampling.", low=0, high=2**32 - 1)

    def between_fields(self) -> Iterator[str]:
        for k in self.k:
            if k > self.num_samples:
                yield f"k: got {k}, expected at most num_samples ({self.num_samples})."


@dataclass
class PushArguments:
    hub: str = knob("", "org/prefix, or a folder ./name/prefix: what every name there begins with.")
    runs: str = knob("runs", "Folder of the finished stages.")
    stages: list[str] = knob([], "Folders of `runs` to push; default: all, in order.")
    public: bool = knob(False, "Let everybody see what is pushed.")
    value_model: bool = knob(False, "Push PPO's value model with the policy.")
    merged: bool = knob(False, "Push LoRA stages as whole models, not as adapters on their base.")
    license: str | None = knob(
        None, "Licence of everything, where its sources agree on none that codexhf knows to fit."
    )
    dry_run: bool = knob(False, "Show repositories, files, bytes and visibility, send nothing.")


# ------------------------------------------------------------------------------ hub names

KINDS = {card: "dataset", model_folder: "model", tokenizer_folder: "model"}
"""What a hub name stands for, by the check of its field."""


def pin(stage: StageArguments, output_dir: str) -> list[str]:
    """Add the commit to every hub name of a stage, in place; return what is wrong, by field.

    A commit that the run in `output_dir` began with still counts for a name without revision.
    """
    begun, errors = Path(output_dir, "run.json"), []
    record = begun.read_text(encoding="utf-8") if begun.is_file() and not stage.restart else ""
    for field in fields(stage):
        kind, value = KINDS.get(field.metadata["check"]), getattr(stage, field.name)
        if kind is None or not value:
            continue
        try:
            one = isinstance(value, str)
            each = [hub.pin(name, kind, record) for name in ([value] if one else value)]
            setattr(stage, field.name, each[0] if one else each)
        except ValueError as error:
            errors.append(f"{field.name}: {error}")
    return errors
