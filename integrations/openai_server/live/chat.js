// A chat with the model. What it says is text, never markup.

const messages = document.getElementById("messages"), text = document.getElementById("text"), send = document.getElementById("send");
let history = [], answering = null;

function show(kind, content) {
  messages.querySelector(".hint")?.remove();
  const element = document.createElement("div");
  element.className = `message ${kind}`;
  element.textContent = content;
  messages.append(element);
  messages.scrollTop = messages.scrollHeight;
  return element;
}

async function ask(question) {
  history.push({ role: "user", content: question });
  show("user", question);
  answering = new AbortController();
  send.textContent = "Stop";
  const element = show("assistant", ""), thought = document.createElement("span"), said = document.createElement("span"), meta = document.createElement("span");
  thought.className = "thought"; meta.className = "meta";
  element.append(thought, said, meta);
  const told = { thought, said, meta, start: performance.now(), first: 0, tokens: 0 };
  try {
    await streamAnswer(told, answering.signal);
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  if (said.textContent) history.push({ role: "assistant", content: said.textContent });
  else if (!thought.textContent) { element.remove(); history.pop(); }
  answering = null;
  send.textContent = "Send";
}

async function streamAnswer(told, signal) {
  const temperature = Number(document.getElementById("temperature").value);
  const body = { messages: history, stream: true, temperature, max_tokens: Number(document.getElementById("tokens").value) || 256,
    stream_options: { include_usage: true, continuous_usage_stats: true } };
  const options = { method: "POST", body: JSON.stringify(body), signal };
  let response = await fetch("v1/chat/completions", { ...options, headers: headers({ "Content-Type": "application/json" }) });
  while (response.status === 401) {
    await askForKey(true);
    response = await fetch("v1/chat/completions", { ...options, headers: headers({ "Content-Type": "application/json" }) });
  }
  if (!response.ok) throw new Error((await response.json().catch(() => null))?.error?.message ?? `HTTP ${response.status}`);
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") break;
    const piece = JSON.parse(data);
    if (piece.error) throw new Error(piece.error.message);
    told.tokens = piece.usage?.completion_tokens ?? told.tokens;
    const delta = piece.choices[0]?.delta;
    if (!delta) continue;
    const low = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 40;
    if ((delta.content || delta.reasoning) && !told.first) told.first = performance.now();
    if (delta.reasoning) told.thought.textContent += delta.reasoning;
    if (delta.content) told.said.textContent += delta.content;
    if (told.first) {
      const seconds = (performance.now() - told.first) / 1000, rate = seconds > 0.2 ? `, ${short((told.tokens - 1) / seconds)} a second` : "";
      told.meta.textContent = `${told.tokens} tokens${rate}, first after ${duration(told.first - told.start)}`;
    }
    if (low) messages.scrollTop = messages.scrollHeight;
  }
}

document.getElementById("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering) { answering.abort(); return; }
  const question = text.value.trim();
  if (!question) return;
  text.value = "";
  text.style.height = "";
  ask(question);
});
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!answering) document.getElementById("ask").requestSubmit();
});
text.addEventListener("input", () => { text.style.height = ""; text.style.height = `${Math.min(text.scrollHeight + 2, 160)}px`; });
document.getElementById("clear").addEventListener("click", () => { answering?.abort(); history = []; messages.replaceChildren(); text.focus(); });
