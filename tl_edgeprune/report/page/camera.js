// ---- zoom and pan ----

const MAX_ZOOM = 12;
const QUICK = 1500;  // edges: the picture of more follows when the movement rests
const REST = 90;  // milliseconds

const camera = {x: 0, y: 0, scale: 1, own: false};  // own: the user has moved it
let drawn = {x: 0, y: 0, scale: 1};  // the camera of the edges on the canvases
let frame = 0, resting = 0, stale = true;  // stale: the edges have changed since they were drawn

/* Draw in the next frame, once for all that asks for it. */
function drawSoon() {
  if (!frame) frame = requestAnimationFrame(drawFrame);
}

/* Nodes follow the camera at once; so do the edges where they are few, and else their picture is
   shifted and scaled until the movement rests. */
function drawFrame() {
  frame = 0;
  const place = `translate(${camera.x.toFixed(2)},${camera.y.toFixed(2)}) scale(${camera.scale.toFixed(4)})`;
  for (const layer of [view, backLayer]) layer.setAttribute("transform", place);
  clearTimeout(resting);
  if (stale || state.shown <= QUICK) {
    stale = false;
    return drawEdges();
  }
  const ratio = camera.scale / drawn.scale;
  for (const canvas of [edgeCanvas, focusCanvas]) {
    canvas.style.transform = `translate(${camera.x - ratio * drawn.x}px, ${camera.y - ratio * drawn.y}px) scale(${ratio})`;
  }
  resting = setTimeout(drawEdges, REST);
}

function redraw() {
  stale = true;
  drawSoon();
}

function moveCamera(change) {
  Object.assign(camera, change);
  hideTip();
  drawSoon();
}

function fit() {
  const {clientWidth: width, clientHeight: height} = svg;
  const [w, h] = page.drawing.size;
  const scale = Math.max(0.05, Math.min(width / w, height / h, 1.9));
  stale = true;
  moveCamera({scale, x: (width - scale * w) / 2, y: (height - scale * h) / 2, own: false});
}

/* Zoom by a factor about a point of the drawing area, by default its middle. */
function zoom(factor, at) {
  const [x, y] = at ?? [svg.clientWidth / 2, svg.clientHeight / 2];
  const scale = clamp(camera.scale * factor, 0.05, MAX_ZOOM);
  const ratio = scale / camera.scale;
  moveCamera({scale, x: x - ratio * (x - camera.x), y: y - ratio * (y - camera.y), own: true});
}

function bringIntoView([x, y]) {
  const [across, down] = [x * camera.scale + camera.x, y * camera.scale + camera.y];
  const {clientWidth: width, clientHeight: height} = svg;
  if (across > 0 && down > 0 && across < width && down < height) return;
  moveCamera({x: camera.x + width / 2 - across, y: camera.y + height / 2 - down, own: true});
}

/* Where a pointer is: in the drawing area, and in the drawing. */
function placeOf(event) {
  const box = svg.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  return {x, y, at: [(x - camera.x) / camera.scale, (y - camera.y) / camera.scale]};
}

svg.addEventListener("wheel", event => {
  event.preventDefault();
  const {x, y} = placeOf(event);
  const lines = event.deltaMode === 1 ? 16 : 1;
  zoom(Math.exp(-0.0016 * clamp(event.deltaY * lines, -240, 240)), [x, y]);
}, {passive: false});
