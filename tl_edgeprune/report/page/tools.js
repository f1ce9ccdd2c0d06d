// ---- what is shown: kinds, circuits, layers, size, names; the theme ----

const NAMES_FOUND = 14;
const SIZE_STEPS = 200;  // of the slider over edges, which is logarithmic

function refresh() {
  applyFilters();
  if (page.mode === "sizes") sortEdges();
  countChips();
  drawDegrees();
  drawJoins();
  showCounts();
  showOverview();
  byId("empty").hidden = state.shown > 0;
  if (state.chosen) showDetail(state.chosen);
  showFocus();
  redraw();
}

let pending = 0;
function refreshSoon() {
  pending ||= requestAnimationFrame(() => { pending = 0; refresh(); });
}

/* A button that is on or off, with the number of edges of this size that pass its test. */
function chip(symbol, label, test, attributes, flip) {
  const total = make("span");
  const made = make("button", {
    class: "chip", type: "button", "aria-pressed": "true", ...attributes,
    click: () => {
      made.setAttribute("aria-pressed", flip());
      refresh();
    },
  }, symbol, label, total);
  chips.push({total, test});
  return made;
}
const chips = [];

function countChips() {
  for (const {total, test} of chips) total.textContent = number(edges.filter(edge => inSize(edge) && test(edge)).length);
}

function flipIn(set, value) {
  if (!set.delete(value)) set.add(value);
  return set.has(value);
}

function buildChips() {
  for (const [kind, label] of Object.entries(page.kinds)) {
    byId("kinds").append(chip(symbol(kind), label, edge => edge.kind === kind, {"data-kind": kind}, () => flipIn(state.kinds, kind)));
  }
  const dead = edges.some(edge => edge.deadIn.length);
  const deadSymbol = make("svg", {class: "mark", width: 16, height: 12, viewBox: "0 -6 16 12", "aria-hidden": "true"},
    make("line", {x1: 0, x2: 16, y1: 0, y2: 0, stroke: "var(--muted)", "stroke-width": 2, "stroke-dasharray": "2 2.6"}));
  if (dead) byId("kinds").append(chip(deadSymbol, "dead", edge => edge.dead, {"data-kind": "dead", title: "Edges on no path from the input to the logits"}, () => (state.dead = !state.dead)));
  if (page.mode !== "overlay") return;
  byId("sides").hidden = false;
  for (const [side, label] of Object.entries(SIDES)) {
    byId("sides").append(chip(sideSymbol(side), label, edge => edge.side === side, {"data-side": side}, () => flipIn(state.sides, side)));
  }
}

// ---- layers ----

function buildLayers() {
  byId("layers").hidden = layerNames.length < 2;
  for (const id of ["layer-from", "layer-to"]) {
    byId(id).append(...layerNames.map(layer => make("option", {value: layer}, String(layer))));
    byId(id).addEventListener("change", () => {
      const chosen = ["layer-from", "layer-to"].map(other => Number(byId(other).value));
      if (chosen[0] > chosen[1]) chosen.fill(Number(byId(id).value));
      chooseLayers(...chosen);
    });
  }
  [byId("layer-from").value, byId("layer-to").value] = state.layers;
}

/* Show only what touches these layers; choosing the same layer again shows all. */
function chooseLayers(from, to) {
  const same = from === to && state.layers[0] === from && state.layers[1] === to;
  state.layers = same ? [layerNames[0], layerNames.at(-1)] : [from, to];
  [byId("layer-from").value, byId("layer-to").value] = state.layers;
  refresh();
}

// ---- size ----

const edgesAt = step => Math.round(edges.length ** (step / SIZE_STEPS));
const stepAt = k => Math.round(SIZE_STEPS * Math.log(Math.max(1, k)) / Math.log(edges.length));

function buildSize() {
  const several = page.mode === "sizes";
  if (!several && !(page.scored && edges.length > 1)) return;
  byId("size").hidden = false;
  byId("size-range").max = several ? circuits.length - 1 : SIZE_STEPS;
  byId("size-field").hidden = several;
  byId("size-field").max = edges.length;
  byId("size-range").setAttribute("aria-label", several ? "Circuit shown" : "Strongest edges shown");
  byId("size-range").addEventListener("input", event => setSize(several ? Number(event.target.value) : edgesAt(Number(event.target.value)), event.target));
  byId("size-field").addEventListener("input", event => setSize(Math.round(Number(event.target.value) || 1), event.target));
  showSize(null);
}

/* Show this many edges, or the circuit at this index; `by`: the input that changed, not updated. */
function setSize(size, by) {
  const several = page.mode === "sizes";
  state.size = clamp(size, several ? 0 : 1, several ? circuits.length - 1 : edges.length);
  showSize(by);
  refreshSoon();
}

function showSize(by) {
  const several = page.mode === "sizes";
  const range = byId("size-range"), field = byId("size-field");
  if (by !== range) range.value = several ? state.size : stepAt(state.size);
  if (by !== field) field.value = state.size;
  const words = several ? `${circuits[state.size].name} (${state.size + 1} of ${circuits.length})` : `strongest of ${number(edges.length)}`;
  byId("size-name").textContent = words;
  range.setAttribute("aria-valuetext", several ? words : `${number(state.size)} ${words}`);
}

/* The next size, or about a quarter more or fewer edges. */
function stepSize(sign) {
  if (byId("size").hidden) return;
  if (page.mode === "sizes") return setSize(state.size + sign, null);
  setSize(sign > 0 ? Math.ceil(state.size * 1.25) : Math.floor(state.size / 1.25), null);
}

// ---- search ----

let found = [], picked = 0;

/* Nodes before edges; names that begin with the text before those that contain it. */
function findNames(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const order = thing => {
    const name = thing.name.toLowerCase();
    return name === wanted ? 0 : name.startsWith(wanted) ? 1 : name.includes(wanted) ? 2 : 3;
  };
  const best = things => things.map(thing => [order(thing), thing]).filter(([place]) => place < 3)
    .sort(([a], [b]) => a - b).slice(0, NAMES_FOUND).map(([, thing]) => thing);
  return [...best(nodes), ...best(edges)].slice(0, NAMES_FOUND);
}

function showMatches() {
  const list = byId("matches"), input = byId("search");
  list.hidden = input.value.trim() === "";
  input.setAttribute("aria-expanded", String(!list.hidden));
  input.setAttribute("aria-activedescendant", found.length ? `match-${picked}` : "");
  list.replaceChildren(...found.map((thing, place) => make("li", {
    id: `match-${place}`, role: "option", "aria-selected": String(place === picked),
    pointerdown: event => { event.preventDefault(); take(thing); },
  }, make("span", {}, thing.name), make("span", {}, isEdge(thing) ? "edge" : NODE_KINDS[thing.kind]))));
  if (!found.length) list.append(make("li", {}, make("span", {class: "label"}, "No such name")));
  list.children[picked]?.scrollIntoView({block: "nearest"});
}

function take(thing) {
  byId("matches").hidden = true;
  byId("search").setAttribute("aria-expanded", "false");
  goTo(thing);
}

function buildSearch() {
  const input = byId("search");
  input.addEventListener("input", () => { found = findNames(input.value); picked = 0; showMatches(); });
  input.addEventListener("blur", () => { byId("matches").hidden = true; });
  input.addEventListener("keydown", event => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      picked = clamp(picked + (event.key === "ArrowDown" ? 1 : -1), 0, Math.max(0, found.length - 1));
      showMatches();
    } else if (event.key === "Enter" && found.length) {
      take(found[picked]);
    }
  });
}

// ---- theme ----

const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark"
  || (getComputedStyle(document.documentElement).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);

function newTheme() {
  readPalette();
  redraw();
}

function flipTheme() {
  document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
  newTheme();
}
