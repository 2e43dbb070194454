"""How a command reads its options and prints its help."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand

from mmcli.cli.boundary import is_set, say
from mmcli.core.errors import ConfigError, one_line

OTHER = "Options"
PREFIX, OF_TESTS = "MMCLI_", "MMCLI_TEST_"


class Command(TyperCommand):
    """Help in groups, and all options that cannot be read in one error."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises ConfigError that lists every option with a bad value; other usage errors as they come."""
        try:
            return super().parse_args(ctx, list(args))
        except Exception as first:
            if not hasattr(first, "format_message"):
                raise
            # The parser's own errors do not know which command's help to name.
            first.ctx = getattr(first, "ctx", None) or ctx  # type: ignore[attr-defined]
            problems = self._problems(ctx, list(args))
            if not problems:
                raise
            raise ConfigError(problems, hint=f"{ctx.command_path} --help") from first

    def invoke(self, ctx: Any) -> Any:
        """Run the command; before that say which variables nothing reads."""
        # One that a command without --quiet does not read asks for the same.
        quiet = ctx.params.get("quiet", is_set("MMCLI_QUIET"))
        # Of several processes (torchrun) the first one talks.
        if not quiet and ("LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"):
            for note in unknown_variables(ctx.find_root().command, os.environ):
                say(note)
        return super().invoke(ctx)

    def _problems(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            values, _, _ = self.make_parser(ctx).parse_args(args=args)
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            return []
        problems = []
        for parameter in self.get_params(ctx):
            try:
                parameter.handle_parse_result(ctx, values, [])
            except ConfigError as error:
                problems += error.problems
            except Exception as error:
                if not hasattr(error, "format_message"):
                    raise
                problems.append(_problem(parameter, ctx, values, error))
        return problems

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """One section per group of options, in the order of their declaration."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if parameter.param_type_name == "argument":
                sections.setdefault("Arguments", []).append(
                    (str(parameter.metavar), str(getattr(parameter, "help", "")))
                )
            elif (record := parameter.get_help_record(ctx)) is not None:
                panel = getattr(parameter, "rich_help_panel", None) or OTHER
                sections.setdefault(panel, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def unknown_variables(group: Any, environment: Mapping[str, str]) -> list[str]:
    """A line for each variable that looks like one of mmcli's and is of no option of any command of `group`."""
    named = [name for name in environment if name.startswith(PREFIX) and not name.startswith(OF_TESTS)]
    if not named:
        return []
    from difflib import get_close_matches

    options = (option for command in group.commands.values() for option in command.params)
    known = {option.envvar.removeprefix(PREFIX) for option in options if option.envvar}
    lines = []
    for name in sorted({name.removeprefix(PREFIX) for name in named} - known):
        near = get_close_matches(name, known, 1)
        meant = f"did you mean {PREFIX}{near[0]}?" if near else "unset it"
        lines.append(f"{PREFIX}{one_line(name)} is not known; {meant}")
    return lines


def _problem(parameter: Any, ctx: Any, values: dict[str, Any], error: Any) -> str:
    """What is wrong with an option's value, with that value and where it comes from."""
    name = next(iter(parameter.opts), parameter.name)
    value = values.get(parameter.name)
    if value is None and (from_variable := parameter.resolve_envvar_value(ctx)) is not None:
        name, value = f"{parameter.envvar}", from_variable
    if value is None:
        value = (ctx.default_map or {}).get(parameter.name)
    if value is None or not getattr(parameter, "is_flag", False):
        return str(error.format_message())
    return f"{name} {value!r} is neither true nor false; give 1 or 0"
