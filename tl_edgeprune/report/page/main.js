// ---- the keyboard, and the start ----

const ARROWS = {ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0]};
const KEYS = [
  ["Tab", "to the drawing, then to the tools"], ["← ↑ ↓ →", "from node to node"], ["Enter", "select the node: its edges in and out"],
  ["/", "find a name"], ["+ −", "larger or smaller circuit (or view, with one size)"], ["[ ]", "zoom out or in"], ["0", "fit"],
  ["d", "light or dark theme"], ["Esc", "whole circuit"],
];

/* The nearest node in a direction; distance across it counts threefold. */
function neighbour(node, [dx, dy]) {
  let best = null, least = Infinity;
  for (const other of nodes) {
    const [x, y] = [other.at[0] - node.at[0], other.at[1] - node.at[1]];
    const ahead = x * dx + y * dy;
    const cost = ahead + 3 * Math.abs(x * dy - y * dx);
    if (ahead > 1 && cost < least) [best, least] = [other, cost];
  }
  return best;
}

function stepTo(node) {
  nodeLayer.querySelector("[tabindex='0']")?.setAttribute("tabindex", -1);
  node.mark.setAttribute("tabindex", 0);
  node.mark.focus({preventScroll: true});
  bringIntoView(node.at);
}

svg.addEventListener("keydown", event => {
  const node = nodeAt(event);
  if (!node) return;
  if (event.key in ARROWS) {
    const next = neighbour(node, ARROWS[event.key]);
    if (next) stepTo(next);
  } else if (event.key === "Enter" || event.key === " ") {
    choose(node === state.chosen ? null : node);
  } else return;
  event.preventDefault();
});
svg.addEventListener("focusin", event => { if (event.target.matches(":focus-visible")) point(nodeAt(event)); });
svg.addEventListener("focusout", () => point(null));

function clear() {
  byId("search").value = "";
  byId("matches").hidden = true;
  choose(null);
}

const grow = sign => byId("size").hidden ? zoom(sign > 0 ? 1.3 : 1 / 1.3) : stepSize(sign);
const ACTIONS = {
  "/": () => byId("search").focus(), "+": () => grow(1), "=": () => grow(1), "-": () => grow(-1),
  "]": () => zoom(1.3), "[": () => zoom(1 / 1.3), "0": fit, d: flipTheme, "?": () => byId("keys").showModal(),
};

document.addEventListener("keydown", event => {
  if (byId("keys").open) return;
  if (event.key === "Escape") return clear();
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey || !(event.key in ACTIONS)) return;
  event.preventDefault();
  ACTIONS[event.key]();
});

function start() {
  applyFilters();
  sortEdges();
  readPalette();
  drawBack();
  nodeLayer.append(...nodes.map(drawNode));
  byId("back").append(backLayer);
  svg.append(view);
  buildChips();
  buildLayers();
  buildSearch();
  showSettings();
  showCurves();
  byId("keys").querySelector("dl").append(...KEYS.flatMap(([key, words]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, words)]));
  for (const [id, action] of Object.entries({
    "zoom-in": () => zoom(1.3), "zoom-out": () => zoom(1 / 1.3), fit, save: saveSvg, theme: flipTheme, help: () => byId("keys").showModal(),
  })) byId(id).addEventListener("click", action);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", newTheme);
  buildSize();
  refresh();
  fit();
  setTimeout(buildGrid, 200);  // before the pointer needs it
  let seen = `${svg.clientWidth} ${svg.clientHeight}`;
  new ResizeObserver(() => {
    const size = `${svg.clientWidth} ${svg.clientHeight}`;
    if (size === seen) return;
    seen = size;
    if (camera.own) redraw(); else fit();
  }).observe(svg);
  document.documentElement.dataset.ready = "true";
}

start();
