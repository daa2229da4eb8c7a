"""Tokenizer, policy and reward model: new or loaded. Every load goes through here."""

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from codexhf.arguments import PretrainArguments, TokenizerArguments, nearest
from codexhf.data import Data, text_of
from codexhf.rewards import ModelReward

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + END +
    "{% else %}" + USER + "{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)  # fmt: skip


def new_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with distinct pad and end tokens and a chat template.

    Byte-level: every text encodes and decodes to itself. Deterministic for equal texts in order.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Digits one by one, so that numbers are spelled the same everywhere.
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def train_tokenizer(
    stage: TokenizerArguments, corpora: Data, chats: Data, heldout: dict[str, Data], folder: Path
) -> dict:
    """Train the stage's tokenizer, save it, and measure bytes per token on held-out documents."""
    texts, left = [], stage.max_characters
    for row in corpora.dataset:
        texts.append(row["text"][:left])
        left -= len(texts[-1])
        if left <= 0:
            break
    for row in chats.dataset:
        texts += [text_of(row["prompt"]), text_of(row["completion"])]
    print(
        f"learning {stage.vocab_size} tokens from {sum(map(len, texts)):,} characters", flush=True
    )
    tokenizer = new_tokenizer(texts, stage.vocab_size)
    tokenizer.save_pretrained(folder)
    metrics: dict = {"vocab_size": len(tokenizer)}
    for card, data in heldout.items():
        documents = data.dataset["text"]
        tokens = sum(len(ids) for ids in tokenizer(list(documents))["input_ids"])
        metrics[f"bytes_per_token_{Path(card).stem}"] = (
            sum(len(t.encode()) for t in documents) / tokens
        )
    return metrics


def load_tokenizer(path: str, padding_side: str = "right") -> PreTrainedTokenizerBase:
    """Load a tokenizer that has a pad token.

    Raises:
        ValueError: no pad or end token, which training would silently learn wrongly from.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        path, padding_side=padding_side, trust_remote_code=False
    )
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"{path}: the tokenizer has no {name}. Set one and save it: "
                f"tokenizer.{name} = ...; tokenizer.save_pretrained(...)"
            )
    return tokenizer


def new_policy(
    architecture: dict, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> PreTrainedModel:
    """Make a causal language model with random weights.

    Args:
        architecture: `model_type` and fields of its transformers config, e.g. llama.
        tokenizer: gives the vocabulary size and the special tokens.
        max_length: longest sequence; becomes max_position_embeddings unless the architecture says.
        seed: of the weights.
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
    known = set(config.to_dict()) | set(config.attribute_map)
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(
            "; ".join(
                f"architecture.{n}: unknown for {model_type}.{nearest(n, known)}" for n in unknown
            )
        )
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def new_or_loaded_policy(stage: PretrainArguments, tokenizer, seed: int) -> PreTrainedModel:
    """The model that pretraining starts from: `stage.model`, or new weights."""
    if stage.model is not None:
        return load_policy(stage.model, tokenizer)
    return new_policy(stage.architecture, tokenizer, stage.max_length, seed)


def load_policy(path: str, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """Load a causal language model from safetensors, in float32 for training.

    Raises:
        ValueError: weights that hold NaN or infinity; a vocabulary smaller than the tokenizer's.
    """
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"{path}: the model has {model.get_input_embeddings().num_embeddings} embeddings, the "
            f"tokenizer {len(tokenizer)} tokens. Use the tokenizer that the model was trained with."
        )
    return check_finite(model, path)


def load_reward_model(path: str, *, new_head: bool = False, seed: int = 42) -> PreTrainedModel:
    """Load a sequence classification model with one label.

    Args:
        path: folder or Hub id.
        new_head: allow a missing score head (a policy that becomes a reward model); it starts at
            N(0, 1/(hidden+1)) (Stiennon et al. 2020, appendix C.1), reproducibly from `seed`.
        seed: of the new head.
    Raises:
        ValueError: the head is missing and `new_head` is False, or weights are not finite.
    """
    set_seed(seed)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path,
        num_labels=1,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing = [name for name in info["missing_keys"] if "score" in name or "classifier" in name]
    if missing and not new_head:
        raise ValueError(
            f"{path}: the weights of {', '.join(missing)} are missing, so this is no trained "
            "reward model. Give the folder that recipes/reward_model.py wrote."
        )
    if missing:
        head = model.score.weight
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.copy_(torch.randn(head.shape, generator=generator) * (head.shape[1] + 1) ** -0.5)
    return check_finite(model, path)


def load_model_reward(path: str, clip: float | None = None) -> ModelReward:
    """The reward model as a reward function: its own tokenizer, normalised by its saved scores.

    Raises:
        ValueError: config.json has no score_mean and score_std, so scores have no known scale.
    """
    model = to_device(load_reward_model(path))
    for name in ("score_mean", "score_std"):
        if not hasattr(model.config, name):
            raise ValueError(
                f"{path}: config.json has no {name}, so its scores cannot be normalised. Train the "
                "reward model with recipes/reward_model.py, or write the two numbers there."
            )
    return ModelReward(
        model,
        load_tokenizer(path),
        mean=model.config.score_mean,
        std=model.config.score_std,
        clip=clip,
    )


def check_finite(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Refuse weights that hold NaN or infinity: every later number would be NaN."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"{path}: {name} holds NaN or infinity. Take an earlier checkpoint of that run."
            )
    return model


def context_length(path: str) -> int | None:
    """Longest sequence that the model of a folder or Hub id was built for; None if unbounded."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def within_context(path: str, max_length: int) -> int:
    """`max_length`, or a ValueError when the model cannot read so much."""
    context = context_length(path)
    if context is not None and max_length > context:
        raise ValueError(
            f"max_length: got {max_length} tokens, but {path} was built for {context}. Lower it, "
            "or pretrain with a larger max_length."
        )
    return max_length


def room_for(path: str, new_tokens: int) -> int | None:
    """Longest prompt that leaves room for `new_tokens` in the model's context.

    Raises:
        ValueError: no prompt does.
    """
    context = context_length(path)
    if context is not None and new_tokens >= context:
        raise ValueError(
            f"answers of {new_tokens} tokens leave no room for a prompt in the context of {path} "
            f"({context} tokens). Lower max_new_tokens or response_length."
        )
    return None if context is None else context - new_tokens


def to_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the accelerator of this process, if there is one, and to evaluation mode."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def lora_config(stage) -> LoraConfig | None:
    """The LoRA settings of a stage with `use_peft`, on all linear layers; None without it."""
    if not stage.use_peft:
        return None
    return LoraConfig(
        r=stage.lora_r,
        lora_alpha=stage.lora_alpha,
        lora_dropout=stage.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def merge_adapters(trainer) -> dict:
    """Fold trained LoRA adapters into the weights, so that later stages load a plain model.

    Of PPO's trainer that is the policy, which it holds beside the critic.
    """
    if isinstance(trainer.model, PeftModel):
        trainer.model = trainer.model.merge_and_unload()
    elif isinstance(getattr(trainer.model, "policy", None), PeftModel):
        trainer.model.policy = trainer.model.policy.merge_and_unload()
    else:
        return {}
    trainer.model_wrapped = trainer.model
    return {"adapters_merged": True}
