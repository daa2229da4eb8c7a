"""Engines that sample answers, through one small interface.

PPO builds an engine once and calls it once per rollout:

    generation = engine.generate(policy, prompt_ids, prompt_mask, seed=..., temperature=...)

All engines sample from softmax(logits / temperature) with no other filter, from their own random
stream, and leave the global random state, the policy and its generation config as they were.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    __version__,
)

from codexhf.models import base_model, evaluating, nonfinite_parameter


@dataclass
class Generation:
    """Sampled answers; rows are padded on the right with token 0."""

    responses: Tensor  # (B, R)
    lengths: Tensor  # (B,) tokens of each answer, its stop token included
    logprobs: Tensor  # (B, R) float32 of the sampled tokens, 0 after the end


@dataclass(frozen=True)
class Sampling:
    """What every engine needs to know about an answer."""

    max_tokens: int
    stop_ids: tuple[int, ...]  # empty: an answer never ends early
    chunk: int  # rows at a time
    vocabulary: int | None = None
    """The first so many ids are tokens; further embeddings of a model are never sampled."""


class Engine(Protocol):
    """What the trainer expects of an engine."""

    def generate(
        self,
        policy: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        seed: int,
        temperature: float,
    ) -> Generation:
        """Answer left-padded prompts (B, P); temperature 0 is greedy."""


class HFEngine:
    """`model.generate`, for architectures whose cache the native loop does not know.

    Some of them read padding whatever the mask says; their prompts are grouped by length.
    """

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._pads: bool | None = None  # None: not tried out yet

    @torch.no_grad()
    def generate(self, policy, prompt_ids, prompt_mask, *, seed, temperature) -> Generation:
        """See `Engine.generate`."""
        devices = [prompt_ids.device] if prompt_ids.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            parts, order = [], []
            for rows, width in self._chunks(policy, prompt_mask):
                ids, mask = prompt_ids[rows, -width:], prompt_mask[rows, -width:]
                parts.append(self._generate(policy, ids, mask, temperature))
                order.append(rows)
        found, back = join(parts), torch.cat(order).argsort()
        found = Generation(found.responses[back], found.lengths[back], found.logprobs[back])
        return check_finite(found, policy)

    def _chunks(self, policy: nn.Module, mask: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Yield row numbers, and the width of their prompts with padding."""
        if self._pads is None:
            self._pads = not reads_padding(policy)
        rows = torch.arange(mask.size(0), device=mask.device)
        lengths = torch.full_like(rows, mask.size(1)) if self._pads else mask.sum(1)
        for width in lengths.unique().tolist():
            equally_long = rows[lengths == width]
            for chunk in row_chunks(len(equally_long), self.sampling.chunk):
                yield equally_long[chunk], width

    def _generate(self, policy, prompt_ids, prompt_mask, temperature) -> Generation:
        """Answer one chunk of prompts."""
        recorder = _SampledLogprobs(temperature or 1.0, policy, self.sampling.vocabulary)
        kept = base_model(policy).generation_config
        # generate fills what a config leaves unset from the model's own: give it a blank one
        base_model(policy).generation_config = GenerationConfig()
        try:
            sequences = policy.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask.long(),
                generation_config=self._config(temperature),
                logits_processor=LogitsProcessorList([recorder]),
            )
        finally:
            base_model(policy).generation_config = kept
        responses = sequences[:, prompt_ids.size(1) :]
        logprobs = recorder.finish(sequences)
        return ended_by_stop(responses, logprobs, self.sampling.stop_ids)

    def _config(self, temperature: float) -> GenerationConfig:
        """Return a config that pins every filter."""
        return GenerationConfig(
            max_new_tokens=self.sampling.max_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else 1.0,
            top_k=0,
            top_p=1.0,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(self.sampling.stop_ids) or None,
            pad_token_id=0,  # fed to ended rows: any id that has an embedding will do
        )


class ContinuousBatchingEngine:
    """`model.generate_batch`: paged cache, fast with flash attention and uneven lengths.

    Blocks are never shared between requests: shared blocks survive an update of the weights and
    serve keys and values of the old policy.
    """

    def __init__(self, sampling: Sampling, num_blocks: int = 256, page_size: int = 32):
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        known = {field.name for field in fields(ContinuousBatchingConfig)}
        if not {"page_size", "return_logprobs", "seed"} <= known:
            raise ImportError(
                f"rollout_engine: got 'continuous_batching' with transformers {__version__}, "
                "expected 5.23 or newer. Upgrade it, or use rollout_engine='native'."
            )
        self.sampling = sampling
        self.config = ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=num_blocks,
            max_batch_tokens=num_blocks * page_size,
            allow_block_sharing=False,
            return_logprobs=True,
        )

    @torch.no_grad()
    def generate(self, policy, prompt_ids, prompt_mask, *, seed, temperature) -> Generation:
        """See `Engine.generate`."""
        if self.config.allow_block_sharing:
            raise ValueError(
                "continuous_batching: got allow_block_sharing=True, expected False. Shared cache "
                "blocks outlive weight updates and answer with the old policy."
            )
        config = GenerationConfig(
            max_new_tokens=self.sampling.max_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else 1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=list(self.sampling.stop_ids) or -1,
            pad_token_id=0,  # fed to ended rows: any id that has an embedding will do
            suppress_tokens=surplus_ids(policy, self.sampling),
        )
        self.config.seed = seed
        model = base_model(policy)
        prompts = [ids[real].tolist() for ids, real in zip(prompt_ids, prompt_mask, strict=True)]
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=self.config
        )
        answers = [out for _, out in sorted(outputs.items(), key=lambda item: _order(item[0]))]
        generation = from_lists(
            [out.generated_tokens for out in answers],
            [out.logprobs for out in answers],
            prompt_ids.device,
        )
        return check_finite(generation, policy)


@torch.no_grad()
def reads_padding(policy: nn.Module) -> bool:
    """Return whether what stands under padding on the left changes the logits behind it.

    The states of RecurrentGemma's convolutions and of RWKV do not know the mask.
    """
    device = next(policy.parameters()).device
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ids = torch.tensor([[[0, 0, 0, 0, 1, 2]], [[2, 1, 2, 0, 1, 2]]], device=device)
    takes = inspect.signature(base_model(policy).forward).parameters
    given = {"position_ids": positions} if "position_ids" in takes else {}
    with evaluating(policy):
        one, two = (
            policy(input_ids=row, attention_mask=mask, use_cache=False, **given).logits[:, -3:]
            for row in ids
        )
    return not torch.allclose(one, two, rtol=1e-3, atol=1e-5)


def surplus_ids(policy: nn.Module, sampling: Sampling) -> list[int] | None:
    """Return the ids that the policy's head scores and the tokenizer does not know."""
    scored = base_model(policy).config.get_text_config().vocab_size
    return list(range(sampling.vocabulary or scored, scored)) or None


def _order(request_id: str) -> int:
    """Return the position of a request in its batch, which ends its id."""
    return int(request_id.rsplit("_", 1)[-1])


def from_lists(tokens: list[list[int]], logprobs: list[list[float]], device) -> Generation:
    """Return ragged answers as one padded Generation."""
    lengths = torch.tensor([len(row) for row in tokens], device=device)
    width = int(lengths.max())
    responses = torch.zeros(len(tokens), width, dtype=torch.long, device=device)
    picked = torch.zeros(len(tokens), width, dtype=torch.float32, device=device)
    for i, (ids, values) in enumerate(zip(tokens, logprobs, strict=True)):
        responses[i, : len(ids)] = torch.tensor(ids, device=device)
        picked[i, : len(ids)] = torch.tensor(values[: len(ids)], device=device)
    return Generation(responses, lengths, picked)


def make_engine(name: str, sampling: Sampling, cuda_graphs: bool = True) -> Engine:
    """Return the engine of that name, or say what is missing for it."""
    if name == "native":
        from codexhf.generation.native import NativeEngine

        return NativeEngine(sampling, fixed_shapes=None if cuda_graphs else False)
    if name == "hf":
        return HFEngine(sampling)
    return ContinuousBatchingEngine(sampling)


def ended_by_stop(responses: Tensor, logprobs: Tensor, stop_ids: tuple[int, ...]) -> Generation:
    """Cut responses (B, R) after their first stop token."""
    width = responses.size(1)
    lengths = torch.full((responses.size(0),), width, device=responses.device)
    if stop_ids:
        stops = torch.tensor(stop_ids, device=responses.device)
        lengths = first_true(torch.isin(responses, stops)).add(1).clamp(max=width)
    real = torch.arange(width, device=responses.device) < lengths[:, None]
    return Generation(responses * real, lengths, logprobs * real)


def check_finite(generation: Generation, policy: nn.Module) -> Generation:
    """Return what was sampled, or stop where the logits behind it were not finite.

    Raises:
        FloatingPointError: with the first parameter of the policy that is not finite, if any.
    """
    if not torch.isfinite(generation.logprobs).all():
        raise_not_finite(policy)
    return generation


def raise_not_finite(policy: nn.Module) -> None:
    """Say that the policy's logits are not finite, and which parameter is at fault."""
    culprit = nonfinite_parameter(policy)
    told = "" if culprit is None else f": its parameter {culprit} does"
    raise FloatingPointError(
        f"sampling: the logits of {type(base_model(policy)).__name__} hold NaN or infinity{told}. "
        "Take an earlier checkpoint, or lower learning_rate."
    )


def first_true(mask: Tensor) -> Tensor:
    """Return the index (B,) of the first True in each row of `mask` (B, R), R where none is."""
    return torch.where(mask.any(1), mask.int().argmax(1), mask.size(1))


def row_chunks(count: int, size: int) -> list[slice]:
    """Cut `count` rows into slices of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def join(parts: list[Generation]) -> Generation:
    """Concatenate generations of different widths."""
    width = max(part.responses.size(1) for part in parts)

    def widen(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, width - x.size(1)))

    return Generation(
        torch.cat([widen(part.responses) for part in parts]),
        torch.cat([part.lengths for part in parts]),
        torch.cat([widen(part.logprobs) for part in parts]),
    )


class _SampledLogprobs(LogitsProcessor):
    """Leaves the scores of tokens alone, and records log p(sampled token).

    At call t + 1 the token drawn from the scores of call t is known; `finish` adds the last. So
    it takes the memory of one step.
    """

    def __init__(self, temperature: float, policy: nn.Module, vocabulary: int | None):
        self.temperature, self.policy, self.vocabulary = temperature, policy, vocabulary
        self.scores, self.picked = None, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take note of `scores` (B, V) and pass on those of tokens."""
        self._flush(input_ids[:, -1])
        scores = scores[:, : self.vocabulary]
        self.scores = scores / self.temperature
        self.normaliser = torch.logsumexp(self.scores, -1)
        if not torch.isfinite(self.normaliser).all():  # else torch.multinomial fails unexplained
            raise_not_finite(self.policy)
        return scores

    def _flush(self, tokens: Tensor) -> None:
        if self.scores is not None:
            picked = self.scores.gather(-1, tokens[:, None]).squeeze(1)
            self.picked.append(picked - self.normaliser)

    def finish(self, sequences: Tensor) -> Tensor:
        """Return log-probabilities (B, R) of the generated part of `sequences`."""
        self._flush(sequences[:, -1])
        return torch.stack(self.picked, 1)
