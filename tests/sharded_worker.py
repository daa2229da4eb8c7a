"""One process of tests/test_sharding.py: `torchrun ... sharded_worker.py FOLDER HOW CASE...`.

HOW is ddp, zero3, fsdp2 or pieces, which is fsdp2 with checkpoints in pieces. Or fail, with the
case raises or dies: what the second process does after a checkpoint.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainerCallback
from transformers import TrainingArguments as Arguments

sys.path.insert(0, str(Path(__file__).parent))

import fsdp_on_cpu  # noqa: E402
from codexhf.adapters import merge_adapters  # noqa: E402
from codexhf.arguments import PretrainArguments, SFTArguments  # noqa: E402
from codexhf.data import Data  # noqa: E402
from codexhf.evaluation import PassAt1  # noqa: E402
from codexhf.launch import disable_zero3_init, launch  # noqa: E402
from codexhf.run import run_stage  # noqa: E402
from conftest import CORPUS, tiny_config  # noqa: E402
from ppo_setup import whole  # noqa: E402

STEPS, ROWS = 6, 4


class Watch(TrainerCallback):
    """Keeps the gradients of the first step, and crashes after a step if it is told to."""

    def __init__(self, crash_at: int | None):
        self.gradients, self.crash_at = None, crash_at

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            named = model.named_parameters()
            self.gradients = {n: whole(p.grad) for n, p in named if p.grad is not None}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.crash_at:
            raise RuntimeError("crash")


def tokenizer():
    """Return the tokenizer of conftest.py."""
    from codexhf.tokenizer import new_tokenizer

    return new_tokenizer(CORPUS * 3, vocab_size=320)


def build(case: str, folder: Path, watch: Watch):
    """Return the trainer of a case, of which ROWS rows over all processes make a batch."""
    stage, _, kind = case.partition("-")
    disable_zero3_init()  # the case before may have trained
    known, world = tokenizer(), int(os.environ.get("WORLD_SIZE", "1"))
    shared = {
        "output_dir": str(folder), "max_steps": STEPS, "save_steps": 2, "logging_steps": 1,
        "per_device_train_batch_size": ROWS // world, "learning_rate": 1e-2, "use_cpu": True,
        "bf16": False, "report_to": "none", "disable_tqdm": True, "seed": 1,
        "gradient_checkpointing": stage == "rm",
    }  # fmt: skip
    torch.manual_seed(0)
    rows = [[3 + (i * j) % 300 for j in range(4 + i % 7)] for i in range(1, 41)]
    lora = None
    if kind == "lora":
        from peft import LoraConfig

        tasks = {"sft": "CAUSAL_LM", "rm": "SEQ_CLS"}
        lora = LoraConfig(r=2, target_modules="all-linear", task_type=tasks[stage])
    tied = {"tie_word_embeddings": stage == "sft"}
    if stage == "rm":
        from trl import RewardConfig, RewardTrainer

        pairs = [{"chosen_ids": row, "rejected_ids": row[::-1]} for row in rows]
        return RewardTrainer(
            LlamaForSequenceClassification(tiny_config(known, num_labels=1)),
            RewardConfig(**shared, max_length=32),
            train_dataset=Dataset.from_list(pairs),
            processing_class=known,
            callbacks=[watch],
            peft_config=lora,
        )
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    model = LlamaForCausalLM(tiny_config(known, **tied))
    if stage == "pretrain":
        from transformers import DataCollatorForLanguageModeling

        collator = DataCollatorForLanguageModeling(known, mlm=False)
        data = data.remove_columns("labels")
        return Trainer(model, Arguments(**shared), collator, data, callbacks=[watch])
    from trl import SFTConfig, SFTTrainer

    tests = [{"args": "(1, 2)", "expected": "3"}]
    rows = [{"prompt": "x" * n, "tests": tests, "entry_point": "f"} for n in range(1, 4)]
    options = SFTArguments(eval_max_new_tokens=7)
    evaluated = {"eval_strategy": "steps", "eval_steps": 3}
    return SFTTrainer(
        model,
        SFTConfig(**shared, **evaluated, max_length=32, packing=False),
        train_dataset=data,
        eval_dataset=data.select(range(5)),  # uneven over two processes
        processing_class=known,
        callbacks=[watch, PassAt1(Dataset.from_list(rows), known, options)],
        peft_config=lora,
    )


def stage(case: str, folder: Path, crash_at: int | None = None) -> None:
    """Run a stage to its end; write its losses and the gradients of the first step."""
    watch = Watch(crash_at)
    trainer = build(case, folder / "out", watch)
    data = Data(trainer.train_dataset)
    several = "WORLD_SIZE" in os.environ  # there nothing is padded, as by itself on GPUs
    options = PretrainArguments(architecture={"model_type": "llama"}, padding_free=several)
    manifest = run_stage(
        trainer, options, trainer.args, data={"train": data}, parents={}, finish=merge_adapters
    )
    if manifest and crash_at is None:
        result = {"gradients": watch.gradients, "history": manifest["history"]}
        result["zero3"] = trainer.is_deepspeed_enabled
        torch.save(result, folder / "result.pt")


def work(case: str, folder: Path) -> None:
    """Run a stage, and once more with a crash after its third step."""
    folder.mkdir(parents=True, exist_ok=True)
    stage(case, folder / "whole")
    try:
        stage(case, folder / "cut", crash_at=3)
    except RuntimeError as error:
        assert "crash" in str(error), error
    stage(case, folder / "cut")


def fail(case: str, folder: Path) -> None:
    """Let the second process raise in a reward function, or be killed, in the third step."""
    second = os.environ["RANK"] == "1"

    class Die(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if second and state.global_step == 2:
                (folder / "failed_at").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)

    def reward(prompts, completions, **columns):
        if second and trainer.state.global_step == 2:
            (folder / "failed_at").write_text(str(time.time()))
            raise ZeroDivisionError("this reward divides by nothing")
        return [float(len(text)) for text in completions]

    if case == "dies":
        trainer = build("pretrain-full", folder / "out", Watch(None))
        trainer.add_callback(Die())
    else:
        import ppo_setup

        config = {"num_mini_batches": 1, "num_ppo_epochs": 1, "total_episodes": 64}
        config |= {"save_strategy": "steps", "save_steps": 1, "step_unit": "optimizer"}
        trainer = ppo_setup.new_trainer(folder / "out", config=config, reward_funcs=[reward])
    options = PretrainArguments(architecture={"model_type": "llama"})
    run_stage(trainer, options, trainer.args, data={}, parents={})


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "fail":
        launch(lambda: fail(sys.argv[3], Path(sys.argv[1])))
        sys.exit()
    fsdp_on_cpu.each(work, *sys.argv[1:])
