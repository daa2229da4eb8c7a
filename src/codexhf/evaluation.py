"""The same held-out numbers for any checkpoint, and the callbacks that give some of them early.

U(M) = alpha * L_SFT + beta * L_RLHF + gamma * Omega, with L_SFT the cross-entropy on held-out
demonstrations (nats per token), L_RLHF minus the mean normalised reward, and Omega the KL to M1
(nats per answer). All from the same samples and the same problems for every model.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from codexhf.arguments import EvaluationArguments
from codexhf.chat import answered_ids, decode, prompt_ids, right_pad, text_of
from codexhf.checkpoints import write_json
from codexhf.data import Data
from codexhf.execution import Result, run_tests
from codexhf.generation import sample, sample_ids
from codexhf.hub import short_name
from codexhf.models import evaluating, load_policy, to_device
from codexhf.reward_model import ModelReward, load_model_reward
from codexhf.rewards import code_of, parses_reward, violation_rate
from codexhf.safety import load_rules

# ---------------------------------------------------------------------------------------------
# pass@k
# ---------------------------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples passes, when c of n did.

    1 - C(n - c, k) / C(n, k), in the stable product form.
    Source: Chen et al. 2021, eq. 1 (arXiv:2107.03374).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k: got n={n}, c={c}, k={k}, expected 0 <= c <= n and 1 <= k <= n.")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean; the units are problems, not samples."""
    values = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = values[generator.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def pass_interval(values: Sequence[float]) -> tuple[float, float]:
    """`interval`, with the exact binomial bound where no problem or every problem passed.

    The bootstrap would give a width of zero there (Clopper and Pearson 1934).
    """
    if set(values) == {0.0}:
        return 0.0, 1 - 0.025 ** (1 / len(values))
    if set(values) == {1.0}:
        return 0.025 ** (1 / len(values)), 1.0
    return interval(values)


class PassAtK(evaluate.Metric):
    """pass@k over problems, with the code run in the sandbox.

    compute(predictions=[[code, ...], ...], references=[{"tests": json, "entry_point": name}, ...],
    k=[1, 4]) returns pass@k for each k, its 95% interval, and the verdict counts.
    """

    def __init__(self, timeout_s: float = 3.0, progress: str | None = None, **kwargs):
        self.timeout_s, self.progress = timeout_s, progress
        super().__init__(config_name="default", keep_in_memory=True, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="Chen et al. 2021, arXiv:2107.03374",
            inputs_description="predictions: n programs per problem; references: tests per problem",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": {
                        "tests": datasets.Value("string"),
                        "entry_point": datasets.Value("string"),
                    },
                }
            ),
        )

    def _compute(self, predictions, references, k=(1,)):
        tests = [json.loads(r["tests"]) for r in references]
        names = [r["entry_point"] for r in references]
        verdicts = judge(predictions, tests, names, self.timeout_s, self.progress)
        return summarise(verdicts, k)


def grade(
    answers: Sequence[Sequence[str]],
    tests: Sequence,
    entry_points: Sequence[str],
    timeout_s: float = 3.0,
    progress: str | None = None,
) -> list[list[Result]]:
    """Run each answer's tests in the sandbox: [problem][answer] results.

    Raises:
        RuntimeError: the sandbox failed on a program; an outage is neither a label nor a verdict.
    """
    owner = [i for i, group in enumerate(answers) for _ in group]
    with tqdm(total=len(owner), desc=progress, disable=progress is None) as bar:
        results = run_tests(
            [code_of(code) for group in answers for code in group],
            [tests[i] for i in owner],
            [entry_points[i] for i in owner],
            timeout_s=timeout_s,
            progress=lambda done, total: bar.update(done - bar.n),
        )
    out: list[list[Result]] = [[] for _ in answers]
    for i, result in zip(owner, results, strict=True):
        if result.verdict == "sandbox_error":
            raise RuntimeError(
                f"the sandbox failed on an answer to problem {i}: {result.detail}. Nothing was "
                "counted. Run `python -m codexhf.execution selftest`."
            )
        out[i].append(result)
    return out


def judge(answers, tests, entry_points, timeout_s=3.0, progress=None) -> list[list[str]]:
    """Verdict of each answer: [problem][answer] pass, fail, timeout or memory."""
    results = grade(answers, tests, entry_points, timeout_s, progress)
    return [[result.verdict for result in group] for group in results]


def summarise(verdicts: Sequence[Sequence[str]], k: Sequence[int]) -> dict:
    """pass@k with intervals and verdict counts from [problem][sample] verdicts."""
    passed = [[v == "pass" for v in group] for group in verdicts]
    out: dict = {}
    for size in k:
        values = [pass_at_k(len(group), sum(group), size) for group in passed]
        low, high = pass_interval(values)
        out |= {
            f"pass@{size}": float(np.mean(values)),
            f"pass@{size}_low": low,
            f"pass@{size}_high": high,
        }
    flat = [v for group in verdicts for v in group]
    out["verdicts"] = {v: flat.count(v) for v in sorted(set(flat))}
    return out


# ---------------------------------------------------------------------------------------------
# Likelihoods
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def token_logprobs(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log p of each token given those before it: (B, T) -> (B, T - 1) float32, 0 where masked.

    Args:
        input_ids: (B, T), right-padded.
        mask: (B, T) bool, True = real token.
    """
    logits = model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1]
    logits = logits.float() / temperature
    picked = logits.gather(-1, input_ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)
    return picked * mask[:, 1:]


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
    rows = [
        answered_ids(prompt, answer, tokenizer)
        if isinstance(answer, str)
        else _joined(prompt_ids(prompt, tokenizer), answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    sums, counts = np.zeros(len(rows)), np.zeros(len(rows))
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            ids, mask = right_pad([rows[i][0] for i in picked], model.device)
            starts = torch.tensor([rows[i][1] for i in picked], device=ids.device)
            answer = mask & (torch.arange(ids.size(1), device=ids.device) >= starts[:, None])
            logprobs = token_logprobs(model, ids, mask, temperature)
            sums[picked] = (logprobs * answer[:, 1:]).sum(1).cpu().numpy()
            counts[picked] = answer.sum(1).cpu().numpy()
    return sums, counts


def _joined(prompt: list[int], answer: list[int]) -> tuple[list[int], int]:
    return [*prompt, *answer], len(prompt)


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
    pieces = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        step = max_length - 1
        pieces += [
            [tokenizer.eos_token_id, *ids[i : i + step]] for i in range(0, len(ids), step) if ids
        ]
    pieces.sort(key=len)
    nats = 0.0
    with evaluating(model):
        for start in range(0, len(pieces), batch_size):
            ids, mask = right_pad(pieces[start : start + batch_size], model.device)
            nats -= token_logprobs(model, ids, mask).sum().item()
    return nats / math.log(2) / sum(len(t.encode()) for t in texts)


# ---------------------------------------------------------------------------------------------
# While training
# ---------------------------------------------------------------------------------------------


class BitsPerByte(TrainerCallback):
    """Adds `eval_<card>_bits_per_byte` to evaluations of packed corpora."""

    def __init__(self, heldout: dict[str, Data]):
        self.bytes_per_token = {
            name: data.facts[name]["bytes_per_token"] for name, data in heldout.items()
        }

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for name, size in self.bytes_per_token.items():
            loss = (metrics or {}).get(f"eval_{name}_loss")
            if loss is not None:
                add_metrics(
                    state, metrics, {f"eval_{name}_bits_per_byte": loss / math.log(2) / size}
                )


class PassAt1(TrainerCallback):
    """Adds `eval_pass@1` by generating one answer per problem and running its tests.

    Only text is kept; no logits. Runs on the main process of a single-model setup.
    """

    def __init__(self, problems: Dataset, tokenizer, max_new_tokens: int, seed: int = 42):
        self.problems, self.tokenizer = problems, tokenizer
        self.max_new_tokens, self.seed = max_new_tokens, seed

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        if not len(self.problems) or not state.is_world_process_zero:
            return
        answers = sample(
            model,
            self.tokenizer,
            self.problems["prompt"],
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
        )
        verdicts = judge(answers, self.problems["tests"], self.problems["entry_point"])
        passed = np.mean([group[0] == "pass" for group in verdicts])
        add_metrics(state, metrics, {"eval_pass@1": float(passed)})


def add_metrics(state, metrics: dict, new: dict) -> None:
    """Put numbers where the evaluation's own ones are: the metrics and the logged history."""
    metrics.update(new)
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        state.log_history[-1].update(new)
    if state.is_world_process_zero:
        print({k: round(v, 4) for k, v in new.items()}, flush=True)


# ---------------------------------------------------------------------------------------------
# The suite
# ---------------------------------------------------------------------------------------------


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Dataset,
    corpora: dict[str, list[str]],
    *,
    reference: PreTrainedModel,
    reward: ModelReward | None = None,
    settings: EvaluationArguments,
    name: str = "",
) -> tuple[dict, dict]:
    """All held-out numbers of one model.

    Args:
        problems: rows of prompt, completion, tests, entry_point.
        corpora: card name -> held-out documents.
        reference: M1, for the KL; the same tokenizer.
        reward: `rewards.ModelReward` or None.
        settings: EvaluationArguments.
    Returns:
        metrics; and the raw answers {"answers", "verdicts", "rewards"}, each [problem][sample].
    """
    prompts = problems["prompt"]
    metrics: dict = {
        f"bits_per_byte_{card}": bits_per_byte(
            model, tokenizer, texts, max_length=settings.max_length
        )
        for card, texts in corpora.items()
    }
    nats, tokens = answer_logprobs(model, tokenizer, prompts, problems["completion"])
    metrics["L_SFT"] = float(-nats.sum() / tokens.sum())
    ids = sample_ids(
        model,
        tokenizer,
        prompts,
        n=settings.num_samples,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=f"{name}: answers",
    )
    answers = [decode(group, tokenizer) for group in ids]
    verdicts = judge(answers, problems["tests"], problems["entry_point"], settings.timeout_s)
    metrics |= summarise(verdicts, settings.k)
    greedy = sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=0.0,
        batch_size=settings.batch_size,
        progress=f"{name}: greedy answers",
    )
    greedy_verdicts = judge(greedy, problems["tests"], problems["entry_point"], settings.timeout_s)
    metrics["pass@1_greedy"] = float(np.mean([g[0] == "pass" for g in greedy_verdicts]))
    flat = [a for group in answers for a in group]
    owners = [p for p, group in zip(prompts, answers, strict=True) for _ in group]
    flat_ids = [a for group in ids for a in group]
    heat = settings.temperature
    own, lengths = answer_logprobs(model, tokenizer, owners, flat_ids, temperature=heat)
    base = own
    if reference is not model:
        base, _ = answer_logprobs(reference, tokenizer, owners, flat_ids, temperature=heat)
    kl = (own - base).reshape(len(answers), -1).mean(axis=1)  # of each problem
    metrics["kl"] = float(kl.mean())
    metrics["kl_low"], metrics["kl_high"] = interval(kl)
    metrics["answer_tokens"] = float(lengths.mean())
    metrics["violation_rate"] = violation_rate(
        flat, load_rules(settings.safety_rules) if settings.safety_rules else None
    )
    metrics["parses"] = float(np.mean(parses_reward(owners, flat)))
    n = settings.num_samples
    raw = {"answers": answers, "verdicts": verdicts, "greedy": [g[0] for g in greedy]}
    if reward is not None:
        scores = reward(owners, flat)
        raw["rewards"] = [scores[i : i + n] for i in range(0, len(scores), n)]
        metrics["reward"] = float(np.mean(scores))
        metrics["L_RLHF"] = -metrics["reward"]
        metrics["U"] = (
            settings.alpha_sft * metrics["L_SFT"]
            + settings.beta_rlhf * metrics["L_RLHF"]
            + settings.gamma_reg * metrics["kl"]
        )
    return metrics, raw


def win_rate(scores: Sequence[Sequence[float]], parent: Sequence[Sequence[float]]) -> float:
    """Share of (problem, sample) pairs that score above the parent's; a tie counts half."""
    wins = [
        (a > b) + 0.5 * (a == b)
        for ours, theirs in zip(scores, parent, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return float(np.mean(wins))


def demonstrations_of(problems: Data) -> Dataset | None:
    """The problems' references as demonstrations, for the held-out loss; None without problems."""
    if not len(problems.dataset):
        return None
    return problems.dataset.map(
        lambda row: {"completion": [{"role": "assistant", "content": row["completion"]}]},
        remove_columns=[
            c for c in problems.dataset.column_names if c not in ("prompt", "completion")
        ],
        desc="Held-out demonstrations",
    )


def evaluate_models(
    stage: EvaluationArguments, tokenizer, problems: Data, corpora: dict[str, Data], folder: Path
) -> dict:
    """Evaluate every model of the stage; write answers.json; return flat metrics `m1/pass@1`.

    The win rate of each model is against the one before it in `stage.models`.
    """
    reference = to_device(load_policy(stage.reference, tokenizer))
    reward = load_model_reward(stage.reward_model) if stage.reward_model else None
    texts = {name: list(data.dataset["text"]) for name, data in corpora.items()}
    metrics: dict = {"problems": len(problems.dataset)}
    raw: dict = {}
    for path in stage.models:
        name = short_name(path)
        same = path == stage.reference
        model = reference if same else to_device(load_policy(path, tokenizer))
        found, raw[name] = evaluate_model(
            model,
            tokenizer,
            problems.dataset,
            texts,
            reference=reference,
            reward=reward,
            settings=stage,
            name=name,
        )
        parent = list(raw)[-2] if len(raw) > 1 else None
        if parent and reward is not None:
            found["win_rate"] = win_rate(raw[name]["rewards"], raw[parent]["rewards"])
        if parent:
            passed = {
                n: [[float(v == "pass") for v in g] for g in raw[n]["verdicts"]]
                for n in (name, parent)
            }
            found["win_rate_tests"] = win_rate(passed[name], passed[parent])
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
        print(
            f"{name}: pass@1 {found['pass@1']:.3f} "
            f"[{found['pass@1_low']:.3f}, {found['pass@1_high']:.3f}], KL {found['kl']:.3f}",
            flush=True,
        )
    rows = problems.dataset.select(range(min(stage.samples_in_report, len(problems.dataset))))
    shown = [
        {
            "prompt": text_of(row["prompt"]),
            "reference": row["completion"],
            "answers": {n: raw[n]["answers"][i][0] for n in raw},
            "verdicts": {n: raw[n]["verdicts"][i][0] for n in raw},
        }
        for i, row in enumerate(rows)
    ]
    write_json(folder / "answers.json", {"samples": shown, "all": raw})
    return metrics
