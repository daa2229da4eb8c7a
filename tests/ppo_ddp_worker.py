"""One process of tests/test_ppo_ddp.py: `torchrun ... ppo_ddp_worker.py FOLDER HOW CASE...`.

HOW is ddp, zero3, fsdp2, or pieces: fsdp2 with checkpoints in pieces.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import fsdp_on_cpu  # noqa: E402
import ppo_setup as setup  # noqa: E402
from codexhf.generation.engines import Generation  # noqa: E402
from codexhf.launch import disable_zero3_init  # noqa: E402

KL_TARGET = 0.06
"""What the KL of the adaptive case passes: below it in the third rollout, above in the fourth."""


class Canned:
    """An engine whose answers follow from the prompts alone, so that any split gives the same."""

    def generate(self, policy, prompt_ids, prompt_mask, *, seed, temperature) -> Generation:
        """Answer with letters and a length that a row's own tokens decide."""
        rows = []
        for ids, real in zip(prompt_ids, prompt_mask, strict=True):
            key = int((ids[real] * torch.arange(1, int(real.sum()) + 1)).sum())
            rows.append([4 + (key * (i + 3)) % 26 for i in range(1 + key % 7)] + [2])
        width = max(len(row) for row in rows)
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return Generation(padded, lengths, torch.zeros(padded.shape))


def digest(trainer) -> str:
    """Return a checksum of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(setup.state(trainer).items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def build(case: str, folder: Path, **config):
    """Return the trainer of a case; a rollout is 8 rows over all processes."""
    disable_zero3_init()  # the case before may have trained
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        "gradient_accumulation_steps": 4 // world,
        "num_mini_batches": 1,
        "shuffle_dataset": False,
        "step_unit": "optimizer",
        "alpha_sft": 0.5,
        "sft_batch_size": 2,
        "padding_free": world > 1,  # as by itself on GPUs
        **config,
    }
    kwargs = {"sft_dataset": setup.demonstrations(8), "reward_funcs": [setup.length]}
    if case.startswith("lora"):
        from peft import LoraConfig

        kwargs["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        torch.manual_seed(0)  # the adapter's weights
    return setup.new_trainer(folder, config=settings, **kwargs)


def gradients(case: str, folder: Path) -> None:
    """Write the gradient of the first minibatch, whose answers are canned."""
    config = {"old_logprobs": "recompute", "max_grad_norm": 0.0, "kl_in": "loss"}
    trainer = build(case, folder / "out", kl_estimator="k3", entropy_coef=0.1, **config)
    trainer.engine = Canned()
    caught = {}

    def before_step(args, state, control, **kwargs):
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None and not caught.get("done"):
                caught[name] = setup.whole(parameter.grad)
        caught["done"] = True
        control.should_training_stop = True

    from transformers import TrainerCallback

    hook = TrainerCallback()
    hook.on_pre_optimizer_step = before_step
    trainer.add_callback(hook)
    trainer.train()
    caught.pop("done")
    logs = {k: v for k, v in setup.logs(trainer)[0].items() if "time" not in k and k != "eps"}
    if trainer.is_world_process_zero():
        result = {"gradients": caught, "logs": logs, "zero3": trainer.is_deepspeed_enabled}
        torch.save(result, folder / "result.pt")


def adaptive(case: str, folder: Path) -> None:
    """Write the KL coefficient after every rollout, then the metrics of an evaluation."""
    config = {"old_logprobs": "recompute", "kl_estimator": "k3"}
    config |= {"kl_target": KL_TARGET, "kl_horizon": 10, "gradient_checkpointing": True}
    trainer = build(case, folder / "out", total_episodes=40, **config)
    trainer.engine = Canned()
    coefs, make_rollout = [], trainer._make_rollout

    def noted(number: int):
        rollout = make_rollout(number)
        coefs.append(trainer.kl.coef)
        return rollout

    trainer._make_rollout = noted
    trainer.train()
    # 5 rows: the second of two processes answers the first row again
    found = trainer.evaluate(setup.prompts(5))
    timing = ("runtime", "per_second")
    metrics = {k: v for k, v in found.items() if not any(word in k for word in timing)}
    logged = [log["objective/kl_coef"] for log in setup.logs(trainer) if "objective/kl_coef" in log]
    kls = [log["objective/kl"] for log in setup.logs(trainer) if "objective/kl" in log]
    result = {"coefs": coefs, "logged": logged, "kls": kls, "metrics": metrics}
    rank = trainer.args.process_index
    (folder / f"adaptive_{rank}.json").write_text(json.dumps(result))


def resume(case: str, folder: Path) -> None:
    """Train, resume from two checkpoints, and write the checksums of the weights."""
    config = {
        "num_mini_batches": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "critic_warmup_rollouts": 1,
        "early_stop_kl": 1e-8,  # passed at the second update that the policy gets
        "kl_target": 1.0,
    }
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):  # where no weight can rest
        config["critic_warmup_rollouts"] = 0
    trainer = build(case, folder / "out", **config)
    trainer.train()
    found = {"whole": digest(trainer)}
    for step in (3, 6):  # in the middle of the first rollout, and of a later one
        again = build(case, folder / "out", **{**config, "save_strategy": "no"})
        again.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{step}"))
        found[f"resumed at {step}"] = digest(again)
    if not trainer.is_deepspeed_enabled:
        found["frozen"] = str(frozen(case, folder))
    if trainer.is_fsdp_enabled:  # as a stage ends: checkpoints may lie in pieces, the result not
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "saved"))
    rank = trainer.args.process_index
    (folder / f"digests_{rank}.json").write_text(json.dumps(found))


def frozen(case: str, folder: Path) -> bool:
    """Return whether the policy rests while the critic warms up, in spite of weight decay."""
    config = {"total_episodes": 8, "critic_warmup_rollouts": 1, "weight_decay": 0.5}
    warm = build(case, folder / "warm", **config)
    before = setup.state(warm)
    warm.train()
    kept = {n: t for n, t in setup.state(warm).items() if n.startswith("policy.")}
    return setup.same({n: before[n] for n in kept}, kept)


def work(name: str, folder: Path) -> None:
    """Do a case in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    do = {"gradients": gradients, "adaptive": adaptive, "resume": resume}[name.split("-")[1]]
    do(name, folder)


if __name__ == "__main__":
    fsdp_on_cpu.each(work, *sys.argv[1:])
