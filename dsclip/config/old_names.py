"""Keys that had another name in an earlier version: recipes, overrides and manifests of checkpoints may still say it."""

from __future__ import annotations

from typing import Any

from dsclip.command_line import say
from dsclip.errors import UserError

OLD_NAMES = {"batch": {"samples_per_forward": "micro_batch_size"}}
_warned: set[str] = set()  # of this process


def with_new_names(section: str, values: dict[str, Any], source: str) -> dict[str, Any]:
    """A section's keys under the names they have today. Says once, on standard error, which key to write from now on.

    Raises UserError when a key is there under both names.
    """
    names = OLD_NAMES.get(section, {})
    for old, new in names.items():
        if old not in values:
            continue
        if new in values:
            raise UserError(
                f"{source}: `{section}.{old}` is the old name of `{section}.{new}`, which is there too; remove it"
            )
        from dsclip.distributed import launched_ranks  # torch takes seconds to import

        if old not in _warned and launched_ranks()[0] == 0:
            say(
                f"dsclip: {source}: `{section}.{old}` is now called `{section}.{new}`; the old name is still read, write the new one"
            )
        _warned.add(old)
    return {names.get(key, key): value for key, value in values.items()}
