// ---- pointing: highlights what is under the pointer and its neighbours, with a tooltip ----

const CELL = 24;  // of the grid in which edges are looked up, in the drawing's points
const SAMPLES = 22;  // points of a curve
const REACH = 7;  // pixels from the pointer to an edge
const TIP_FACTS = 6;

const gridKey = (x, y) => Math.floor(x / CELL) * 100003 + Math.floor(y / CELL);
let grid = null;  // cell -> indices of the edges that pass through it

function pointsOf(edge) {
  if (edge.points) return edge.points;
  const [x0, y0, x1, y1, x2, y2, x3, y3] = edge.curve;
  const points = new Float32Array(2 * SAMPLES);
  for (let i = 0; i < SAMPLES; i++) {
    const t = i / (SAMPLES - 1), s = 1 - t;
    const [a, b, c, d] = [s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t];
    points[2 * i] = a * x0 + b * x1 + c * x2 + d * x3;
    points[2 * i + 1] = a * y0 + b * y1 + c * y2 + d * y3;
  }
  return edge.points = points;
}

function buildGrid() {
  if (grid) return;
  grid = new Map();
  for (const edge of edges) {
    const points = pointsOf(edge);
    let last = null;
    const enter = (x, y) => {
      const key = gridKey(x, y);
      if (key === last) return;
      last = key;
      if (!grid.has(key)) grid.set(key, []);
      grid.get(key).push(edge.place);
    };
    for (let i = 1; i < SAMPLES; i++) {
      const [x, y, u, v] = [points[2 * i - 2], points[2 * i - 1], points[2 * i], points[2 * i + 1]];
      const steps = Math.ceil(Math.hypot(u - x, v - y) / (CELL / 2)) || 1;
      for (let j = 0; j < steps; j++) enter(x + (u - x) * j / steps, y + (v - y) * j / steps);
    }
    enter(points[2 * SAMPLES - 2], points[2 * SAMPLES - 1]);
  }
}

/* The shown edge nearest to a point of the drawing, if one is near enough. */
function edgeAt([x, y]) {
  buildGrid();
  let best = null, least = REACH / camera.scale;
  const rings = Math.ceil(least / CELL), seen = new Set();
  for (let i = -rings; i <= rings; i++) for (let j = -rings; j <= rings; j++) {
    for (const place of grid.get(gridKey(x + i * CELL, y + j * CELL)) ?? []) {
      if (seen.has(place) || !edges[place].shown) continue;
      seen.add(place);
      const far = distance(pointsOf(edges[place]), x, y);
      if (far < least) [best, least] = [edges[place], far];
    }
  }
  return best;
}

/* From a point to a curve, by its samples. */
function distance(points, x, y) {
  let least = Infinity;
  for (let i = 1; i < SAMPLES; i++) {
    const [x0, y0] = [points[2 * i - 2], points[2 * i - 1]];
    const [dx, dy] = [points[2 * i] - x0, points[2 * i + 1] - y0];
    const t = clamp(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy || 1), 0, 1);
    least = Math.min(least, Math.hypot(x - x0 - t * dx, y - y0 - t * dy));
  }
  return least;
}

const nodeAt = event => {
  const found = event.target.closest?.("[data-node]");
  return found ? nodes[found.dataset.node] : null;
};

// ---- what is lit ----

const inFocus = () => state.pointed ?? state.chosen;

function focusEdges() {
  const thing = inFocus();
  if (thing === null) return [];
  if (isEdge(thing)) return thing.shown ? [thing] : [];
  return [...thing.reads, ...thing.writes].filter(edge => edge.shown).sort((a, b) => b.rank - a.rank);
}

function showFocus() {
  const thing = inFocus(), lit = focusEdges();
  const near = new Set(lit.flatMap(edge => [edge.from, edge.to]));
  if (thing && !isEdge(thing)) [thing, ...thing.kin].forEach(node => near.add(node));
  byId("graph").classList.toggle("focused", thing !== null);
  for (const node of nodes) {
    node.mark.classList.toggle("near", near.has(node));
    node.mark.classList.toggle("center", node === thing);
    node.mark.classList.toggle("chosen", node === state.chosen);
    node.mark.setAttribute("aria-pressed", node === state.chosen);
  }
  drawFocus();
  lightRows(isEdge(thing) ? thing : null);
}

function point(thing) {
  if (thing === state.pointed) return;
  state.pointed = thing;
  showFocus();
}

function choose(thing) {
  state.chosen = thing;
  state.pointed = null;
  showFocus();
  showDetail(thing);
}

// ---- the words beside the pointer ----

/* What is known of an edge, in words: names and values. */
function edgeFacts(edge) {
  const facts = [["enters", `${page.kinds[edge.kind]}${edge.kind in {q: 1, k: 1, v: 1} ? ` of ${edge.to.label}` : ""}`]];
  if (page.mode === "overlay") facts.push(["circuit", SIDES[edge.side]]);
  if (page.mode === "sizes") facts.push(["in", edge.circuits.map(place => circuits[place].name).join(", ")]);
  if (edge.score !== null) facts.push(["score", figure(edge.score)], ["rank", `${number(edge.rank + 1)} of ${number(edges.length)}`]);
  if (edge.dead) facts.push(["dead", "on no path from input to logits"]);
  return [...facts, ...Object.entries(edge.facts).map(([name, value]) => [name, figure(value)])];
}

const factList = facts => make("dl", {}, ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));

function showTip(thing, {x, y}) {
  const tip = byId("tip");
  if (thing === null) return hideTip();
  if (isEdge(thing)) {
    const facts = edgeFacts(thing);
    const more = facts.length - TIP_FACTS - 4;
    tip.replaceChildren(make("strong", {}, thing.name), factList(more > 0 ? facts.slice(0, -more) : facts));
    if (more > 0) tip.append(`and ${count(more, "fact")} more: click`);
  } else {
    tip.replaceChildren(make("strong", {}, thing.name), `${count(thing.nIn, "edge")} in, ${count(thing.nOut, "edge")} out`);
  }
  tip.hidden = false;
  const {clientWidth: width, clientHeight: height} = byId("graph");
  const [w, h] = [tip.offsetWidth, tip.offsetHeight];
  tip.style.left = `${clamp(x + 16 + w > width ? x - w - 12 : x + 16, 4, width)}px`;
  tip.style.top = `${clamp(y + 18 + h > height ? y - h - 10 : y + 18, 4, height)}px`;
}

function hideTip() {
  byId("tip").hidden = true;
}

// ---- pointer and drag ----

let drag = null;

svg.addEventListener("pointerdown", event => {
  if (event.button === 0) drag = {x: event.clientX, y: event.clientY, from: {...camera}, moved: false};
});
svg.addEventListener("pointermove", event => {
  if (drag) return pull(event);
  const place = placeOf(event);
  const thing = nodeAt(event) ?? edgeAt(place.at);
  svg.classList.toggle("over-edge", isEdge(thing));
  point(thing);
  showTip(thing, place);
});
svg.addEventListener("pointerleave", () => {
  hideTip();
  if (!drag) point(null);
});
svg.addEventListener("pointerup", event => {
  const moved = drag?.moved;
  const wanted = nodeAt(event) ?? edgeAt(placeOf(event).at);
  endDrag();
  if (!moved && !event.target.closest(".layer-hit")) choose(wanted === state.chosen ? null : wanted);
});
svg.addEventListener("pointercancel", endDrag);

function pull(event) {
  const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
  if (!drag.moved && Math.hypot(dx, dy) < 4) return;
  if (!drag.moved) svg.setPointerCapture(event.pointerId);
  drag.moved = true;
  svg.classList.add("dragging");
  moveCamera({x: drag.from.x + dx, y: drag.from.y + dy, own: true});
}

function endDrag() {
  drag = null;
  svg.classList.remove("dragging");
}
