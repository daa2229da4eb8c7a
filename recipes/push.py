"""push: a finished run -> repositories on a model hub, or the same in a local folder.

    accelerate launch recipes/push.py --hub org/prefix --dry_run true  # what would go where
    accelerate launch recipes/push.py --hub org/prefix  # plain `python` does as well

Reads   runs/*/manifest.json and the files that these record; data cards that the stages read.
Writes  org/prefix-m0 and so on: one commit each, private, none if nothing changed.
"""

from codexhf.arguments import PushArguments
from codexhf.launch import launch
from codexhf.parsing import parse
from codexhf.push import push


def main(argv=None):
    (stage,) = parse((PushArguments,), __file__, argv)
    return push(stage)


if __name__ == "__main__":
    launch(main)
