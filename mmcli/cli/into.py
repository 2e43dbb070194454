"""`--into FOLDER`: whether files can be put there, as far as that can be told before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mmcli.cli.parse import Problems

if TYPE_CHECKING:
    from mmcli.cli.compose import Arguments
    from mmcli.cli.options import IntoArguments


def check_into(arguments: Arguments, problems: Problems) -> None:
    """All that is wrong with --into, --link and --copy."""
    wanted = arguments.into
    if wanted is None:
        return
    if wanted.link and wanted.copy:
        problems.add("--link and --copy exclude one another; give one of them")
    if wanted.into is None:
        if wanted.link or wanted.copy:
            problems.add(
                f"--{'link' if wanted.link else 'copy'}: there is no folder to put files into; add --into FOLDER"
            )
        return
    from mmcli.sinks.class_notes import Into, check_folder
    from mmcli.sinks.formats import RESULTS

    said, output = f"--into {wanted.into}", arguments.output
    _check_inputs(arguments, wanted, problems)
    if output.output == "-":
        problems.add(
            f"{said}: files are put there when all rows are there, from an output; add e.g. -o labels.parquet"
        )
        return
    if output.format in RESULTS:
        problems.add(f"{said}: made from the rows of an output, which --format {output.format} has not")
    out = os.path.realpath(output.output)
    if _within(out, os.path.realpath(wanted.into)):
        such = f", e.g. -o {wanted.into}.parquet" if wanted.into.name else ""
        problems.add(f"{said}: -o {output.output} lies in it; put the output beside it{such}")
    elif _within(os.path.realpath(wanted.into), out):
        problems.add(f"{said}: it lies in -o {output.output}; put it beside that")
    else:
        problems.collect(check_folder, Into(wanted.into, Path(out), wanted.copy))


def _check_inputs(arguments: Arguments, wanted: IntoArguments, problems: Problems) -> None:
    """Else a second run would take what the first has put there for inputs."""
    folder = os.path.realpath(str(wanted.into))
    said = f"--into {wanted.into}"
    for name in arguments.inputs.inputs or ():
        if name == "-":
            continue
        real = os.path.realpath(name)
        if real != folder and _within(real, folder):
            problems.add(f"{said}: the input {name} lies in it; give another folder")
            return
        if _reads(name, folder):
            it = "it is" if real == folder else "it lies in"
            problems.add(
                f"{said}: {it} the input {name}, and a second run would read what the first has put there; "
                "give a folder beside it"
            )
            return


def _reads(name: str, folder: str) -> bool:
    """Whether the files that an input names may be in FOLDER/label/."""
    from mmcli.sources.names import compile_pattern, has_wildcard, split_pattern

    if os.path.lexists(name) or not has_wildcard(name):
        return os.path.isdir(name) and _within(folder, os.path.realpath(name))
    root, pattern = split_pattern(name)
    real = os.path.realpath(root or ".")
    if not _within(folder, real):
        return False
    parts = pattern.split("/")
    below = [*os.path.relpath(folder, real).split("/"), "label"] if folder != real else ["label"]
    if "**" in parts:
        return True
    return len(parts) == len(below) + 1 and bool(
        compile_pattern("/".join(parts[: len(below) - 1])).fullmatch("/".join(below[:-1]))
    )


def _within(path: str, folder: str) -> bool:
    """Whether a path is a folder or in it; both without symbolic links."""
    return os.path.join(path, "").startswith(os.path.join(folder, ""))
