"""The policy, new or loaded, and what every reader of a model needs.

The tokenizer is in tokenizer.py, the reward model in reward_model.py.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from codexhf.hub import locate, resolve
from codexhf.prompts import vocabulary_size
from codexhf.refusals import nearest


def new_policy(
    architecture: dict,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    **loading: Any,
) -> PreTrainedModel:
    """Make a causal language model with random weights.

    Args:
        architecture: `model_type` and fields of its transformers config, e.g. llama.
        tokenizer: gives the vocabulary size and the special tokens.
        max_length: longest sequence; becomes max_position_embeddings unless the architecture says.
        seed: of the weights.
        loading: dtype and attn_implementation.
    Raises:
        ValueError: unknown model_type or field, with the nearest legal name.
    """
    fields = dict(architecture)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ValueError("architecture: got no model_type, expected e.g. `model_type: llama`.")
    fields.setdefault("max_position_embeddings", max_length)
    fields.update(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    config = AutoConfig.for_model(model_type)
    known = {*config.to_dict(), *config.attribute_map}
    if unknown := [name for name in fields if name not in known]:
        told = (f"architecture.{n}: unknown for {model_type}.{nearest(n, known)}" for n in unknown)
        raise ValueError("; ".join(told))
    set_seed(seed)
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, **loading)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def load_policy(
    path: str, tokenizer: PreTrainedTokenizerBase | None = None, **loading: Any
) -> PreTrainedModel:
    """Load a causal language model from safetensors, in float32 unless `loading` says otherwise.

    Of an adapter's folder it is the base with the adapter folded in.

    Args:
        loading: dtype and so on, as `adapters.loading` gives them.
    Raises:
        ValueError: weights that hold NaN or infinity; a vocabulary smaller than the tokenizer's.
    """
    folder = resolve(path)
    base = adapter_base(folder)
    model = AutoModelForCausalLM.from_pretrained(
        base or folder,
        use_safetensors=True,
        trust_remote_code=False,
        use_cache=False,
        **{"dtype": torch.float32, **loading},
    )
    if base is not None:
        model = _with_adapter(model, folder)
    found = model.get_input_embeddings().num_embeddings
    if tokenizer is not None and vocabulary_size(tokenizer) > found:
        raise ValueError(
            f"{path}: the model has {found} embeddings, the tokenizer {vocabulary_size(tokenizer)} "
            "ids. Use the tokenizer that the model was trained with."
        )
    return check_finite(model, path)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load saved weights into a model in place, adapters into a PEFT model.

    They are read as from_pretrained reads them, into a second model for the moment: some
    architectures save their weights under other names and in other shapes than they compute with.

    Raises:
        ValueError: the folder lacks weights that the model needs, or has others.
    """
    if not isinstance(module, PreTrainedModel):
        named = folder / module.active_adapter  # where PEFT puts all but the one called default
        where = named if named.is_dir() else folder
        module.load_adapter(str(where), module.active_adapter, is_trainable=True)
        return
    # the widest dtype of the model holds the others exactly
    dtypes = {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()}
    with torch.random.fork_rng(devices=[]):
        saved, info = type(module).from_pretrained(
            folder,
            dtype=reduce(torch.promote_types, dtypes),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below
            output_loading_info=True,
        )
    wrong = {name: sorted(map(str, info[name])) for name in info if info[name]}
    theirs = {name: tensor.shape for name, tensor in saved.state_dict().items()}
    ours = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if wrong or theirs != ours:
        differing = sorted(n for n in {*theirs, *ours} if theirs.get(n) != ours.get(n))
        wrong = {name: found[:3] for name, found in wrong.items()} or differing[:3]
        raise ValueError(
            f"{folder}: got weights that do not fit {type(module).__name__} ({wrong}), expected "
            "those of the model that was saved. Resume with that model."
        )
    module.load_state_dict(saved.state_dict())


def check_finite(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Refuse weights that hold NaN or infinity: every later number would be NaN."""
    if name := nonfinite_parameter(model):
        raise ValueError(
            f"{path}: {name} holds NaN or infinity. Take an earlier checkpoint of that run."
        )
    return model


def nonfinite_parameter(model: nn.Module) -> str | None:
    """Return the name of the first parameter that holds NaN or infinity; None where none does."""
    for name, parameter in model.named_parameters():
        # of sharded weights its own part: the other processes need not be here
        mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not torch.isfinite(mine).all():
            return name
    return None


def context_length(path: str) -> int | None:
    """Longest sequence that the model of a folder or Hub id was built for; None if unbounded."""
    return context_of(config_of(path))


def config_of(path: str) -> PreTrainedConfig:
    """The config of a folder's or Hub id's model; that of its base where an adapter has none."""
    folder = resolve(path)
    base = None if (folder / "config.json").is_file() else adapter_base(folder)
    return AutoConfig.from_pretrained(base or folder, trust_remote_code=False)


def outline(path: str, dtype: str, kind: Callable = lambda config: AutoModelForCausalLM) -> Any:
    """A model as its config describes it, on the meta device: class and shapes, no weights."""
    config = config_of(path)
    config.num_labels, kind = 1, kind(config)
    make = getattr(kind, "from_config", None) or kind._from_config
    with torch.device("meta"):
        return make(config, dtype=getattr(torch, dtype))


def context_of(config: PreTrainedConfig) -> int | None:
    """Longest sequence of a model with this config; None where positions have no end."""
    config = config.get_text_config()
    return getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))


def within_context(path: str, max_length: int, cards: Sequence[str] | None = None) -> int:
    """`max_length`, or a ValueError when the model cannot read so much.

    Args:
        cards: what is read at that length; where there are none, any length will do.
    """
    context = context_length(path) if cards != [] else None
    if context is not None and max_length > context:
        raise ValueError(
            f"max_length: got {max_length} tokens, but {path} was built for {context}. Lower it, "
            "or pretrain with a larger max_length."
        )
    return max_length


def room_for(models: str | Sequence[str], new_tokens: int) -> int | None:
    """Longest prompt that leaves room for `new_tokens` in the context of each model.

    Raises:
        ValueError: no prompt does.
    """
    paths = [models] if isinstance(models, str) else models
    contexts = {path: context_length(path) for path in paths}
    known = {path: context for path, context in contexts.items() if context is not None}
    if not known:
        return None
    path = min(known, key=known.__getitem__)
    if new_tokens >= known[path]:
        raise ValueError(
            f"completions of {new_tokens} tokens leave no room for a prompt in the context of "
            f"{path} ({known[path]} tokens). Lower max_new_tokens or response_length."
        )
    return known[path] - new_tokens


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def position_ids(attention_mask: Tensor) -> Tensor:
    """Return positions (b, l) that count real tokens from 0."""
    return attention_mask.long().cumsum(1) - attention_mask.long()


def mask_arguments(attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Return mask and positions as a model takes them; without a mask attention is only causal."""
    if attention_mask is None:
        return {}
    return {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the layers below the head, also of a model in a PEFT wrapper.

    Raises:
        ValueError: a family whose layers do not stand under its prefix, such as Llama 4.
    """
    model = base_model(model)
    backbone = getattr(model, model.base_model_prefix, None)
    if backbone is None:
        raise ValueError(
            f"model: got {type(model).__name__}, expected layers under "
            f"{model.base_model_prefix!r}, where its family says they are. PPO and evaluation "
            "cannot read its hidden states: use another family (docs/models.md)."
        )
    return backbone


def backbone_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    """Return the last hidden states (b, l, H), which the head of `model` reads."""
    return backbone_of(model)(
        input_ids=input_ids, use_cache=False, **mask_arguments(attention_mask)
    ).last_hidden_state


def compile_layers(model: nn.Module, dynamic: bool | None = True) -> None:
    """Let torch compile the layers of a model, each where it is first called.

    Layers of one class share what is compiled, so it takes seconds where a whole model takes
    minutes. `uncompiled` switches them back for a while.

    Args:
        dynamic: for batches of all sizes; None: once sizes are seen to change.
    """
    # a backward pass may be run twice over one graph: PPO logs the gradient norm of each term
    torch._functorch.config.donated_buffer = False
    # as an input of its own the epsilon of a norm is converted on the CPU in each call, by a kernel
    # that a C++ compiler takes a minute to build
    torch._dynamo.config.specialize_float = True
    kinds = set(base_model(model)._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.compile(dynamic=dynamic)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled layers as they were: with a cache, whose shapes grow, compiling never ends."""
    if all(module._compiled_call_impl is None for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Put models into eval mode and back: activation checkpointing rests and caches work.

    Mixtures of experts whose config asks for router logits, as SFTTrainer leaves it, rest from
    their auxiliary loss as well: with a cache it fails, as its mask is longer than the input.
    """
    modes = [(module, module.training) for module in modules if module is not None]
    configs = _configs(part for module, _ in modes for part in module.modules())
    asked = [config for config in configs if getattr(config, "output_router_logits", False)]
    for module, _ in modes:
        module.eval()
    for config in asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in asked:
            config.output_router_logits = True
        for module, training in modes:
            module.train(training)


def disable_dropout(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Set every dropout of `model` to 0, also those that layers apply as functions.

    Log-probabilities at sampling and in training must be those of one and the same policy.

    Returns:
        (configuration, name, value) of each that a configuration had, for the saved model's.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or "layerdrop" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
    given = [
        (config, name, value)
        for config in _configs(model.modules())
        for name, value in vars(config).items()
        if "dropout" in name and isinstance(value, float) and value
    ]
    for config, name, _ in given:
        setattr(config, name, 0.0)
    return given


def _configs(modules: Iterable[nn.Module]) -> list[Any]:
    return list({id(m.config): m.config for m in modules if hasattr(m, "config")}.values())


def shortest_context(models: Iterable[Any]) -> int | None:
    """Positions of the model that has the fewest; None where none has a limit."""
    return min(filter(None, (context_of(model.config) for model in models)), default=None)


def to_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the accelerator of this process, if there is one, and to evaluation mode."""
    return model.to(PartialState().device).eval()


def adapter_base(folder: Path) -> Path | None:
    """The folder of the model that the adapter in `folder` changes; None of a plain model."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    name, revision = config["base_model_name_or_path"], config.get("revision")
    return locate(f"{name}@{revision}" if revision else name, folder)


def _with_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Fold the adapter of a folder into its base; where a completion ends is said in the folder."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    model.requires_grad_(True)  # peft froze it
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
