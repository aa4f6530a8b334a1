"""The contrastive engine over DeepSpeed."""
