"""What makes training faster on a GPU: compiled layers, and nothing computed for padding.

A batch (B, L) says by its mask, or by positions that start again, which of its tokens belong
together. Within a model that `skip_padding` changed the layers read the real tokens as one row,
and flash attention is told where each document begins: there is no mask in memory.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import TrainerCallback
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from codexhf.models import (
    backbone_of,
    backbone_states,
    base_model,
    compile_layers,
    evaluating,
    position_ids,
)
from codexhf.sharding import is_sharded

DOCUMENTS = "documents"
"""The name under which transformers knows `attend_documents`."""

SAME_STATES = 0.05
"""Largest relative difference of hidden states: bfloat16 rounds, no more."""


def attend_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return causal attention (1, T, heads, D) within documents; an attention of transformers.

    Args:
        query: (1, heads, T, D).
        key: (1, groups, T, D), where groups divides heads.
        value: (1, groups, T, D).
        cu_seq_lens_q: (documents + 1,) int32, where each begins, and T.
        max_length_q: tokens of the longest, or more.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if kind == "cuda":
        rows = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        # what torch.nn.attention.varlen calls, whose arguments change from version to version
        found = torch.ops.aten._flash_attention_forward(
            *rows, *bounds, 0.0, True, False, scale=scaling
        )[0]
        return found[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = [x.split(lengths, 2) for x in (query, key, value)]
    found = [
        scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=True)
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(found, 2).transpose(1, 2), None


WORTH_COMPILING = 1000
"""Forward passes of a run from which on compiling earns its half minute back."""


def worth_compiling(asked: bool | None, passes: int, device: torch.device) -> bool:
    """Return whether to compile, as `asked`; None: on a GPU if a run is long enough."""
    return device.type == "cuda" and passes >= WORTH_COMPILING if asked is None else asked


class Faster(TrainerCallback):
    """Lets a trainer's model skip padding on a GPU and, if `compiled`, compiles its layers.

    Args:
        compiled: None: on a GPU, in a run of at least WORTH_COMPILING forward passes.
        loss_alone: the trainer takes nothing but the loss from a model with labels.
    """

    def __init__(self, compiled: bool | None, loss_alone: bool):
        self.compiled, self.loss_alone = compiled, loss_alone

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Change the model where it stands; it computes what it did."""
        if is_sharded(model) or args.deepspeed or args.torch_compile:
            return  # Trainer compiles the model as a whole then
        skip_padding(model)
        passes = state.max_steps * args.gradient_accumulation_steps
        if worth_compiling(self.compiled, passes, next(model.parameters()).device):
            compile_layers(model, dynamic=None)
            if self.loss_alone:
                _return_loss_alone(base_model(model))


def _return_loss_alone(model: nn.Module) -> None:
    """Compile a model's loss, and let it keep its logits for itself while it trains.

    accelerate would make a float32 copy of them.
    """
    model.loss_function = torch.compile(model.loss_function)
    read = model.forward

    @wraps(read)
    def forward(*args, **kwargs):
        out = read(*args, **kwargs)
        return type(out)(loss=out.loss) if model.training and out.loss is not None else out

    model.forward = forward


ALL_ATTENTION_FUNCTIONS.register(DOCUMENTS, attend_documents)
ALL_MASK_ATTENTION_FUNCTIONS.register(DOCUMENTS, flash_attention_mask)


def skip_padding(*models: nn.Module | None) -> None:
    """Let the layers of models on a GPU skip padding, where they can and compute in 16 bits."""
    for model in models:
        if model is not None and next(model.parameters()).is_cuda and _may_skip(model):
            _wrap(model)
            if not _computes_the_same(model):
                del backbone_of(model).forward


def skips_padding(model: nn.Module) -> bool:
    """Return whether `skip_padding` changed a model."""
    return "forward" in vars(backbone_of(model))


def states_at(model: nn.Module, input_ids: Tensor, mask: Tensor | None, at: Tensor) -> Tensor:
    """Return the last hidden states (N, H) where `at` (b, l) is True.

    Args:
        mask: (b, l), or None where no padding precedes a real token. A model that skips padding
            then reads each row up to the last column that is wanted.
    """
    if mask is None and skips_padding(model):
        mask = at.int().flip(1).cumsum(1).flip(1) > 0
    return backbone_states(model, input_ids, mask)[at]


def _may_skip(model: nn.Module) -> bool:
    """Return whether attention of a model is plain: causal, over all that was before."""
    config = base_model(model).config.get_text_config()
    return (
        base_model(model)._supports_attention_backend
        and config._attn_implementation == "sdpa"
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and not getattr(config, "attn_logit_softcapping", None)
        and not getattr(config, "num_experts", None)  # routers' losses read the mask
        and not getattr(config, "num_local_experts", None)
        and not skips_padding(model)
    )


def _wrap(model: nn.Module) -> None:
    """Let a backbone read real tokens alone where it is told which they are."""
    backbone = backbone_of(model)
    read, config = backbone.forward, backbone.config

    @wraps(read)
    def forward(input_ids=None, attention_mask=None, position_ids=None, **given):
        if not _can(backbone, input_ids, attention_mask, position_ids, given):
            return read(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **given,
            )
        at, positions, bounds = _documents(attention_mask, position_ids)
        config._attn_implementation = DOCUMENTS
        try:
            out = read(
                input_ids=input_ids.flatten()[at][None],
                position_ids=positions[None],
                cu_seq_lens_q=bounds,
                max_length_q=input_ids.size(1),
                **given,
            )
        finally:
            config._attn_implementation = "sdpa"
        states = out.last_hidden_state[0]  # (T, H)
        rows = states.new_zeros(input_ids.numel(), states.size(1)).index_copy(0, at, states)
        out.last_hidden_state = rows.view(*input_ids.shape, -1)
        return out

    backbone.forward = forward


def _can(backbone, input_ids, mask, positions, given: dict) -> bool:
    """Return whether a call can do without padding."""
    if input_ids is None or (mask is None and positions is None):
        return False
    wanted = ("past_key_values", "use_cache", "output_hidden_states", "output_attentions")
    if any(given.get(name) for name in wanted) or (mask is not None and mask.dim() != 2):
        return False
    if positions is not None and positions.shape != input_ids.shape:
        return False
    if input_ids.is_cuda and not torch.is_autocast_enabled("cuda"):
        return next(backbone.parameters()).dtype in (torch.bfloat16, torch.float16)
    return True


def _documents(mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the T real tokens of (B, L) are, their positions (T,), and documents' bounds.

    Args:
        mask: (B, L), 1 where a token is real; None: everywhere.
        positions: (B, L), 0 where a document begins; None: a row is one.
    """
    if mask is None:
        at = torch.arange(positions.numel(), device=positions.device)
    else:
        at = mask.flatten().nonzero().squeeze(1)
        positions = position_ids(mask) if positions is None else positions
    positions = positions.flatten()[at]
    starts = (positions == 0).nonzero().squeeze(1)
    bounds = torch.cat([starts, starts.new_full((1,), len(at))]).to(torch.int32)
    return at, positions, bounds


@torch.no_grad()
def _computes_the_same(model: nn.Module) -> bool:
    """Return whether a changed model still says of real tokens what it said before."""
    backbone = backbone_of(model)
    device = next(model.parameters()).device
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], device=device)
    ids = torch.arange(15, device=device).view(3, 5) % 7
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
    read = backbone.forward.__wrapped__
    with evaluating(model), torch.autocast(device.type, torch.bfloat16):
        try:
            new = backbone(**given, use_cache=False).last_hidden_state[mask.bool()].float()
        except Exception:  # whatever a model of somebody else's may raise
            return False
        old = read(**given, use_cache=False).last_hidden_state[mask.bool()].float()
    return bool((new - old).norm() <= SAME_STATES * old.norm())
