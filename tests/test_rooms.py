"""The rooms of the code: which may import which, what only the command line knows, how deep a call goes."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import Result

from ldm.modules.diffusionmodules.openaimodel import UNetModel

ROOT = Path(__file__).parents[1]
OURS = sorted((ROOT / "ldm").rglob("*.py"))
ORDER = [  # a room may import those in the rows above it, and itself
    {"errors", "fields", "log", "util", "cache", "machine", "ldm"},
    {"modules", "sampling", "images", "prompts"},
    {"models"},
    {"weights"},
    {"optimize"},
    {"pipeline"},
    {"runs"},
    {"training"},
    {"scenes"},
    {"service"},
    {"cli", "evaluation", "webui"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
BASE = ORDER[0]


def room_of(path: Path) -> str:
    """`sampling` for ldm/sampling/run.py, `util` for ldm/util.py, `ldm` for ldm/__init__.py."""
    first = path.relative_to(ROOT / "ldm").parts[0].removesuffix(".py")
    return "ldm" if first == "__init__" else first


def only_for_types(tree: ast.Module) -> set[ast.AST]:
    """What is within `if TYPE_CHECKING:`."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules that a file imports anywhere, also within functions; and whether only for types."""
    tree = ast.parse(path.read_text())
    types = only_for_types(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from ldm import catalogue` may import a module
            yield from ((f"{node.module}.{alias.name}", node in types) for alias in node.names)


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in OURS} <= RANK.keys()


def test_imports_run_one_way() -> None:
    """From the tools that everyone may use up to the command line; the rooms of one row know nothing of each
    other, and nobody knows the command line."""
    wrong = []
    for path in OURS:
        room = room_of(path)
        for module, for_types in imports(path):
            if module.split(".")[0] != "ldm":
                continue
            other = module.split(".")[1] if "." in module else "ldm"
            other = other if other in RANK else "ldm"  # `from ldm import __version__`
            fits = other == room or RANK[other] < RANK[room] or {room, other} <= BASE
            # the sampler's denoiser names the type of the model that it is given
            allowed = for_types and path.name == "denoiser.py" and (room, other) == ("sampling", "models")
            if not (fits or allowed):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_nothing_of_ours_imports_scripts_or_tests() -> None:
    ours = [(path, module) for path in OURS for module, _ in imports(path)]
    assert [f"{path}: {m}" for path, m in ours if m.split(".")[0] in ("scripts", "tests", "benchmarks")] == []


def test_only_the_command_line_knows_argparse() -> None:
    users = {
        room_of(path) for path in OURS for module, _ in imports(path) if module.split(".")[0] == "argparse"
    }
    assert users == {"cli"}


def test_no_signature_takes_a_command_line() -> None:
    """Functions of the engine took an `argparse.Namespace`: a notebook had to forge a command line."""
    wrong = []
    for path in OURS:
        if room_of(path) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                words = {argument.arg for argument in named}
                hints = " ".join(ast.unparse(a.annotation) for a in named if a.annotation)
                if "args" in words or "Namespace" in hints:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_few_calls_lie_between_the_command_and_the_unet(
    command: Callable[..., Result], model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most eight frames of ours from main to UNetModel.forward."""
    plain, stacks = UNetModel.forward, []

    def forward(self, *args: object, **kwargs: object) -> object:
        frame, found = sys._getframe(1), []
        while frame is not None and Path(frame.f_code.co_filename).name != "txt2img.py":
            if Path(frame.f_code.co_filename).is_relative_to(ROOT / "ldm"):
                found.append(f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_code.co_qualname}")
            frame = frame.f_back
        stacks.append(tuple(reversed(found)))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(UNetModel, "forward", forward)
    argv = [
        "--config",
        model[0],
        "--ckpt",
        model[1],
        "--steps",
        2,
        "--n_samples",
        1,
        "--n_iter",
        1,
        "--eager",
    ]
    assert command("txt2img", *argv).code == 0
    (stack,) = set(stacks)
    print("\n".join(stack))
    assert len(stack) <= 8, "\n".join(stack)
