"""The package is folders by purpose, whose imports lead one way: down the table of layers."""

from __future__ import annotations

from collections import Counter

from support import layers

PLUG_INS = ("methods", "tasks/library")  # one file a plug-in
MOST_IN_ROOT, MOST_IN_FOLDER = 8, 15


def test_no_file_imports_a_higher_layer() -> None:
    upward = [
        each
        for each in layers.imports()
        if each.importer.partition(".")[0] != each.imported.partition(".")[0]
        and layers.rank(each.imported) >= layers.rank(each.importer)
    ]
    assert upward == []


def test_only_the_doors_lead_upward() -> None:
    doors = {
        (importer, imported)
        for importer, imported in layers.late_imports()
        if layers.rank(imported) > layers.rank(importer)
    }
    assert doors == {*layers.DOORS}


def test_no_circle_of_files() -> None:
    assert layers.circles({(each.importer, each.imported) for each in layers.imports()}) == []


def test_no_circle_of_folders() -> None:
    def folder(name: str) -> str:
        path = layers.files()[name].relative_to(layers.ROOT / layers.PACKAGE)
        return str(path if len(path.parts) == 1 else path.parent)  # a file of the root is a room

    arrows = {
        (folder(each.importer), folder(each.imported))
        for each in layers.imports()
        if layers.files()[each.importer].name != "__init__.py"  # gives on what is inside
    }
    assert layers.circles({(start, end) for start, end in arrows if start != end}) == []


def test_imports_are_at_the_top_of_their_files() -> None:
    """But for commands, which are quick to show their help, and the doors."""
    inside = [
        each
        for each in layers.imports()
        if each.where != "module" and not each.importer.startswith("commands.")
    ]
    assert inside == []
    assert [each for each in layers.imports() if each.where == "typing"] == []


def test_folders_are_small() -> None:
    counts = Counter(str(path.parent.relative_to(layers.ROOT)) for path in layers.files().values())
    assert counts.pop("tl_edgeprune") <= MOST_IN_ROOT
    for folder in PLUG_INS:
        counts.pop(f"tl_edgeprune/{folder}")
    assert {folder: n for folder, n in counts.items() if n > MOST_IN_FOLDER} == {}


def test_the_page_shows_the_table_of_layers() -> None:
    page = (layers.ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert layers.table() in page, (
        "docs/design.md: put what `python tests/support/layers.py` prints"
    )
