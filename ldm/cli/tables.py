"""The documentation's tables of options: `python -m ldm.cli.tables > docs/options.md`."""

from __future__ import annotations

import argparse
import re

from ldm.cli.arguments import TEMPLATES, WHOLE_RUN
from ldm.cli.parser import (
    compare_parser,
    depth2img_parser,
    img2img_parser,
    inpaint_parser,
    serve_parser,
    txt2img_parser,
    upscale_parser,
    walk_parser,
)
from ldm.fields import settings_of
from ldm.pipeline.request import ImageRequest

HEADING = """# Options

Every option of `txt2img.py`, `img2img.py`, `inpaint.py`, `depth2img.py` and `upscale.py`; `compare.py` takes
those of the first two and `walk.py` those of the first, with folders of their own and one image at a time.
Where an option is not for all of the five, the commands that have it stand behind its meaning. At the end are
the further options of `compare.py`, `walk.py` and `serve.py`. The other commands (`batch_score.py`,
`finetune.py`, `train.py`, `evaluate.py`, `verify.py` and so on) show theirs with `--help`.

This page is made from the code by `python -m ldm.cli.tables > docs/options.md`, and a test holds it equal. A
line of a JSON prompt file may have, under their names without the dashes: {line_options}.
"""
OWN = {  # of the commands that have most of the options above as well
    "compare.py": "Its own ones, beside those of `txt2img.py`, or with `--init-img` of `img2img.py`.",
    "walk.py": "Its own ones, beside those of `txt2img.py`.",
    "serve.py": "Its own ones; `serve.py --help` shows those of the model, too.",
}
ORDER = (
    *("prompt", "size", "sampling", "further guidance", "init image", "inpainting", "depth", "upscaling"),
    "control",
    *("model", "output"),
)
COMMANDS = {
    "txt2img": txt2img_parser,
    "img2img": img2img_parser,
    "inpaint": inpaint_parser,
    "depth2img": depth2img_parser,
    "upscale": upscale_parser,
}


def options_page() -> str:
    """docs/options.md: a table for each group of options."""
    parsers = {command: parser() for command, parser in COMMANDS.items()}
    groups: dict[str, dict[str, dict[str, argparse.Action]]] = {title: {} for title in ORDER}
    for command, parser in parsers.items():
        for group in parser._action_groups:
            for action in group._group_actions:
                if action.dest != "help":
                    title = group.title if group.title in ORDER else "output"
                    groups[title].setdefault(action.option_strings[0], {})[command] = action
    own = [
        each.spellings[0].lstrip("-").replace("-", "_")
        for each in settings_of(ImageRequest).values()
        if each.name not in (*WHOLE_RUN, *TEMPLATES)
    ]
    lines = [HEADING.format(line_options=", ".join(f"`{name}`" for name in own))]
    for title, options in groups.items():
        lines += [f"## {title.capitalize()}", "", "| option | default | meaning |", "|---|---|---|"]
        lines += [_row(actions, len(parsers)) for actions in options.values()]
        lines.append("")
    service = next(group for group in serve_parser()._action_groups if group.title == "service")
    further = {
        "compare.py": _further(compare_parser(), parsers["txt2img"]),
        "walk.py": _further(walk_parser(), parsers["txt2img"]),
        "serve.py": service._group_actions,
    }
    for command, actions in further.items():
        lines += [f"## `{command}`", "", OWN[command], "", "| option | default | meaning |", "|---|---|---|"]
        lines += [*(_row({command: action}, 1) for action in actions), ""]
    return "\n".join(lines)


def _further(parser: argparse.ArgumentParser, known: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a parser that the known one has not."""
    return [action for action in parser._actions if action.dest not in {each.dest for each in known._actions}]


def _row(actions: dict[str, argparse.Action], commands: int) -> str:
    texts = {command: _split(action.help) for command, action in actions.items()}
    meaning = next(iter(texts.values()))[0]
    if len(actions) < commands:
        meaning += f" ({', '.join(f'`{command}.py`' for command in actions)})"
    defaults = {command: default for command, (_, default) in texts.items()}
    if len(set(defaults.values())) == 1:
        default = next(iter(defaults.values()))
    else:
        commands_of: dict[str, list[str]] = {}
        for command, value in defaults.items():
            commands_of.setdefault(value, []).append(f"`{command}.py`")
        shown = {"": "off", "True": "on"}
        parts = (f"{shown.get(value, value)} in {', '.join(names)}" for value, names in commands_of.items())
        default = "; ".join(parts)
    action = next(iter(actions.values()))
    return f"| {_spelling(action)} | {_escaped(default)} | {_escaped(meaning)} |"


def _escaped(text: str) -> str:
    """A text as a cell of a table shows it: no further column, no bold text, no HTML."""
    return text.replace("|", r"\|").replace("__", r"\_\_").replace("<", "&lt;")


def _split(help: str) -> tuple[str, str]:
    """A help text as its meaning and the default in parentheses at its end."""
    text = help.replace("%%", "%")
    match = re.fullmatch(r"(.*) \((?:default: )?([^()]*)\)", text, re.S)
    return (match[1], match[2]) if match else (text, "")


def _spelling(action: argparse.Action) -> str:
    value = ""
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    elif action.nargs != 0:
        value = action.metavar or action.dest.upper()
        value = value if isinstance(value, str) else " ".join(value)
        value += " …" if action.nargs == "+" else ""
    if action.nargs == "?" and action.choices:
        value = f"[{value}]"
    return ", ".join(f"`{flag} {value}`".replace(" `", "`") for flag in action.option_strings)


if __name__ == "__main__":
    print(options_page(), end="")
