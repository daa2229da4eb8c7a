"""A rollout: prompts in, completions with their rewards, values and advantages out.

sampling.py calls, in this order, `PromptEncoder.ids`, an engine, `mark`, `Scorer.running_tests` (on
a GPU), `Scorer.score` and `advantages`. Shapes: B rows, P prompt columns, R response columns,
L = P + R; b rows of l columns are a part of them as a model reads it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from codexhf.generation.engines import Generation, first_true, row_chunks
from codexhf.ppo.config import PPOConfig
from codexhf.ppo.objective import (
    Reduce,
    generalized_advantages,
    kl_estimate,
    overlong_penalty,
    token_rewards,
    whiten,
)
from codexhf.prompts import answered_ids, decode, prompt_ids, prompt_ids_batch, right_pad
from codexhf.reward_model import IdReward
from codexhf.rewards import RewardSum, UnitTestsReward

CHECKED_ROWS = 1000
"""Prompts tokenised at a time when a data set is checked."""

NOT_REWARD_COLUMNS = ("prompt", "input_ids", "attention_mask", "token_type_ids", "completion")


@dataclass
class Layout:
    """Rows as a model reads them, and where in them its hidden states are wanted."""

    input_ids: Tensor  # (b, l)
    attention_mask: Tensor | None  # (b, l) bool; None: no padding before a real token
    policy_at: Tensor  # (b, l) bool, True where the next token belongs to the completion
    value_at: Tensor  # (b, l) bool, True where a value is wanted
    last: Tensor  # (b,) column of the last real token


@dataclass
class Sequences:
    """Prompts padded on the left and completions padded on the right, one row each."""

    input_ids: Tensor  # (B, L) padded with token 0
    mask: Tensor  # (B, L) bool
    response_mask: Tensor  # (B, R) bool, the stop token included
    value_mask: Tensor  # (B, R) bool

    def layout(self, index: Tensor, trim: bool) -> Layout:
        """Return rows for a forward; `trim` moves them flush left and needs no attention mask.

        Flush left, padding only follows real tokens, which causal attention never looks at, and
        the width is that of the longest row rather than longest prompt plus longest completion.
        """
        ids, mask = self.input_ids[index], self.mask[index]  # (b, L)
        policy_at = self._sources(self.response_mask[index], mask)
        value_at = self._sources(self.value_mask[index], mask)
        columns = torch.arange(mask.size(1), device=mask.device)
        last = (columns * mask).amax(1)
        if not trim:
            return Layout(ids, mask, policy_at, value_at, last)
        start = first_true(mask)
        last = last - start
        columns = columns[: int(last.max()) + 1] + start[:, None]  # (b, l)
        real = columns < mask.size(1)
        columns = columns.clamp(max=mask.size(1) - 1)  # nothing is wanted of the last column
        real = real & mask.gather(1, columns)
        return Layout(
            input_ids=ids.gather(1, columns) * real,
            attention_mask=None,
            policy_at=policy_at.gather(1, columns),
            value_at=value_at.gather(1, columns),
            last=last,
        )

    def _sources(self, wanted: Tensor, mask: Tensor) -> Tensor:
        """Return (b, L) True one column before each wanted position of the completion (b, R)."""
        sources = torch.zeros_like(mask)
        width = wanted.size(1)
        sources[:, -width - 1 : -1] = wanted
        return sources

    def batches(self, size: int, trim: bool) -> Iterator[tuple[Tensor, Layout]]:
        """Yield row numbers and layouts of `size` rows; with `trim`, in order of length."""
        order = torch.arange(self.mask.size(0), device=self.mask.device)
        if trim:
            order = self.by_length(order)
        for rows in row_chunks(len(order), size):
            yield order[rows], self.layout(order[rows], trim)

    def by_length(self, index: Tensor) -> Tensor:
        return index[self.mask[index].sum(1).argsort(stable=True)]


@dataclass
class MicroBatch:
    """What one forward and its loss read. N completion tokens and M values, row after row."""

    layout: Layout
    targets: Tensor  # (N,) the completions' tokens
    logprobs: Tensor  # (N,) float32 of the sampling policy
    ref_logprobs: Tensor  # (N,) float32
    advantages: Tensor  # (N,) float32
    importance: Tensor  # (N,) float32
    values: Tensor  # (M,) float32 at sampling time
    returns: Tensor  # (M,) float32


@dataclass
class Rollout(Sequences):
    """Everything the updates of one rollout read; one row per completion of this process."""

    logprobs: Tensor  # (B, R) float32 of the sampling policy
    ref_logprobs: Tensor  # (B, R) float32
    values: Tensor  # (B, R) float32
    advantages: Tensor  # (B, R) float32
    returns: Tensor  # (B, R) float32
    importance: Tensor  # (B, R) float32 weights, 1 unless importance_cap is set

    @classmethod
    def of_longest(cls, rows: int, prompt: int, response: int, device: torch.device) -> "Rollout":
        """Return rows of token 0 that all have so many tokens: as much as rows can be."""
        mask = torch.ones(rows, prompt + response, dtype=torch.bool, device=device)
        ends, numbers = mask[:, prompt:], torch.zeros(rows, response, device=device)
        own = dict.fromkeys(cls.__annotations__, numbers)
        return cls(torch.zeros_like(mask, dtype=torch.long), mask, ends, ends, **own)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name, to be saved."""
        return {f.name: getattr(self, f.name).contiguous() for f in fields(self)}

    def micro_batch(self, index: Tensor, trim: bool) -> MicroBatch:
        real, value = self.response_mask[index], self.value_mask[index]
        responses = self.input_ids[index][:, -real.size(1) :]
        return MicroBatch(
            layout=self.layout(index, trim),
            targets=responses[real],
            logprobs=self.logprobs[index][real],
            ref_logprobs=self.ref_logprobs[index][real],
            advantages=self.advantages[index][real],
            importance=self.importance[index][real],
            values=self.values[index][value],
            returns=self.returns[index][value],
        )


@dataclass
class PromptEncoder:
    """Turns data set rows into token ids: `input_ids`, text, or messages."""

    tokenizer: PreTrainedTokenizerBase
    room: int  # tokens that stay free for the completion ...
    limit: int | None  # ... of those that the models can read
    pad_id: int | None = None  # `input_ids` that begin or end with it need a mask
    vocabulary: float = math.inf  # ids from here on are refused

    def ids(self, row: Mapping[str, Any], number: int | None = None) -> list[int]:
        """Return the prompt of a row as token ids.

        Raises:
            ValueError: no prompt in the row, an empty one, or one that leaves no room.
        """
        if row.get("input_ids") is not None:
            ids = self._without_padding(row, number)
        elif row.get("prompt") is not None:
            ids = prompt_ids(row["prompt"], self.tokenizer)
        else:
            raise ValueError(
                f"row {number}: got columns {sorted(row)}, expected `prompt` (text or messages) or "
                "`input_ids`."
            )
        unknown = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if unknown is not None:
            raise ValueError(
                f"row {number}: got a prompt with the id {unknown}, expected ids from 0 to "
                f"{self.vocabulary - 1}. Tokenise with the policy's tokenizer."
            )
        if not ids:
            raise ValueError(f"row {number}: got a prompt without tokens, expected at least one.")
        if self.limit is not None and len(ids) + self.room > self.limit:
            raise ValueError(
                f"row {number}: got a prompt of {len(ids)} tokens, expected at most "
                f"{self.limit - self.room}: the policy has {self.limit} positions and "
                f"response_length is {self.room}. Drop long prompts or lower response_length."
            )
        return ids

    def errors(self, dataset: Any, name: str) -> list[str]:
        """Return what is wrong with the first unfit prompt of a data set, and how many are unfit.

        Tokenises in batches; `ids` judges each row that looks unfit by its length.
        """
        found = []
        longest = math.inf if self.limit is None else self.limit - self.room
        for number, (row, length) in enumerate(self.with_lengths(dataset)):
            if length is None or not 0 < length <= longest:
                try:
                    self.ids(row, number)
                except ValueError as error:
                    found.append(str(error))
        more = f" ({len(found)} of {len(dataset)} rows cannot be used.)" if len(found) > 1 else ""
        return [f"{name} {found[0]}{more}"] if found else []

    def with_lengths(self, dataset: Any) -> Iterator[tuple[dict, int | None]]:
        """Yield each row with the tokens of its text or message prompt; None for other rows."""
        for chunk in row_chunks(len(dataset), CHECKED_ROWS):
            rows = [dataset[i] for i in range(chunk.start, chunk.stop)]
            lengths: list[int | None] = [None] * len(rows)
            prompts = [
                None if row.get("input_ids") is not None else row.get("prompt") for row in rows
            ]
            for kind in (str, list):  # text, messages
                where = [i for i, p in enumerate(prompts) if isinstance(p, kind) and p != []]
                if where:
                    ids = prompt_ids_batch([prompts[i] for i in where], self.tokenizer)
                    for i, row_ids in zip(where, ids, strict=True):
                        lengths[i] = len(row_ids)
            yield from zip(rows, lengths, strict=True)

    def _without_padding(self, row: Mapping[str, Any], number: int | None) -> list[int]:
        """Return the real tokens of a tokenised prompt, as its attention_mask tells them."""
        ids, mask = list(row["input_ids"]), row.get("attention_mask")
        if mask is not None:
            return [token for token, real in zip(ids, mask, strict=True) if real]
        if ids and self.pad_id is not None and self.pad_id in (ids[0], ids[-1]):
            raise ValueError(
                f"row {number}: got input_ids padded with {self.pad_id} and no attention_mask, "
                "expected tokens of the prompt alone. Tokenise without padding, or keep the mask."
            )
        return ids

    def encode_demonstration(self, row: Mapping[str, Any], number: int) -> tuple[list[int], int]:
        """Return ids of prompt and completion, and how many of them are prompt.

        The last of `messages` is the completion.
        """
        prompt, completion = row.get("prompt"), row.get("completion")
        if row.get("messages"):
            prompt, completion = row["messages"][:-1], row["messages"][-1:]
        if prompt is None or completion is None:
            raise ValueError(
                f"sft_dataset row {number}: got columns {sorted(row)}, expected `prompt` and "
                "`completion`, or `messages`."
            )
        return answered_ids(prompt, completion, self.tokenizer)

    def texts(self, rows: Sequence[Mapping[str, Any]], ids: Sequence[list[int]]) -> list[Any]:
        """Return the prompts as reward functions get them: text, or messages as they are."""
        return [
            row["prompt"]
            if row.get("prompt") is not None
            else self.tokenizer.decode(prompt, skip_special_tokens=True)
            for row, prompt in zip(rows, ids, strict=True)
        ]

    def decode(self, responses: Tensor, lengths: Tensor) -> list[str]:
        """Return responses (B, R) as text, without special tokens."""
        ids = [row[:n].tolist() for row, n in zip(responses, lengths.tolist(), strict=True)]
        return decode(ids, self.tokenizer)


def demonstration_batch(rows: Sequence[tuple[list[int], int]], limit: int, device) -> dict:
    """Return right-padded demonstrations: input_ids, predict_at (S, T) and targets (N,)."""
    ids, mask = right_pad([ids[:limit] for ids, _ in rows], "cpu")
    starts = torch.tensor([max(start, 1) for _, start in rows])
    learned = mask & (torch.arange(ids.size(1)) >= starts[:, None])
    # predicted one column before; the first column is never learned
    batch = {"input_ids": ids, "predict_at": learned.roll(-1, 1), "targets": ids[learned]}
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass
class Completions(Sequences):
    """What an engine produced, with the rules of the configuration applied by `mark`."""

    responses: Tensor  # (B, R)
    lengths: Tensor  # (B,)
    ended: Tensor  # (B,) bool, by a stop token
    logprobs: Tensor  # (B, R) float32 of the engine


def mark(
    generation: Generation,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    args: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: tuple[int, ...],
) -> Completions:
    """Say which tokens are real and which completions ended, by the rules that `args` names."""
    responses, lengths = generation.responses, generation.lengths
    width = responses.size(1)
    columns = torch.arange(width, device=responses.device)
    real = columns < lengths[:, None]
    by_eos = args.missing_eos_check == "eos_token" or not stop_ids
    ends = (tokenizer.eos_token_id,) if by_eos else stop_ids
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    if None not in ends:
        ended = (torch.isin(responses, torch.tensor(ends, device=responses.device)) & real).any(1)
    if args.masks_from == "pad_token":
        # TRL's rule: a pad token is padding wherever it stands, also one the policy sampled
        prompt_mask = prompt_mask & (prompt_ids != tokenizer.pad_token_id)
        prompt_ids = prompt_ids * prompt_mask
        padding = (responses == tokenizer.pad_token_id) & real
        lengths = torch.minimum(lengths, first_true(padding))
        real = columns < lengths[:, None]
    value_mask = real if args.reward_position == "eos" else columns <= lengths[:, None]
    return Completions(
        input_ids=torch.cat([prompt_ids, responses * real], 1),
        mask=torch.cat([prompt_mask, real], 1),
        response_mask=real,
        value_mask=value_mask,
        responses=responses,
        lengths=lengths,
        ended=ended,
        logprobs=generation.logprobs * real,
    )


@dataclass
class Scorer:
    """Scores completions with all rewards of a run; one for training, one for evaluation."""

    rewards: RewardSum
    encoder: PromptEncoder
    size: int  # rows per forward
    trim: bool

    def score(
        self, rows: Sequence[Mapping[str, Any]], ids: Sequence[list[int]], completions: Completions
    ) -> tuple[Tensor, dict[str, list[float | None]], list[str]]:
        """Return total scores (B,), each reward's values by name, and the completions as text."""
        for reward in self.rewards.rewards:
            if isinstance(reward, IdReward):
                batches = completions.batches(self.size, self.trim)
                reward.read(completions.mask.size(0), batches)
        texts = self.encoder.decode(completions.responses, completions.lengths)
        scored = self.rewards(self.encoder.texts(rows, ids), texts, **_columns(rows))
        total = torch.tensor(scored.total, dtype=torch.float32, device=completions.responses.device)
        return total, scored.parts, texts

    @contextmanager
    def running_tests(
        self, rows: Sequence[Mapping[str, Any]], completions: Completions
    ) -> Iterator[None]:
        """Run unit tests while the body does something else; `score` there waits for them."""
        with ExitStack() as running:
            for reward in self.rewards.rewards:
                if isinstance(reward, UnitTestsReward):
                    texts = self.encoder.decode(completions.responses, completions.lengths)
                    running.enter_context(reward.running(texts, **_columns(rows)))
            yield


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Return the columns of the prompts' rows that rewards get."""
    names = [name for name in rows[0] if name not in NOT_REWARD_COLUMNS]
    return {name: [row[name] for row in rows] for name in names}


def shape_scores(scores: Tensor, completions: Completions, args: PPOConfig) -> Tensor:
    """Return scores (B,) clipped and with the penalties for completions that ran too long."""
    if args.score_clip is not None:
        scores = scores.clamp(-args.score_clip, args.score_clip)
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * (~completions.ended)
    if args.overlong_penalty > 0:
        scores = scores + overlong_penalty(
            completions.lengths, args.response_length, args.overlong_buffer, args.overlong_penalty
        )
    return scores


def advantages(
    completions: Completions,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    args: PPOConfig,
    kl_coef: float,
    reduce: Reduce | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return advantages, returns and the KL, each (B, R).

    Args:
        scores: (B,) shaped scores.
        logprobs, ref_logprobs: (B, R) of sampling policy and reference, 0 outside response_mask.
        values: (B, R), 0 outside value_mask.
        kl_coef: of the KL in the reward; 0 when it is in the loss.
        reduce: sums over processes for global whitening.
    """
    real, value_mask = completions.response_mask, completions.value_mask
    kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator)
    # the last position that has a value: the last token, or the one after it where TRL put it
    end = value_mask.sum(1).clamp(min=1) - 1
    rewards = token_rewards(kl, kl_coef, scores, end)
    if args.whiten_rewards:
        rewards = whiten(rewards, value_mask, shift_mean=False, reduce=reduce) * value_mask
    raw, returns = generalized_advantages(rewards, values, args.gamma, args.lam)
    return whiten(raw, real, reduce=reduce) * real, returns, kl
