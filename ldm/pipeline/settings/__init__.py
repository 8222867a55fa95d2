"""Parts of `ImageRequest`, an idea each, with the checks that concern it. Imports neither torch nor numpy."""


def without_none(settings: object, name: str) -> None:
    """Make a list of files empty that is `none` in their place, which leaves out those of --like."""
    if getattr(settings, name) == ("none",):
        object.__setattr__(settings, name, ())
