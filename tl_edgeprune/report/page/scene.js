// ---- the drawing: edges on a canvas, for there may be many; nodes as SVG, for they have names ----

const [nodeWidth, nodeHeight] = page.drawing.node_size;
const CORNERS = {mlp: 3, kv: 0.5};
const HUB_SHADE = 0.3;  // how much darker the most connected node is ...
const HUB_FROM = 30;  // ... in a drawing where it has at least so many edges
const DASHES = {dead: [1.6, 3], b: [8, 3.5]};
const MOST_DASHED = 1500;  // edges: beyond, dashes take longer than all else and nobody can tell them
const LEVELS = 4;  // widths of edges, by the quarters of their ranks
const BATCH = 8;  // edges of one style that are stroked together, which is twice as quick

const MARKS = {  // of what an edge enters, the same without colour; about (0, 0)
  q: "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z",
  k: "M-2.7,-2.7h5.4v5.4h-5.4z",
  v: "M0,-3.4L3.3,2.6H-3.3z",
  attn: "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z",
  mlp: "M0,-3.6L3.6,0L0,3.6L-3.6,0z",
  logits: "M-4.4,-1.4h8.8v2.8h-8.8z",
};

const edgeCanvas = byId("edges"), focusCanvas = byId("focus"), svg = byId("drawing");
const backLayer = make("g"), nameLayer = make("g"), nodeLayer = make("g");
const view = make("g", {id: "view"}, nameLayer, nodeLayer);
let palette = {};  // the theme's colours, for the canvases

/* The colours as the page now has them: a canvas knows no custom properties. */
function readPalette() {
  const probe = make("span");
  document.body.append(probe);
  for (const name of [...Object.keys(page.kinds), ...Object.keys(SIDES), "page", "ink", "muted", "band", "line", "node", "mlp-node", "end-node", "end-ink"]) {
    probe.style.color = `var(--${name})`;
    palette[name] = getComputedStyle(probe).color;
  }
  probe.remove();
}

/* From 0 for the weakest quarter of the edges to 3 for the strongest. */
const levelOf = edge => page.scored ? Math.floor(LEVELS * (1 - (edge.rank + 0.5) / edges.length)) : 0;

function edgeWidth(edge) {
  if (!page.scored) return edges.length < 100 ? 1.7 : 1;
  return [0.7, 1, 1.5, 2.4][levelOf(edge)] * (edges.length < 100 ? 1.3 : 1);
}

function dashOf(edge) {
  if (state.shown > MOST_DASHED) return [];
  return edge.dead ? DASHES.dead : DASHES[colourOf(edge)] ?? [];
}

/* The more edges, the fainter each, and the weak ones most: what is dense and what is strong shows. */
function edgeOpacity(edge) {
  const all = clamp(12 / Math.sqrt(Math.max(1, state.shown)), 0.13, 0.9);
  const strength = page.scored && state.shown >= 100 ? [0.5, 0.7, 0.9, 1.15][levelOf(edge)] : 1;
  return Math.min(0.95, all * strength * (edge.dead ? 0.5 : 1));
}

/* Where colours tell two circuits apart, what an edge enters is told by the mark alone. */
const markColour = kind => page.mode === "overlay" ? "var(--muted)" : `var(--${kind})`;

function mark(kind, attributes = {}) {
  return make("path", {class: "mark", d: MARKS[kind], fill: markColour(kind), ...attributes});
}

function portOf(kind) {
  return [nodeWidth * (page.drawing.ports[kind] ?? 0), nodeHeight / 2 + 1];
}

function drawNode(node) {
  const shape = {x: -nodeWidth / 2, y: -nodeHeight / 2, width: nodeWidth, height: nodeHeight, rx: CORNERS[node.kind] ?? nodeHeight / 2};
  node.hub = make("rect", {class: "hub", ...shape});
  node.ports = Object.fromEntries([...new Set(node.reads.map(edge => edge.kind))].map(kind =>
    [kind, mark(kind, {class: "port", transform: `translate(${portOf(kind)})`})]));
  node.mark = make("g", {
    class: `node ${node.kind}`, transform: `translate(${node.at})`, role: "button", "aria-pressed": "false",
    tabindex: node.place === 0 ? 0 : -1, "data-node": node.place,
    "aria-label": `${node.name}: ${count(node.reads.length, "edge")} in, ${count(node.writes.length, "edge")} out`,
  },
  make("rect", {class: "box", ...shape}), node.hub,
  make("text", {"font-size": page.drawing.font_size}, node.label), ...Object.values(node.ports));
  return node.mark;
}

function drawBack() {
  const [width, height] = page.drawing.size;
  const font = page.drawing.font_size;
  for (const [layer, top, bottom] of page.drawing.layers) {
    if (layer % 2 === 0) backLayer.append(make("rect", {class: "layer-band", width, y: top, height: bottom - top}));
    const choose = () => chooseLayers(layer, layer);
    nameLayer.append(
      make("rect", {class: "layer-hit", width: page.drawing.layer_label_x + 8, y: top, height: bottom - top, click: choose}, make("title", {}, `Show only layer ${layer}`)),
      make("text", {class: "layer-name", x: page.drawing.layer_label_x, y: (top + bottom) / 2, "font-size": font, "pointer-events": "none"}, String(layer)));
  }
  for (const [name, left, right] of page.drawing.spans) {
    backLayer.append(make("line", {class: "span-line", x1: left, x2: left, y1: 8, y2: height - 8}));
    nameLayer.append(
      make("text", {class: "span-name", x: (left + right) / 2, y: height - page.drawing.span_room, "font-size": font + 1}, name));
  }
  for (const group of page.drawing.links) {
    const [first] = group;
    const line = make("line", {class: "link", y1: nodes[first].at[1], y2: nodes[first].at[1]});
    backLayer.append(line);
    joins.push({members: group.map(place => nodes[place]), line});
  }
}
const joins = [];

/* A line along the nodes that one attention joins, where two or more of them have edges. */
function drawJoins() {
  for (const {members, line} of joins) {
    const xs = members.filter(node => node.total).map(node => node.at[0]);
    line.classList.toggle("gone", xs.length < 2);
    if (xs.length > 1) for (const [name, x] of [["x1", Math.min(...xs)], ["x2", Math.max(...xs)]]) line.setAttribute(name, x);
  }
}

/* How dark nodes are, which are idle, and which of their inputs are in use. */
function drawDegrees() {
  const most = Math.max(HUB_FROM, ...nodes.map(node => node.total));
  for (const node of nodes) {
    node.hub.setAttribute("fill-opacity", (HUB_SHADE * Math.sqrt(node.total / most)).toFixed(3));
    node.mark.classList.toggle("idle", node.total === 0 && edges.length > 0);
    const entered = new Set(node.reads.filter(edge => edge.shown).map(edge => edge.kind));
    for (const [kind, port] of Object.entries(node.ports)) port.classList.toggle("gone", !entered.has(kind));
  }
}

/* Stroke edges onto a canvas, as the camera sees them; those outside are left out. */
function stroke(canvas, list, opacityOf, least) {
  const {clientWidth: width, clientHeight: height} = svg;
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, {width: w, height: h});
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  const {x, y, scale} = camera;
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.clearRect(0, 0, w, h);
  pen.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * x, ratio * y);
  const [left, top, right, bottom] = [-x / scale, -y / scale, (width - x) / scale, (height - y) / scale];
  let style = null, inBatch = 0;
  for (const edge of list) {
    const [x0, y0, x1, y1, x2, y2, x3, y3] = edge.curve;
    if (y3 > bottom || y0 < top || Math.max(x0, x1, x2, x3) < left || Math.min(x0, x1, x2, x3) > right) continue;
    const own = styleOf(edge);
    if (own !== style || inBatch === BATCH) {
      if (inBatch) pen.stroke();
      if (own !== style) {
        pen.strokeStyle = palette[colourOf(edge)];
        pen.globalAlpha = opacityOf(edge);
        pen.lineWidth = Math.max(least, edgeWidth(edge), 0.55 / scale);
        pen.setLineDash(dashOf(edge));
      }
      pen.beginPath();
      [style, inBatch] = [own, 0];
    }
    pen.moveTo(x0, y0);
    pen.bezierCurveTo(x1, y1, x2, y2, x3, y3);
    inBatch += 1;
  }
  if (inBatch) pen.stroke();
  canvas.style.transform = "";
  canvas.dataset.drawn = list.length;
}

const styleOf = edge => `${edge.dead ? 0 : 1}${levelOf(edge)}${colourOf(edge)}`;

let inOrder = [];  // dead edges first and strong ones last, so on top; those of one style together

function sortEdges() {
  const keys = new Map(edges.map(edge => [edge, styleOf(edge)]));
  const byStyle = (a, b) => keys.get(a) < keys.get(b) ? -1 : Number(keys.get(a) > keys.get(b));
  inOrder = [...edges].sort((a, b) => byStyle(a, b) || b.rank - a.rank);
}

function drawEdges() {
  stroke(edgeCanvas, inOrder.filter(edge => edge.shown), edgeOpacity, 0);
  edgeCanvas.setAttribute("aria-label", `${count(state.shown, "edge")}, of ${number(edges.length)}`);
  drawFocus();
  drawn = {...camera};
}

function drawFocus() {
  stroke(focusCanvas, focusEdges(), edge => edge.dead ? 0.6 : 0.95, 1.5);
}
