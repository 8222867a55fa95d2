"""Objects from YAML: `{target: dotted.name, params: {...}}` -> an instance."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ldm.errors import InputError


def parameters(owner: Callable) -> list[str]:
    """The names of the parameters that `owner` takes.

    Of a class whose constructor hands its further ones (`**params`) to its base, the base's are among them.
    """
    names = {}
    for cls in owner.__mro__ if isinstance(owner, type) else (owner,):
        found = inspect.signature(cls).parameters
        names |= {name: None for name, p in found.items() if p.kind is not p.VAR_KEYWORD}
        if all(p.kind is not p.VAR_KEYWORD for p in found.values()):
            break
    return list(names)


def check_params(owner: Callable, params: Iterable[str], ignored: Iterable[str] = ()) -> None:
    """Raise an InputError for the first name that `owner` does not take, with the nearest that it does."""
    known = [*parameters(owner), *ignored]
    for name in params:
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(sorted(known))}"
            raise InputError(f"{owner.__name__} has no parameter {name!r}{hint}")


def get_obj_from_str(target: str, allow: Iterable[str] = ()) -> Any:
    """The class that a dotted name stands for.

    Only modules of `ldm.*`, `torch.nn.Identity` and what lies below a prefix in `allow` are imported.
    Anything else is an InputError, and so is a name in `ldm` that is not a class of layers defined there.
    """
    allowed = any(target.startswith(f"{prefix.rstrip('.')}.") for prefix in allow)
    if not (allowed or target == "torch.nn.Identity" or target.startswith("ldm.")):
        raise InputError(
            f"config target {target!r} is not allowed; allowed: ldm.*, torch.nn.Identity, "
            "and the packages named by --allow_target"
        )
    module_name, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"config target {target!r} does not exist: {error}") from error
    # a function or an import of ours, called with parameters of a stranger's choice, could do anything
    is_layer = isinstance(found, type) and issubclass(found, nn.Module)
    if target.startswith("ldm.") and not (is_layer and found.__module__ == module_name):
        raise InputError(f"config target {target!r} is not a class of the model")
    return found


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
    if "allow_target" in parameters(owner):
        params["allow_target"] = tuple(allow_target)
    return owner(**{name: value for name, value in params.items() if name not in unused})
