// ---- the drawing as an SVG file: as it is filtered now, whole and unzoomed, in this theme ----

function drawingAsSvg() {
  const [width, height] = page.drawing.size;
  const lines = inOrder.filter(edge => edge.shown).map(edge => {
    const [x0, y0, ...rest] = edge.curve;
    const dash = dashOf(edge);
    return make("path", {
      d: `M${x0},${y0}C${rest}`, fill: "none", stroke: palette[colourOf(edge)], "stroke-width": edgeWidth(edge).toFixed(2),
      "stroke-opacity": edgeOpacity(edge).toFixed(2), ...(dash.length ? {"stroke-dasharray": dash.join(" ")} : {}),
    }, make("title", {}, edge.name));
  });
  const names = [...page.drawing.layers.map(([name, top, bottom]) => [name, page.drawing.layer_label_x, (top + bottom) / 2, "end"]),
    ...page.drawing.spans.map(([name, left, right]) => [name, (left + right) / 2, height - page.drawing.span_room, "middle"])];
  return new XMLSerializer().serializeToString(make("svg", {
    viewBox: `0 0 ${width} ${height}`, width, height, "font-family": "system-ui, Helvetica, Arial, sans-serif", "font-size": page.drawing.font_size,
  },
  make("title", {}, page.title), make("rect", {width, height, fill: palette.page}),
  ...page.drawing.layers.filter(([layer]) => layer % 2 === 0).map(([, top, bottom]) => make("rect", {width, y: top, height: bottom - top, fill: palette.band})),
  ...names.map(([name, x, y, anchor]) => make("text", {x, y, fill: palette.muted, "text-anchor": anchor, "dominant-baseline": "central"}, String(name))),
  ...lines, ...nodes.filter(node => node.total).map(plainNode)));
}

function plainNode(node) {
  const ends = node.kind === "input" || node.kind === "logits";
  const fill = ends ? palette["end-node"] : node.kind === "mlp" ? palette["mlp-node"] : palette.node;
  const ports = [...new Set(node.reads.filter(edge => edge.shown).map(edge => edge.kind))];
  return make("g", {transform: `translate(${node.at})`},
    make("rect", {x: -nodeWidth / 2, y: -nodeHeight / 2, width: nodeWidth, height: nodeHeight, rx: CORNERS[node.kind] ?? nodeHeight / 2, fill, stroke: palette.muted}),
    make("text", {"text-anchor": "middle", "dominant-baseline": "central", fill: ends ? palette["end-ink"] : palette.ink}, node.label),
    ...ports.map(kind => make("path", {d: MARKS[kind], transform: `translate(${portOf(kind)})`, fill: page.mode === "overlay" ? palette.muted : palette[kind]})));
}

function saveSvg() {
  const url = URL.createObjectURL(new Blob([drawingAsSvg()], {type: "image/svg+xml"}));
  make("a", {href: url, download: "circuit.svg"}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
