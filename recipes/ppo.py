"""ppo: M1 + R + rules -> M2, under min alpha L_SFT + beta L_RLHF + gamma Omega.

    accelerate launch recipes/ppo.py                # settings: ppo.yaml
    accelerate launch recipes/ppo.py --kl_coef 0.1  # any field of PPOArguments or PPOConfig

Reads   runs/m1, runs/rm; data_cards/*.md of prompts, demonstrations and tasks.
Writes  runs/m2: policy, value_model/, tokenizer, README.md, manifest.json (last).
"""

from codexhf.arguments import PPOArguments
from codexhf.launch import importing, launch
from codexhf.parsing import parse


def main(argv=None):
    with importing():
        from codexhf.ppo import PPOConfig
    stage, training = parse((PPOArguments, PPOConfig), __file__, argv)
    with importing():  # late: what parse() refuses is refused at once
        from codexhf.adapters import merge_adapters
        from codexhf.data import load_demonstrations, load_tasks
        from codexhf.execution import check_isolation
        from codexhf.models import room_for, within_context
        from codexhf.ppo.stage import new_trainer
        from codexhf.run import run_stage
        from codexhf.tokenizer import load_tokenizer
    check_isolation(stage.unsafe_exec)
    tokenizer = load_tokenizer(stage.model, padding_side="left")
    room, seed = room_for(stage.model, training.response_length), training.seed
    prompts = load_tasks(
        stage.prompt_cards,
        tokenizer,
        exclude=stage.exclude_cards,
        max_prompt_tokens=room,
        runs_tests=stage.runs_tests,
        seed=seed,
    )
    demonstrations = load_demonstrations(
        stage.sft_cards,
        tokenizer,
        within_context(stage.model, training.sft_max_length, stage.sft_cards),
        exclude=stage.exclude_cards,
    )
    tasks = load_tasks(
        stage.eval_cards, tokenizer, max_rows=stage.eval_tasks, max_prompt_tokens=room, seed=seed
    )
    data = {"prompts": prompts, "demonstrations": demonstrations, "tasks": tasks}
    trainer = new_trainer(stage, training, tokenizer, prompts, demonstrations, tasks)
    parents = {"m1": stage.model, "rm": stage.reward_model, "critic": stage.value_model}
    return run_stage(trainer, stage, training, data=data, parents=parents, finish=merge_adapters)


if __name__ == "__main__":
    launch(main)
