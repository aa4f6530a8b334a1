"""Configuration: the recipe (what to train) and the DeepSpeed JSON (how to run it), both read strictly."""

from dsclip.config.deepspeed import load_ds_config
from dsclip.config.load import dump_recipe, load_recipe, packaged_recipes
from dsclip.config.schema import Recipe

__all__ = ["Recipe", "dump_recipe", "load_ds_config", "load_recipe", "packaged_recipes"]
