"""vLLM in the training process as one of the engines; needs `pip install vllm`."""

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from codexhf.generation.engines import Generation, Sampling, check_finite, from_lists, surplus_ids

MEMORY_SHARE = 0.3
"""Of the GPU, for vLLM's weights and cache; the rest is the training's."""


class VLLMEngine:
    """Keeps a copy of the policy inside vLLM and loads the new weights before every rollout."""

    def __init__(self, sampling: Sampling):
        self.sampling, self._llm = sampling, None

    @torch.no_grad()
    def generate(
        self,
        policy: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        seed: int,
        temperature: float,
    ) -> Generation:
        """See `codexhf.generation.engines.Engine.generate`."""
        from vllm import SamplingParams

        if not isinstance(policy, PreTrainedModel):
            raise ValueError(
                "rollout_engine: got 'vllm' with an adapter, expected a full policy. "
                "Use rollout_engine='native'."
            )
        llm = self._updated(policy)
        prompts = [ids[real].tolist() for ids, real in zip(prompt_ids, prompt_mask, strict=True)]
        allowed = self.sampling.vocabulary if surplus_ids(policy, self.sampling) else None
        params = [
            SamplingParams(
                max_tokens=self.sampling.max_tokens,
                temperature=temperature,
                top_k=-1,
                top_p=1.0,
                seed=(seed + row) % 2**31,
                stop_token_ids=list(self.sampling.stop_ids),
                ignore_eos=True,  # stop_token_ids says what ends an answer
                logprobs=0,
                allowed_token_ids=None if allowed is None else list(range(allowed)),
                detokenize=False,
            )
            for row in range(len(prompts))
        ]
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        answers = [out.outputs[0] for out in llm.generate(requests, params, use_tqdm=False)]
        tokens = [list(answer.token_ids) for answer in answers]
        logprobs = [
            [step[token].logprob for step, token in zip(answer.logprobs, ids, strict=True)]
            for answer, ids in zip(answers, tokens, strict=True)
        ]
        return check_finite(from_lists(tokens, logprobs, prompt_ids.device), policy)

    def _updated(self, policy: PreTrainedModel):
        """Return the vLLM model with the weights of `policy`."""
        if self._llm is None:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are shared here
            from vllm import LLM

            self._llm = LLM(
                model=policy.config.name_or_path,
                skip_tokenizer_init=True,
                gpu_memory_utilization=MEMORY_SHARE,
                enable_prefix_caching=False,  # cached blocks would outlive the weights
                logprobs_mode="processed_logprobs",
            )
        executor = self._llm.llm_engine.model_executor
        executor.driver_worker.model_runner.model.load_weights(_weights(policy))
        return self._llm


def _weights(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors as a checkpoint has them."""
    for name, parameter in policy.named_parameters():
        yield name, parameter.data
