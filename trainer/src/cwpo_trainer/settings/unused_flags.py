"""Settings that were given a value, though nothing reads them under the choices of the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import BaseModel

from cwpo_trainer.constants import HasConstants, names_by_constant


def refuse_if_set(settings: BaseModel, names: Iterable[str], reason: str) -> None:
    """Raises: ValueError with the reason for the first of these settings that was given a value."""
    for name in names:
        if name in settings.model_fields_set:
            raise ValueError(f"{flag(name)} {reason}")


def refuse_other_constants(
    settings: BaseModel, choice: str, registry: Mapping[str, HasConstants]
) -> None:
    """Refuse the constants of losses or weights other than the chosen one.

    Args:
        choice: the setting that chooses one of the registry.
    Raises: ValueError naming the flags that the chosen one has.
    """
    chosen = getattr(settings, choice)
    own = registry[chosen].constants
    known = {name for constant in own for name in (constant.flag, constant.config_field)}
    takes = " and ".join(flag(constant.flag) for constant in own) or "no constant"
    for constant, names in names_by_constant(registry).items():
        if constant.flag not in known:
            belongs = f"belongs to {flag(choice)} {any_of(names)}; {chosen} takes {takes}"
            refuse_if_set(settings, (constant.flag,), belongs)


def flag(name: str) -> str:
    """A setting as it stands on the command line."""
    return f"--{name.replace('_', '-')}"


def any_of(names: Iterable[str]) -> str:
    """Such as "dpo, rdpo or hinge"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
