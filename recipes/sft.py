"""sft: M0 + demonstrations -> M1, which answers prompts.

    accelerate launch recipes/sft.py                       # uses sft.yaml beside this file
    accelerate launch recipes/sft.py --learning_rate 1e-5  # any field of SFTArguments or SFTConfig

Reads   runs/m0; data_cards/*.md with columns prompt, completion (text or messages).
Writes  runs/m1: weights, tokenizer, README.md, manifest.json (last).
"""

from trl import SFTConfig, SFTTrainer

from codexhf.arguments import SFTArguments, parse
from codexhf.data import load_demonstrations, load_tasks
from codexhf.evaluation import PassAt1, demonstrations_of
from codexhf.execution import check_isolation
from codexhf.models import (
    load_policy,
    load_tokenizer,
    lora_config,
    merge_adapters,
    room_for,
    within_context,
)
from codexhf.run import launch, run_stage


def main(argv=None):
    stage, training = parse((SFTArguments, SFTConfig), __file__, argv)
    check_isolation(stage.unsafe_exec)
    tokenizer = load_tokenizer(stage.model)
    train = load_demonstrations(
        stage.train_cards,
        tokenizer,
        within_context(stage.model, training.max_length),
        exclude=stage.exclude_cards,
        weights=stage.weights,
        completion_only=training.completion_only_loss,
        seed=training.seed,
    )
    problems = load_tasks(
        stage.eval_cards,
        tokenizer,
        max_rows=stage.eval_problems,
        max_prompt_tokens=room_for(stage.model, stage.eval_max_new_tokens),
        seed=training.seed,
    )
    model = load_policy(stage.model, tokenizer)
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=train.ids,
        eval_dataset=demonstrations_of(problems),
        processing_class=tokenizer,
        peft_config=lora_config(stage),
        callbacks=[PassAt1(problems.dataset, tokenizer, stage.eval_max_new_tokens, training.seed)],
    )
    return run_stage(
        trainer,
        stage,
        training,
        data={"train": train, "eval": problems},
        parents={"m0": stage.model},
        finish=merge_adapters,
    )


if __name__ == "__main__":
    launch(main)
