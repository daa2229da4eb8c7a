"""Our own decoding loop: a preallocated cache, ended rows leave the batch, a GPU replays the step.

On a GPU a decoding step of a small or middle-sized model takes longer to launch from Python than
to compute. Its shapes are therefore held fixed, so that it can be recorded once as a CUDA graph
and replayed for every further token: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import warnings

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from codexhf.generation.engines import Generation, Sampling, check_finite, join, row_chunks
from codexhf.models import base_model, position_ids

FIXED_TOKENS = 512
"""A step of fixed shape attends to this many tokens, or a multiple; then a wider one takes over."""
WORTH_RECORDING = 128
"""With fewer steps to go, recording a step for the rows that are left costs more than it saves."""
LOOK_EVERY = 8
"""Steps of fixed shape between two looks at which rows have ended: a look waits for the GPU."""
SAME_LOGITS = 0.05
"""Largest relative difference of the logits of a step of fixed shape: bfloat16 rounds, no more."""


class NativeEngine:
    """A decoding loop of our own, for models whose cache has plain or sliding attention layers.

    Its cost is the sum of the answers' lengths rather than rows times the longest. With
    `drop_ended=False` it draws the same random numbers as `model.generate` does.

    `fixed_shapes` None means on a GPU, unless the policy has an `obstacle`. The first step is then
    computed both ways; if they disagree the engine warns and stays with the plain loop.
    """

    def __init__(
        self, sampling: Sampling, drop_ended: bool = True, fixed_shapes: bool | None = None
    ):
        self.sampling, self.drop_ended, self.fixed_shapes = sampling, drop_ended, fixed_shapes
        self._checked = False

    @torch.no_grad()
    def generate(self, policy, prompt_ids, prompt_mask, *, seed, temperature) -> Generation:
        """See `codexhf.generation.engines.Engine.generate`."""
        generator = torch.Generator(prompt_ids.device).manual_seed(seed)
        # one random number per row is much faster on a CPU; on a GPU cumsum is not deterministic
        invert = self.drop_ended and prompt_ids.device.type == "cpu"
        parts = [
            self._decode(
                policy, prompt_ids[rows], prompt_mask[rows], generator, temperature, invert
            )
            for rows in row_chunks(prompt_ids.size(0), self.sampling.chunk)
        ]
        return check_finite(join(parts), policy)

    def _decode(
        self, policy, prompt_ids, prompt_mask, generator, temperature, invert
    ) -> Generation:
        """Answer one chunk of prompts."""
        count, width = prompt_ids.size(0), self.sampling.max_tokens
        device = prompt_ids.device
        responses = torch.zeros(count, width, dtype=torch.long, device=device)
        logprobs = torch.zeros(count, width, dtype=torch.float32, device=device)
        lengths = torch.full((count,), width, dtype=torch.long, device=device)
        stops = torch.tensor(self.sampling.stop_ids, dtype=torch.long, device=device)
        rows = torch.arange(count, device=device)  # rows still in the batch
        ended = torch.zeros(count, dtype=torch.bool, device=device)  # of the rows in the batch
        reader = _Reader(policy, prompt_mask, width)
        fixed = self._fixes(reader)
        logits = reader.read(prompt_ids)
        for step in range(width):
            logits = logits[:, : self.sampling.vocabulary]
            tokens, picked = sample(logits, temperature, generator, invert)
            responses[rows, step] = tokens.masked_fill(ended, 0)
            logprobs[rows, step] = picked.masked_fill(ended, 0.0)
            if step + 1 == width:
                break
            if len(stops):
                stopped = torch.isin(tokens, stops) & ~ended
                lengths[rows] = lengths[rows].masked_fill(stopped, step + 1)
                ended = ended | stopped
                if not fixed or step % LOOK_EVERY == 0:
                    gone = int(ended.sum())
                    if gone == len(ended):
                        break
                    if self.drop_ended and self._pays(gone, len(ended), width - step, fixed):
                        keep = (~ended).nonzero().squeeze(1)
                        reader.keep(keep)
                        rows, tokens, ended = rows[keep], tokens[keep], ended[keep]
            if fixed and not self._checked:
                logits, fixed = self._first_fixed_step(reader, tokens)
            else:
                logits = reader.read_fixed(tokens) if fixed else reader.read(tokens[:, None])
        used = int(lengths.max())
        return Generation(responses[:, :used], lengths, logprobs[:, :used])

    def _fixes(self, reader: "_Reader") -> bool:
        """Return whether to hold the shapes of a step fixed."""
        if self.fixed_shapes is None and reader.mask.is_cuda:
            problem = obstacle(reader.policy, reader.cache)
            if problem is not None:
                self._stay_plain(reader, problem)
        return reader.mask.is_cuda if self.fixed_shapes is None else self.fixed_shapes

    def _stay_plain(self, reader: "_Reader", problem: str) -> None:
        """Give up steps of fixed shape and say so."""
        self.fixed_shapes = False
        warnings.warn(
            f"{type(base_model(reader.policy)).__name__} does not decode with fixed shapes "
            f"({problem}). It decodes without a CUDA graph, which is slower.",
            stacklevel=4,
        )

    def _pays(self, gone: int, rows: int, steps: int, fixed: bool) -> bool:
        """Return whether to go on without the ended rows, which copies the cache."""
        if fixed:
            return gone * 2 >= rows and steps > WORTH_RECORDING
        return gone * 4 >= rows

    def _first_fixed_step(self, reader: "_Reader", tokens: Tensor) -> tuple[Tensor, bool]:
        """Compute a step in both ways; return its logits, and whether to stay with fixed shapes."""
        self._checked = True
        logits = reader.read(tokens[:, None])
        try:
            error = reader.repeat_fixed(tokens, logits)
            problem = None if error <= SAME_LOGITS else f"its logits differ by {error:.0%}"
        except Exception as wrong:  # whatever a model of somebody else's may raise
            problem = f"{type(wrong).__name__}: {wrong}".split("\n")[0]
        if problem is None:
            return logits, True
        self._stay_plain(reader, problem)
        return reader.read_again(tokens), False


class _Reader:
    """A policy, its cache, and how far it has read."""

    def __init__(self, policy: nn.Module, prompt_mask: Tensor, width: int):
        """Make room for left-padded prompts, whose mask is (B, P), and `width` answer tokens."""
        self.policy = policy
        self.mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt_mask), width)], 1)
        self.cache = preallocated_cache(base_model(policy), self.mask.size(1))
        self.positions = position_ids(prompt_mask)  # (B, n) of the n tokens to read next
        self.seen = 0
        self.fixed: _FixedStep | None = None

    def read(self, ids: Tensor) -> Tensor:
        """Read tokens (B, n); return the logits (B, V) behind the last."""
        self.seen += ids.size(1)
        logits = forward(self.policy, ids, self.mask[:, : self.seen], self.positions, self.cache)
        self.positions = self.positions[:, -1:] + 1
        return logits

    def read_fixed(self, tokens: Tensor) -> Tensor:
        """Read one token (B,) per row in a step of fixed shape; the logits last until the next."""
        if self.fixed is None or self.seen == self.fixed.end:
            self.fixed = _FixedStep(self, self.seen, self.positions)
        self.seen, self.positions = self.seen + 1, self.positions + 1
        return self.fixed(tokens)

    def repeat_fixed(self, tokens: Tensor, logits: Tensor) -> float:
        """Read what was just read once more with a step of fixed shape.

        Returns the norm of the difference to `logits` (B, V), relative to that of the logits.
        """
        self.fixed = _FixedStep(self, self.seen - 1, self.positions - 1)
        difference = (self.fixed(tokens) - logits).float().norm()
        return float(difference / (logits - logits.mean(-1, keepdim=True)).float().norm())

    def read_again(self, tokens: Tensor) -> Tensor:
        """Read the last tokens (B,) anew, over what a failed step wrote into the cache."""
        self.fixed, self.seen, self.positions = None, self.seen - 1, self.positions - 1
        self._tell_cache()
        return self.read(tokens[:, None])

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._tell_cache()
        self.cache.batch_select_indices(rows)
        self.mask, self.positions, self.fixed = self.mask[rows], self.positions[rows], None

    def _tell_cache(self) -> None:
        """Set how far each layer is, which a step of fixed shape does not."""
        for layer in self.cache.layers:
            layer.seen = self.seen


class _FixedStep:
    """Reads one token per row with shapes and addresses that never change.

    On a GPU the first call also records a CUDA graph, and the others replay it.
    """

    def __init__(self, reader: _Reader, seen: int, positions: Tensor):
        """Start after `seen` tokens, with the token at `positions` (B, 1) as the next."""
        self.policy, self.cache = reader.policy, reader.cache
        self.end = min(reader.mask.size(1), (seen // FIXED_TOKENS + 1) * FIXED_TOKENS)
        self.tokens, self.positions = torch.zeros_like(positions), positions.clone()
        self.column = torch.tensor([seen], device=positions.device)
        mask = reader.mask[:, None, None, : self.end].clone()  # (B, 1, 1, end)
        mask[..., seen:] = False
        # added to scores: attention would make that of a bool mask anew in every layer
        dtype = reader.cache.layers[0].dtype
        hidden = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device=mask.device)
        self.mask = torch.where(mask, hidden.new_zeros(()), hidden)
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, V) behind `tokens` (B,); the next call may write over them."""
        self.tokens.copy_(tokens[:, None])
        if self.graph is not None:
            self.graph.replay()
            return self.logits
        logits = self._advance()
        if self.tokens.is_cuda:
            self._record()
        return logits

    def _record(self) -> None:
        """Record what the GPU does for one step, without doing it."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: NCCL's watchdog and data loaders go on meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._advance()
        finally:
            torch.cuda.set_stream(stream)  # after an error torch.cuda.graph stays on its own
        self.graph = graph

    def _advance(self) -> Tensor:
        """Read the tokens and move on by one column."""
        self.mask.index_fill_(3, self.column, 0.0)
        for layer in self.cache.layers:
            layer.fixed_at = (self.column, self.end)
        try:
            # a mask of four dimensions is taken as it is
            logits = forward(self.policy, self.tokens, self.mask, self.positions, self.cache)
        finally:
            for layer in self.cache.layers:
                layer.fixed_at = None
        self.column += 1
        self.positions += 1
        return logits


def forward(
    policy: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
) -> Tensor:
    """Return the logits (B, V) behind the last of `ids` (B, n), which are added to the cache."""
    return policy(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def obstacle(policy: nn.Module, cache: DynamicCache) -> str | None:
    """Return why a step of fixed shape cannot be recorded, or None if it can be tried."""
    plain = all(isinstance(layer, _PreallocatedLayer) for layer in cache.layers)
    if not plain:
        return "its cache has layers with a sliding window"
    attention = base_model(policy).config._attn_implementation
    if attention != "sdpa":
        return f"its attn_implementation is {attention!r} and not 'sdpa'"
    modules = list(policy.modules())
    # those of enable_input_require_grads, which gradient checkpointing calls, may be left out
    harmless = {hook.id for m in modules for hook in getattr(m, "_require_grads_hooks", ())}
    if any(m._forward_pre_hooks or set(m._forward_hooks) - harmless for m in modules):
        return "its modules have hooks, which a recorded step would not call"
    return None


def sample(
    logits: Tensor, temperature: float, generator: torch.Generator, invert: bool
) -> tuple[Tensor, Tensor]:
    """Draw one token per row of `logits` (B, V); return ids (B,) and log-probabilities (B,).

    `invert` looks one uniform number per row up in the distribution function, instead of drawing
    one number per token of the vocabulary as `torch.multinomial` does.
    """
    scores = logits.float()
    if temperature not in (0, 1):
        scores = scores / temperature
    logprobs = torch.log_softmax(scores, -1)
    if temperature == 0:
        tokens = scores.argmax(-1)
    elif invert:
        below = logprobs.exp().cumsum(-1, dtype=torch.float64)
        drawn = torch.rand(
            len(below), 1, dtype=torch.float64, device=below.device, generator=generator
        )
        # right: a token of probability 0 is never the first one above the number
        tokens = torch.searchsorted(below, drawn * below[:, -1:], right=True).squeeze(1)
        tokens = tokens.clamp(max=logits.size(-1) - 1)
    else:
        probabilities = torch.softmax(scores, -1)
        # what torch.multinomial draws, without its checks, for which Python waits for the GPU
        race = torch.empty_like(probabilities).exponential_(generator=generator)
        tokens = (probabilities / race).argmax(-1)
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(1)


class _PreallocatedLayer(DynamicLayer):
    """A cache layer that writes into a buffer of the final length instead of concatenating."""

    fixed_at: tuple[Tensor, int] | None = None
    """(column to write (1,), columns to return) within a step of fixed shape."""

    def __init__(self, max_tokens: int):
        super().__init__()
        self.max_tokens, self.seen = max_tokens, 0

    def lazy_initialization(self, key_states, value_states=None) -> None:
        """Allocate the buffers for the batch and head sizes of the first keys."""
        values = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffers = [self._buffer(key_states), self._buffer(values)]
        self.is_initialized = True

    def _buffer(self, states: Tensor) -> Tensor:
        batch, heads, _, size = states.shape
        # zeros: a step of fixed shape weighs columns that are not written yet with 0, and 0 * NaN
        # would be NaN
        return states.new_zeros(batch, heads, self.max_tokens, size)

    def update(self, key_states, value_states, *args, **kwargs):
        """Write new keys and values (B, heads, n, size); return views of all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.fixed_at is not None:
            column, end = self.fixed_at
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer.index_copy_(2, column, states)
        else:
            end = self.seen + key_states.size(-2)
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:, :, self.seen : end] = states
            self.seen = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the tokens written so far."""
        return self.seen

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        if self.seen:
            kept = [self._buffer(buffer[: len(indices)]) for buffer in self.buffers]
            for new, old in zip(kept, self.buffers, strict=True):
                new[:, :, : self.seen] = old[indices, :, : self.seen]
            self.buffers = kept


def preallocated_cache(model: nn.Module, max_tokens: int) -> DynamicCache:
    """Return a cache for `model` whose full-attention layers never copy themselves."""
    cache = DynamicCache(config=model.config)
    cache.layers = [
        _PreallocatedLayer(max_tokens) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    unfit = sorted({type(x).__name__ for x in cache.layers if not isinstance(x, DynamicLayer)})
    if unfit or not cache.layers:
        raise ValueError(
            f"rollout_engine 'native': got cache layers {unfit} from {type(model).__name__}, "
            "expected attention layers. Use rollout_engine='hf'."
        )
    return cache
