// Numbers, sparklines and histograms.

const HISTOGRAM_MS = 60000;

function showStatus(kind, text) {
  const status = document.getElementById("status");
  status.dataset.state = kind;
  if (status.textContent !== text) status.textContent = text;
}

function put(id, text) {
  const element = document.getElementById(id);
  if (element.textContent !== text) element.textContent = text;
}

const short = (x) => x >= 100000 ? `${(x / 1000).toFixed(0)}k` : x >= 10 || Number.isInteger(x) ? Math.round(x).toLocaleString("en") : x.toFixed(1);
const duration = (ms) => ms >= 1000 ? `${+(ms / 1000).toPrecision(2)} s` : `${+ms.toPrecision(2)} ms`;

function showNumbers() {
  const { prefilled, generated } = rates(), total = sums(HISTOGRAM_MS);
  showStatus(state.paused ? "wait" : "live", state.paused ? "paused" : "live");
  put("model", state.about.model ?? "");
  document.title = `${state.about.model ?? ""} · hf_paged`;
  put("out", short(generated));
  put("in", short(prefilled));
  put("running", short(state.running));
  put("waiting", short(state.waiting));
  const used = 100 * state.active / state.numPages;
  put("used", used >= 10 || used === 0 ? used.toFixed(0) : used.toFixed(1));
  put("used-pages", state.cached ? `and ${(100 * state.cached / state.numPages).toFixed(0)} % cached` : "");
  put("hits", total.queries ? (100 * total.hits / total.queries).toFixed(0) : "–");
  put("hits-unit", total.queries ? "% of prompt tokens" : "");
  document.getElementById("hits-bar").style.transform = `scaleX(${total.queries ? total.hits / total.queries : 0})`;
  document.getElementById("accepted").hidden = !state.drafted;
  if (total.drafted) {
    document.getElementById("drafts-tile").hidden = false;
    put("drafts", (100 * total.accepted / total.drafted).toFixed(0));
    document.getElementById("drafts-bar").style.transform = `scaleX(${total.accepted / total.drafted})`;
  }
}

// A canvas as large as its box, in CSS pixels.
function fit(canvas) {
  const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  const context = canvas.getContext("2d");
  const changed = canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio);
  if (changed) { canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio); }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  if (canvas.id !== "pool") context.clearRect(0, 0, width, height);
  return { context, width, height, changed };
}

function drawSpark(id, color, valueOf, least) {
  const { context, width, height } = fit(document.getElementById(id)), at = now() + 300, points = [];
  let most = least;
  for (const tick of state.ticks) {
    if (tick.t < at - 62000) continue;
    const value = valueOf(tick);
    most = Math.max(most, value);
    points.push([width - (at - tick.t) / 60000 * width, value]);
  }
  if (points.length < 2) return;
  const y = (value) => height - 1 - value / most * (height - 4);
  context.beginPath();
  context.moveTo(points[0][0], height);
  for (const [x, value] of points) context.lineTo(x, y(value));
  context.lineTo(points.at(-1)[0], height);
  context.fillStyle = color;
  context.globalAlpha = 0.16;
  context.fill();
  context.globalAlpha = 0.9;
  context.strokeStyle = color;
  context.lineWidth = 1.25;
  context.beginPath();
  for (const [x, value] of points) context.lineTo(x, y(value));
  context.stroke();
  context.globalAlpha = 1;
}

function drawSparks(colors) {
  const perSecond = (which) => (tick) => tick.tokens[which] * 1000 / Math.max(tick.ms, 1);
  drawSpark("spark-out", colors.decode, perSecond(1), 1);
  drawSpark("spark-in", colors.prefill, perSecond(0), 1);
  drawSpark("spark-running", colors.shared, (tick) => tick.running, 4);
  drawSpark("spark-used", colors.owned, (tick) => tick.used, 1);
}

const boundMs = (place) => 0.1 * 10 ** (place / 10); // where a bucket begins

function drawHistogram(id, list, color, colors) {
  const { context, width, height } = fit(document.getElementById(id)), counts = new Array(70).fill(0);
  const from = now() - HISTOGRAM_MS;
  let total = 0;
  for (const [t, found] of list) {
    if (t < from) continue;
    for (const [place, count] of Object.entries(found)) { counts[place] += count; total += count; }
  }
  put(`${id}-note`, total ? `${total.toLocaleString("en")} in the last minute` : "");
  context.font = '11px system-ui, "DejaVu Sans", sans-serif';
  context.textAlign = "center";
  if (!total) {
    context.fillStyle = colors.muted;
    context.fillText("none in the last minute", width / 2, height / 2);
    return;
  }
  let low = counts.findIndex(Boolean), high = counts.findLastIndex(Boolean) + 1;
  while (high - low < 14) { low = Math.max(0, low - 1); high = Math.min(70, high + 1); }
  const room = height - 36, wide = width / (high - low), most = Math.max(...counts);
  const x = (place) => (place - low) * wide;
  for (let place = low; place < high; place++) {
    const tall = counts[place] ? Math.max(2, counts[place] / most * room) : 0;
    context.fillStyle = color;
    context.beginPath();
    context.roundRect(x(place) + 0.5, 18 + room - tall, Math.max(wide - 1.5, 1), tall, [2, 2, 0, 0]);
    context.fill();
  }
  context.fillStyle = colors.line;
  context.fillRect(0, 18 + room, width, 1);
  context.fillStyle = colors.muted;
  for (let place = Math.ceil(low / 5) * 5; place < high; place += 5) {
    const label = duration(+boundMs(place).toPrecision(1)), half = context.measureText(label).width / 2;
    if (x(place) - half > 0 && x(place) + half < width && (wide * 5 > 60 || place % 10 === 0)) context.fillText(label, x(place), height - 4);
  }
  drawQuantiles(context, counts, total, x, room, width, colors);
}

function drawQuantiles(context, counts, total, x, room, width, colors) {
  let right = -1;
  for (const [name, share] of [["p50", 0.5], ["p95", 0.95]]) {
    let place = 0, below = 0;
    while (below + counts[place] < share * total) below += counts[place++];
    const at = place + (share * total - below) / counts[place], line = Math.min(x(at), width - 1);
    context.fillStyle = colors.ink;
    context.globalAlpha = 0.55;
    context.fillRect(line, 14, 1, room + 4);
    context.globalAlpha = 1;
    const label = `${name} ${duration(boundMs(at))}`, half = context.measureText(label).width / 2;
    const middle = Math.max(Math.min(Math.max(line, half), width - half), right < 0 ? 0 : right + half + 8);
    if (middle + half <= width + 1) context.fillText(label, middle, 10);
    right = middle + half;
  }
}
