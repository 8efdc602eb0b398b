// What the page knows: lanes with their phases, counts over time, the page map.

const QUEUED = 0, PREFILL = 1, DECODE = 2, PREEMPTED = 3;
const KEPT_MS = 95000; // a little more than the longest window
const RATE_MS = 2000; // what tokens per second are averaged over

const state = {
  about: {}, numPages: 1, pageSize: 0, maxNumSeqs: 1,
  lanes: new Map(), rows: [], topRow: 0,
  ticks: [], // one per message: {t, ms, steps, tokens, prefix, running, waiting, used}
  drafted: false, // whether anything ever was
  ttft: [], itl: [], // [t, {bucket: count}]
  cells: new Uint8Array(0), perCell: 1, mapVersion: 0,
  running: 0, waiting: 0, active: 0, cached: 0, paused: false,
  clock: null, // server's milliseconds less ours
};

// The server's time, a little in the past: where everything that happened is known already.
function now() {
  return state.clock === null ? 0 : performance.now() + state.clock - 300;
}

function take(message) {
  const offset = message.t - performance.now();
  if (message.about) {
    Object.assign(state, { about: message.about, numPages: message.num_pages, pageSize: message.page_size,
      maxNumSeqs: message.max_num_seqs, lanes: new Map(), rows: [], ticks: [], ttft: [], itl: [], clock: offset });
  }
  // The message that was fastest on its way tells the clock best; it may drift by a millisecond a message.
  state.clock = Math.max(state.clock - 1, offset);
  for (const [number, request, sample, adapter] of message.lanes) {
    state.lanes.set(number, { number, request, sample, adapter, phases: [], row: -1, shownFrom: 0, ended: null, reason: null });
  }
  for (const [number, kind, start, end, tokens, accepted] of message.phases) {
    const lane = state.lanes.get(number);
    if (lane) addPhase(lane, { kind, start, end, tokens, accepted });
  }
  for (const [number, reason] of message.ends ?? []) {
    const lane = state.lanes.get(number);
    if (lane) { lane.ended = message.t; lane.reason = reason; }
  }
  for (const name of ["running", "waiting", "active", "cached", "paused"]) state[name] = message[name];
  if (message.pages) takePages(message);
  if (message.tokens) {
    const before = state.ticks.at(-1);
    state.ticks.push({ t: message.t, ms: before ? message.t - before.t : 200, steps: message.steps, tokens: message.tokens,
      prefix: message.prefix, running: message.running, waiting: message.waiting, used: message.active / state.numPages });
    state.drafted ||= message.tokens[2] > 0;
    if (Object.keys(message.ttft).length) state.ttft.push([message.t, message.ttft]);
    if (Object.keys(message.itl).length) state.itl.push([message.t, message.itl]);
  }
  forget(message.t - KEPT_MS);
}

function addPhase(lane, phase) {
  const last = lane.phases.at(-1);
  if (last && last.kind === phase.kind && last.start === phase.start) lane.phases[lane.phases.length - 1] = phase;
  else {
    if (last && last.end > phase.start) last.end = phase.start;
    lane.phases.push(phase);
  }
}

function takePages(message) {
  let size = 0;
  for (let i = 1; i < message.pages.length; i += 2) size += message.pages[i];
  const cells = new Uint8Array(size);
  for (let i = 0, at = 0; i < message.pages.length; at += message.pages[i + 1], i += 2) {
    cells.fill(message.pages[i], at, at + message.pages[i + 1]);
  }
  Object.assign(state, { cells, perCell: message.per_cell, mapVersion: state.mapVersion + 1 });
}

function forget(before) {
  for (const list of [state.ttft, state.itl]) while (list.length && list[0][0] < before) list.shift();
  while (state.ticks.length && state.ticks[0].t < before) state.ticks.shift();
  for (const [number, lane] of state.lanes) {
    while (lane.phases.length > 1 && lane.phases[1].start < before) lane.phases.shift();
    if (lane.ended !== null && lane.ended < before) state.lanes.delete(number);
  }
}

// Rows of the timeline: a lane keeps its row while it lives, and soon after somebody else may have it.
function placeLanes(at) {
  const most = Math.min(512, Math.max(48, Math.ceil(state.maxNumSeqs * 1.25)));
  let first = 0;
  for (const lane of state.lanes.values()) {
    if (lane.row >= 0 || lane.ended !== null && lane.ended < at) continue;
    const queued = lane.phases.length < 2 && lane.phases[0]?.kind === QUEUED;
    const room = queued ? Math.min(most, 48) : most; // those that wait leave room to those that run
    while (first < room && state.rows[first] && !(state.rows[first].ended !== null && state.rows[first].ended < at - 400)) first++;
    if (first >= room) { if (!queued) break; continue; }
    lane.row = first;
    lane.shownFrom = state.rows[first] ? state.rows[first].ended + 100 : 0;
    state.rows[first] = lane;
  }
}

// Sums of the last messages, per second.
function rates() {
  const last = state.ticks.at(-1);
  let ms = 0, prefilled = 0, generated = 0;
  for (let i = state.ticks.length - 1; last && i >= 0 && last.t - state.ticks[i].t < RATE_MS; i--) {
    ms += state.ticks[i].ms; prefilled += state.ticks[i].tokens[0]; generated += state.ticks[i].tokens[1];
  }
  return ms ? { prefilled: prefilled * 1000 / ms, generated: generated * 1000 / ms } : { prefilled: 0, generated: 0 };
}

function sums(windowMs) {
  const from = (state.ticks.at(-1)?.t ?? 0) - windowMs, total = { queries: 0, hits: 0, drafted: 0, accepted: 0 };
  for (const tick of state.ticks) {
    if (tick.t < from) continue;
    total.queries += tick.prefix[0]; total.hits += tick.prefix[1];
    total.drafted += tick.tokens[2]; total.accepted += tick.tokens[3];
  }
  return total;
}
