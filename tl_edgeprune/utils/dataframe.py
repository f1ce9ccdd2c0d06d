"""A table that shows all of itself. Apart from its user, since pandas takes long to import."""

from __future__ import annotations

import pandas


class WholeFrame(pandas.DataFrame):
    """A DataFrame whose texts are not cut, and whose rows are not folded, when it is shown."""

    @property
    def _constructor(self) -> type[WholeFrame]:
        return WholeFrame

    def __repr__(self) -> str:
        return self.to_string()

    def _repr_html_(self) -> str:
        with pandas.option_context("display.max_colwidth", None):
            return self.to_html()
