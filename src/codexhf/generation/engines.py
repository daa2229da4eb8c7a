"""Engines that sample answers, through one small interface.

PPO builds an engine once and calls it once per rollout:

    generation = engine.generate(policy, prompt_ids, prompt_mask, seed=..., temperature=...)

All engines sample from softmax(logits / temperature) with no other filter, from their own random
stream, and leave the global random state, the policy and its generation config as they were.
"""

import importlib.util
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

from codexhf.models import base_model, nonfinite_parameter


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
    """`model.generate`, for architectures whose cache the native loop does not know."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling

    @torch.no_grad()
    def generate(self, policy, prompt_ids, prompt_mask, *, seed, temperature) -> Generation:
        """See `Engine.generate`."""
        devices = [prompt_ids.device] if prompt_ids.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            parts = [
                self._generate(policy, prompt_ids[rows], prompt_mask[rows], temperature)
                for rows in row_chunks(prompt_ids.size(0), self.sampling.chunk)
            ]
        return check_finite(join(parts), policy)

    def _generate(self, policy, prompt_ids, prompt_mask, temperature) -> Generation:
        """Answer one chunk of prompts."""
        recorder = _SampledLogprobs(temperature or 1.0, policy)
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
    if name == "continuous_batching":
        return ContinuousBatchingEngine(sampling)
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "rollout_engine: got 'vllm', but the package vllm is not installed. "
            "Install it with `pip install vllm`, or use rollout_engine='native'."
        )
    from codexhf.generation.vllm import VLLMEngine

    return VLLMEngine(sampling)


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
    """Records log p(sampled token) with the memory of one step.

    At call t + 1 the token drawn from the scores of call t is known; `finish` adds the last.
    """

    def __init__(self, temperature: float, policy: nn.Module):
        self.temperature, self.policy = temperature, policy
        self.scores, self.picked = None, []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take note of `scores` (B, V) and pass them on."""
        self._flush(input_ids[:, -1])
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
