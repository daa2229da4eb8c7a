"""evaluation: M0, M1, M2 and R -> the same held-out numbers for each model.

    accelerate launch recipes/evaluation.py                  # uses evaluation.yaml beside this file
    accelerate launch recipes/evaluation.py --num_samples 8  # any field of EvaluationArguments

Reads   runs/m0, runs/m1, runs/m2, runs/rm; data_cards/*.md of held-out problems and corpora.
Writes  runs/evaluation: answers.json, README.md, manifest.json (last) with every metric.
"""

from codexhf.arguments import EvaluationArguments, parse
from codexhf.data import load_heldout_texts, load_problems
from codexhf.evaluation import evaluate_models
from codexhf.execution import check_isolation
from codexhf.models import load_tokenizer, room_for
from codexhf.run import launch, run_task


def main(argv=None):
    (stage,) = parse((EvaluationArguments,), __file__, argv)
    check_isolation(stage.unsafe_exec)
    tokenizer = load_tokenizer(stage.reference)
    problems = load_problems(
        stage.heldout_cards,
        tokenizer,
        max_rows=stage.max_problems,
        max_prompt_tokens=room_for([stage.reference, *stage.models], stage.max_new_tokens),
        seed=stage.seed,
    )
    corpora = load_heldout_texts(stage.text_cards, max_rows=stage.max_documents)
    return run_task(
        stage,
        lambda folder: evaluate_models(stage, problems, corpora, folder),
        data={"problems": problems, **corpora},
        parents={"reward_model": stage.reward_model, **{m: m for m in stage.models}},
    )


if __name__ == "__main__":
    launch(main)
