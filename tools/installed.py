"""The command `superglobal` of the installed package, for use without a checkout: superglobal NAME ARGUMENTS.

It runs the same code as `python test.py` and `python -m tools.NAME` in a checkout, from the package's own copy.
"""

import ast
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

# The folder of the code: `config`, `model`, `tools` ... are top-level names only while this command runs.
sys.path.insert(0, str(Path(__file__).parents[1]))

from model.errors import INSTALLED, InputError, as_typed, run_command

CODE = Path(__file__).parents[1]
SCRIPTS = ("test", "extract_rop1m")
SCRIPT = re.compile('^if __name__ == "__main__":', re.MULTILINE)


def main() -> None:
    """The entry point, see pyproject.toml."""
    run_command(_run)


def _run(argv: list[str]) -> None:
    commands = _commands()
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(commands))
        return
    name, *rest = argv
    if name not in commands:
        raise InputError(f"{name!r} is not a command; the commands are {', '.join(commands)}")
    if missing := _missing_packages():
        raise InputError(f'missing packages: {", ".join(missing)}; pip install "superglobal[bench]" installs them')
    sys.argv = [INSTALLED + name, *rest]
    _run_as_main(commands[name])


def _commands() -> dict[str, str]:
    """Returns the modules of the commands by name: those that can be started as a script."""
    tools = sorted(path.stem for path in (CODE / "tools").glob("*.py") if SCRIPT.search(path.read_text()))
    return {**{name: name for name in SCRIPTS}, **{name: f"tools.{name}" for name in tools}}


def _overview(commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    lines = []
    for name, module in commands.items():
        docstring = ast.get_docstring(ast.parse((CODE / f"{module.replace('.', '/')}.py").read_text())) or ""
        lines.append(f"  {name:<{width}}  {as_typed(docstring.partition(chr(10))[0])}")
    return "\n".join(
        [
            "usage: superglobal NAME ARGUMENTS\n",
            "Data are looked for in ./revisitop, weights in ./weights; results go to ./output and ./log.txt.\n",
            *lines,
            "\nsuperglobal NAME --help tells more.",
        ]
    )


def _missing_packages() -> list[str]:
    """Returns the packages of the extra `bench` that are not installed."""
    missing = []
    extra = [each for each in importlib.metadata.requires("superglobal") or () if 'extra == "bench"' in each]
    for requirement in extra:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def _run_as_main(name: str) -> None:
    """Runs a module as `python -m` does, but keeps sys.argv[0], which is the name of the command."""
    spec = importlib.util.find_spec(name)
    main = ModuleType("__main__", spec.loader.get_source(name))
    main.__spec__, main.__file__ = spec, spec.origin  # new processes import it by its spec
    sys.modules["__main__"] = main
    exec(spec.loader.get_code(name), main.__dict__)
