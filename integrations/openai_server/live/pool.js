// The page pool as a map: a cell a page, or several.

const poolCanvas = document.getElementById("pool");
const STATES = ["free", "owned", "shared", "cached"];
let drawnMap = "";

function drawPool(colors) {
  const { context, width, height, changed } = fit(poolCanvas);
  const version = `${state.mapVersion} ${colors.free}`;
  if (!changed && version === drawnMap) return;
  drawnMap = version;
  context.clearRect(0, 0, width, height);
  const count = state.cells.length;
  if (!count) return;
  let size = Math.min(22, Math.floor(Math.sqrt(width * height / count) * 2) / 2);
  while (size > 1 && Math.ceil(count / Math.floor(width / size)) * size > height) size -= 0.25;
  const columns = Math.max(1, Math.floor(width / size)), gap = size >= 10 ? 2 : size >= 4 ? 1 : 0;
  const totals = [0, 0, 0, 0];
  for (let i = 0; i < count; i++) {
    const cell = state.cells[i], kind = cell & 3;
    totals[kind]++;
    const x = (i % columns) * size, y = Math.floor(i / columns) * size;
    context.globalAlpha = 1;
    context.fillStyle = colors.free;
    if (kind) {
      if (cell >> 2 < 3) context.fillRect(x, y, size - gap, size - gap);
      context.globalAlpha = 0.4 + 0.2 * (cell >> 2);
      context.fillStyle = colors[STATES[kind]];
    }
    if (size >= 8) { context.beginPath(); context.roundRect(x, y, size - gap, size - gap, 2); context.fill(); }
    else context.fillRect(x, y, size - gap, size - gap);
  }
  context.globalAlpha = 1;
  showTotals(totals);
}

function showTotals(totals) {
  const exact = state.perCell === 1;
  for (let kind = 0; kind < 4; kind++) {
    document.getElementById(`n-${STATES[kind]}`).textContent = exact ? totals[kind].toLocaleString("en") : "";
  }
  const pages = `${state.numPages.toLocaleString("en")} pages of ${state.pageSize} tokens`;
  document.getElementById("pool-note").textContent = exact ? pages : `${pages}, ${state.perCell} in a cell`;
}
