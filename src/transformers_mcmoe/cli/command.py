# SPDX-License-Identifier: Apache-2.0
"""What every subcommand of `mcmoe` has: errors in one sentence, exit codes, `--debug`, and `--config` with YAML.

Exit codes: 0 done, 1 it failed, 2 the command line is wrong, 130 interrupted.
Knows typer; it does not know what the commands do.
"""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

from transformers_mcmoe.cli.console import messages, quieten, say
from transformers_mcmoe.distributed import RankLost
from transformers_mcmoe.version import __version__


class _InOrder(TyperGroup):
    """Lists the commands in the order of their use."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    name="mcmoe",
    cls=_InOrder,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Make Mixture-of-Experts models of Hugging Face transformers small, and use them.

    A first run: [bold]mcmoe plan MODEL[/] says what it will take, [bold]mcmoe compress MODEL --output DIR[/] does it,
    [bold]mcmoe evaluate DIR --reference MODEL[/] says what it cost, [bold]mcmoe report DIR[/] draws it,
    [bold]mcmoe serve DIR[/] answers OpenAI clients.
    """


class Refused(Exception):
    """The command cannot do this; the message is one sentence."""


def command(name: str, panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a subcommand.

    Args:
        name: of the subcommand.
        panel: heading that help lists it under.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, debug: bool, config_file: Path | None, **kwargs: Any) -> None:
            quieten(debug)
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt as error:
                say("Interrupted.")
                raise typer.Exit(130) from error
            except (typer.Exit, typer.Abort, BrokenPipeError):
                raise
            except Exception as error:
                if debug:
                    messages.print_exception()
                rank = os.environ.get("RANK", "0")  # of several processes that a launcher has started
                say(f"Error{f' on rank {rank}' if rank != '0' else ''}: {sentence(error)}")
                raise typer.Exit(1) from error

        signature = inspect.signature(function, eval_str=True)
        common = inspect.signature(_common, eval_str=True).parameters.values()
        run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *common])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
        app.command(name, rich_help_panel=panel)(run)
        return function

    return register


def _read_yaml(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's values the defaults of the command's options."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise typer.BadParameter(f"'{path}' cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"'{path}' is not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(values, Mapping):
        raise typer.BadParameter(f"'{path}' must hold options as 'name: value', one per line.")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    known = {parameter.name for parameter in context.command.params if parameter.name}
    unknown = sorted(set(values) - known)
    if unknown:
        raise typer.BadParameter(f"'{path}' has {', '.join(unknown)}, which this command has no option for.")
    context.default_map = {name: _as_text(value) for name, value in values.items() if value is not None}
    return path


def _as_text(value: Any) -> Any:
    """A YAML value as it would stand on the command line."""
    if isinstance(value, Mapping):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _common(
    *,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            is_eager=True,
            callback=_read_yaml,
            metavar="FILE",
            help="YAML file with options as 'name: value'; those on the command line win.",
        ),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show every log line, and where an error comes from.")
    ] = False,
) -> None:
    """Options of every command."""


def sentence(error: BaseException) -> str:
    """What went wrong, on one line."""
    text = str(error).strip()
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        where = f" of '{error.filename}'" if getattr(error, "filename", None) else ""  # type: ignore[attr-defined]
        return f"The disk{where} is full; free some room, or choose an output (or --work-dir) on another disk."
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{error.strerror}: '{error.filename}'." if error.filename else f"{error.strerror}."
    first = " ".join(text.split("\n\n")[0].split())
    if isinstance(error, Refused | RankLost | ValueError | OSError | ImportError | NotImplementedError) and first:
        return first
    return f"{type(error).__name__}: {first}".rstrip(": ") + " (--debug shows where)."
