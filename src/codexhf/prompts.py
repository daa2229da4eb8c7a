"""Where a prompt becomes tokens, rows are padded, and an answer's end is known: for every stage.

A prompt is text or messages, and stays what it is: text is tokenised as it stands, messages are
rendered by the tokenizer's chat template with the assistant's turn opened. `data.py` turns text
into messages once, where the tokenizer has a template, so that a model is always prompted in the
way in which it was trained. SFT, the reward model, PPO, sampling and evaluation all take their ids
from here.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
Encode = Callable[[Sequence[str]], list[list[int]]]

ROLES = {
    "prompt": "user",
    "completion": "assistant",
    "chosen": "assistant",
    "rejected": "assistant",
}
"""Who speaks in a column of text."""

_PROBE = "xyzzy"
"""A word that no template writes by itself."""


def content_text(content: Any) -> str:
    """Return the text of a message's content: text, null (none), or a list of text parts.

    Raises:
        ValueError: a part that is not text, by its type, or content of another kind.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        other = sorted({str(part.get("type")) for part in content} - {"text"})
        if not other:
            return "".join(str(part.get("text") or "") for part in content)
        raise ValueError(f"content: got parts of type {', '.join(other)}, expected text alone.")
    raise ValueError(f"content: got {type(content).__name__}, expected text.")


def text_of(value: Any) -> str | None:
    """Return the text of a string or of a list of messages; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, Mapping) and "content" in m for m in value):
        try:
            return "\n".join(content_text(message["content"]) for message in value)
        except ValueError:
            return None
    return None


def in_form(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Return a prompt in the form in which this tokenizer's model is prompted.

    With a chat template text becomes a user's message, without one messages become their text.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt
    return prompt if tokenizer.chat_template else (text_of(list(prompt)) or "")


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a prompt, which a model continues.

    A tokenizer that ends every text with its end token is kept from ending the prompt.
    """
    return prompt_ids_batch([prompt], tokenizer)[0]


def prompt_ids_batch(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, encode: Encode | None = None
) -> list[list[int]]:
    """Return `prompt_ids` of many prompts, all of them text or all of them messages.

    Args:
        encode: what reads rendered messages faster than the tokenizer itself, to the same ids.
    """
    if not isinstance(prompts[0], str):
        return _render(prompts, tokenizer, encode, add_generation_prompt=True)
    rows = tokenizer(list(prompts))["input_ids"]
    return [_without_end(ids, tokenizer) for ids in rows]


def answered_ids(
    prompt: Prompt, completion: Prompt, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], int]:
    """Return the ids of a prompt with its completion, and how many of them are the prompt.

    The prompt's part is what `prompt_ids` returns, so a model is trained on the context that it
    will be sampled in, also where a template renders the prompt alone in another way than with its
    answer. The last token is the one that ends the answer; what a template writes behind it is
    left out, since no sampled answer has it.
    """
    return answered_ids_batch([prompt], [completion], tokenizer)[0]


def answered_ids_batch(
    prompts: Sequence[Prompt],
    completions: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    encode: Encode | None = None,
    starts: list[list[int]] | None = None,
) -> list[tuple[list[int], int]]:
    """Return `answered_ids` of many rows, all of one kind; `starts` are the prompts' ids if known.

    Args:
        encode: as in `prompt_ids_batch`.
    """
    starts = starts or prompt_ids_batch(prompts, tokenizer, encode)
    if isinstance(prompts[0], str) and isinstance(completions[0], str):
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        wholes = tokenizer(texts)["input_ids"]
        return [
            (_joined(start, _without_end(whole, tokenizer), text, tokenizer), len(start))
            for start, whole, text in zip(starts, wholes, completions, strict=True)
        ]
    turns = [
        [{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in completions
    ]
    wholes = _render([[*p, *c] for p, c in zip(prompts, turns, strict=True)], tokenizer, encode)
    ends = set(end_ids(tokenizer))
    rows = []
    for start, whole in zip(starts, wholes, strict=True):
        answer = whole[_common_prefix(start, whole) :]
        last = next((i for i in reversed(range(len(answer))) if answer[i] in ends), None)
        # a template may have no end; without one nobody would learn to stop
        answer = [*answer, tokenizer.eos_token_id] if last is None else answer[: last + 1]
        rows.append(([*start, *answer], len(start)))
    return rows


def _joined(start: list[int], whole: list[int], completion: str, tokenizer) -> list[int]:
    """Return a text's ids with its prompt's at the beginning and an end token at the end."""
    if whole[: len(start)] != start:  # tokens merged across the border
        whole = [*start, *tokenizer(completion, add_special_tokens=False)["input_ids"]]
    return whole if completion.endswith(tokenizer.eos_token) else [*whole, tokenizer.eos_token_id]


def _without_end(ids: list[int], tokenizer) -> list[int]:
    """Return ids without the end token that some tokenizers write behind every text."""
    ended = bool(ids) and ids[-1] == tokenizer.eos_token_id and _appends_end(tokenizer)
    return ids[:-1] if ended else ids


def end_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """Return every id that ends an answer, in order.

    These are the tokenizer's end token, those of the model's generation config, and the token with
    which the chat template closes the assistant's turn.
    """
    ids = {tokenizer.eos_token_id, _closing_id(tokenizer, tokenizer.chat_template)}
    if generation_config is not None:
        given = generation_config.eos_token_id
        ids |= set(given if isinstance(given, list) else [given])
    return tuple(sorted(token for token in ids if token is not None))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest token id; many models have more embeddings than that."""
    return max(tokenizer.get_vocab().values()) + 1


def decode(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def left_pad(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return ids (B, P), padded on the left with 0, and their mask, for sampling."""
    return _padded(rows, device, "left")


def right_pad(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return ids (B, T), padded on the right with 0, and their mask, for scoring."""
    return _padded(rows, device, "right")


def _padded(rows, device, side: str) -> tuple[Tensor, Tensor]:
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    ids, mask = (pad_sequence(x, batch_first=True, padding_side=side) for x in (ids, masks))
    return ids.to(device), mask.to(device)


def _render(
    conversations: Sequence[Prompt], tokenizer, encode: Encode | None, **kwargs: Any
) -> list[list[int]]:
    rows = [list(messages) for messages in conversations]
    if encode is None:
        return tokenizer.apply_chat_template(rows, tokenize=True, return_dict=False, **kwargs)
    return encode(tokenizer.apply_chat_template(rows, tokenize=False, **kwargs))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    if a == b[: len(a)]:
        return len(a)
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


@lru_cache
def _appends_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer ends every text with its end token."""
    ids = tokenizer(_PROBE)["input_ids"]
    return bool(ids) and ids[-1] == tokenizer.eos_token_id


@lru_cache
def _closing_id(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int | None:
    """The special token right behind an assistant's answer in the template; None without one."""
    if template is None:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tail = text.rpartition(_PROBE)[2]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in ids if token in special), None)
