"""Every family of models through every stage, and models with more embeddings than tokens.

python -m pytest tests/test_families.py                  # one family for each mechanism
python -m pytest tests/test_families.py -m "slow or not slow"
python tests/test_families.py                            # the table of docs/models.md
"""

import functools
import math
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parent))

import conftest  # noqa: E402
from codexhf import models, prompts, run  # noqa: E402
from codexhf.arguments import RewardModelArguments  # noqa: E402
from codexhf.evaluation import answer_logprobs  # noqa: E402
from codexhf.generation import engine_for, sample_ids  # noqa: E402
from codexhf.generation.engines import HFEngine, Sampling, reads_padding  # noqa: E402
from codexhf.ppo import PPOConfig, PPOTrainer  # noqa: E402
from codexhf.reward_model import (  # noqa: E402
    ModelReward,
    load_reward_model,
    prompts_to_score,
    record_scores,
)
from codexhf.tokenizer import new_tokenizer  # noqa: E402
from codexhf.tokens import answered_rows  # noqa: E402
from model_kinds import FAMILIES, tiny_config  # noqa: E402
from ppo_setup import same  # noqa: E402

FAST = {
    "gpt2": "learned positions, tied head",
    "gpt_neox": "names that change on saving",
    "gemma2": "capped logits, sliding window",
    "qwen3_moe": "experts",
    "mamba": "a state instead of a cache",
    "recurrent_gemma": "convolutions that read padding",
}
"""One family for each mechanism; the others are marked slow."""

ANSWER = 6  # tokens
COMMON = {
    "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_steps": 1,
    "save_strategy": "steps", "logging_steps": 1, "per_device_train_batch_size": 2,
    "learning_rate": 1e-2, "gradient_checkpointing": False,
}  # fmt: skip


@functools.cache
def the_tokenizer():
    made = new_tokenizer(conftest.CORPUS * 3, vocab_size=320)
    made.padding_side = "left"
    return made


def said(*texts: str) -> list[list[dict]]:
    return [[{"role": "user", "content": text}] for text in texts]


PROMPTS = said("add a", "x = 1 and more", "Write a", "def")
CHOSEN = ["return a + b", "12", "x = 12", "def add"]
REJECTED = ["a", "b", "numbers", "two"]


def length(prompts, completions, **columns) -> list[float]:
    return [len(text) / 9 for text in completions]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def begun(checkpoint: Path | None = None) -> run._Begun:
    """A stage that begins, or goes on from a checkpoint."""
    return run._Begun(checkpoint=checkpoint, record={"run": "family", "allowed": []})


def trained_twice(make, folder: Path) -> object:
    """Train two steps; do so again from the first step's checkpoint; the weights must be equal."""
    trainer = make(folder)
    before = weights(trainer.model)
    run._train(trainer, trainer.args, begun())
    after = weights(trainer.model)
    assert not same(before, after), "nothing was trained"
    assert all(map(math.isfinite, (log.get("loss", 0.0) for log in trainer.state.log_history)))
    again = make(folder)
    run._train(again, again.args, begun(folder / "checkpoint-1"))
    assert same(after, weights(again.model)), "resumed to other weights"
    return trainer


class Family:
    """One family's models on their way through the stages, in a folder."""

    def __init__(self, name: str, folder: Path, surplus: int = 0):
        self.folder, self.tokenizer = folder, the_tokenizer()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(name, self.tokenizer, surplus))
        model.save_pretrained(folder / "m0")
        self.policy = folder / "m0"

    def load(self):
        return models.load_policy(str(self.policy), self.tokenizer)

    def sft(self) -> None:
        rows = Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN})
        ids = answered_rows(rows, self.tokenizer)

        def make(folder):
            args = SFTConfig(output_dir=str(folder), max_steps=2, max_length=None, **COMMON)
            return SFTTrainer(self.load(), args, train_dataset=ids, processing_class=self.tokenizer)

        trainer = trained_twice(make, self.folder / "sft")
        trainer.save_model(str(self.folder / "m1"))
        self.policy = self.folder / "m1"
        assert same(weights(trainer.model), weights(self.load())), "saved other weights"

    def reward_model(self) -> None:
        columns = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
        ids = answered_rows(Dataset.from_dict(columns), self.tokenizer, ("chosen", "rejected"))

        def make(folder):
            args = RewardConfig(output_dir=str(folder), max_steps=2, max_length=None, **COMMON)
            model = load_reward_model(str(self.policy), self.tokenizer, new_head=True)
            return RewardTrainer(model, args, train_dataset=ids, processing_class=self.tokenizer)

        trainer = trained_twice(make, self.folder / "rm")
        trainer.save_model(str(self.folder / "r"))
        read = load_reward_model(str(self.folder / "r"), self.tokenizer)
        assert same(weights(trainer.model), weights(read)), "saved other weights"
        together = ModelReward(read, self.tokenizer)(PROMPTS, CHOSEN)
        alone = ModelReward(trainer.model, self.tokenizer, batch_size=1)(PROMPTS, CHOSEN)
        assert together == pytest.approx(alone, abs=1e-4), "padding changes the score"
        one = {"input_ids": torch.tensor([ids[0]["chosen_ids"]])}
        with torch.no_grad():
            own = read.eval()(**one, attention_mask=torch.ones_like(one["input_ids"])).logits.item()
        assert own == pytest.approx(together[0], abs=1e-4), "training reads another score"

    def ppo(self, critic_from: str) -> None:
        """Two rollouts with a critic made of the reward model, or of the policy."""
        rewards = {"reward_funcs": [length]}

        def make(folder):
            if critic_from == "reward_model":
                rewards.clear()
                rewards["reward_model"] = load_reward_model(str(self.folder / "r"))
            args = PPOConfig(
                output_dir=str(folder), response_length=ANSWER, total_episodes=8, stop_token="eos",
                gradient_accumulation_steps=2, num_ppo_epochs=1, num_mini_batches=1,
                temperature=1.0, num_sample_generations=0, log_grad_norms=False, **COMMON,
            )  # fmt: skip
            trainer = PPOTrainer(
                args=args, processing_class=self.tokenizer, model=self.load(), ref_model=None,
                **{"reward_model": None, **rewards},
                train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            )  # fmt: skip
            self.compare_rollouts(trainer)
            return trainer

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* cannot sample")
            trainer = trained_twice(make, self.folder / f"ppo_{critic_from}")
        ratios = [log["val/ratio"] for log in trainer.state.log_history if "val/ratio" in log]
        assert ratios[0] == pytest.approx(1, abs=1e-5), f"first ratio {ratios[0]}"
        kls = [log["objective/kl"] for log in trainer.state.log_history if "objective/kl" in log]
        assert kls[0] == pytest.approx(0, abs=1e-4), f"first KL {kls[0]}"
        trainer.save_model(str(self.folder / "m2"))
        self.policy = self.folder / "m2"
        assert same(weights(trainer.policy_model), weights(self.load())), "saved other weights"

    def compare_rollouts(self, trainer) -> None:
        """Hold each rollout's log-probabilities against a plain forward of its policy."""
        make, size = trainer._make_rollout, len(self.tokenizer)

        def compared(number):
            made = make(number)
            width = made.response_mask.size(1)
            model = trainer.policy_model.eval()
            for i, real in enumerate(made.response_mask):
                ids = made.input_ids[i][made.mask[i]]
                count = int(real.sum())
                with torch.no_grad():
                    logits = model(input_ids=ids[None], use_cache=False).logits[0, :, :size]
                plain = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[-count:, 0]
                gap = (plain - made.logprobs[i][real]).abs().max()
                assert gap < 1e-4, f"rollout {number}: sampled and plain differ by {gap:.1e}"
                assert int(made.input_ids[i, -width:].max()) < size
            model.train()
            return made

        trainer._make_rollout = compared

    def evaluation(self) -> None:
        model = self.load().eval()
        options = {"n": 2, "max_new_tokens": ANSWER}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* cannot sample")
            answers = sample_ids(model, self.tokenizer, PROMPTS, **options)
        rows = [(p, a) for p, group in zip(PROMPTS, answers, strict=True) for a in group]
        nats, tokens = answer_logprobs(model, self.tokenizer, *zip(*rows, strict=True))
        for (prompt, answer), found, count in zip(rows, nats, tokens, strict=True):
            assert count == len(answer) and max(answer) < len(self.tokenizer)
            start = prompts.prompt_ids(prompt, self.tokenizer)
            with torch.no_grad():
                logits = model(torch.tensor([[*start, *answer]]), use_cache=False).logits[0]
            logp = logits[len(start) - 1 : -1, : len(self.tokenizer)].double().log_softmax(-1)
            plain = logp.gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert found == pytest.approx(plain, abs=1e-3)


STAGES = {
    "SFT": Family.sft,
    "reward model": Family.reward_model,
    "PPO, critic of R": lambda family: family.ppo("reward_model"),
    "PPO, critic of the policy": lambda family: family.ppo("policy"),
    "evaluation": Family.evaluation,
}
"""Each saves, reads back and resumes as it goes; the next starts from what it saved."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in FAMILIES]
)
def test_a_family_goes_through_every_stage(name, tmp_path):
    family = Family(name, tmp_path)
    for stage in STAGES.values():
        stage(family)


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral"])
def test_the_best_checkpoint_is_read_back_whole(name, tmp_path):
    """R1, for Trainer's own classes: the first step is the best, by a rate that spoils the rest."""
    family = Family(name, tmp_path)
    rows = Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN})
    ids = answered_rows(rows, family.tokenizer)
    args = SFTConfig(
        output_dir=str(tmp_path / "sft"), max_steps=3, max_length=None, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, lr_scheduler_type="constant",
        **{**COMMON, "learning_rate": 1.0},
    )  # fmt: skip
    trainer = SFTTrainer(
        family.load(), args, train_dataset=ids, eval_dataset=ids, processing_class=family.tokenizer
    )
    run._train(trainer, args, begun())
    best = models.load_policy(trainer.state.best_model_checkpoint)
    assert same(weights(trainer.model), weights(best))
    assert trainer.state.best_model_checkpoint != str(tmp_path / "sft" / "checkpoint-3")


# ------------------------------------------------------------------------------ T5


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "granite", "mamba"])
def test_embeddings_that_are_no_tokens_change_nothing(name, tmp_path):
    """Linear head, capped and scaled logits, and model.generate."""
    family = Family(name, tmp_path, surplus=40)
    with torch.no_grad():  # ids that are no tokens are by far the likeliest
        model = family.load()
        head = model.get_output_embeddings()
        head.weight[len(family.tokenizer) :] = 50 * head.weight[5]
        model.save_pretrained(tmp_path / "m0")
    family.ppo("policy")
    family.evaluation()


def test_no_engine_samples_what_is_no_token():
    tokenizer = the_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen2", tokenizer, 400)).eval()
    ids, mask = prompts.left_pad([[5, 6, 7], [8, 9]] * 8, "cpu")
    size = len(tokenizer)
    for name in ("native", "hf", "continuous_batching"):
        engine = engine_for(model, Sampling(8, (), 64, size), name)
        found = engine.generate(model, ids, mask, seed=1, temperature=1.0)
        assert int(found.responses.max()) < size, name
        whole = torch.cat([ids[0], found.responses[0]])
        with torch.no_grad():
            logp = model(whole[None]).logits[0, 2:-1, :size].log_softmax(-1)
        plain = logp.gather(1, found.responses[0][:, None])[:, 0]
        assert torch.allclose(plain, found.logprobs[0], atol=1e-4), name


@pytest.mark.parametrize("name", ["native", "hf", "continuous_batching"])
def test_experts_whose_config_asks_for_router_logits_are_sampled(name):
    """As SFTTrainer leaves them."""
    torch.manual_seed(0)
    config = tiny_config("mixtral", the_tokenizer())
    config.output_router_logits = True
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, mask = prompts.left_pad([[5, 6, 7], [8, 9]], "cpu")
    engine = engine_for(model, Sampling(4, (), 64), name)
    with models.evaluating(model):
        found = engine.generate(model, ids, mask, seed=1, temperature=1.0)
    assert found.lengths.tolist() == [4, 4] and model.config.output_router_logits


# ------------------------------------------------------------------------------ T5, T7, M1, M8


def with_context(positions: int, embeddings: int | None = None, kind="CausalLM"):
    """GPT-2, whose positions are learned: one token more is an IndexError."""
    torch.manual_seed(0)
    config = tiny_config("gpt2", the_tokenizer())
    config.n_positions, config.vocab_size = positions, embeddings or config.vocab_size
    config.num_labels = 1
    made = {
        "CausalLM": AutoModelForCausalLM,
        "SequenceClassification": AutoModelForSequenceClassification,
    }
    return made[kind].from_config(config)


def ppo_trainer(folder, **given):
    args = PPOConfig(
        output_dir=str(folder), response_length=ANSWER, total_episodes=4, stop_token="eos",
        gradient_accumulation_steps=2, num_ppo_epochs=1, num_sample_generations=0,
        temperature=1.0, **COMMON,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": PROMPTS})
    given = {"model": with_context(96), "train_dataset": rows, "ref_model": None, **given}
    return PPOTrainer(
        args=args, processing_class=the_tokenizer(),
        **{"reward_model": None, "reward_funcs": [length], **given},
    )  # fmt: skip


def test_models_with_fewer_embeddings_than_the_policy_read_what_it_writes(tmp_path):
    """Policy of 360 embeddings; critic, reference and reward model as many as there are tokens."""
    trainer = ppo_trainer(
        tmp_path,
        model=with_context(96, len(the_tokenizer()) + 40),
        ref_model=with_context(96),
        value_model=with_context(96, kind="SequenceClassification"),
        reward_model=with_context(96, kind="SequenceClassification"),
    )
    trainer.train()
    assert any(log.get("val/ratio") == pytest.approx(1) for log in trainer.state.log_history)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "few"}, "processing_class: got ids up to 3.*below the policy's 300"),
        ({"ref_model": "few"}, "ref_model: got 300 embeddings.*Pass None"),
        ({"value_model": "few"}, "value_model: got 300 embeddings.*Leave value_model out"),
        ({"train_dataset": [[5, 6], [7, 5000], [8], [9]]}, "row 1: got a prompt with the id 5000"),
        ({"train_dataset": [[5, -100], [6], [7], [8]]}, "row 0: got a prompt with the id -100"),
    ],
)
def test_ids_that_a_model_does_not_know_are_refused_at_construction(tmp_path, given, message):
    ((name, value),) = given.items()
    kind = "SequenceClassification" if name == "value_model" else "CausalLM"
    if value == "few":
        value = with_context(96, 300, kind)
    else:
        value = Dataset.from_dict({"input_ids": value})
    with pytest.raises(ValueError, match=message):
        ppo_trainer(tmp_path, **{name: value})


def test_a_reference_of_shorter_context_limits_the_prompts(tmp_path):
    with pytest.raises(ValueError, match="the policy has 16 positions|expected at most 10"):
        ppo_trainer(tmp_path, ref_model=with_context(16))


def test_scores_are_recorded_on_answers_of_ppos_length_within_the_context(tmp_path, capsys):
    with_context(32).save_pretrained(tmp_path / "m1")
    model = with_context(32, kind="SequenceClassification")
    model.config.pad_token_id = the_tokenizer().pad_token_id
    pairs = Dataset.from_dict({"prompt": [*PROMPTS, *said("x = 1 " * 9), PROMPTS[0]]})

    def stage(tokens):
        return RewardModelArguments(
            model=str(tmp_path / "m1"), score_samples=8, score_max_new_tokens=tokens
        )

    prompts = prompts_to_score(pairs, the_tokenizer(), stage(8))
    assert prompts == PROMPTS  # each once, but for the one that leaves no room
    assert "1 of 5 prompts leave no room for 8 tokens" in capsys.readouterr().out
    trainer = SimpleNamespace(
        model=model,
        processing_class=the_tokenizer(),
        args=SimpleNamespace(seed=1, report_to=[]),
        state=SimpleNamespace(global_step=0),
    )
    assert record_scores(trainer, prompts, stage(8))["score_samples"] == 8
    with pytest.raises(ValueError, match="score_max_new_tokens: got 31, which leaves 1 tokens"):
        prompts_to_score(pairs, the_tokenizer(), stage(31))
    with pytest.raises(ValueError, match="leave no room for a prompt"):
        prompts_to_score(pairs, the_tokenizer(), stage(32))


# ------------------------------------------------------------------------------ padding


def test_prompts_are_grouped_by_length_where_a_model_reads_padding():
    tokenizer, found = the_tokenizer(), {}
    for name in ("llama", "lfm2", "recurrent_gemma"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(name, tokenizer)).eval()
        with torch.no_grad():  # row 0 pads, and is drawn as 0
            model.get_input_embeddings().weight[0] = 1.0
        found[name] = reads_padding(model)
    assert found == {"llama": False, "lfm2": False, "recurrent_gemma": True}
    ids, mask = prompts.left_pad([[5, 6, 7, 8, 9], [8], [5, 6], [7]], "cpu")
    together = HFEngine(Sampling(6, (), 64)).generate(model, ids, mask, seed=1, temperature=0)
    for i, (row, real) in enumerate(zip(ids, mask, strict=True)):
        prompt = row[real][None]
        engine = HFEngine(Sampling(6, (), 64))
        alone = engine.generate(model, prompt, prompt > -1, seed=1, temperature=0)
        assert torch.equal(alone.responses[0], together.responses[i])


def configured(model_type: str, tokenizer, **fields):
    """A tiny random model of a family that is not in the matrix."""
    config = AutoConfig.for_model(
        model_type, **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def test_a_model_that_computes_otherwise_with_a_cache_is_stopped_in_the_first_rollout(tmp_path):
    """Phi-3's longrope switches its factors at a length that the completions cross."""
    tokenizer = the_tokenizer()
    switch = max(len(prompts.prompt_ids(prompt, tokenizer)) for prompt in PROMPTS) + 2
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
        "long_factor": [16.0] * 4, "original_max_position_embeddings": switch,
    }  # fmt: skip
    model = configured(
        "phi3", tokenizer, rope_parameters=rope, original_max_position_embeddings=switch
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.qkv_proj.weight *= 20  # else attention is flat and positions matter not
    trainer = ppo_trainer(tmp_path, model=model)
    with pytest.raises(RuntimeError, match="differ from those of the training forward"):
        trainer.train()


def test_a_family_whose_layers_cannot_be_found_is_refused_at_construction(tmp_path):
    model = configured(
        "llama4_text", the_tokenizer(), intermediate_size_mlp=48, num_local_experts=2, head_dim=8
    )
    with pytest.raises(ValueError, match="got Llama4ForCausalLM, expected layers under"):
        ppo_trainer(tmp_path, model=model)


def table() -> str:
    """Return the table of docs/models.md, as Markdown."""
    lines = [f"| family | {' | '.join(STAGES)} |", "|---" * (len(STAGES) + 1) + "|"]
    for name in FAMILIES:
        cells = []
        with tempfile.TemporaryDirectory() as folder:
            family = Family(name, Path(folder))
            for stage in STAGES.values():
                try:
                    stage(family)
                    cells.append("yes")
                except Exception as error:  # whatever it is, it belongs in the table
                    cells.append(f"{type(error).__name__}: {error}".replace("\n", " ")[:150])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import contextlib

    with contextlib.redirect_stdout(sys.stderr):  # where the trainers' logs go
        text = table()
    print(text)
