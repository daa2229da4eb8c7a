"""reward_model: M1 + preference pairs -> R, which scores answers.

    accelerate launch recipes/reward_model.py              # settings: reward_model.yaml
    accelerate launch recipes/reward_model.py --num_train_epochs 3  # any field of
                                                           # RewardModelArguments or RewardConfig

Reads   runs/m1; runs/prefs, or data_cards/*.md of type preference.
Writes  runs/rm: weights, tokenizer, README.md, manifest.json (last); config.json carries the mean
        and standard deviation of the score on M1's answers.
"""

from codexhf.arguments import RewardModelArguments
from codexhf.launch import importing, launch
from codexhf.parsing import parse


def main(argv=None):
    with importing():
        from trl import RewardConfig
    stage, training = parse((RewardModelArguments, RewardConfig), __file__, argv)
    with importing():  # late: what parse() refuses is refused at once
        from trl import RewardTrainer

        from codexhf.adapters import loading, merge_adapters, with_lora
        from codexhf.data import load_pairs
        from codexhf.models import within_context
        from codexhf.reward_model import load_reward_model, prompts_to_score, record_scores
        from codexhf.run import run_stage
        from codexhf.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(stage.model)
    max_length = within_context(stage.model, training.max_length)
    train = load_pairs(stage.train_cards, tokenizer, max_length, exclude=stage.eval_cards)
    test = load_pairs(stage.eval_cards, tokenizer, max_length)
    prompts = prompts_to_score(train.dataset, tokenizer, stage)
    options = {"new_head": True, "seed": training.seed, **loading(stage)}
    model = load_reward_model(stage.model, tokenizer, **options)
    trainer = RewardTrainer(
        model=with_lora(model, stage, training.seed, task="SEQ_CLS"),
        args=training,
        train_dataset=train.ids,
        eval_dataset=test.ids,
        processing_class=tokenizer,
    )
    return run_stage(
        trainer,
        stage,
        training,
        data={"train": train, "test": test},
        parents={"m1": stage.model},
        finish=lambda t: {**record_scores(t, prompts, stage), **merge_adapters(t)},
    )


if __name__ == "__main__":
    launch(main)
