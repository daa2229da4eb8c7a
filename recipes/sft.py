"""sft: M0 + demonstrations -> M1, which answers prompts.

    accelerate launch recipes/sft.py                       # settings: sft.yaml
    accelerate launch recipes/sft.py --learning_rate 1e-5  # any field of SFTArguments or SFTConfig

Reads   runs/m0; data_cards/*.md with columns prompt, completion (text or messages).
Writes  runs/m1: weights, tokenizer, README.md, manifest.json (last).
"""

from trl import SFTConfig

from codexhf.arguments import SFTArguments
from codexhf.launch import launch
from codexhf.parsing import parse


def main(argv=None):
    stage, training = parse((SFTArguments, SFTConfig), __file__, argv)
    # Late, so that what parse() refuses is refused at once.
    from trl import SFTTrainer

    from codexhf import models
    from codexhf.data import load_demonstrations, load_tasks
    from codexhf.evaluation import PassAt1, demonstrations_of
    from codexhf.execution import check_isolation
    from codexhf.run import run_stage
    from codexhf.tokenizer import load_tokenizer

    check_isolation(stage.unsafe_exec)
    tokenizer = load_tokenizer(stage.model, chat_template=training.chat_template_path)
    seed, longest = training.seed, models.within_context(stage.model, training.max_length)
    train = load_demonstrations(
        stage.train_cards,
        tokenizer,
        longest,
        exclude=stage.exclude_cards,
        weights=stage.weights,
        when_exhausted=stage.when_exhausted,
        completion_only=training.completion_only_loss,
        seed=seed,
    )
    room = models.room_for(stage.model, stage.eval_max_new_tokens)
    tasks = load_tasks(
        stage.eval_cards, tokenizer, max_rows=stage.eval_tasks, max_prompt_tokens=room, seed=seed
    )
    trainer = SFTTrainer(
        model=models.load_policy(stage.model, tokenizer),
        args=training,
        train_dataset=train.ids,
        eval_dataset=demonstrations_of(tasks, tokenizer),
        processing_class=tokenizer,
        peft_config=models.lora_config(stage, stage.lora_dropout),
        callbacks=[PassAt1(tasks.dataset, tokenizer, stage, seed)],
    )
    data, parents, end = {"train": train, "eval": tasks}, {"m0": stage.model}, models.merge_adapters
    return run_stage(trainer, stage, training, data=data, parents=parents, finish=end)


if __name__ == "__main__":
    launch(main)
