"""One dataclass per stage, and `parse()`, which every recipe calls first.

A recipe's YAML lies beside it and is its default configuration; `--config other.yaml` replaces it
and `--field value` overrides one field. Fields that transformers or TRL already name keep their
name and stay in the library's own config class; the dataclasses here hold only what is ours.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from trl import TrlParser

from codexhf.execution import UNSAFE_PHRASE
from codexhf.hub import hub_name, pin_arguments
from codexhf.refusals import nearest, refuse
from codexhf.strict_yaml import load_yaml


def knob(default, help):
    """A dataclass field that `--help` explains; mutable defaults are copied per instance."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


# ---------------------------------------------------------------------------------------------
# The stages' own fields
# ---------------------------------------------------------------------------------------------


@dataclass
class StageArguments:
    """Fields of every stage, and the checks that need nothing loaded."""

    dry_run: bool = knob(
        False, "Resolve everything, show what would be trained on, write nothing, stop."
    )
    restart: bool = knob(
        False, "Set the existing output folder aside (never deleted) and start from the beginning."
    )

    def problems(self) -> list[str]:
        """What is wrong with these values, one sentence each with its mend; empty if nothing."""
        return []


@dataclass
class CodeRunningArguments(StageArguments):
    """Fields of the stages that run what a model wrote."""

    timeout_s: float = knob(3.0, "Seconds one program may run.")
    unsafe_exec: str | None = knob(
        None,
        f"{UNSAFE_PHRASE!r} lets generated code run without isolation where none can be had; every "
        "manifest and model card then says so.",
    )

    def problems(self) -> list[str]:
        out = check_range("timeout_s", self.timeout_s, 0.05, 600)
        if self.unsafe_exec not in (None, UNSAFE_PHRASE):
            out.append(
                f"unsafe_exec: got {self.unsafe_exec!r}, expected {UNSAFE_PHRASE!r} or nothing."
            )
        return out


@dataclass
class TokenizerArguments(StageArguments):
    output_dir: str = knob("runs/tokenizer", "Folder that receives the tokenizer.")
    train_cards: list[str] = knob([], "Data cards of type language-modeling to learn merges from.")
    weights: list[float] | None = knob(
        None, "Share of characters wanted from each card; default: all there is."
    )
    chat_cards: list[str] = knob(
        [], "Data cards of type prompt-completion, learned from as well (all of their text)."
    )
    exclude_cards: list[str] = knob([], "Held-out cards; rows that overlap with them are removed.")
    vocab_size: int = knob(4096, "Tokens in the vocabulary, special tokens included.")
    max_characters: int = knob(20_000_000, "Characters of the mix to learn merges from at most.")
    seed: int = knob(42, "Seed of the mix.")

    def problems(self) -> list[str]:
        return [
            *check_cards("train_cards", self.train_cards),
            *check_cards("chat_cards", self.chat_cards, required=False),
            *check_cards("exclude_cards", self.exclude_cards, required=False),
            *check_weights("weights", self.weights, self.train_cards),
            *check_range("vocab_size", self.vocab_size, 300, 1_000_000),
            *check_range("max_characters", self.max_characters, 1000, None),
        ]


@dataclass
class PretrainArguments(StageArguments):
    model: str | None = knob(
        None, "Continue from this folder or Hub id; default: new weights from `architecture`."
    )
    architecture: dict | str | None = knob(
        None, "Model config of a new model: model_type and its fields (JSON on the command line)."
    )
    tokenizer: str = knob("runs/tokenizer", "Tokenizer folder or Hub id.")
    train_cards: list[str] = knob([], "Data cards of type language-modeling.")
    weights: list[float] | None = knob(None, "Share of training tokens wanted from each card.")
    exclude_cards: list[str] = knob([], "Held-out cards; rows that overlap with them are removed.")
    max_length: int = knob(512, "Context length: tokens of one packed training sequence.")
    max_eval_rows: int = knob(64, "Held-out sequences per card in evaluations while training.")

    def __post_init__(self):
        self.architecture = as_dict("architecture", self.architecture)

    def problems(self) -> list[str]:
        out = [
            *check_cards("train_cards", self.train_cards),
            *check_cards("exclude_cards", self.exclude_cards, required=False),
            *check_weights("weights", self.weights, self.train_cards),
            *check_folder("tokenizer", self.tokenizer, "tokenizer.json"),
            *check_range("max_length", self.max_length, 8, None),
        ]
        if self.model is not None:
            out += check_model("model", self.model)
        elif not self.architecture:
            out.append(
                "architecture: got nothing, expected a mapping with model_type when model is not "
                "given. Copy the block from recipes/pretrain.yaml."
            )
        return out


@dataclass
class SFTArguments(CodeRunningArguments):
    model: str = knob("runs/m0", "M0: folder or Hub id of the model to fine-tune.")
    train_cards: list[str] = knob([], "Data cards of type prompt-completion (demonstrations).")
    weights: list[float] | None = knob(None, "Share of training tokens wanted from each card.")
    eval_cards: list[str] = knob([], "Cards of problems with reference and tests for evaluation.")
    exclude_cards: list[str] = knob([], "Held-out cards; rows that overlap with them are removed.")
    use_peft: bool = knob(False, "Train LoRA adapters and merge them when saving.")
    lora_r: int = knob(16, "LoRA rank.")
    lora_alpha: int = knob(32, "LoRA scale numerator.")
    lora_dropout: float = knob(0.0, "Dropout on the LoRA branch.")
    eval_problems: int = knob(100, "Problems of eval_cards in each evaluation while training.")
    eval_max_new_tokens: int = knob(96, "Longest answer, in tokens, in those evaluations.")

    def problems(self) -> list[str]:
        return [
            *super().problems(),
            *check_model("model", self.model),
            *check_cards("train_cards", self.train_cards),
            *check_cards("eval_cards", self.eval_cards, required=False),
            *check_cards("exclude_cards", self.exclude_cards, required=False),
            *check_weights("weights", self.weights, self.train_cards),
            *check_range("lora_r", self.lora_r, 1, None),
            *check_range("lora_alpha", self.lora_alpha, 1, None),
            *check_range("lora_dropout", self.lora_dropout, 0, 0.99),
            *check_range("eval_problems", self.eval_problems, 0, None),
            *check_range("eval_max_new_tokens", self.eval_max_new_tokens, 1, None),
        ]


@dataclass
class PreferencesArguments(CodeRunningArguments):
    output_dir: str = knob("runs/prefs", "Folder that receives the pairs.")
    model: str = knob("runs/m1", "M1: the model whose completions are compared.")
    prompt_cards: list[str] = knob([], "Data cards of type prompt-only with tests.")
    exclude_cards: list[str] = knob([], "Held-out cards; rows that overlap with them are removed.")
    samples_per_prompt: int = knob(8, "Completions k sampled for each prompt at each temperature.")
    min_prompts: int = knob(
        512, "Prompts written for PPO at least: contested ones, filled up with others."
    )
    pairs_per_prompt: int = knob(3, "Pairs kept per prompt at most.")
    include_reference: bool = knob(
        False, "Let the card's reference completion take part as one more answer."
    )
    max_prompts: int | None = knob(None, "Prompts to use at most; default: all.")
    max_new_tokens: int = knob(96, "Longest completion, in tokens.")
    temperatures: list[float] = knob(
        [1.0], "Sampling temperatures; the first one also decides which prompts are contested."
    )
    batch_size: int = knob(256, "Sequences generated at once.")
    test_share: float = knob(0.15, "Share of problems whose pairs are held out of R's training.")
    seed: int = knob(42, "Seed of sampling and pairing.")

    def problems(self) -> list[str]:
        return [
            *super().problems(),
            *check_model("model", self.model),
            *check_cards("prompt_cards", self.prompt_cards),
            *check_cards("exclude_cards", self.exclude_cards, required=False),
            *check_range("samples_per_prompt", self.samples_per_prompt, 2, 1024),
            *check_range("min_prompts", self.min_prompts, 1, None),
            *check_range("pairs_per_prompt", self.pairs_per_prompt, 1, None),
            *check_range("max_new_tokens", self.max_new_tokens, 1, None),
            *(p for t in self.temperatures for p in check_range("temperatures", t, 1e-3, 10)),
            *check_range("temperatures: how many", len(self.temperatures), 1, None),
            *check_range("batch_size", self.batch_size, 1, None),
            *check_range("test_share", self.test_share, 0.01, 0.5),
            *(
                check_range("max_prompts", self.max_prompts, 2, None)
                if self.max_prompts is not None
                else []
            ),
        ]


@dataclass
class RewardModelArguments(StageArguments):
    model: str = knob("runs/m1", "M1: the model that the reward model starts from.")
    train_cards: list[str] = knob(
        [], "Preference pairs: data cards of type preference, or the preferences stage's folder."
    )
    eval_cards: list[str] = knob([], "Held-out pairs, of problems that no training pair is from.")
    score_samples: int = knob(
        512, "M1 completions whose mean and standard deviation of score are saved in the config."
    )

    def problems(self) -> list[str]:
        return [
            *check_model("model", self.model),
            *check_cards("train_cards", self.train_cards),
            *check_cards("eval_cards", self.eval_cards),
            *check_range("score_samples", self.score_samples, 2, None),
        ]


@dataclass
class PPOArguments(CodeRunningArguments):
    trainer: str = knob("codexhf", "codexhf: our PPOTrainer. trl: the class of trl 1.12.")
    model: str = knob("runs/m1", "M1: the policy to start from, and the reference.")
    reward_model: str = knob("runs/rm", "R: folder or Hub id of the reward model.")
    value_model: str | None = knob(
        None, "Model that the critic starts from; default: the reward model."
    )
    prompt_cards: list[str] = knob([], "Data cards of type prompt-only.")
    sft_cards: list[str] = knob([], "Demonstrations for the alpha_sft term.")
    eval_cards: list[str] = knob([], "Problems for the gold signal while training.")
    exclude_cards: list[str] = knob([], "Held-out cards; rows that overlap with them are removed.")
    safety_rules: str | None = knob(
        None, "YAML rule pack of the safety reward; default: the one that codexhf ships."
    )
    rewards: list[str] = knob(["reward_model"], "Names of the rewards that are summed.")
    reward_weights: list[float] | None = knob(None, "Weight of each reward; default: 1 each.")
    reward_clip: float | None = knob(
        5.0, "Bound on the reward model's normalised score, in standard deviations."
    )
    eval_problems: int = knob(100, "Problems of eval_cards in each evaluation while training.")
    use_peft: bool = knob(False, "Train LoRA adapters, merged at the end; M1 is the reference.")
    lora_r: int = knob(16, "LoRA rank.")
    lora_alpha: int = knob(32, "LoRA scale numerator.")
    lora_dropout: float = knob(0.0, "Dropout on the LoRA branch; PPO wants 0.")

    def problems(self) -> list[str]:
        out = [
            *super().problems(),
            *check_model("model", self.model),
            *check_model("reward_model", self.reward_model),
            *check_cards("prompt_cards", self.prompt_cards),
            *check_cards("sft_cards", self.sft_cards, required=False),
            *check_cards("eval_cards", self.eval_cards, required=False),
            *check_cards("exclude_cards", self.exclude_cards, required=False),
            *check_choice("trainer", self.trainer, ["codexhf", "trl"]),
            *check_range("eval_problems", self.eval_problems, 1, None),
        ]
        if self.value_model is not None:
            out += check_model("value_model", self.value_model)
        from codexhf.rewards import REWARD_MODEL, REWARDS

        for name in self.rewards:
            out += check_choice("rewards", name, [REWARD_MODEL, *REWARDS])
        if not self.rewards:
            out.append("rewards: got an empty list, expected at least one name.")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            out.append(
                f"reward_weights: got {len(self.reward_weights)} values, expected one for each of "
                f"the {len(self.rewards)} rewards."
            )
        return out


@dataclass
class EvaluationArguments(CodeRunningArguments):
    output_dir: str = knob("runs/evaluation", "Folder that receives the metrics and samples.")
    models: list[str] = knob(
        ["runs/m0", "runs/m1", "runs/m2"], "Checkpoints to compare; each one's parent is before it."
    )
    reference: str = knob("runs/m1", "M1: the model that KL is measured against.")
    reward_model: str | None = knob("runs/rm", "R: scores every answer; none: no reward.")
    heldout_cards: list[str] = knob([], "Held-out problems with tests and references.")
    text_cards: list[str] = knob([], "Cards whose held-out documents give bits per byte.")
    safety_rules: str | None = knob(
        None, "YAML rule pack of the violation rate; default: the one that codexhf ships."
    )
    num_samples: int = knob(4, "Answers n per problem for pass@k, at `temperature`.")
    k: list[int] = knob([1, 4], "The k of pass@k, each at most num_samples.")
    temperature: float = knob(1.0, "Sampling temperature.")
    max_problems: int | None = knob(None, "Held-out problems at most; default: all.")
    max_new_tokens: int = knob(96, "Longest answer, in tokens.")
    max_length: int = knob(512, "Context length of the bits-per-byte evaluation.")
    max_documents: int = knob(64, "Held-out documents per card for bits per byte.")
    batch_size: int = knob(256, "Sequences generated at once.")
    alpha_sft: float = knob(1.0, "alpha in U(M) = alpha L_SFT + beta L_RLHF + gamma Omega.")
    beta_rlhf: float = knob(1.0, "beta in U(M); L_RLHF is minus the mean normalised reward.")
    gamma_reg: float = knob(0.05, "gamma in U(M); Omega is the KL to the reference, nats/answer.")
    samples_in_report: int = knob(6, "Problems whose answers the report shows side by side.")
    seed: int = knob(42, "Seed of sampling.")

    def problems(self) -> list[str]:
        out = [
            *super().problems(),
            *check_cards("heldout_cards", self.heldout_cards),
            *check_cards("text_cards", self.text_cards, required=False),
            *check_model("reference", self.reference),
            *check_range("num_samples", self.num_samples, 1, None),
            *check_range("temperature", self.temperature, 1e-3, 10),
            *check_range("max_new_tokens", self.max_new_tokens, 1, None),
            *check_range("max_length", self.max_length, 8, None),
            *check_range("max_documents", self.max_documents, 1, None),
            *check_range("samples_in_report", self.samples_in_report, 0, None),
            *check_range("batch_size", self.batch_size, 1, None),
            *(
                check_model("reward_model", self.reward_model)
                if self.reward_model is not None
                else []
            ),
        ]
        for model in self.models:
            out += check_model("models", model)
        if not self.models:
            out.append("models: got an empty list, expected at least one folder or Hub id.")
        for k in self.k:
            out += check_range("k", k, 1, self.num_samples)
        return out


@dataclass
class PushArguments:
    hub: str = knob("", "org/prefix, or a folder ./name/prefix: what every name there begins with.")
    runs: str = knob("runs", "Folder of the finished stages.")
    stages: list[str] = knob([], "Folders of `runs` to push; default: all, in order.")
    public: bool = knob(False, "Let everybody see what is pushed.")
    value_model: bool = knob(False, "Push PPO's value model with the policy.")
    license: str | None = knob(
        None, "Licence of everything, where its sources agree on none that codexhf knows to fit."
    )
    dry_run: bool = knob(False, "Show repositories, files, bytes and visibility, send nothing.")


# ---------------------------------------------------------------------------------------------
# Checks shared by the stages
# ---------------------------------------------------------------------------------------------


def check_range(name, value, low, high) -> list[str]:
    if (low is None or value >= low) and (high is None or value <= high):
        return []
    bounds = f"at least {low}" if high is None else f"between {low} and {high}"
    return [f"{name}: got {value!r}, expected {bounds}."]


def check_choice(name, value, choices) -> list[str]:
    if value in choices:
        return []
    return [
        f"{name}: got {value!r}, expected one of {', '.join(choices)}.{nearest(value, choices)}"
    ]


def check_cards(name, paths, required=True) -> list[str]:
    if required and not paths:
        return [f"{name}: got an empty list, expected at least one data card (see data_cards/)."]
    out = []
    for path in paths:
        if Path(path).is_dir() and (Path(path) / "README.md").is_file():
            continue  # a finished stage's folder is its own card
        if hub_name(path):
            continue
        if not Path(path).is_file():
            folder = Path(path).parent
            known = [str(p) for p in folder.glob("*.md")] if folder.is_dir() else []
            out.append(f"{name}: got {path!r}, which does not exist.{nearest(path, known)}")
    return out


def check_weights(name, weights, cards) -> list[str]:
    if weights is None:
        return []
    if len(weights) != len(cards):
        return [f"{name}: got {len(weights)} values, expected one for each of {len(cards)} cards."]
    if any(w <= 0 for w in weights):
        return [f"{name}: got {weights}, expected positive shares. Leave out a card instead."]
    return []


def check_folder(name, path, file) -> list[str]:
    if (Path(path) / file).is_file() or hub_name(path):
        return []
    if not Path(path).is_dir():
        return [f"{name}: got {path!r}, which is no folder. Run the stage that makes it first."]
    return [
        f"{name}: got {path!r}, a folder without {file}: that stage has not finished. Run it again "
        "(it resumes), or give another folder."
    ]


def check_model(name, path) -> list[str]:
    out = check_folder(name, path, "config.json")
    if out or not Path(path).is_dir():
        return out
    weights = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
    if any((Path(path) / file).is_file() for file in weights):
        return []
    return [
        f"{name}: got {path!r}, a folder with a config but no safetensors weights "
        f"({', '.join(weights[:2])}). Save the model with save_pretrained, or run its stage again."
    ]


def as_dict(name, value) -> dict | None:
    """A mapping given in YAML, or as JSON on the command line."""
    if value is None or isinstance(value, dict):
        return value
    try:
        loaded = json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name}: got {value!r}, expected JSON ({error}).") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{name}: got {value!r}, expected a JSON object.")
    return loaded


# ---------------------------------------------------------------------------------------------
# parse()
# ---------------------------------------------------------------------------------------------

# Ranges of library fields that the libraries take at any value.
RANGES = {
    "learning_rate": (0, 10),
    "per_device_train_batch_size": (1, None),
    "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "num_train_epochs": (0, None),
    "max_grad_norm": (0, None),
    "weight_decay": (0, None),
    "seed": (0, 2**32 - 1),
}


class _Parser(TrlParser):
    """Raises instead of exiting, so that all problems can be shown at once."""

    def error(self, message):
        raise ValueError(message)


def parse(types: Sequence[type], recipe: str, argv: Sequence[str] | None = None) -> tuple:
    """Return one filled instance per dataclass, or exit with code 2 and every problem found.

    Order of precedence: command line, `--config` (default: the YAML beside the recipe), defaults.
    Abbreviated flags are refused, since `--learning_rat 3` would otherwise set learning_rate.
    bf16 is switched on where the device has it, use_cpu where there is no other device, unless the
    user says otherwise.

    Args:
        types: dataclasses; ours first, the library's config second where there is one.
        recipe: the recipe's `__file__`; its docstring heads `--help`.
        argv: arguments without the program's name; default `sys.argv[1:]`.
    Raises:
        SystemExit: code 2 after printing the problems to stderr; code 0 after `--help`.
    """
    argv, config = _split_config(sys.argv[1:] if argv is None else list(argv), recipe)
    parser = _Parser(
        types,
        allow_abbrev=False,
        prog=f"accelerate launch {Path(recipe).parent.name}/{Path(recipe).name}",
        description=getattr(sys.modules.get("__main__"), "__doc__", None),
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", metavar="YAML", help=f"Configuration (default: {config}).")
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    problems: list[str] = []
    values: dict = {}
    try:
        values = load_yaml(config) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{config}: got {type(values).__name__}, expected `key: value` lines.")
    except ValueError as error:
        problems.append(str(error))
    problems += _take_out_wrong_values(parser, values, config)
    problems += _take_out_wrong_flags(parser, argv)
    try:
        instances = _fill(parser, values, argv)
    except (ValueError, TypeError, OSError) as error:
        if not problems or "are required" not in str(error):  # that may be what was taken out
            problems.append(" ".join(str(error).split()))
        instances = _fill_stage(types, values, argv)
    for instance in instances:
        problems += _instance_problems(instance)
    if not problems and isinstance(instances[0], StageArguments):
        # The library's config comes second and has the folder; other stages name it themselves.
        problems = pin_arguments(instances[0], instances[-1].output_dir)
    if problems:
        refuse(problems, f"{Path(recipe).name} with {config}")
    return instances


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _split_config(argv, recipe) -> tuple[list[str], str]:
    """Take `--config x` and `--config=x` (which TrlParser refuses) out of argv."""
    config, rest = str(Path(recipe).with_suffix(".yaml")), []
    words = iter(argv)
    for word in words:
        if word == "--config":
            config = next(words, "")
        elif word.startswith("--config="):
            config = word.removeprefix("--config=")
        else:
            rest.append(word)
    return rest, config


def _options(parser) -> dict[str, argparse.Action]:
    # a bool that defaults to True has two actions, --x and --no_x: the first is the field's
    return {action.dest: action for action in reversed(parser._actions) if action.option_strings}


def _take_out_wrong_values(parser, values: dict, config) -> list[str]:
    """Leave in `values` what can be used; return what is wrong with the rest."""
    options, out = _options(parser), []
    for key, value in list(values.items()):
        found = []
        if key not in options or key in ("config", "help"):
            found = [f"{config}: unknown key {key!r}.{nearest(key, options)}"]
        elif value is not None and not isinstance(value, dict):
            found = _value_problems(parser, options[key], key, value, f"{config}: ")
        if found:
            del values[key]
            out += found
    return out


def _value_problems(parser, action, key, value, where) -> list[str]:
    if isinstance(value, bool) and action.type is not None and action.nargs != "?":
        if getattr(action.type, "__name__", "") not in ("bool", "string_to_bool"):
            return [
                f"{where}{key}: got {value} (YAML reads a bare yes/no/on/off so), expected text or "
                f'a number. Quote it: {key}: "{"no" if value is False else "yes"}".'
            ]
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and action.nargs not in ("+", "*"):
        return [f"{where}{key}: got a list, expected one value."]
    if not items:
        return []
    try:
        parser.parse_known_args([f"--{key}", *(str(item) for item in items)])
    except ValueError as error:
        return [f"{where}{key}: got {value!r}, {_expected(str(error), action)}."]
    return []


def _expected(message, action) -> str:
    if action.choices:
        return f"expected one of {', '.join(map(str, action.choices))}"
    kind = getattr(action.type, "__name__", "a value")
    kind = {"string_to_bool": "true or false", "int": "a whole number", "float": "a number"}.get(
        kind, message
    )
    return f"expected {kind}"


def _spelled(parser) -> dict[str, argparse.Action]:
    return {s: action for action in parser._actions for s in action.option_strings}


def _flag_groups(argv: list[str]) -> list[list[str]]:
    """Each flag with the words that follow it."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def _take_out_wrong_flags(parser, argv: list[str]) -> list[str]:
    """Leave in `argv` what can be used; return what is wrong with the rest."""
    spelled, out = _spelled(parser), []
    groups = _flag_groups(argv)
    argv.clear()
    for flag, *rest in groups:
        name, _, inline = flag.partition("=")
        if name not in spelled:
            known = [s for s in spelled if s.startswith("--") and "-" not in s[2:]]
            out.append(f"unknown argument {name!r}.{nearest(name, known)}")
            continue
        try:
            _, left = parser.parse_known_args([flag, *rest])
        except ValueError as error:
            got = " ".join([inline, *rest]).strip()
            out.append(f"{name}: got {got!r}, {_expected(str(error), spelled[name])}.")
            continue
        out += [f"unexpected argument {word!r} after {name}." for word in left]
        argv += [flag, *(word for word in rest if word not in left)]
    return out


def _fill(parser, values, argv):
    said = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv}
    options = _options(parser)
    if "bf16" in options and not {"bf16", "fp16"} & (said | set(values)):
        parser.set_defaults(bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    if "use_cpu" in options and "use_cpu" not in said | set(values):
        # Unsaid, accelerate takes two processes on a CPU for two lone ones, in the same folder.
        parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    for key, value in values.items():
        action = options[key]
        if isinstance(value, list) and action.type is not None:
            value = [action.type(str(item)) for item in value]
        elif value is not None and not isinstance(value, dict | list | bool) and action.type:
            value = action.type(str(value))
        parser.set_defaults(**{key: value})
        action.required = False
    # the parser returns what is in no dataclass (--config) as one more namespace
    return parser.parse_args_into_dataclasses(args=argv)[: len(parser.dataclass_types)]


def _fill_stage(types, values, argv) -> tuple:
    """The stage's own arguments alone, if they can be filled: where the library refuses its own."""
    stages = [kind for kind in types if issubclass(kind, StageArguments)]
    parser = _Parser(stages, allow_abbrev=False)
    options, spelled = _options(parser), _spelled(parser)
    known = {key: value for key, value in values.items() if key in options}
    groups = [group for group in _flag_groups(argv) if group[0].partition("=")[0] in spelled]
    try:
        return _fill(parser, known, [word for group in groups for word in group])
    except (ValueError, TypeError, OSError):
        return ()


def _instance_problems(instance) -> list[str]:
    if isinstance(instance, StageArguments):
        return instance.problems()
    out = []
    if getattr(instance, "push_to_hub", False) or getattr(instance, "hub_token", None):
        out.append(
            "push_to_hub, hub_token: refused while training: Trainer pushes publicly, in the "
            "background, with the optimizer and the token in training_args.bin. Upload the "
            "finished run instead: make push HUB=org/prefix"
        )
    for f in fields(instance):
        if f.name in RANGES and getattr(instance, f.name) is not None:
            out += check_range(f.name, getattr(instance, f.name), *RANGES[f.name])
    return out
