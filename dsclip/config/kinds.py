"""The kinds of values that keys of a recipe take: a type with its bounds, as pydantic checks them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

# No text is taken for a number, and no number for another type but an integer for a float.
STRICT = ConfigDict(strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its type and bounds. wanted: what to give instead, in words."""

    holds: Callable[[Any], bool]
    wanted: str

    def check(self, value: Any) -> Any:
        """The value. Raises ValueError that says what to give."""
        if not self.holds(value):
            raise ValueError(f"give {self.wanted}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


def _interval(x: list[float]) -> bool:
    return len(x) == 2 and 0 < x[0] <= x[1] <= 1


def _weights(x: list[float]) -> bool:
    return bool(x) and min(x) >= 0 and 0 < sum(x) < math.inf


def _jitter(x: list[float]) -> bool:
    return len(x) == 4 and min(x) >= 0 and sum(x) < math.inf and x[3] <= 0.5


def _group_rule(rule: dict[str, str | float]) -> bool:
    match = rule.get("match")
    numbers = {key: value for key, value in rule.items() if key != "match"}
    if not isinstance(match, str) or not match or not numbers or numbers.keys() - {"lr_scale", "weight_decay"}:
        return False
    return _expression(match) and all(not isinstance(x, str) and x >= 0 for x in numbers.values())


def _expression(x: str) -> bool:
    try:
        re.compile(x)
    except re.error:
        return False
    return True


Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Interval = Annotated[list[float], Rule(_interval, "[low, high] within (0, 1]")]
Weights = Annotated[list[float], Rule(_weights, "numbers that are not negative, not all 0")]
Jitter = Annotated[list[float], Rule(_jitter, "[brightness, contrast, saturation, hue], hue at most 0.5")]
GroupRules = Annotated[
    list[dict[str, str | float]],
    Rule(
        lambda rules: all(map(_group_rule, rules)),
        "a list of {match: REGULAR EXPRESSION, lr_scale: NUMBER, weight_decay: NUMBER} with one number or both, 0 or more",
    ),
]
Expressions = Annotated[list[str], Rule(lambda x: all(map(_expression, x)), "a list of regular expressions")]
Colour = Annotated[list[float], Rule(lambda x: len(x) == 3, "three numbers, for red, green and blue")]
