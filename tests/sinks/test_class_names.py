"""Folders of labels and names of files: readable, safe, and never one for two."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcli.sinks.class_names import Claims, LabelFolders, file_name, folder_name, numbered

NASTY = st.text(st.sampled_from([*"./%~-\\\0\n\x1b\u2028é ", "\u0301", *"aA2Ee", "🐱"]), max_size=12)
LABELS = st.one_of(NASTY, st.text(max_size=20), NASTY.map(lambda text: text * 60))


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("a cat", "a cat"),
        ("Grüße 世界", "Grüße 世界"),
        ("AC/DC", "AC%2FDC"),
        (".", "%2E"),
        ("..", "%2E."),
        (".hidden", "%2Ehidden"),
        ("100%", "100%25"),
        ("a\0b\n", "a%00b%0A"),
        ("metadata.csv", "metadata%2Ecsv"),
    ],
)
def test_names_of_labels(label: str, name: str) -> None:
    assert folder_name(label) == name


@given(LABELS)
def test_a_label_is_one_visible_folder(label: str) -> None:
    name = folder_name(label)
    assert name not in ("", ".", "..")
    assert not set(name) & set("/\0\n\x1b")
    assert not name.startswith(".")
    assert len(name.encode()) <= 255
    if "%~" not in name:
        assert unquote(name) == label


@given(LABELS, LABELS)
def test_two_labels_have_two_names(one: str, other: str) -> None:
    if one != other:
        names = [{folder_name(label), folder_name(label, distinct=True)} for label in (one, other)]
        assert not names[0] & names[1]


def test_a_label_cannot_pose_as_a_long_one() -> None:
    long = "x" * 300
    assert folder_name(folder_name(long)) != folder_name(long)
    assert folder_name(long) != folder_name(long + "y")


@given(st.binary(min_size=1, max_size=255).filter(lambda name: not set(name) & set(b"/\0")))
def test_any_file_name_is_text_that_can_be_shown(name: bytes) -> None:
    made = numbered(file_name("/some/where/" + os.fsdecode(name)), 12)
    assert len(made.encode()) <= 255
    assert not made.startswith(".")
    assert not any(ord(c) < 32 or c == "/" for c in made)
    assert "-12" in made


@pytest.mark.parametrize(
    ("name", "number", "made"),
    [
        ("a.jpg", 1, "a.jpg"),
        ("a.jpg", 2, "a-2.jpg"),
        ("a.tar.gz", 3, "a.tar-3.gz"),
        ("a", 2, "a-2"),
        ("é" * 125 + ".jpeg", 1, "é" * 125 + ".jpeg"),
        ("é" * 125 + ".jpeg", 10, "é" * 123 + "-10.jpeg"),
        ("a." + "x" * 253, 2, ("a." + "x" * 253)[:253] + "-2"),
    ],
)
def test_numbered_names_keep_their_extension(name: str, number: int, made: str) -> None:
    assert numbered(name, number) == made


@given(st.lists(st.text(st.sampled_from("aAéE\u03012-."), min_size=1, max_size=4), max_size=25))
def test_no_name_twice_not_even_in_another_case(names: list[str]) -> None:
    claims = Claims(sqlite3.connect(":memory:"))
    made = [next(claims.names(f"cat/{name}")) for name in names]
    assert len({name.casefold() for name in made}) == len(names)
    assert [next(claims.names(f"dog/{name}")) for name in names] == [name.replace("cat/", "dog/") for name in made]


def test_the_first_row_has_the_name() -> None:
    claims = Claims(sqlite3.connect(":memory:"))
    wanted = ["a.jpg", "a-2.jpg", "a.jpg", "A.jpg", "a.jpg", "a-2.jpg"]
    assert [next(claims.names(f"cat/{name}")) for name in wanted] == [
        f"cat/{name}" for name in ("a.jpg", "a-2.jpg", "a-3.jpg", "A-4.jpg", "a-5.jpg", "a-2-2.jpg")
    ]


def test_many_of_one_name_take_no_longer_each() -> None:
    """Each number is tried once: 20,000 would else be 200 million tries."""
    claims = Claims(sqlite3.connect(":memory:"))
    assert [next(claims.names("cat/image.jpg")) for _ in range(20_000)][-1] == "cat/image-20000.jpg"


def test_labels_that_the_file_system_takes_for_one_get_two_folders(tmp_path: Path) -> None:
    """As `Cat` and `cat` on a Mac."""
    (tmp_path / "Cat").mkdir()
    (tmp_path / "cat").symlink_to("Cat")
    folders = LabelFolders(str(tmp_path))
    names = [folders.name(label) for label in ("Cat", "cat", "Cat", "cat")]
    assert names[0] == names[2] == "Cat"
    assert names[1] == names[3] == folder_name("cat", distinct=True)
    assert (tmp_path / str(names[1])).is_dir()


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "cat").write_text("mine")
    folders = LabelFolders(str(tmp_path))
    assert isinstance(folders.name("cat"), NotADirectoryError)
    assert isinstance(folders.name("cat"), NotADirectoryError)
    assert folders.name("dog") == "dog"
