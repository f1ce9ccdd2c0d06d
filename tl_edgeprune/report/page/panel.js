// ---- the panel beside the drawing: the whole circuit, or the selected node or edge ----

const MOST_CONNECTED = 12;
const NODE_KINDS = {input: "input", head: "attention head", kv: "key and value of a group of heads", mlp: "MLP", logits: "logits"};

const row = (...cells) => make("tr", {}, ...cells.map(cell => make("td", {}, cell)));
const headings = (...names) => make("tr", {}, ...names.map(name => make("th", {scope: "col"}, name)));
const nodeLink = node => make("button", {class: "name", type: "button", click: () => goTo(node)}, node.name);

function symbol(kind) {
  return make("svg", {class: "mark", width: 12, height: 12, viewBox: "-6 -6 12 12", "aria-hidden": "true"}, mark(kind));
}

function sideSymbol(side) {
  const dash = (DASHES[side] ?? []).join(" ");
  return make("svg", {class: "mark", width: 18, height: 12, viewBox: "0 -6 18 12", "aria-hidden": "true"},
    make("line", {x1: 0, x2: 18, y1: 0, y2: 0, stroke: `var(--${side})`, "stroke-width": 3, ...(dash ? {"stroke-dasharray": dash} : {})}));
}

const edgeSymbol = edge => page.mode === "overlay" ? sideSymbol(edge.side) : symbol(edge.kind);

function goTo(thing) {
  bringIntoView(isEdge(thing) ? pointsOf(thing).slice(SAMPLES, SAMPLES + 2) : thing.at);
  choose(thing);
}

// ---- the whole circuit ----

function showCounts() {
  const parts = [];
  if (page.mode === "one") parts.push(`${count(edges.length, "edge")} of ${number(page.graph_edges)}`);
  if (page.mode === "overlay") parts.push(...circuits.map(each => `${each.name}: ${count(each.n_edges, "edge")}`));
  if (page.mode === "sizes") parts.push(`${count(circuits[state.size].n_edges, "edge")} of ${number(page.graph_edges)}`);
  parts.push(`${count(nodes.filter(node => node.total).length, "node")}`);
  const dead = page.mode === "sizes" ? circuits[state.size].n_dead : edges.filter(edge => edge.dead).length;
  if (dead) parts.push(`${number(dead)} dead`);
  const all = page.mode === "sizes" ? circuits[state.size].n_edges : edges.length;
  if (state.shown < all) parts.push(`${number(state.shown)} shown`);
  byId("counts").textContent = parts.join(" · ");
}

function showOverview() {
  showMeasures();
  const kinds = Object.entries(page.kinds).map(([kind, label]) => {
    const all = edges.filter(edge => edge.kind === kind && (page.mode !== "sizes" || inSize(edge)));
    const numbers = [all.filter(edge => edge.shown), all.filter(edge => edge.dead), all].map(list => number(list.length));
    return row(make("span", {class: "with-mark"}, symbol(kind), label), ...numbers);
  });
  byId("by-kind").replaceChildren(make("h2", {}, "Edges by what they enter"),
    make("table", {}, headings("", "shown", "dead", "all"), ...kinds));
  const top = nodes.filter(node => node.total).sort((a, b) => b.total - a.total).slice(0, MOST_CONNECTED);
  byId("by-degree").replaceChildren(make("h2", {}, "Most connected"),
    make("table", {}, headings("node", "in", "out"), ...top.map(node => row(nodeLink(node), number(node.nIn), number(node.nOut)))));
}

/* The measures of the circuit; for two circuits, a column each, and their overlap. */
function showMeasures() {
  const section = byId("measures");
  const chosen = page.mode === "sizes" ? [circuits[state.size]] : circuits;
  const names = [...new Set(chosen.flatMap(each => Object.keys(each.measures)))];
  if (page.mode === "overlay") {
    const shared = edges.filter(edge => edge.side === "shared").length;
    const body = [row("edges", ...circuits.map(each => number(each.n_edges))), row("dead", ...circuits.map(each => number(each.n_dead)))];
    body.push(...names.map(name => row(name, ...circuits.map(each => each.measures[name] ?? ""))));
    section.replaceChildren(make("h2", {}, "Two circuits"),
      make("table", {}, headings("", ...circuits.map(each => each.name)), ...body),
      factList([["edges in both", number(shared)], ["edges in either", number(edges.length)],
        ["in both / in either", `${(100 * shared / Math.max(1, edges.length)).toFixed(1)} %`]]));
    return;
  }
  const [only] = chosen;
  section.replaceChildren(...(names.length ? [make("h2", {}, page.mode === "sizes" || state.size < edges.length ? `Measures of all ${count(only.n_edges, "edge")}` : "Measures"),
    factList(Object.entries(only.measures))] : []));
}

function showSettings() {
  const entries = Object.entries(page.settings);
  if (entries.length) byId("settings").append(make("details", {}, make("summary", {}, "Settings"), factList(entries)));
}

// ---- a node or an edge ----

let rows = new Map();  // edge -> its row in the panel

function showDetail(thing) {
  const detail = byId("detail");
  rows = new Map();
  detail.hidden = thing === null;
  byId("status").textContent = thing === null ? "Nothing selected" : isEdge(thing) ? `Edge ${thing.name}` : thing.mark.getAttribute("aria-label");
  if (thing === null) return detail.replaceChildren();
  detail.replaceChildren(...(isEdge(thing) ? edgeDetail(thing) : nodeDetail(thing)));
  byId("detail").closest("aside").scrollTop = 0;
}

function detailHead(name, words) {
  return make("header", {}, make("div", {}, make("h2", {}, name), make("p", {}, words)),
    make("button", {type: "button", "aria-label": "Close", click: () => choose(null)}, "✕"));
}

function edgeDetail(edge) {
  return [
    detailHead(edge.name, "edge"),
    make("section", {}, factList(edgeFacts(edge))),
    make("section", {}, make("table", {}, row("from", nodeLink(edge.from)), row("to", nodeLink(edge.to)))),
  ];
}

function nodeDetail(node) {
  const where = [node.layer >= 0 ? `layer ${node.layer}` : "", node.span === null ? "" : `at ${node.span}`];
  const words = [NODE_KINDS[node.kind], ...where].filter(Boolean).join(", ");
  const kin = [...node.kin];
  const parts = [detailHead(node.name, words)];
  if (kin.length) parts.push(make("section", {}, make("h2", {}, node.span === null && node.kind === "kv" ? "Shared by" : node.span === null ? "Shares keys and values with" : "Same attention in other spans"),
    make("table", {}, ...kin.map(other => row(nodeLink(other))))));
  parts.push(edgeTable("Flows in", node.reads, edge => edge.from), edgeTable("Flows out", node.writes, edge => edge.to));
  return parts;
}

/* The edges on one side of a node, strongest first; filtered edges are faint. */
function edgeTable(heading, list, other) {
  const sorted = [...list].sort((a, b) => b.shown - a.shown || a.rank - b.rank);
  const body = sorted.map(edge => {
    const made = row(make("span", {class: "with-mark"}, edgeSymbol(edge), nodeLink(other(edge))),
      page.kinds[edge.kind] + (edge.dead ? ", dead" : ""), edge.score === null ? "" : figure(edge.score), edgeButton(edge));
    if (!edge.shown) made.classList.add("off");
    made.addEventListener("pointerenter", () => point(edge));
    made.addEventListener("pointerleave", () => point(null));
    made.addEventListener("focusin", () => point(edge));
    made.addEventListener("focusout", () => point(null));
    rows.set(edge, made);
    return made;
  });
  const table = list.length ? make("table", {}, headings("", "enters", page.scored ? "score" : "", ""), ...body) : make("p", {class: "label"}, "nothing");
  return make("section", {}, make("h2", {}, `${heading} (${number(list.length)})`), table);
}

const edgeButton = edge => make("button", {class: "name", type: "button", "aria-label": `Edge ${edge.name}`, click: () => choose(edge)}, "›");

function lightRows(edge) {
  for (const [other, made] of rows) made.classList.toggle("lit", other === edge);
}
