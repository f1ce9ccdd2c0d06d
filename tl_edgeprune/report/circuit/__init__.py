"""A circuit as a page, a drawing and text.

Reading order: `layout` (where nodes and edges are), `figure` (.svg, .png, .pdf), `html_page` with
`page_data` (what the page shows) and `labels` (in which words), `dot` (Graphviz).
"""
