"""dsclip: contrastive image-text training at scale, on the exact loss of the whole global batch."""

__version__ = "0.1.0"
__all__ = ["ContrastiveEngine", "create_model"]


def __getattr__(name):
    # Imported on first use: `import dsclip` stays instant and free of side effects.
    if name == "create_model":
        from dsclip.model import create_model

        return create_model
    if name == "ContrastiveEngine":
        from dsclip.engine.contrastive import ContrastiveEngine

        return ContrastiveEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
