// Sequences as lanes that move with time; now is at the right.

const timelineCanvas = document.getElementById("timeline");
const tip = document.getElementById("tip");
const AXIS = 18, COLORS = ["queued", "prefill", "decode", "preempted"];
let windowMs = 30000, rowHeight = 20, pointer = null;

function endOf(lane, phase, at) {
  const open = lane.ended === null && phase === lane.phases.at(-1) && (phase.kind === QUEUED || phase.kind === PREEMPTED);
  return open ? at : phase.end;
}

function drawTimeline(colors) {
  const { context, width, height } = fit(timelineCanvas), at = now();
  placeLanes(at);
  const from = at - windowMs, scale = width / windowMs, room = height - AXIS;
  let rows = 10;
  for (const lane of state.lanes.values()) if (lane.row >= rows && (lane.ended === null || lane.ended > from)) rows = lane.row + 1;
  const wanted = Math.min(20, room / rows);
  rowHeight += Math.abs(wanted - rowHeight) < 0.05 ? wanted - rowHeight : (wanted - rowHeight) * 0.15;
  const bar = Math.max(rowHeight - (rowHeight > 5 ? 2 : rowHeight > 2.5 ? 0.6 : 0), 0.6);

  drawAxis(context, colors, from, at, scale, width, room);
  context.save();
  context.beginPath(); context.rect(0, 0, width, room); context.clip();
  context.textBaseline = "middle";
  context.font = `${Math.min(11, bar - 3)}px system-ui, "DejaVu Sans", sans-serif`;
  let hovered = null, shown = 0;
  for (const lane of state.lanes.values()) {
    if (lane.row < 0) continue;
    const y = lane.row * rowHeight;
    for (const phase of lane.phases) {
      const start = Math.max(phase.start, lane.shownFrom), end = Math.min(endOf(lane, phase, at), at);
      if (end < from || end <= start) continue;
      const x = (start - from) * scale, w = Math.max((end - start) * scale, 0.75);
      drawPhase(context, colors, phase, x, y, w, bar);
      shown++;
      if (pointer && pointer.x >= x && pointer.x <= x + w && pointer.y >= y && pointer.y < y + rowHeight) hovered = { lane, phase, end };
    }
    if (lane.reason === "error" || lane.reason === "abort") {
      context.fillStyle = colors.preempted;
      context.fillRect((lane.phases.at(-1).end - from) * scale, y, 2, bar);
    }
  }
  context.restore();
  document.getElementById("idle").hidden = shown > 0 || state.clock === null;
  showTip(hovered, width);
}

function drawPhase(context, colors, phase, x, y, w, bar) {
  context.fillStyle = colors[COLORS[phase.kind]];
  context.beginPath();
  context.roundRect(x, y, w, bar, Math.min(3, w / 2, bar / 2));
  context.fill();
  if (phase.accepted) { // its share of the tokens is its share of the bar's height
    const part = bar * phase.accepted / Math.max(phase.tokens, 1);
    context.fillStyle = colors.accepted;
    context.fillRect(x, y + bar - part, w, part);
  }
  if (bar < 12 || w < 56 || !phase.tokens) return;
  const left = Math.max(x, 0);
  const text = phase.kind === PREFILL ? `prompt ${phase.tokens}` : `${phase.tokens} tokens`;
  if (x + w - left < context.measureText(text).width + 12) return;
  context.fillStyle = phase.kind === PREFILL ? "#241800" : colors.onDecode;
  context.fillText(text, left + 6, y + bar / 2 + 0.5);
}

function drawAxis(context, colors, from, at, scale, width, room) {
  const step = windowMs <= 10000 ? 1000 : windowMs <= 30000 ? 5000 : 15000;
  context.font = '11px system-ui, "DejaVu Sans", sans-serif';
  context.textBaseline = "alphabetic";
  context.textAlign = "center";
  for (let ago = 0; ago < windowMs; ago += step) {
    const x = Math.round(width - ago * scale) - 0.5;
    context.fillStyle = colors.line;
    context.fillRect(x, 0, 1, room);
    context.fillStyle = colors.muted;
    if (ago) context.fillText(`−${ago / 1000} s`, x, room + 14);
  }
  context.textAlign = "right";
  context.fillText("now", width, room + 14);
  context.textAlign = "left";
}

function showTip(found, width) {
  tip.hidden = !found;
  if (!found) return;
  const { lane, phase, end } = found, seconds = (end - phase.start) / 1000;
  const lines = [`${lane.request}${lane.sample ? ` #${lane.sample}` : ""}`];
  lines.push(`${COLORS[phase.kind]}: ${seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`}${phase.tokens ? `, ${phase.tokens} tokens` : ""}`);
  if (phase.accepted) lines.push(`${phase.accepted} of them drafted`);
  if (lane.adapter) lines.push(`adapter ${lane.adapter}`);
  if (lane.reason) lines.push(`ended by ${lane.reason}`);
  tip.textContent = lines.join("\n");
  tip.style.left = `${Math.max(0, Math.min(pointer.x + 12, width - tip.offsetWidth))}px`;
  tip.style.top = `${pointer.y + 16}px`;
}

timelineCanvas.addEventListener("pointermove", (event) => { pointer = { x: event.offsetX, y: event.offsetY }; });
timelineCanvas.addEventListener("pointerleave", () => { pointer = null; });
for (const button of document.querySelectorAll("[data-window]")) {
  button.addEventListener("click", () => {
    windowMs = 1000 * Number(button.dataset.window);
    for (const one of document.querySelectorAll("[data-window]")) one.setAttribute("aria-pressed", String(one === button));
  });
}
