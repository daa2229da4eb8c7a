"""Policy and critic as one module, which is what `PPOTrainer` hands to `transformers.Trainer`.

One module means one wrapper for DDP, FSDP or DeepSpeed and one forward per micro batch, which is
the only way in which the gradients of the RL and the SFT loss are both right under DDP.
"""

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from codexhf.faster import states_at
from codexhf.models import backbone_of, backbone_states, base_model, evaluating, mask_arguments
from codexhf.ppo.objective import linear_logprobs, logits_logprobs
from codexhf.reward_model import classifier_class, draw_head

BLOCK_ROWS, BLOCK_BYTES = 256, 32 * 2**20
"""Logits are made this many rows at a time, or as many as fit into this memory if that is more."""
COMPILED_BLOCK_BYTES = 2**30
"""The memory where kernels are compiled, counted in float32: they hold two blocks in 16 bits."""


class PolicyOutput(NamedTuple):
    """What one forward of `PolicyAndCritic` returns; None where it was not asked for.

    N completion tokens and M values, row after row.
    """

    logprobs: Tensor | None  # (N,) float32
    entropy: Tensor | None  # (N,) float32
    values: Tensor | None  # (M,) float32
    sft_loss_sum: Tensor | None  # () cross-entropy of the demonstrations, summed


def _of_both(method: str) -> Callable:
    """Return a method that calls one of that name of the policy and of the critic."""

    def call(self: "PolicyAndCritic", **kwargs: Any) -> None:
        for model in (base_model(self.policy), base_model(self.value_model)):
            getattr(model, method)(**kwargs)

    return call


class PolicyAndCritic(nn.Module):
    """The policy and the critic, trained together.

    `forward` returns per-token numbers and never a tensor with a vocabulary dimension. Its state
    dict has two prefixes, `policy.` and `value_model.`.
    """

    main_input_name = "input_ids"
    compiled = False  # whether log-probabilities come from compiled kernels

    def __init__(
        self,
        policy: nn.Module,
        value_model: nn.Module,
        kept_logits_mb: int = 256,
        reference: nn.Module | None = None,
        vocabulary: int | None = None,
    ):
        """`vocabulary`: the policy is a distribution over the first so many ids; None: over all."""
        super().__init__()
        self.policy, self.value_model = policy, value_model
        self.config = policy.config
        self._kept_bytes = kept_logits_mb * 2**20
        self._vocabulary = vocabulary
        # set once here: a FSDP or ZeRO wrapper may hide the modules later
        self._head_is_linear = has_linear_head(policy)
        self._reference_head_is_linear = reference is None or has_linear_head(reference)

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.policy.parameters()).dtype

    @property
    def _no_split_modules(self) -> list[str]:
        """Layer classes that FSDP wraps one by one."""
        models = (base_model(self.policy), base_model(self.value_model))
        return sorted({name for model in models for name in (model._no_split_modules or [])})

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return any(getattr(m, "gradient_checkpointing", False) for m in self.modules())

    activation_checkpointing_enable = _of_both("activation_checkpointing_enable")
    activation_checkpointing_disable = _of_both("activation_checkpointing_disable")
    # their names before transformers 5.23
    is_activation_checkpointing = is_gradient_checkpointing
    gradient_checkpointing_enable = _of_both("gradient_checkpointing_enable")
    gradient_checkpointing_disable = _of_both("gradient_checkpointing_disable")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the policy's generate; FSDP2 registers this name as a forward."""
        return self.policy.generate(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        policy_at: Tensor | None,
        value_at: Tensor,
        targets: Tensor | None,
        temperature: float,
        sft: dict[str, Tensor] | None = None,
    ) -> PolicyOutput:
        """Score completions with the policy and the critic and, in the same pass, demonstrations.

        Args:
            attention_mask: (b, l) bool, or None if no padding precedes a real token.
            policy_at: (b, l) bool, True where the next token is one of `targets` (N,); None leaves
                the policy out.
            value_at: (b, l) bool, True where a value is wanted.
            sft: input_ids (S, T), predict_at (S, T) and targets of demonstrations.
        """
        logprobs = entropy = sft_loss_sum = None
        if policy_at is not None:
            logprobs, entropy = self.logprobs(
                self.policy, input_ids, attention_mask, policy_at, targets, temperature
            )
        values = self.values(input_ids, attention_mask, value_at)
        if sft is not None:
            sft_logprobs, _ = self.logprobs(
                self.policy, sft["input_ids"], None, sft["predict_at"], sft["targets"], 1.0
            )
            sft_loss_sum = -sft_logprobs.sum()
        return PolicyOutput(logprobs, entropy, values, sft_loss_sum)

    def values(self, input_ids: Tensor, attention_mask: Tensor | None, at: Tensor) -> Tensor:
        """Return the critic's values (M,) float32 where `at` (b, l) is True."""
        hidden = states_at(self.value_model, input_ids, attention_mask, at)
        return self.value_model.score(hidden).squeeze(-1).float()

    def logprobs(
        self,
        policy: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        at: Tensor,
        targets: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of `targets` (N,) and entropies, predicted where `at` is True.

        `policy` is a parameter because the reference is scored in the same way.
        """
        of_policy = policy is self.policy
        if not (self._head_is_linear if of_policy else self._reference_head_is_linear):
            logits = policy(
                input_ids=input_ids, use_cache=False, **mask_arguments(attention_mask)
            ).logits[at]
            return logits_logprobs(logits[:, : self._vocabulary], targets, temperature)
        model = base_model(policy)
        head = model.get_output_embeddings()
        hidden = states_at(model, input_ids, attention_mask, at)  # (N, H)
        weight, bias = head.weight, head.bias
        if self._vocabulary is not None and self._vocabulary < weight.size(0):
            weight = weight[: self._vocabulary]
            bias = None if bias is None else bias[: self._vocabulary]
        row = 4 * weight.size(0)  # bytes of one row of float32 logits
        size = COMPILED_BLOCK_BYTES if self.compiled else BLOCK_BYTES
        return linear_logprobs(
            hidden,
            weight,
            bias,
            targets,
            temperature,
            block=max(BLOCK_ROWS, size // row),
            keep=torch.is_grad_enabled() and hidden.size(0) * row <= self._kept_bytes,
            dtype=matmul_dtype(hidden),
            compiled=self.compiled,
        )


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which autocast would multiply `hidden`."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


@torch.no_grad()
def has_linear_head(policy: nn.Module) -> bool:
    """Return whether logits = head(backbone(x)), so that they can be made chunk by chunk.

    Some models scale or cap their logits after the head, and no configuration field says so for
    all of them. So it is tried out: the head is made to answer large numbers, which must come out
    of the model unchanged, and must have been given what the backbone returns.
    """
    if not isinstance(policy, PreTrainedModel):
        if any(config.is_prompt_learning for config in policy.peft_config.values()):
            return False
    model = base_model(policy)
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.numel() == 0 or head.weight.is_meta:
        return False
    ids = torch.tensor([[0, 1, 2]], device=head.weight.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    seen = []

    def answer(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(inputs[0])
        return torch.linspace(-1e3, 1e3, output.numel()).view_as(output).to(output)

    with evaluating(policy):
        states = backbone_states(model, ids, mask)
        hook = head.register_forward_hook(answer)
        try:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            hook.remove()
    expected = torch.linspace(-1e3, 1e3, logits.numel()).view_as(logits).to(logits)
    return len(seen) == 1 and torch.equal(logits, expected) and torch.allclose(seen[0], states)


def critic_from_policy(policy: nn.Module) -> PreTrainedModel:
    """Return a critic on a copy of the policy's trunk with a new, nearly-zero head.

    Source: Huang et al. 2024, detail 11 (arXiv:2403.17031) initialises with std 1/sqrt(H+1).
    """
    model = base_model(policy)
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    kind = classifier_class(config)
    if hasattr(kind, "from_config"):
        critic = kind.from_config(config)
    else:  # of the generic kind, which knows no other implementations of experts
        critic = kind(type(config).from_dict(config.to_dict()))
    critic = critic.to(device=model.device, dtype=model.dtype)
    weights = {
        re.sub(r"(base_layer|original_module|token_adapter)\.", "", name): weight
        for name, weight in backbone_of(model).state_dict().items()
    }
    wanted = backbone_of(critic)
    wanted.load_state_dict({name: weights[name] for name in wanted.state_dict()})
    draw_head(critic, seed=0)
    return critic
