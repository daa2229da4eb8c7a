"""The same held-out numbers for any checkpoint, and the callbacks that give some of them early.

U(M) = alpha * L_SFT + beta * L_RLHF + gamma * Omega, with L_SFT the cross-entropy on held-out
demonstrations (nats per token), L_RLHF minus the mean normalised reward, and Omega kl_coef times
the KL to M1 (nats per completion). All from the same samples and the same tasks for every model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from codexhf.adapters import loading
from codexhf.arguments import EvaluationArguments, SFTArguments
from codexhf.benchmarks import run_benchmarks
from codexhf.checkpoints import write_json
from codexhf.completions import grade, judge
from codexhf.data import Data, cards_of
from codexhf.generation import sample, sample_ids
from codexhf.hub import short_name
from codexhf.models import evaluating, load_policy, room_for, shortest_context, to_device
from codexhf.passes import interval, summarise
from codexhf.prompts import (
    answered_ids,
    decode,
    end_ids,
    in_form,
    prompt_ids,
    right_pad,
    text_of,
    vocabulary_size,
)
from codexhf.reward_model import ModelReward, load_model_reward
from codexhf.rewards import parses_reward, violation_rate
from codexhf.safety import Rule, load_rules
from codexhf.sharding import gathered
from codexhf.tokenizer import load_tokenizer
from codexhf.tokens import answered_rows, prompt_lengths
from codexhf.trackers import log_samples, tracked

# ------------------------------------------------------------------------------ likelihoods

LOGITS_BYTES = 2**30
"""Logits (rows, T, V) that are held at a time, in float32: with a large vocabulary, of few rows."""


@torch.no_grad()
def token_logprobs(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    vocabulary: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log p of each token given those before it: (B, T) -> (B, T - 1) float32, 0 where masked.

    Args:
        input_ids: (B, T), right-padded.
        mask: (B, T) bool, True = real token.
        vocabulary: among how many ids a token is chosen, as in sampling; see `vocabulary_size`.
    """
    found = []
    rows = max(1, LOGITS_BYTES // (4 * input_ids.size(1) * vocabulary))
    for ids, real in zip(input_ids.split(rows), mask.split(rows), strict=True):
        logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
        logits = logits[..., :vocabulary].float() / temperature
        picked = logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
        found.append(picked * real[:, 1:])
    return torch.cat(found)


def answer_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence,
    answers: Sequence[str | list[int]],
    *,
    batch_size: int = 32,
    temperature: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of log-probabilities and number of tokens of each answer.

    Args:
        answers: token ids as they were sampled, or texts, which get the end token.
    Returns:
        two float arrays (N,): nats, tokens.
    """
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if isinstance(answer, str):
            rows.append(answered_ids(prompt, answer, tokenizer))
        else:
            start = prompt_ids(prompt, tokenizer)
            rows.append(([*start, *answer], len(start)))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
    vocabulary = vocabulary_size(tokenizer)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            ids, mask = right_pad([rows[i][0] for i in picked], model.device)
            starts = torch.tensor([rows[i][1] for i in picked], device=ids.device)
            answer = mask & (torch.arange(ids.size(1), device=ids.device) >= starts[:, None])
            logprobs = token_logprobs(model, ids, mask, vocabulary, temperature)
            sums[picked] = (logprobs * answer[:, 1:]).sum(1).cpu().numpy()
            counts[picked] = answer.sum(1).cpu().numpy()
    return sums, counts


@torch.no_grad()
def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int = 16,
) -> float:
    """Bits the model needs per byte of text; comparable across tokenizers.

    Each text is cut into pieces of `max_length` tokens that start with the end token as context,
    so every token is predicted exactly once.
    """
    pieces, step = [], max_length - 1
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    for text in texts:
        ids, eos = tokenizer(text, **plain)["input_ids"], tokenizer.eos_token_id
        pieces += [[eos, *ids[i : i + step]] for i in range(0, len(ids), step)]
    pieces.sort(key=len)
    nats, vocabulary = 0.0, vocabulary_size(tokenizer)
    with evaluating(model):
        for start in range(0, len(pieces), batch_size):
            ids, mask = right_pad(pieces[start : start + batch_size], model.device)
            nats -= token_logprobs(model, ids, mask, vocabulary).sum().item()
    return nats / math.log(2) / sum(len(t.encode()) for t in texts)


# ------------------------------------------------------------------------------ while training


class BitsPerByte(TrainerCallback):
    """Adds `eval_<card>_bits_per_byte` to evaluations of packed corpora.

    Trackers get greedy continuations of what is held out as well.
    """

    def __init__(self, heldout: dict[str, Data], tokenizer: PreTrainedTokenizerBase):
        self.heldout, self.tokenizer = heldout, tokenizer

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if tracked(args):
            with gathered(model):
                if state.is_world_process_zero:
                    log_samples(args, state.global_step, self._continuations(model))
        for name, data in self.heldout.items():
            loss, size = metrics.get(f"eval_{name}_loss"), data.cards[name]["bytes_per_token"]
            if loss is not None:
                bits = loss / math.log(2) / size
                add_metrics(state, metrics, {f"eval_{name}_bits_per_byte": bits})

    def _continuations(self, model) -> list[dict]:
        """Continue the beginning of the first held-out sequences of each card."""
        starts = [
            decode([row["input_ids"][:32]], self.tokenizer)[0]
            for data in self.heldout.values()
            for row in data.dataset.select(range(min(2, len(data.dataset))))
        ]
        found = sample(model, self.tokenizer, starts, temperature=0.0, max_new_tokens=64)
        return [{"text": s, "continuation": f[0]} for s, f in zip(starts, found, strict=True)]


class PassAt1(TrainerCallback):
    """Adds `eval_pass@1` by generating one answer per task and running its tests.

    Only text is kept; no logits. The first process answers, with weights that are whole meanwhile,
    and tells the others, which may choose the best checkpoint by it.
    """

    def __init__(self, tasks: Dataset, tokenizer, stage: SFTArguments, seed: int = 42):
        self.tasks, self.tokenizer = tasks, tokenizer
        self.stage, self.seed = stage, seed

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if not len(self.tasks):
            return
        with gathered(model):
            first = state.is_world_process_zero
            passed = self._passed(model, args, state.global_step) if first else None
        add_metrics(state, metrics, {"eval_pass@1": broadcast_object_list([passed])[0]})

    def _passed(self, model, args, step: int) -> float:
        """Share of the tasks whose tests a sampled answer passes; trackers get the answers."""
        prompts, tests, names = (self.tasks[n] for n in ("prompt", "tests", "entry_point"))
        options = {"max_new_tokens": self.stage.eval_max_new_tokens, "seed": self.seed}
        answers = sample(model, self.tokenizer, prompts, **options)
        verdicts = judge(answers, tests, names, self.stage.timeout_s)
        passed = np.mean([group[0] == "pass" for group in verdicts])
        shown = zip(prompts, answers, verdicts, strict=True)
        rows = [{"prompt": text_of(p), "completion": a[0], "verdict": v[0]} for p, a, v in shown]
        log_samples(args, step, rows)
        return float(passed)


def add_metrics(state, metrics: dict, new: dict) -> None:
    """Put numbers where the evaluation's own ones are: the metrics and the logged history."""
    metrics.update(new)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(new)
    if state.is_world_process_zero:
        print({k: round(v, 4) for k, v in new.items()}, flush=True)


# ------------------------------------------------------------------------------ the suite


@dataclass
class Judges:
    """What every model of an evaluation is held against.

    Attributes:
        reference: M1, for the KL, with its tokenizer.
        reward: the reward model as a reward, or None.
        rules: of the safety metric; None takes those that ship.
    """

    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reward: ModelReward | None = None
    rules: Sequence[Rule] | None = None


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Dataset,
    corpora: dict[str, list[str]],
    judges: Judges,
    stage: EvaluationArguments,
    name: str = "",
) -> tuple[dict, dict]:
    """Return all held-out numbers of one model.

    Args:
        tasks: rows of prompt, tests, entry_point, and completion where a reference is known.
        corpora: card name -> held-out documents.
        name: of the model, for the progress bars.
    Returns:
        metrics; and the raw record {"answers", "verdicts", "greedy", "rewards"}, of which each is
        [task][sample] but greedy, which is [task].
    """
    prompts = [in_form(prompt, tokenizer) for prompt in tasks["prompt"]]
    length = min(stage.max_length, shortest_context([model]) or stage.max_length)
    metrics: dict = {
        f"bits_per_byte_{card}": bits_per_byte(model, tokenizer, texts, max_length=length)
        for card, texts in corpora.items()
    }
    metrics |= reference_loss(model, tokenizer, prompts, tasks)
    options = {"max_new_tokens": stage.max_new_tokens, "batch_size": stage.batch_size}
    ids = sample_ids(
        model,
        tokenizer,
        prompts,
        n=stage.num_samples,
        temperature=stage.temperature,
        seed=stage.seed,
        progress=f"{name}: completions",
        **options,
    )
    completions = [decode(group, tokenizer) for group in ids]
    results = grade(completions, tasks["tests"], tasks["entry_point"], stage.timeout_s)
    verdicts = [[result.verdict for result in group] for group in results]
    metrics |= summarise(verdicts, sorted({1, *stage.k}))
    if together := np.mean([r.judged == "together" for group in results for r in group]):
        metrics["judged_together"] = float(together)  # by tests in the program's own process
    greedy = sample(
        model, tokenizer, prompts, temperature=0.0, progress=f"{name}: greedy", **options
    )
    greedily = judge(greedy, tasks["tests"], tasks["entry_point"], stage.timeout_s)
    metrics["pass@1_greedy"] = float(np.mean([group[0] == "pass" for group in greedily]))
    metrics |= divergence(model, tokenizer, prompts, ids, judges, stage.temperature)
    raw = {"answers": completions, "verdicts": verdicts, "greedy": [group[0] for group in greedy]}
    owners = [prompt for prompt, group in zip(prompts, ids, strict=True) for _ in group]
    flat = [text for group in completions for text in group]
    metrics["violation_rate"] = violation_rate(flat, judges.rules)
    metrics["parses"] = float(np.mean(parses_reward(owners, flat)))
    if judges.reward is not None:
        scores = judges.reward(owners, flat)
        n = stage.num_samples
        raw["rewards"] = [scores[i : i + n] for i in range(0, len(scores), n)]
        metrics |= {"reward": float(np.mean(scores)), "L_RLHF": -float(np.mean(scores))}
    return metrics | objective(metrics, stage), raw


def reference_loss(model, tokenizer, prompts: Sequence, tasks: Dataset) -> dict:
    """Return L_SFT on the tasks with a reference completion that fits; nothing without any."""
    known = tasks["completion"] if "completion" in tasks.column_names else []
    rows = [(p, c) for p, c in zip(prompts, known, strict=False) if c is not None]
    context = shortest_context([model]) or math.inf
    fitting = [row for row in rows if len(answered_ids(*row, tokenizer)[0]) <= context]
    metrics = {"references_too_long": len(rows) - len(fitting)} if len(fitting) < len(rows) else {}
    if not fitting:
        return metrics
    nats, tokens = answer_logprobs(model, tokenizer, *zip(*fitting, strict=True))
    return metrics | {"L_SFT": float(-nats.sum() / tokens.sum())}


def divergence(model, tokenizer, prompts, ids, judges: Judges, temperature: float) -> dict:
    """Return the KL to the reference, nats per completion, with its interval; lengths; the ended.

    `ended` is the share of completions that an end token ended, and not the limit of tokens.

    Without the KL where the reference has another tokenizer: the ids would be other texts to it.
    """
    owners = [prompt for prompt, group in zip(prompts, ids, strict=True) for _ in group]
    flat = [completion for group in ids for completion in group]
    given = {"prompts": owners, "answers": flat, "temperature": temperature}
    own, lengths = answer_logprobs(model, tokenizer, **given)
    ends = set(end_ids(tokenizer, model.generation_config))
    ended = np.mean([bool(completion) and completion[-1] in ends for completion in flat])
    metrics = {"answer_tokens": float(lengths.mean()), "ended": float(ended)}
    if tokenizer.get_vocab() != judges.tokenizer.get_vocab():
        print("KL left out: the reference has another tokenizer", flush=True)
        return metrics
    base = own
    if judges.reference is not model:
        base, _ = answer_logprobs(judges.reference, tokenizer, **given)
    kl = (own - base).reshape(len(ids), -1).mean(axis=1)  # of each task
    low, high = interval(kl)
    return metrics | {"kl": float(kl.mean()), "kl_low": low, "kl_high": high}


def objective(metrics: dict, stage: EvaluationArguments) -> dict:
    """Return U(M), where all of its terms were measured."""
    omega = stage.gamma_reg * stage.kl_coef
    weights = {"L_SFT": stage.alpha_sft, "L_RLHF": stage.beta_rlhf, "kl": omega}
    if not weights.keys() <= metrics.keys():
        return {}
    return {"U": sum(weight * metrics[name] for name, weight in weights.items())}


def win_rate(scores: Sequence[Sequence[float]], parent: Sequence[Sequence[float]]) -> float:
    """Share of (task, sample) pairs that score above the parent's; a tie counts half."""
    ours, theirs = np.array(scores), np.array(parent)
    return float(np.mean((ours > theirs) + 0.5 * (ours == theirs)))


def demonstrations_of(tasks: Data, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
    """The tasks' references as input_ids and labels, for the held-out loss.

    No rows where no reference is known, so that `PassAt1` is still called; None without tasks.
    """
    if not len(tasks.dataset):
        return None
    known = tasks.dataset
    if "completion" in known.column_names:
        known = known.filter(lambda row: row["completion"] is not None)
        if len(known):
            return answered_rows(known, tokenizer, source=cards_of(tasks))
    print(f"{cards_of(tasks)}: no references, so L_SFT is left out", flush=True)
    return Dataset.from_dict({"input_ids": [], "labels": []})


def evaluate_models(
    stage: EvaluationArguments,
    tasks: Data,
    corpora: dict[str, Data],
    benchmarks: dict[str, Data],
    folder: Path,
) -> dict:
    """Evaluate every model of the stage; return flat metrics `m1/pass@1`.

    Writes answers.json, and benchmarks.json where there are any.

    Each model reads with its own tokenizer. Its win rates are against the one before it in
    `stage.models`.
    """
    tokenizers = {path: load_tokenizer(path) for path in [stage.reference, *stage.models]}
    tokenizer = tokenizers[stage.reference]
    rows, metrics = with_room(tasks, stage, tokenizers)
    judges = Judges(
        to_device(load_policy(stage.reference, tokenizer, **loading(stage))),
        tokenizer,
        load_model_reward(stage.reward_model, **loading(stage)) if stage.reward_model else None,
        load_rules(stage.safety_rules) if stage.safety_rules else None,
    )
    texts = {name: list(data.dataset["text"]) for name, data in corpora.items()}
    raw: dict[str, dict] = {}
    public: dict[str, dict] = {}
    for path, name in zip(stage.models, names_of(stage.models), strict=True):
        own, model = tokenizers[path], judges.reference
        if path != stage.reference:
            model = to_device(load_policy(path, own, **loading(stage)))
        found, record = evaluate_model(model, own, rows, texts, judges, stage, name)
        if raw:
            found |= _wins(record, raw[list(raw)[-1]])
        raw[name] = record
        measured, public[name] = run_benchmarks(model, own, benchmarks, stage, name)
        found |= measured
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
        shown = "{pass@1:.3f} [{pass@1_low:.3f}, {pass@1_high:.3f}]".format_map(found)
        kl = f", KL {found['kl']:.3f}" if "kl" in found else ""
        print(f"{name}: pass@1 {shown}{kl}", flush=True)
    write_json(folder / "answers.json", _answers(rows, raw))
    if benchmarks:
        ids = {card: list(data.dataset["id"]) for card, data in benchmarks.items()}
        write_json(folder / "benchmarks.json", {"tasks": ids, "all": public})
    return metrics


def with_room(
    tasks: Data, stage: EvaluationArguments, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> tuple[Dataset, dict]:
    """Return the tasks that every model has room to answer, and how many there are.

    load_tasks counted tokens of the reference; each model reads with its own tokenizer.

    Raises:
        CardError: the chat template of one of them refuses a task.
        ValueError: no task fits.
    """
    rows = tasks.dataset
    fits = np.ones(len(rows), dtype=bool)
    for path, tokenizer in tokenizers.items():
        prompts = [{"prompt": in_form(prompt, tokenizer)} for prompt in rows["prompt"]]
        lengths = prompt_lengths(Dataset.from_list(prompts), tokenizer, cards_of(tasks))
        room = room_for(path, stage.max_new_tokens) if path in stage.models else None
        fits &= lengths <= (room or math.inf)
    if len(rows) and not fits.any():
        raise ValueError(
            f"max_new_tokens: got {stage.max_new_tokens}, which leaves no room for any of "
            f"{len(rows)} prompts in the contexts of the models. Lower it."
        )
    dropped = int((~fits).sum())
    counts = {"tasks": len(rows) - dropped} | ({"tasks_too_long": dropped} if dropped else {})
    return (rows.select(np.flatnonzero(fits)) if dropped else rows), counts


def names_of(paths: Sequence[str]) -> list[str]:
    """Folder names, with as much of their parents' as it takes to tell them apart."""
    parts = [Path(short_name(path)).parts for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def parents_of(stage: EvaluationArguments) -> dict[str, str | None]:
    """Name -> folder of everything that an evaluation reads."""
    models = dict(zip(names_of(stage.models), stage.models, strict=True))
    return {"reward_model": stage.reward_model, "reference": stage.reference, **models}


def _wins(record: dict, parent: dict) -> dict:
    """Win rates of one model's record against another's, by the reward model and by tests."""
    passed = (np.array(each["verdicts"]) == "pass" for each in (record, parent))
    wins = {"win_rate_tests": win_rate(*passed)}
    if "rewards" in record:
        wins["win_rate"] = win_rate(record["rewards"], parent["rewards"])
    return wins


def _answers(tasks: Dataset, raw: dict[str, dict]) -> dict:
    """The record of an evaluation: the tasks, and every completion of every model."""
    rows = [
        {"prompt": text_of(row["prompt"]), "reference": row.get("completion")}
        | {"group": row.get("group")}
        for row in tasks
    ]
    return {"tasks": rows, "all": raw}
