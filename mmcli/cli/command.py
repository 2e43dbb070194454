"""How a command reads its options and prints its help."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from mmcli.core.errors import ConfigError

OTHER = "Options"


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
