"""codexhf: train a code model through its whole lineage, M0 -> M1 -> R -> M2."""

__version__ = "0.1.0"
