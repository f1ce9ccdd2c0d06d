"""Makes the tables of docs/models.md: supported and refused models with the installed
TransformerLens, tested on a tiny random model of each family.

    python scripts/supported_models.py           # print them
    python scripts/supported_models.py --write   # write them into the page

Needs the tests' dependencies (pip install -e '.[test]'). Only the columns of the installed version
of TransformerLens change, so run the script once in an environment of each version.
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
    """The installed TransformerLens version, as in a column. Raises ValueError if it has none."""
    installed_version = ".".join(version("transformer-lens").split(".")[:2])
    versions = sorted({column_version for column_version, _ in COLUMNS.values()})
    if installed_version not in versions:
        raise ValueError(
            f"TransformerLens {installed_version} has no column: expected {' or '.join(versions)}."
        )
    return installed_version


def section(page: str, name: str) -> str:
    """The page's text between `<!-- name -->` and `<!-- end -->`."""
    return page.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0]


def cells(page: str) -> dict[tuple[str, str], str]:
    """The cells of the page's table of families, by family and column."""
    heading, _, *lines = rows(section(page, "supported"))
    return {
        (line[0], column): cell
        for line in lines
        for column, cell in zip(heading, line, strict=True)
        if column in COLUMNS
    }


def measured(page: str) -> dict[tuple[str, str], str]:
    """The same, with the installed version's cells measured and the others from the page."""
    result = cells(page)
    for column, (column_version, cls) in COLUMNS.items():
        if column_version == installed():
            for family in model_families.FAMILIES + model_families.OTHERS:
                result[family.name, column] = model_families.verdict(family, cls)
    return result


def supported(verdicts: dict[tuple[str, str], str]) -> str:
    """The table of families, from its cells."""
    lines = [["Family", "For example", *COLUMNS, "Notes"]]
    lines.append(["---"] * len(lines[0]))
    for family in model_families.FAMILIES + model_families.OTHERS:
        family_cells = [verdicts.get((family.name, column), "?") for column in COLUMNS]
        lines.append([family.name, family.examples, *family_cells, family.note])
    return table(lines)


def refused() -> str:
    """The table of refused models, each with the reason given by the error."""
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
    parser.add_argument("--write", action="store_true", help="write them into docs/models.md")
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
