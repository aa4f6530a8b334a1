"""Reads recipes strictly: unknown keys, wrong types, duplicate keys and impossible values stop the run at once.

Later wins: the defaults of the sections, then the recipe file, then `section.key=value` from the command line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dsclip.config.build import build_recipe
from dsclip.config.grid import Grid, expand
from dsclip.config.old_names import with_new_names
from dsclip.config.schema import Recipe
from dsclip.config.synonyms import suggestion
from dsclip.errors import UserError, did_you_mean

MAX_RECIPE_BYTES = 1 << 20
YAML, GRID = ".yaml", ".grid.yaml"


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML with `1e-3` as a number, `no` as a word, and neither duplicate keys nor aliases."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not allowed in recipes", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is no word", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key `{key}` stands here twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 1e-3 is a string and no/on/yes are booleans; both surprise everyone.
_StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp) for tag, regexp in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|nan))$"),
    list("-+.0123456789"),
)


def load_recipe(name_or_path: str = "demo", overrides: Sequence[str] = ()) -> Recipe:
    """A packaged recipe by name, or a YAML file, with overrides such as `optim.lr=1e-3`. Raises UserError."""
    source, tree = _read_tree(name_or_path)
    if not isinstance(tree, dict):
        raise UserError(f"{source} holds no sections; a recipe starts like `model:` or `data:`")
    tree = {k: with_new_names(k, v, source) if isinstance(v, dict) else v for k, v in tree.items()}
    for override in overrides:
        _apply(tree, override)
    return build_recipe(tree, source)


def load_grid(name_or_path: str, only: str | None = None) -> Grid:
    """A packaged grid by name, or a YAML file; `only`: one run of it. Raises UserError."""
    if name_or_path in packaged_grids():
        source = f"grid {name_or_path}"
        return expand(parse_yaml(_packaged_text(name_or_path + GRID), source), source, only)
    source, text = _read_file(name_or_path, "a packaged grid", packaged_grids())
    return expand(parse_yaml(text, source), source, only)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to the same recipe."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def packaged_recipes() -> list[str]:
    """Names of the recipes that come with dsclip, those of grids left out: these are called GRID/RUN."""
    return sorted(name.removesuffix(YAML) for name in _packaged_files() if not name.endswith(GRID))


def packaged_grids() -> list[str]:
    """Names of the grids that come with dsclip."""
    return sorted(name.removesuffix(GRID) for name in _packaged_files() if name.endswith(GRID))


def _packaged_files() -> list[str]:
    return [p.name for p in resources.files("dsclip.recipes").iterdir() if p.name.endswith(YAML)]


def _packaged_text(file: str) -> str:
    return (resources.files("dsclip.recipes") / file).read_text(encoding="utf-8")


def parse_yaml(text: str, source: str) -> Any:
    """Strict YAML; errors name the source and the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: {error.problem or error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{source} is no valid YAML: {error}") from error


def _read_tree(name_or_path: str) -> tuple[str, Any]:
    """(source, content) of a recipe: packaged, a run of a packaged grid, or a file."""
    grid, _, run = name_or_path.partition("/")
    if grid in packaged_grids() and not Path(name_or_path).is_file():
        return f"recipe {name_or_path}", asdict(load_grid(grid, only=run).runs[0].recipe)
    if name_or_path in packaged_recipes():
        source = f"recipe {name_or_path}"
        return source, parse_yaml(_packaged_text(name_or_path + YAML), source) or {}
    known = [*packaged_recipes(), *(f"{name}/RUN" for name in packaged_grids())]
    source, text = _read_file(name_or_path, "a packaged recipe", known)
    return source, parse_yaml(text, source) or {}


def _read_file(name_or_path: str, what: str, known: list[str]) -> tuple[str, str]:
    """(path, text). Raises UserError that lists what is known in its place."""
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"--config {name_or_path}: neither a file nor {what}.{did_you_mean(name_or_path, known)} "
            f"Packaged: {', '.join(known)}"
        )
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes; a recipe has a few hundred")
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error})") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) != 2 or not all(parts):
        meant = suggestion(key, None, _plain(value), tree) if equals and len(parts) == 1 else ""
        raise UserError(f"`{override}` is no override; write section.key=value, such as optim.lr=1e-3.{meant}")
    section = tree.setdefault(parts[0], {})
    if section is None:
        section = tree[parts[0]] = {}
    if not isinstance(section, dict):
        raise UserError(f"`{override}`: `{parts[0]}` is no section")
    plain = parse_yaml(value, f"`{override}`") if value else ""
    section |= with_new_names(parts[0], {parts[1]: plain}, f"`{override}`")


def _plain(text: str) -> Any:
    """The value of an override that is about to be refused; its text where it is no YAML."""
    try:
        return parse_yaml(text, "")
    except UserError:
        return text
