"""A DataFrame that is displayed in full. In its own file, since pandas is slow to import."""

from __future__ import annotations

import pandas


class WholeFrame(pandas.DataFrame):
    """A DataFrame that is displayed with all of its rows and texts."""

    @property
    def _constructor(self) -> type[WholeFrame]:
        return WholeFrame

    def __repr__(self) -> str:
        return self.to_string()

    def _repr_html_(self) -> str:
        with pandas.option_context("display.max_colwidth", None):
            return self.to_html()
