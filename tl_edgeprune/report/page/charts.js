// ---- the training curves ----

const CHART = {width: 290, height: 92, left: 38, right: 4, top: 6, bottom: 18};
const LOG_FROM = 12;  // an axis is logarithmic when its largest value is this many times its smallest

const finite = values => values.filter(value => value !== null);

/* A scale from values to pixels, and the ticks of its axis. */
function scaleOf(values, from, to) {
  const known = finite(values);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const log = low > 0 && high / low >= LOG_FROM;
  const [bottom, top] = log ? [Math.log(low), Math.log(high)] : [Math.min(0, low), high];
  const at = value => from + (to - from) * ((log ? Math.log(value) : value) - bottom) / ((top - bottom) || 1);
  const ticks = log ? [low, Math.sqrt(low * high), high] : [Math.min(0, low), high];
  return {at, ticks, log};
}

const short = value => {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(2))}M`;
  if (size >= 1e4) return `${Math.round(value / 1e3)}k`;
  return size >= 100 ? String(Math.round(value)) : String(Number(value.toPrecision(2)));
};

function path(steps, values, x, y) {
  let text = "", open = false;
  values.forEach((value, i) => {
    if (value !== null) text += `${open ? "L" : "M"}${x.at(steps[i]).toFixed(1)},${y.at(value).toFixed(1)}`;
    open = value !== null;
  });
  return text;
}

/* One chart: lines over the steps, [class, values] each; dots in place of a line that jumps. */
function chart(title, unit, series, dots = false) {
  const {steps} = page.curves;
  const {width, height, left, right, top, bottom} = CHART;
  const x = scaleOf([0, ...steps], left, width - right);
  const y = scaleOf(series.flatMap(([, values]) => values), height - bottom, top);
  const shapes = series.flatMap(([name, values]) => dots
    ? values.map((value, i) => value === null ? "" : make("circle", {class: name, r: 1.6, cx: x.at(steps[i]), cy: y.at(value)}))
    : [make("path", {class: name, d: path(steps, values, {at: step => left + (width - right - left) * step / (steps.at(-1) || 1)}, y)})]);
  const last = steps.at(-1);
  return make("figure", {},
    make("figcaption", {}, make("b", {}, title), unit + (y.log ? ", log scale" : "")),
    make("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} over ${number(last)} steps`},
      ...y.ticks.map(tick => make("line", {class: "axis", x1: left, x2: width - right, y1: y.at(tick), y2: y.at(tick)})),
      ...y.ticks.map(tick => make("text", {x: left - 5, y: y.at(tick) + 4, "text-anchor": "end"}, short(tick))),
      ...shapes.filter(Boolean),
      make("text", {x: left, y: height - 4}, "0"),
      make("text", {x: (left + width) / 2, y: height - 4, "text-anchor": "middle"}, "step"),
      make("text", {x: width - right, y: height - 4, "text-anchor": "end"}, number(last))));
}

function showCurves() {
  const {curves} = page;
  if (!curves) return;
  const edgeSeries = [["kept", curves.edges]];
  if (!curves.jumps && finite(curves.target).length) edgeSeries.push(["budget", curves.target]);
  byId("curves").append(make("h2", {}, "Training"),
    chart("Objective", "running mean", [["faint", curves.loss], ["loss", curves.smooth]]),
    chart("Edges", curves.jumps ? "expected, at each step" : "expected; dashed: budget", edgeSeries, curves.jumps));
}
