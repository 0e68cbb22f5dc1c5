"""evalcache: the build cache for LLM evals."""

__version__ = "0.1.0"
