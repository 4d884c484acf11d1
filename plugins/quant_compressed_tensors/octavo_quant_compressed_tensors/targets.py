"""Names of modules as compressed-tensors spells them: a class, a module, or "re:" and a regular expression."""

import re
from collections.abc import Sequence

from octavo.errors import CheckpointError

CLASS = "Linear"
"""The class of every layer that is asked about."""
REGEX = "re:"


def check_targets(targets: Sequence[str], where: str) -> None:
    """Raises CheckpointError for an expression that cannot be compiled."""
    for target in targets:
        if target.startswith(REGEX):
            try:
                re.compile(target.removeprefix(REGEX))
            except re.error as error:
                raise CheckpointError(f"{where} {target!r}, which is no regular expression: {error}.") from error


def rank(module: str, targets: Sequence[str]) -> int | None:
    """How closely the targets name a module: 0 by name, 1 by expression, 2 by class, None not at all."""
    if module in targets:
        return 0
    expressions = (target.removeprefix(REGEX) for target in targets if target.startswith(REGEX))
    if any(re.match(expression, module) for expression in expressions):
        return 1
    return 2 if CLASS in targets else None
