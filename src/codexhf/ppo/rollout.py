"""A rollout: prompts in, answers with their rewards, values and advantages out.

`codexhf.ppo.trainer` calls, in this order, `PromptEncoder.encode`, an engine, `Scorer.score` and
`advantages`. Shapes: B rows, P prompt columns, R response columns, L = P + R.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from codexhf.ppo.config import PPOConfig
from codexhf.ppo.engines import first_true, row_chunks
from codexhf.ppo.model import backbone_states, check_scalar_head
from codexhf.ppo.objective import (
    Reduce,
    generalized_advantages,
    kl_estimate,
    overlong_penalty,
    token_rewards,
    whiten,
)
from codexhf.rewards import RewardSum

NOT_REWARD_COLUMNS = ("prompt", "input_ids", "attention_mask", "token_type_ids", "completion")


@dataclass
class Rollout:
    """Everything the updates of one rollout read; one row per answer of this process."""

    input_ids: Tensor  # (B, L) prompts left-padded, answers right-padded, both with token 0
    mask: Tensor  # (B, L) bool
    response_mask: Tensor  # (B, R) bool, the stop token included
    value_mask: Tensor  # (B, R) bool
    logprobs: Tensor  # (B, R) float32 of the sampling policy
    ref_logprobs: Tensor  # (B, R) float32
    values: Tensor  # (B, R) float32
    advantages: Tensor  # (B, R) float32
    returns: Tensor  # (B, R) float32
    importance: Tensor  # (B, R) float32 weights, 1 unless importance_cap is set

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name, to be saved."""
        return {f.name: getattr(self, f.name).contiguous() for f in fields(self)}

    def rows(self, index: Tensor, trim: bool) -> "Rollout":
        """Return some rows; with `trim`, without the columns in which all of them are padding."""
        picked = {name: tensor[index] for name, tensor in self.tensors().items()}
        if not trim:
            return Rollout(**picked)
        width = self.response_mask.size(1)
        start = int(first_true(picked["mask"].any(0)[None]))
        used = int((picked["response_mask"] | picked["value_mask"]).any(0).sum())
        end = picked["mask"].size(1) - width + max(used, 1)
        for name, tensor in picked.items():
            whole_row = name in ("input_ids", "mask")
            picked[name] = tensor[:, start:end] if whole_row else tensor[:, : max(used, 1)]
        return Rollout(**picked)


class PromptEncoder:
    """Turns data set rows into token ids: `input_ids`, text, or messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int, limit: int | None):
        """`room` tokens are kept free for the answer within the `limit` of the model."""
        self.tokenizer, self.room, self.limit = tokenizer, room, limit

    def ids(self, row: Mapping[str, Any], number: int | None = None) -> list[int]:
        """Return the prompt of a row as token ids.

        Raises:
            ValueError: no prompt in the row, an empty one, or one that leaves no room.
        """
        if row.get("input_ids") is not None:
            ids = list(row["input_ids"])
        elif row.get("prompt") is not None:
            ids = self.encode_prompt(row["prompt"])
        else:
            raise ValueError(
                f"row {number}: got columns {sorted(row)}, expected `prompt` (text or messages) or "
                "`input_ids`."
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

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Return the ids of a text, or of messages rendered with the chat template."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        return self.tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    def encode_demonstration(self, row: Mapping[str, Any], number: int) -> tuple[list[int], int]:
        """Return ids of prompt and completion, and how many of them are prompt."""
        prompt, completion = _demonstration(row, number)
        start = self.encode_prompt(prompt)
        if isinstance(completion, str):
            text = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
            return [*start, *text, self.tokenizer.eos_token_id], len(start)
        whole = self.tokenizer.apply_chat_template(
            [*prompt, *completion], tokenize=True, return_dict=False
        )
        if whole[: len(start)] != start:
            raise ValueError(
                f"sft_dataset row {number}: the chat template renders the prompt differently with "
                "its answer than alone, expected the same beginning. Mend the template."
            )
        return whole, len(start)

    def texts(self, rows: Sequence[Mapping[str, Any]], ids: Sequence[list[int]]) -> list[Any]:
        """Return the prompts as reward functions get them: text, or messages as they are."""
        return [
            row["prompt"]
            if row.get("prompt") is not None
            else self.tokenizer.decode(prompt, skip_special_tokens=True)
            for row, prompt in zip(rows, ids, strict=True)
        ]

    def answers(self, responses: Tensor, lengths: Tensor) -> list[str]:
        """Return responses (B, R) as text, without special tokens."""
        ids = [row[:n].tolist() for row, n in zip(responses, lengths.tolist(), strict=True)]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)


def _demonstration(row: Mapping[str, Any], number: int) -> tuple[Any, Any]:
    """Return prompt and completion of a demonstration; `messages` split before the last one."""
    if row.get("messages"):
        return row["messages"][:-1], row["messages"][-1:]
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        raise ValueError(
            f"sft_dataset row {number}: got columns {sorted(row)}, expected `prompt` and "
            "`completion`, or `messages`."
        )
    if not isinstance(prompt, str) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    return prompt, completion


def left_pad(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids (B, P), padded on the left with 0, and their mask."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    return ids.to(device), mask.to(device)


def demonstration_batch(rows: Sequence[tuple[list[int], int]], limit: int, device) -> dict:
    """Return right-padded demonstrations: input_ids, attention_mask, target_mask (S, T)."""
    cut = [(ids[:limit], start) for ids, start in rows]
    width = max(len(ids) for ids, _ in cut)
    ids = torch.zeros(len(cut), width, dtype=torch.long)
    mask = torch.zeros(len(cut), width, dtype=torch.bool)
    target = torch.zeros(len(cut), width, dtype=torch.bool)
    for i, (row, start) in enumerate(cut):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = True
        target[i, max(start, 1) : len(row)] = True
    batch = {"input_ids": ids, "attention_mask": mask, "target_mask": target}
    return {name: tensor.to(device) for name, tensor in batch.items()}


class IdReward:
    """A reward model that reads the policy's own token ids, which saves tokenising again.

    It takes part in a RewardSum like any reward: `read` is called first, with ids, and the call
    with text returns what was read.
    """

    def __init__(self, model: nn.Module, name: str, normalize: bool):
        check_scalar_head(model, name)
        self.model, self.__name__ = model, name
        self.mean = getattr(model.config, "score_mean", 0.0) if normalize else 0.0
        self.std = getattr(model.config, "score_std", 1.0) if normalize else 1.0
        self.scores: list[float] = []

    @torch.no_grad()
    def read(self, input_ids: Tensor, mask: Tensor, last: Tensor, chunk: int) -> None:
        """Score rows (B, L) at the column `last` (B,) of their last real token."""
        self.scores = []
        for rows in row_chunks(input_ids.size(0), chunk):
            hidden = backbone_states(self.model, input_ids[rows], mask[rows])
            picked = hidden[torch.arange(hidden.size(0), device=hidden.device), last[rows]]
            scores = (self.model.score(picked).squeeze(-1).float() - self.mean) / self.std
            self.scores += scores.tolist()

    def __call__(
        self, prompts: Sequence, completions: Sequence[str], **columns: Any
    ) -> list[float]:
        """Return what `read` found."""
        return self.scores


@dataclass
class Answers:
    """What rewards are computed from; produced by an engine and completed by `mark`."""

    prompt_ids: Tensor  # (B, P)
    prompt_mask: Tensor  # (B, P)
    responses: Tensor  # (B, R)
    lengths: Tensor  # (B,)
    ended: Tensor  # (B,) bool, by a stop token
    logprobs: Tensor  # (B, R) of the engine

    @property
    def response_mask(self) -> Tensor:
        """(B, R) bool, True on real tokens of the answer."""
        columns = torch.arange(self.responses.size(1), device=self.responses.device)
        return columns < self.lengths[:, None]

    @property
    def input_ids(self) -> Tensor:
        """(B, L) prompts and answers."""
        return torch.cat([self.prompt_ids, self.responses * self.response_mask], 1)

    @property
    def mask(self) -> Tensor:
        """(B, L) bool."""
        return torch.cat([self.prompt_mask, self.response_mask], 1)

    @property
    def last(self) -> Tensor:
        """(B,) column of the last real token in input_ids."""
        return self.prompt_ids.size(1) + self.lengths - 1


def mark(
    generation, prompt_ids: Tensor, prompt_mask: Tensor, args: PPOConfig, stop_ids, pad_id, eos_id
) -> Answers:
    """Say which tokens are real and which answers ended, by the rules that `args` names."""
    responses, lengths = generation.responses, generation.lengths
    real = torch.arange(responses.size(1), device=responses.device) < lengths[:, None]
    ends = (eos_id,) if args.missing_eos_check == "eos_token" or not stop_ids else stop_ids
    ended = (torch.isin(responses, torch.tensor(ends, device=responses.device)) & real).any(1)
    if args.masks_from == "pad_token":
        # TRL's rule: a pad token is padding wherever it stands, also one the policy sampled
        prompt_mask = prompt_mask & (prompt_ids != pad_id)
        prompt_ids = prompt_ids * prompt_mask
        lengths = torch.minimum(lengths, first_true((responses == pad_id) & real))
    return Answers(prompt_ids, prompt_mask, responses, lengths, ended, generation.logprobs)


class Scorer:
    """Scores answers with all rewards of a run; one for training, one for evaluation."""

    def __init__(self, rewards: RewardSum, encoder: PromptEncoder, chunk: int):
        self.rewards, self.encoder, self.chunk = rewards, encoder, chunk

    def score(
        self, rows: Sequence[Mapping[str, Any]], ids: Sequence[list[int]], answers: Answers
    ) -> tuple[Tensor, dict[str, list[float | None]], list[str]]:
        """Return total scores (B,), the values of each reward by name, and the answers' texts."""
        for reward in self.rewards.rewards:
            if isinstance(reward, IdReward):
                reward.read(answers.input_ids, answers.mask, answers.last, self.chunk)
        texts = self.encoder.answers(answers.responses, answers.lengths)
        columns = {
            name: [row[name] for row in rows] for name in rows[0] if name not in NOT_REWARD_COLUMNS
        }
        scored = self.rewards(self.encoder.texts(rows, ids), texts, **columns)
        total = torch.tensor(scored.total, dtype=torch.float32, device=answers.responses.device)
        return total, scored.parts, texts


def shape_scores(scores: Tensor, answers: Answers, args: PPOConfig) -> Tensor:
    """Return scores (B,) clipped and with the penalties for answers that ran too long."""
    if args.score_clip is not None:
        scores = scores.clamp(-args.score_clip, args.score_clip)
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * (~answers.ended)
    if args.overlong_penalty > 0:
        scores = scores + overlong_penalty(
            answers.lengths, args.response_length, args.overlong_buffer, args.overlong_penalty
        )
    return scores


def advantages(
    answers: Answers,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    args: PPOConfig,
    kl_coef: float,
    reduce: Reduce | None,
) -> dict[str, Tensor]:
    """Return value_mask, values, advantages and returns (B, R), and the KL (B, R).

    Args:
        scores: (B,) shaped scores.
        logprobs, ref_logprobs, values: (B, R).
        kl_coef: of the KL in the reward; 0 when it is in the loss.
        reduce: sums over processes for global whitening.
    """
    real, width = answers.response_mask, answers.responses.size(1)
    end, value_mask = (answers.lengths - 1).clamp(min=0), real
    if args.reward_position == "after_eos":
        end = torch.where(answers.lengths < width, answers.lengths, answers.lengths - 1)
        columns = torch.arange(width, device=real.device)
        value_mask = columns <= answers.lengths[:, None]
    kl = kl_estimate(logprobs, ref_logprobs, args.kl_estimator) * real
    rewards = token_rewards(kl, kl_coef, scores, end)
    if args.whiten_rewards:
        rewards = whiten(rewards, value_mask, shift_mean=False, reduce=reduce) * value_mask
    values = values * value_mask
    raw, returns = generalized_advantages(rewards, values, args.gamma, args.lam)
    return {
        "value_mask": value_mask,
        "values": values,
        "advantages": whiten(raw, real, reduce=reduce) * real,
        "returns": returns,
        "kl": kl,
    }


def in_chunks(function: Callable[..., Any], count: int, size: int, *tensors: Tensor) -> Any:
    """Call `function` on chunks of rows of `tensors` and concatenate what it returns."""
    return torch.cat([function(*(t[rows] for t in tensors)) for rows in row_chunks(count, size)])
