"""The contrastive engine over DeepSpeed, and the collectives it uses."""

from dsclip.engine.collectives import Collectives, shutdown_distributed

__all__ = ["Collectives", "ContrastiveEngine", "StepMetrics", "shutdown_distributed"]


def __getattr__(name):
    # DeepSpeed takes seconds to import; evaluation and conversion of a HF folder do without it.
    if name in ("ContrastiveEngine", "StepMetrics"):
        from dsclip.engine import contrastive

        return getattr(contrastive, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
