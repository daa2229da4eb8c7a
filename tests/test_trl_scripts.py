"""TRL's two example scripts and what its own tests ask of PPOTrainer, with only the import changed.

Written afresh from what they do, on tiny local models and rows.

python -m pytest tests/test_trl_scripts.py
"""

import json
import shutil

import pytest
import torch
from datasets import DatasetDict, load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    HfArgumentParser,
)
from trl import ModelConfig, ScriptArguments, get_peft_config

from codexhf.ppo import PPOConfig, PPOTrainer  # the changed import
from conftest import CORPUS

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FLAGS = (
    "--use_cpu --bf16 False --report_to none --disable_tqdm True --learning_rate 1e-3 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --total_episodes 8 "
    "--num_ppo_epochs 1 --num_mini_batches 1 --response_length 8 --missing_eos_penalty 1.0 "
    "--stop_token eos --logging_steps 1 --save_strategy no --gradient_checkpointing False "
)


@pytest.fixture(params=[0, 12], ids=["embeddings fit", "embeddings padded"])
def folders(request, tokenizer, tmp_path):
    """A policy and a reward model of the family of TRL's examples, as folders, without a pad token.

    Pythia has more embeddings than tokens; a policy of one's own often has as many.
    """
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    config = GPTNeoXConfig(
        vocab_size=len(plain) + request.param, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=128,
        eos_token_id=plain.eos_token_id, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "sft")
    config.pad_token_id = plain.eos_token_id
    GPTNeoXForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    plain.save_pretrained(tmp_path / "sft")
    return tmp_path


def local(folder, rows, splits):
    """Write rows as a data set that load_dataset reads by name."""
    (folder / "data").mkdir()
    for split in splits:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.jsonl").write_text(text)
    return str(folder / "data")


def parsed(folders, more=""):
    words = f"--sft_model_path {folders}/sft --reward_model_path {folders}/rm {FLAGS} {more}"
    words += f" --output_dir {folders}/out --model_name_or_path {folders}/sft"
    words += f" --dataset_name {folders}/data"
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    return parser.parse_args_into_dataclasses(words.split())


def script_models(training_args, model_args):
    """What both scripts load, the pad token without an embedding included."""
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT
    read = AutoModelForSequenceClassification.from_pretrained
    value_model = read(training_args.reward_model_path, num_labels=1)
    reward_model = read(training_args.reward_model_path, num_labels=1)
    policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
    peft_config = get_peft_config(model_args)
    reference = None
    if peft_config is None:
        reference = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path)
    return tokenizer, policy, reference, reward_model, value_model, peft_config


def finish(trainer, training_args):
    """Train, save and print completions, as the scripts end."""
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model(training_args.output_dir)
    trainer.generate_completions()
    after = dict(trainer.model.named_parameters())
    for part in ("policy.", "value_model."):
        assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith(part)), part
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    assert len(logs) == 2 and logs[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    if training_args.num_ppo_epochs == 1:  # else the mean is over ratios that have moved
        assert logs[0]["val/ratio"] == pytest.approx(1, abs=1e-5)


def test_the_sentiment_script_runs(folders, capsys):
    """Prompts tokenised by the script, split by row number, no evaluation while training."""
    rows = [{"prompt": text} for text in (CORPUS[0], "x = 12", "def f", CORPUS[1]) * 3]
    local(folders, rows, ["descriptiveness"])
    script_args, training_args, model_args = parsed(folders)
    shutil.rmtree(training_args.output_dir, ignore_errors=True)
    tokenizer, policy, reference, reward_model, value_model, peft_config = script_models(
        training_args, model_args
    )
    files = {"descriptiveness": f"{script_args.dataset_name}/descriptiveness.jsonl"}
    dataset = load_dataset("json", data_files=files, split="descriptiveness")
    held_out = 4
    train_dataset = dataset.select(range(len(dataset) - held_out))
    eval_dataset = dataset.select(range(len(dataset) - held_out, len(dataset)))

    def prepare(rows):
        return rows.map(
            lambda batch: {"input_ids": tokenizer(batch["prompt"], padding=False)["input_ids"]},
            batched=True,
            remove_columns=rows.column_names,
            num_proc=training_args.dataset_num_proc,
        )

    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=prepare(train_dataset),
        eval_dataset=prepare(eval_dataset),
        peft_config=peft_config,
    )
    finish(trainer, training_args)
    assert capsys.readouterr().out.count("->") >= held_out
    saved = AutoModelForCausalLM.from_pretrained(training_args.output_dir)
    head = trainer.model.policy.get_output_embeddings().weight
    assert torch.equal(saved.get_output_embeddings().weight, head)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_summary_script_runs(folders, adapter):
    """Chats rendered and filtered by length, evaluated by steps; a reference or an adapter."""
    messages = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "x = 12"}]
        for text in (CORPUS[0], "x = 12", "Write a function. " * 30, "def f")
    ]
    local(folders, [{"messages": turns} for turns in messages * 3], ["train", "validation"])
    more = "--dataset_test_split validation --eval_strategy steps --eval_steps 1 "
    more += "--use_peft --lora_r 4" if adapter else ""
    script_args, training_args, model_args = parsed(folders, more)
    tokenizer, policy, reference, reward_model, value_model, peft_config = script_models(
        training_args, model_args
    )
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    assert isinstance(dataset, DatasetDict)

    def prepare(rows):
        def tokenize(row):
            ids = tokenizer.apply_chat_template(
                row["messages"][:1], padding=False, add_generation_prompt=True, return_dict=False
            )
            return {"input_ids": ids, "lengths": len(ids)}

        rows = rows.map(tokenize, remove_columns=rows.column_names)
        return rows.filter(lambda row: row["lengths"] <= 100)

    train_dataset = prepare(dataset[script_args.dataset_train_split])
    eval_dataset = prepare(dataset[script_args.dataset_test_split])
    assert len(train_dataset) == 9 and train_dataset[0]["input_ids"][-1] != tokenizer.eos_token_id
    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )
    finish(trainer, training_args)
    evaluations = [log for log in trainer.state.log_history if "eval_score" in log]
    assert len(evaluations) == 2  # one for each rollout


# ------------------------------------------------------------------------------ TRL's tests


def trainer_of(folders, rows, peft_config=None, **options):
    """A trainer as TRL's tests make it: prompts of ids that end in the end token."""
    local(folders, [{"prompt": "x"}], ["train"])
    _, training_args, model_args = parsed(folders)
    for name, value in options.items():
        setattr(training_args, name, value)
    tokenizer, policy, reference, reward_model, value_model, _ = script_models(
        training_args, model_args
    )
    made = tokenizer(rows)
    columns = {name: made[name] for name in ("input_ids", "attention_mask")}
    dataset = load_dataset("json", data_files=str(folders / "data" / "train.jsonl"), split="train")
    dataset = type(dataset).from_dict(columns)
    return PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None if peft_config else reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=dataset,
        eval_dataset=dataset,
        peft_config=peft_config,
    )


def test_training_moves_both_models(folders):
    trainer = trainer_of(folders, ["x = 12", "def add", "Write a"] * 3, num_ppo_epochs=2)
    finish(trainer, trainer.user_args)


def test_an_adapter_moves_and_its_base_does_not(folders):
    lora = LoraConfig(r=32, lora_alpha=16, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM")
    trainer = trainer_of(folders, ["x = 12", "def add", "Write a"] * 3, peft_config=lora)
    policy = trainer.model.policy
    before = {n: p.clone() for n, p in policy.named_parameters()}
    finish(trainer, trainer.user_args)
    moved = {n for n, p in policy.named_parameters() if not torch.equal(before[n], p)}
    assert moved and all("lora_" in name for name in moved)


def test_uneven_micro_batches_are_means_over_tokens(folders):
    """12 answers in two minibatches of three micro batches: the logs are those of the tokens.

    With a rate of 0 every ratio is 1, so its variance, the clipped shares and the KL are 0.
    """
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}
    trainer = trainer_of(
        folders, ["Hello world"] * 12, **sizes, num_mini_batches=2, total_episodes=24,
        learning_rate=0.0, num_sample_generations=0,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "val/ratio" in log]
    assert len(logs) == 2
    for log in logs:
        assert log["val/ratio"] == pytest.approx(1, abs=1e-5)
        for name in ("val/ratio_var", "policy/approxkl_avg", "policy/clipfrac_avg"):
            assert log[name] == pytest.approx(0, abs=1e-6), name  # float32 rounds
        assert log["policy/entropy_avg"] > 1
