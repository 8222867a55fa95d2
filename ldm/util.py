"""Objects from YAML: `{target: dotted.name, params: {...}}` -> an instance."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ldm.errors import InputError

ALLOWED_TARGETS = (
    "ldm.",
    "torch.nn.Identity",
)  # a config is data from the net: it must not import what it likes


def check_params(owner: Callable, params: Iterable[str], ignored: Iterable[str] = ()) -> None:
    """Raise an InputError for the first name that `owner`'s signature lacks, with the nearest name it has."""
    known = [*list(inspect.signature(owner).parameters), *ignored]
    for name in params:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(sorted(known))}"
            raise InputError(f"{owner.__name__} has no parameter {name!r}{hint}")


def get_obj_from_str(target: str, allow: Iterable[str] = ()) -> Any:
    """The class or function that a dotted name stands for.

    Only `ldm.*`, `torch.nn.Identity` and names below a prefix in `allow` are imported, else an InputError.
    """
    prefixes = (*ALLOWED_TARGETS, *(f"{prefix.rstrip('.')}." for prefix in allow))
    if not any(
        target == prefix or (prefix.endswith(".") and target.startswith(prefix)) for prefix in prefixes
    ):
        raise InputError(
            f"config target {target!r} is not allowed; allowed: ldm.*, torch.nn.Identity, "
            "and the packages named by --allow_target"
        )
    module_name, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"config target {target!r} does not exist: {error}") from error


def instantiate_from_config(config: Mapping[str, Any], allow_target: Iterable[str] = ()) -> Any:
    """Build what a config section describes.

    Parameters unknown to the target's signature are an InputError, except those that its `training_params`
    lists: published configs carry settings that only matter to their original training code.
    """
    if not isinstance(config, Mapping) or "target" not in config:
        raise InputError(f"a config section needs a 'target', got {config!r}")
    owner = get_obj_from_str(config["target"], allow_target)
    params = {str(k): v for k, v in (config.get("params") or {}).items()}
    unused = getattr(owner, "training_params", frozenset())
    if owner.__module__.startswith("ldm."):
        check_params(owner, params, unused)
    if "allow_target" in inspect.signature(owner).parameters:
        params["allow_target"] = tuple(allow_target)
    return owner(**{name: value for name, value in params.items() if name not in unused})
