"""Make the tables of docs/models.md: which models the package supports with the installed
TransformerLens, and which it refuses, each by what a tiny random model of its kind does.

    python scripts/supported_models.py           # print them
    python scripts/supported_models.py --write   # write them into the page

Needs what the tests need (pip install -e '.[test]'). One version of TransformerLens is installed at
a time: the other's columns stay as the page has them, so run it once in an environment of each.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
sys.path.insert(0, str(ROOT / "tests"))

from support import model_families  # noqa: E402

COLUMNS = {  # heading: TransformerLens' version, class
    "HookedTransformer 3.9": ("3.9", "hooked"),
    "TransformerBridge 3.9": ("3.9", "bridge"),
    "TransformerBridge 4.3": ("4.3", "bridge"),
}


def installed() -> str:
    """TransformerLens' version, as a column's. Raises ValueError for one without columns."""
    own = ".".join(version("transformer-lens").split(".")[:2])
    known = sorted({of for of, _ in COLUMNS.values()})
    if own not in known:
        raise ValueError(f"TransformerLens {own} has no column: expected {' or '.join(known)}.")
    return own


def section(page: str, name: str) -> str:
    """The page's text between `<!-- name -->` and `<!-- end -->`."""
    return page.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0]


def cells(page: str) -> dict[tuple[str, str], str]:
    """The page's cells of the table of families, by family and column."""
    heading, _, *lines = rows(section(page, "supported"))
    return {
        (line[0], column): cell
        for line in lines
        for column, cell in zip(heading, line, strict=True)
        if column in COLUMNS
    }


def measured(page: str) -> dict[tuple[str, str], str]:
    """The same: the installed version's by its models, the other's as the page has them."""
    result = cells(page)
    for column, (of, cls) in COLUMNS.items():
        if of == installed():
            for family in model_families.FAMILIES + model_families.OTHERS:
                result[family.name, column] = model_families.verdict(family, cls)
    return result


def supported(verdicts: dict[tuple[str, str], str]) -> str:
    """The table of families from its cells."""
    lines = [["Family", "For example", *COLUMNS, "Notes"]]
    lines.append(["---"] * len(lines[0]))
    for family in model_families.FAMILIES + model_families.OTHERS:
        own = [verdicts.get((family.name, column), "?") for column in COLUMNS]
        lines.append([family.name, family.examples, *own, family.note])
    return table(lines)


def refused() -> str:
    """The table of what is refused, and why: the words of the error."""
    lines = [["Kind", "For example", "Why"], ["---"] * 3]
    refused = model_families.REFUSED
    lines += [[kind.name, kind.examples, model_families.reason(kind)] for kind in refused]
    return table(lines)


def table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rows(text: str) -> list[list[str]]:
    """The cells of a table's rows."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    page = PAGE.read_text(encoding="utf-8")
    tables = {"supported": supported(measured(page)), "refused": refused()}
    if not parser.parse_args().write:
        print(*tables.values(), sep="\n")
        return
    for name, text in tables.items():
        page = page.replace(section(page, name), text)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
