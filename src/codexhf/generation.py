"""Sample completions from a plain policy. Used by preferences, evaluation and callbacks.

The decoding is PPO's (`ppo/native_engine.py`): it stops computing a row when its answer ends, which
with answers of differing length is several times faster than `model.generate`, and samples from the
model's own distribution without the filters of its generation config.
"""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from codexhf.data import render_prompt
from codexhf.ppo.engines import Engine, Sampling, make_engine
from codexhf.ppo.native_engine import preallocated_cache


def sample_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence,
    *,
    n: int = 1,
    max_new_tokens: int = 96,
    temperature: float = 1.0,
    batch_size: int = 256,
    seed: int = 42,
    progress: str | None = None,
) -> list[list[list[int]]]:
    """Return n completions, as token ids, for each prompt, in the order of the prompts.

    Prompts of similar length share a batch. The global random state is left alone.

    Args:
        prompts: strings or lists of messages; rendered with the chat template.
        temperature: of sampling; 0 is greedy.
        progress: what to write before a progress bar; none when None.
    Returns:
        [prompt][n] token ids; the last one is the end token unless max_new_tokens ended it.
    """
    texts = [render_prompt(prompt, tokenizer) for prompt in prompts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    order = [i for i in sorted(range(len(ids)), key=lambda i: (len(ids[i]), i)) for _ in range(n)]
    engine = _engine(model, Sampling(max_new_tokens, (tokenizer.eos_token_id,), batch_size))
    out: list[list[list[int]]] = [[] for _ in texts]
    training = model.training
    model.eval()
    batches = range(0, len(order), batch_size)
    for number, start in enumerate(tqdm(batches, desc=progress, disable=progress is None)):
        rows = order[start : start + batch_size]
        width = max(len(ids[i]) for i in rows)
        prompt = torch.zeros((len(rows), width), dtype=torch.long)  # (B, P), left-padded
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for r, i in enumerate(rows):
            prompt[r, width - len(ids[i]) :] = torch.tensor(ids[i])
            mask[r, width - len(ids[i]) :] = True
        answers = engine.generate(
            model,
            prompt.to(model.device),
            mask.to(model.device),
            seed=seed + 1_000_003 * number,
            temperature=temperature,
        )
        lengths = answers.lengths.tolist()
        for i, answer, length in zip(rows, answers.responses.tolist(), lengths, strict=True):
            out[i].append(answer[:length])
    model.train(training)
    return out


def sample(model, tokenizer, prompts: Sequence, **options) -> list[list[str]]:
    """Like `sample_ids`, decoded: [prompt][n] texts without special tokens."""
    groups = sample_ids(model, tokenizer, prompts, **options)
    return [tokenizer.batch_decode(group, skip_special_tokens=True) for group in groups]


def _engine(model: PreTrainedModel, sampling: Sampling) -> Engine:
    """The native loop, or `model.generate` for an architecture whose cache that does not know."""
    try:
        preallocated_cache(model, 1)
    except ValueError:
        return make_engine("hf", sampling)
    return make_engine("native", sampling)
