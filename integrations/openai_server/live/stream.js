// Server-sent events by fetch, which can send a key where an EventSource cannot.

const keyDialog = document.getElementById("key-dialog");

function headers(more = {}) {
  const key = sessionStorage.getItem("hf_paged_key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

// Resolves when somebody has given a key.
function askForKey(wrong) {
  document.getElementById("key-why").textContent = wrong ? "That key is not one of the server's." : "It is kept in this tab only.";
  if (!keyDialog.open) keyDialog.showModal();
  return new Promise((done) => keyDialog.addEventListener("close", done, { once: true }));
}

document.getElementById("key-form").addEventListener("submit", () => {
  sessionStorage.setItem("hf_paged_key", document.getElementById("key").value.trim());
  document.getElementById("key").value = "";
});
keyDialog.addEventListener("cancel", (event) => event.preventDefault());

// The data of each event of an answer, as text.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield data;
    }
  }
}

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

let following = null;

// Follows the engine for as long as the page is looked at.
async function follow() {
  let pause = 500, asked = false;
  for (;;) {
    while (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
    following = new AbortController();
    try {
      const response = await fetch("live/events", { headers: headers(), signal: following.signal, cache: "no-store" });
      if (response.status === 401) {
        showStatus("wait", "needs a key");
        await askForKey(asked);
        asked = true;
        continue;
      }
      if (!response.ok) throw new Error(`HTTP ${response.status}`);
      asked = false;
      for await (const data of eventsOf(response)) {
        take(JSON.parse(data));
        showNumbers();
        pause = 500;
      }
    } catch (error) {
      if (error instanceof SyntaxError || error instanceof TypeError && !String(error).includes("fetch")) console.error(error);
    }
    showStatus("down", "reconnecting");
    await wait(pause);
    pause = Math.min(pause * 2, 8000);
  }
}

// A page that nobody has looked at for a while lets go of the engine.
let leaving = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(leaving);
  if (document.hidden) leaving = setTimeout(() => following?.abort(), 20000);
});
