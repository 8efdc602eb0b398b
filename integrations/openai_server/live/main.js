// Colours, and the loop that draws.

const root = document.documentElement, prefersDark = matchMedia("(prefers-color-scheme: dark)");
let colors = {};

function applyTheme() {
  root.dataset.theme = localStorage.getItem("hf_paged_theme") ?? (prefersDark.matches ? "dark" : "light");
  const style = getComputedStyle(root);
  for (const name of ["queued", "prefill", "decode", "accepted", "preempted", "owned", "shared", "cached", "free", "ink", "muted", "line"]) {
    colors[name] = style.getPropertyValue(`--${name}`).trim();
  }
  colors.onDecode = style.getPropertyValue("--accent-ink").trim();
}

prefersDark.addEventListener("change", applyTheme);
document.getElementById("theme").addEventListener("click", () => {
  localStorage.setItem("hf_paged_theme", root.dataset.theme === "dark" ? "light" : "dark");
  applyTheme();
});

let frames = 0, lastDraw = -1e9;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

function draw(at) {
  requestAnimationFrame(draw);
  if (at - lastDraw < (calm.matches ? 500 : 0)) return;
  lastDraw = at;
  drawTimeline(colors);
  if (frames++ % 6) return; // the rest changes five times a second
  drawPool(colors);
  drawSparks(colors);
  drawHistogram("ttft", state.ttft, colors.prefill, colors);
  drawHistogram("itl", state.itl, colors.decode, colors);
}

applyTheme();
requestAnimationFrame(draw);
follow();
