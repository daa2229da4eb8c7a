"""Talk to a model in a terminal.

    python -m codexhf.chat runs/m2             # or models/smollm2, org/name
    python -m codexhf.chat runs/m2 --temperature 0 --system "Answer in one line."

Reads   the model's folder; for `/m1` and the like the folders next to it; R from `rm` next to it.

A line is a message. One of several lines begins and ends with three quotes. Commands:
/m1 (the model in the folder of that name, next to this one, or a path: /models/smollm2),
/task (a held-out task of the evaluation, with the verdict of its tests behind the answer; or
/task 17),
/system TEXT, /temperature 0.7, /new, /help, /quit. Ctrl-C stops an answer.
"""

import argparse
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from codexhf.arguments import card, model_folder
from codexhf.refusals import refuse

QUOTES = '"""'
HELP = __doc__.split("\n\n")[-1]


class Speaker:
    """One model, what was said to it, and what its answers are held against."""

    def __init__(self, path: str, options: argparse.Namespace):
        self.options, self.messages, self.task = options, [], None
        self.tasks: list[dict] = []
        self.temperature, self.system = options.temperature, options.system
        self.load(path)
        self.reward = self._reward()

    def load(self, path: str) -> None:
        """Take another model; the conversation goes on."""
        import torch

        from codexhf.models import load_policy, to_device
        from codexhf.tokenizer import load_tokenizer

        self.path, self.tokenizer = path, load_tokenizer(path)
        dtype = getattr(torch, self.options.dtype)
        self.model = to_device(load_policy(path, self.tokenizer, dtype=dtype))

    def _reward(self):
        """R, where the options or the folder next to the model have it."""
        path = self.options.reward_model or str(Path(self.path).parent / "rm")
        if path == "none" or (not self.options.reward_model and model_folder(path)):
            return None
        from codexhf.reward_model import load_model_reward

        return load_model_reward(path)

    def neighbour(self, name: str) -> str:
        """The folder next to the model of that name, or the path that it is."""
        folder = Path(self.path).parent / name
        return str(folder) if folder.is_dir() else name

    def prompt(self) -> Any:
        """Return the conversation as this model is prompted."""
        from codexhf.prompts import in_form

        system = [{"role": "system", "content": self.system}] if self.system else []
        if self.tokenizer.chat_template or len(self.messages) > 1 or system:
            return in_form([*system, *self.messages], self.tokenizer)
        return self.messages[0]["content"] + "\n"

    def answer(self) -> Iterator[str]:
        """Yield the next answer piece by piece; remember what there was when it is closed."""
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        from codexhf.prompts import end_ids, prompt_ids

        ids = torch.tensor([prompt_ids(self.prompt(), self.tokenizer)], device=self.model.device)
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600
        )
        stopped = threading.Event()
        sampling: dict[str, Any] = {"do_sample": self.temperature > 0, "use_cache": True}
        if self.temperature > 0:
            sampling |= {"temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        thread = threading.Thread(
            target=_quietly(self.model.generate, streamer),
            kwargs={
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "streamer": streamer,
                "max_new_tokens": self.options.max_new_tokens,
                "eos_token_id": list(end_ids(self.tokenizer, self.model.generation_config)),
                "pad_token_id": self.tokenizer.pad_token_id,
                "stopping_criteria": StoppingCriteriaList([lambda *_, **__: stopped.is_set()]),
                **sampling,
            },
            daemon=True,
        )
        pieces: list[str] = []
        thread.start()
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        finally:
            stopped.set()
            thread.join()
            self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def draw_task(self, cards: list[str], number: int | None) -> str:
        """Begin anew with a task of the cards, by its number or the next one; return its prompt."""
        from codexhf.data import load_tasks
        from codexhf.prompts import text_of

        if not self.tasks:
            self.tasks = list(load_tasks(cards, self.tokenizer, runs_tests=False).dataset)
        last = -1 if self.task is None else self.tasks.index(self.task)
        self.task = self.tasks[(last + 1 if number is None else number) % len(self.tasks)]
        self.messages = []
        print(text_of(self.task["prompt"]))
        return text_of(self.task["prompt"])

    def verdicts(self) -> str:
        """What R and the tests say of the last answer; "" where there are neither."""
        *asked, answer = self.messages
        said = []
        if self.reward is not None:
            from codexhf.prompts import in_form

            prompt = in_form(asked, self.reward.processing_class)
            (score,) = self.reward([prompt], [answer["content"]])
            said.append(f"R {score:+.2f}")
        if self.task is not None and len(asked) == 1:
            from codexhf.completions import grade

            tests, name = self.task["tests"], self.task["entry_point"]
            (result,) = grade([[answer["content"]]], [tests], [name], self.options.timeout_s)[0]
            said.append(f"tests: {result.verdict}" + (f" ({result.detail})" * bool(result.detail)))
        return ", ".join(said)


def _quietly(generate, streamer):
    """End the stream also where generation fails, so that nobody waits for it."""

    def run(**kwargs):
        try:
            generate(**kwargs)
        except Exception as error:  # told to the person who waits, in the answer
            streamer.on_finalized_text(f"[{type(error).__name__}: {error}]")
            streamer.on_finalized_text("", stream_end=True)

    return run


def speakable(path: str) -> str:
    """A folder or Hub id of a language model; what is wrong with it otherwise."""
    wrong = model_folder(path)
    config = Path(path) / "config.json"
    if not wrong and config.is_file() and "ForSequenceClassification" in config.read_text():
        return "which is a reward model: it scores answers and writes none."
    return wrong


def read_message(line: str, lines: Iterator[str]) -> str:
    """Return a whole message: a line, or what stands between two lines of quotes."""
    if not line.startswith(QUOTES):
        return line
    parts = [line.removeprefix(QUOTES)]
    while not parts[-1].rstrip().endswith(QUOTES):
        following = next(lines, None)
        if following is None:
            break
        parts.append(following)
    return "\n".join(parts).rstrip().removesuffix(QUOTES).strip("\n")


def heldout_cards(model: str) -> list[str]:
    """The cards that the evaluation next to a model asked, else those of the laptop's lineage."""
    manifest = Path(model).parent / "evaluation/manifest.json"
    asked = json.loads(manifest.read_text())["config"] if manifest.is_file() else {}
    return asked.get("heldout_cards") or ["data_cards/python_tasks_heldout.md"]


def command(speaker: Speaker, line: str, tasks: list[str]) -> str | None:
    """Do what a line that begins with a slash says; return a message to send, or None."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name == "help":
        print(HELP)
    elif name == "new":
        speaker.messages, speaker.task = [], None
    elif name == "system":
        speaker.system = rest
        print(f"system: {rest or 'none'}")
    elif name == "temperature":
        try:
            speaker.temperature = max(0.0, float(rest))
            print(f"temperature: {speaker.temperature:g}")
        except ValueError:
            print(f"temperature: got {rest!r}, expected a number, 0 or more.")
    elif name == "task" and (wrong := [f"{path!r}, {w}" for path in tasks if (w := card(path))]):
        print(f"/task: got {'; '.join(wrong)} --tasks names another card.")
    elif name == "task":
        return speaker.draw_task(tasks, int(rest) if rest.isdigit() else None)
    else:
        path = speaker.neighbour(line[1:].strip())
        if wrong := speakable(path):
            print(f"{line}: {wrong} /help lists the commands.")
        else:
            speaker.load(path)
            print(f"now {path}")
    return None


def talk(speaker: Speaker, lines: Iterator[str], tasks: list[str]) -> None:
    """Answer line after line until they end, or somebody says /quit."""
    for line in lines:
        if line.strip() in ("/quit", "/exit"):
            return
        message: str | None = read_message(line, lines)
        if message.startswith("/"):
            message = command(speaker, message, tasks)
        elif message.strip():
            speaker.task = speaker.task if not speaker.messages else None
        if not (message or "").strip():
            continue
        speaker.messages.append({"role": "user", "content": message})
        print(f"\n{Path(speaker.path).name}> ", end="", flush=True)
        try:
            with suppress(KeyboardInterrupt), closing(speaker.answer()) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
        except TemplateError as error:
            speaker.messages.pop()
            print(f"[the chat template refuses this: {error}. /new and /system begin anew.]")
            continue
        said = speaker.verdicts()
        print(f"\n[{said}]" if said else "", flush=True)


def typed() -> Iterator[str]:
    """Yield what is typed, line by line; Ctrl-D ends it."""
    with suppress(ImportError):
        import readline  # noqa: F401 - lines can be edited and recalled

    while True:
        try:
            yield input("you> " if sys.stdin.isatty() else "")
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and talk; exit code 2 where a name is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m codexhf.chat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or Hub id of a model")
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--reward_model", help="R; default: rm next to the model; none: no scores")
    parser.add_argument("--tasks", nargs="+", help="cards of /task; default: the evaluation's")
    parser.add_argument("--timeout_s", type=float, default=3.0, help="seconds a program may run")
    options = parser.parse_args(argv)
    wrong = speakable(options.model)
    errors = [f"model: got {options.model!r}, {wrong}"] if wrong else []
    reward_model = options.reward_model
    if reward_model not in (None, "none") and (wrong := model_folder(reward_model)):
        errors.append(f"--reward_model: got {reward_model!r}, {wrong}")
    for path in options.tasks or ():
        if wrong := card(path):
            errors.append(f"--tasks: got {path!r}, {wrong}")
    if options.temperature < 0 or options.max_new_tokens < 1:
        errors.append("--temperature: expected 0 or more; --max_new_tokens: expected 1 or more.")
    if errors:
        refuse(errors, "chat")
    from transformers.utils import logging

    logging.disable_progress_bar()  # nothing but the conversation stands in the terminal
    logging.set_verbosity_error()
    speaker = Speaker(options.model, options)
    print(f"{options.model}. /help lists commands, /quit ends.", flush=True)
    talk(speaker, typed(), options.tasks or heldout_cards(options.model))


if __name__ == "__main__":
    main()
