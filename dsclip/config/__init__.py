"""Configuration: the recipe (what to train) and the DeepSpeed JSON (how to run it), both read strictly."""

from dsclip.config.deepspeed import load_ds_config
from dsclip.config.grid import Grid, GridRun
from dsclip.config.load import dump_recipe, load_grid, load_recipe, packaged_grids, packaged_recipes
from dsclip.config.schema import Recipe

__all__ = [
    "Grid",
    "GridRun",
    "Recipe",
    "dump_recipe",
    "load_ds_config",
    "load_grid",
    "load_recipe",
    "packaged_grids",
    "packaged_recipes",
]
