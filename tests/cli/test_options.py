"""Every option: its help, its variable, its key in a --config file, its place in docs/cli.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_runs import Cli, finished, manifest

from mmcli.cli.app import COMMANDS, app
from mmcli.cli.reference import ERROR_CODES, EXIT_CODES, reference
from mmcli.core.errors import ExitCode

GROUP: Any = typer.main.get_command(app)
OPTIONS = [
    pytest.param(command, option, id=f"{command} {option.opts[-1]}")
    for command in COMMANDS
    for option in GROUP.commands[command].params
    if option.param_type_name == "option"
]
NAMED = [p for p in OPTIONS if p.values[1].name != "config"]


def parsed(command: str, *arguments: str) -> dict[str, Any]:
    """The values that a command would be given."""
    parent = typer.Context(GROUP, info_name="mmcli")
    values: dict[str, Any] = GROUP.commands[command].make_context(command, list(arguments), parent=parent).params
    return values


def other_value(option: Any) -> Any:
    """One that is not the default."""
    if option.is_flag:
        return option.default is not True
    return ["a,b"] if option.multiple else "17"


def plain(value: Any) -> Any:
    """Paths as texts."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize(("command", "option"), NAMED)
def test_variable(command: str, option: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    value = other_value(option)
    long = next(name for name in option.opts if name.startswith("--"))
    assert option.envvar == "MMCLI_" + long[2:].replace("-", "_").upper()
    monkeypatch.setenv(option.envvar, str(value[0] if isinstance(value, list) else value))
    assert plain(parsed(command)[option.name]) == value
    monkeypatch.delenv(option.envvar)
    assert parsed(command)[option.name] != value


@pytest.mark.parametrize("spelling", ["-", "_"])
@pytest.mark.parametrize(("command", "option"), [p for p in NAMED if p.values[0] == "embed"])
def test_config_key(
    command: str, option: Any, spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MMCLI_NUM_WORKERS")
    value = other_value(option)
    written = 17 if value == "17" else value if isinstance(value, bool | list) else str(value)
    file = tmp_path / "run.toml"
    file.write_text(f"{option.name.replace('_', spelling)} = {json.dumps(written)}\n")
    assert plain(parsed(command, "--config", str(file))[option.name]) == value
    file.write_text(f"[{command}]\n{option.name} = {json.dumps(written)}\n")
    assert plain(parsed(command, "--config", str(file))[option.name]) == value


def test_what_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line over variables, variables over the file."""
    file = tmp_path / "run.toml"
    file.write_text('batch-size = 1\ndtype = "bfloat16"\nseed = 1\n[inspect]\nerrors = 3\n')
    monkeypatch.setenv("MMCLI_CONFIG", str(file))
    monkeypatch.setenv("MMCLI_BATCH_SIZE", "2")
    monkeypatch.setenv("MMCLI_DTYPE", "float16")
    values = parsed("embed", "--batch-size", "3")
    assert (values["batch_size"], values["dtype"], values["seed"]) == ("3", "float16", "1")


def test_a_whole_run_from_a_file(cli: Cli, texts: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'inputs = ["{texts}"]\nmodel = "fake:4"\noutput = "{tmp_path}/o.parquet"\nquiet = true\n')
    done = cli("embed", "--config", file)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (tmp_path / "o.parquet").exists()


def test_mistakes_in_a_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('bach-size = 3\nupdate = "yes"\nkeep = 3\nseed = [1]\nconfig = "x"\n[embd]\nframes = 2\n')
    done = cli("embed", "--config", file)
    assert done.code == 2
    for said in (
        "unknown option bach-size; did you mean batch-size?",
        "update = 'yes' is not true or false",
        "keep = 3 is not a list of strings",
        "seed = [1] is not a string or a number",
        "unknown option config",
        "unknown table embd; did you mean embed?",
    ):
        assert said in done.err
    file.write_text("model = \n")
    assert "is not TOML" in cli("embed", "--config", file).err
    missing = cli("embed", "--config", tmp_path / "none.toml")
    assert missing.code == 2
    assert "No such file" in missing.err


def test_bad_variables_all_at_once(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMCLI_UPDATE", "perhaps")
    monkeypatch.setenv("MMCLI_QUIET", "7")
    done = cli("embed", ".")
    assert done.code == 2
    assert "MMCLI_UPDATE 'perhaps' is neither true nor false" in done.err
    assert "MMCLI_QUIET '7'" in done.err


def test_misspelt_variables_are_told(cli: Cli, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each; those of another command, and of the tests, are none of these."""
    monkeypatch.setenv("MMCLI_DEUBG", "1")
    monkeypatch.setenv("MMCLI_XYZZY", "1")
    monkeypatch.setenv("MMCLI_LABELS_FILE", "labels.txt")
    monkeypatch.setenv("MMCLI_TEST_DATA", "data")
    told = ["MMCLI_DEUBG is not known; did you mean MMCLI_DEBUG?", "MMCLI_XYZZY is not known; unset it"]
    done = cli("embed", texts, "-m", "fake:4", "--num-workers", 1)
    assert done.code == 0
    assert [line for line in done.err.splitlines() if "MMCLI_" in line] == told
    assert cli("embed", texts, "-m", "fake:4", "--quiet").err == ""
    assert cli("eval", texts).err.splitlines()[:2] == told
    monkeypatch.setenv("MMCLI_QUIET", "false")
    assert cli("eval", texts).err.splitlines()[:2] == told
    monkeypatch.setenv("MMCLI_QUIET", "1")
    assert "not known" not in cli("eval", texts).err
    assert "not known" not in cli("--help").err


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_help(command: str, option: Any) -> None:
    assert option.help
    assert option.help.endswith((".", "]"))


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], *([c, "-h"] for c in COMMANDS)])
def test_help_fits(cli: Cli, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = cli(*arguments)
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 100
    assert "Show this message" in done.out
    for name in COMMANDS if len(arguments) == 1 else ["MMCLI_BATCH_SIZE"]:
        assert name in done.out
    if arguments == ["embed", "-h"]:
        headings = re.findall(r"^(\w+):$", done.out, re.MULTILINE)
        groups = ["Arguments", "Inputs", "Model", "Embedding", "Output", "Run", "Messages", "Options"]
        assert headings == groups


def test_version(cli: Cli) -> None:
    assert re.fullmatch(r"mmcli \d+\.\d+\.\d+\n", cli("--version").out)


def test_reference_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text() == reference(), "run: python -m mmcli.cli.reference > docs/cli.md"


def test_reference_has_everything() -> None:
    page = reference()
    for command in COMMANDS:
        assert f"## mmcli {command}\n" in page
    for param in OPTIONS:
        assert param.values[1].opts[-1] in page
    assert set(EXIT_CODES) == set(ExitCode)
    assert all(f"| `{code}` |" in page for code in ERROR_CODES)
    # A cell with a pipe in it would be a column more.
    assert {line.count("|") for line in page.splitlines() if line.startswith("|")} == {3}


def test_offline_is_known_before_the_hub_is_imported(tmp_path: Path) -> None:
    rows = manifest(tmp_path / "m.csv", 1)
    done = finished("embed", rows, "-m", "nobody/nothing", "--offline", env={"PATH": "", "HOME": str(tmp_path)})
    assert done.code == 2
    assert "nobody/nothing" in done.err
    assert "Traceback" not in done.err
