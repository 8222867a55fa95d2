"""How a script runs: errors as one line, exit codes. torch is not imported here."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from ldm.errors import InputError
from ldm.log import LOG, SAID, one_line
from ldm.runs.processes import is_follower

OBJECTS = 50_000  # made between two searches for garbage; Python's own number is far lower


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """main's exit code: 2 with one line for the user's errors, 1 with one line for others.

    `--debug` shows where an error comes from. A reader of stdout that ends early (`| head`) ends the command
    without a word. Processes of a run that follow a leader leave the user's errors to it.
    """
    arguments = sys.argv[1:] if argv is None else argv
    prog = Path(sys.argv[0]).name
    before, LOG.handlers, LOG.propagate = LOG.handlers, [logging.StreamHandler()], False
    level = LOG.level
    SAID.clear()
    if "--debug" in arguments:
        LOG.setLevel(logging.DEBUG)
    # Importing torch makes some hundred thousand objects, all of which stay. Looking for garbage among them
    # took a fifth of the import, and 0.4 s when Python ends, where frozen objects are not looked at.
    threshold = gc.get_threshold()
    gc.set_threshold(OBJECTS, *threshold[1:])
    if argv is None:  # a process of its own, not a call in one of somebody else's
        atexit.register(_leave_objects)
        if hasattr(sys.stdout, "reconfigure"):
            # prompts may have what the encoding of a terminal or a pipe lacks
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main(arguments)
    except InputError as error:
        if "--debug" in arguments:
            raise
        if not is_follower():
            from ldm.cli.parser import in_flags

            LOG.error(f"{prog}: error: {one_line(in_flags(error))}")
        return 2
    except KeyboardInterrupt as error:
        if not is_follower():
            LOG.error(f"{prog}: interrupted; {str(error) or 'the images that were finished are saved'}")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at its end
        return 128 + 13  # as if SIGPIPE had ended it
    except Exception as error:
        if "--debug" in arguments:
            raise
        LOG.error(f"{prog}: {type(error).__name__}: {one_line(error)} (--debug shows where)")
        return 1
    finally:
        for handler in LOG.handlers:
            handler.close()
        LOG.handlers, LOG.propagate = before, True
        LOG.setLevel(level)
        gc.set_threshold(*threshold)


def _leave_objects() -> None:
    """Before Python ends: nothing is searched for garbage any more."""
    if "triton" not in sys.modules:  # whose library complains of every object that is left
        gc.freeze()


def require(packages: Iterable[str], extra: str) -> None:
    """InputError that names those of the packages which are not installed, and the extra that brings them."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise InputError(f'{", ".join(missing)} missing: pip install -e ".[{extra}]"')
