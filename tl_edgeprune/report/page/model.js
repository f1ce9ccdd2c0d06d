"use strict";
// ---- the circuit, as document.py describes it, and what of it is shown ----

const page = JSON.parse(document.getElementById("circuit").textContent);
const {nodes, edges, circuits} = page;
const layerNames = page.drawing.layers.map(([layer]) => layer).sort((a, b) => a - b);

const byId = id => document.getElementById(id);
const number = n => n.toLocaleString("en");
const count = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const figure = x => typeof x !== "number" ? x : Number.isInteger(x) ? number(x) : String(Number(x.toPrecision(4)));

/* An HTML or SVG element; a function is a listener, and text children stay text, never markup. */
const SVG = new Set(["svg", "g", "path", "rect", "text", "line", "title", "circle", "style"]);
function make(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const SIDES = {
  shared: "in both",
  a: page.mode === "overlay" ? `only in ${circuits[0].name}` : "",
  b: page.mode === "overlay" ? `only in ${circuits[1].name}` : "",
};

nodes.forEach((node, place) => Object.assign(node, {place, reads: [], writes: [], kin: new Set()}));
edges.forEach((edge, place) => {
  edge.place = place;
  edge.deadIn = edge.dead;
  edge.side = edge.circuits.length === 2 ? "shared" : edge.circuits[0] === 0 ? "a" : "b";
  edge.from = nodes[edge.source];
  edge.to = nodes[edge.destination];
  edge.from.writes.push(edge);
  edge.to.reads.push(edge);
});
for (const group of page.drawing.links) {
  for (const one of group) for (const other of group) if (one !== other) nodes[one].kin.add(nodes[other]);
}

const state = {
  kinds: new Set(Object.keys(page.kinds)),
  sides: new Set(Object.keys(SIDES)),
  dead: true,
  layers: [layerNames[0] ?? 0, layerNames.at(-1) ?? 0],
  size: page.mode === "sizes" ? page.first : edges.length,  // a circuit, or edges
  shown: edges.length,
  pointed: null,  // the node or the edge under the pointer or the focus
  chosen: null,  // the one that was clicked
};

const allLayers = () => state.layers[0] === layerNames[0] && state.layers[1] === layerNames.at(-1);
const inLayers = node => node.layer >= state.layers[0] && node.layer <= state.layers[1];
const isEdge = thing => thing !== null && "curve" in thing;

function inSize(edge) {
  if (page.mode === "sizes") return edge.circuits.includes(state.size);
  return !page.scored || edge.rank < state.size;
}

/* Dead in the circuit that the slider chooses; of two, in each that has it. */
const isDead = edge => page.mode === "sizes" ? edge.deadIn.includes(state.size) : edge.deadIn.length === edge.circuits.length;

/* Filters by layer keep what touches a layer of the range. */
function isShown(edge) {
  return state.kinds.has(edge.kind) && (!edge.dead || state.dead) && inSize(edge)
    && (page.mode !== "overlay" || state.sides.has(edge.side))
    && (allLayers() || inLayers(edge.from) || inLayers(edge.to));
}

/* The name of an edge's colour. */
const colourOf = edge => page.mode === "overlay" ? edge.side : edge.kind;

/* Which edges are shown, and how many at each node. */
function applyFilters() {
  state.shown = 0;
  for (const node of nodes) Object.assign(node, {total: 0, nIn: 0, nOut: 0});
  for (const edge of edges) {
    edge.dead = isDead(edge);
    edge.shown = isShown(edge);
    if (!edge.shown) continue;
    state.shown += 1;
    edge.from.nOut += 1;
    edge.to.nIn += 1;
  }
  for (const node of nodes) node.total = node.nIn + node.nOut;
}
