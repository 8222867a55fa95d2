"""How a script runs: errors as one line, exit codes. torch is not imported here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

from ldm.errors import InputError
from ldm.log import LOG, one_line


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """main's exit code. The user's errors are one line and exit code 2; --debug shows the traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    prog = Path(sys.argv[0]).name
    before, LOG.handlers, LOG.propagate = LOG.handlers, [logging.StreamHandler()], False
    try:
        return main(arguments)
    except (InputError, OSError) as error:  # a path that the system refuses is the user's to mend
        if "--debug" in arguments:
            raise
        LOG.error(f"{prog}: error: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        LOG.error(f"{prog}: interrupted; the images that were finished are saved")
        return 130
    except Exception as error:
        if "--debug" in arguments:
            raise
        LOG.error(f"{prog}: {type(error).__name__}: {one_line(error)} (--debug shows where)")
        return 1
    finally:
        for handler in LOG.handlers:
            handler.close()
        LOG.handlers, LOG.propagate = before, True
