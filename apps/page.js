// The page's side of the wire (docs/play.md): keys out at once, pictures in a little before they are
// due. Each is painted in the screen's frame that is nearest to that; one overtaken there is dropped.
// `element` is the element that Gradio made of page.html.
const ws = element.querySelector(".ws") || element;
const $ = (name) => ws.querySelector(name);
const HEADER = 48, FIRST = 1, KINDS = { 1: "image/webp", 2: "image/jpeg" };
const root = ws.dataset.root || "";
const address = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}${root}/worldsim/ws`;
const canvas = $(".picture"), paper = canvas.getContext("2d", { alpha: false, desynchronized: false });
const map = $(".map"), chart = map.getContext("2d");
const state = {
  socket: null, hello: null, opened: false, event: 0, held: new Set(), paused: false, run: 0,
  queue: [], number: -1, drawing: false, dropped: 0, painted: [], applied: 0, block: 0, oldest: 0,
  path: [], pose: null, scrubbing: false, thumbs: {}, recording: false, log: null,
};
// For tests and measurements: what was painted when. Nothing is kept unless it is asked for.
window.worldsim = state;

// --- the socket ---------------------------------------------------------------------------------
function connect() {
  show("connecting", "Opening the world…");
  let socket;
  try { socket = new WebSocket(address); } catch { return slow(); }
  socket.binaryType = "arraybuffer";
  state.socket = socket;
  state.hello = null;
  socket.onmessage = (message) => {
    if (typeof message.data === "string") hear(JSON.parse(message.data));
    else picture(message.data, performance.now());
  };
  socket.onclose = (close) => {
    if (state.socket !== socket) return;
    release();
    if (!state.opened) return slow();
    show("ended", close.reason || "The connection to the world was lost.", true);
  };
}

const open = () => state.socket !== null && state.socket.readyState === WebSocket.OPEN;
function send(type, fields) {
  if (open()) state.socket.send(JSON.stringify({ type, ...fields }));
}

function slow() {
  document.body.classList.add("ws-slow");
  show("no WebSocket", "This browser, or something on the way, lets no WebSocket through. The buttons below work without: each press makes one block.", true);
}

const heard = {
  hello(told) {
    state.opened = true;
    state.hello = told;
    lags.length = 0;
    document.body.classList.remove("ws-slow");
    Object.assign(state, { run: 0, number: -1, queue: [], paused: false, path: [], pose: null, thumbs: {} });
    $(".world").textContent = `· ${told.world}`;
    canvas.width = told.width;
    canvas.height = told.height;
    canvas.classList.toggle("small", told.height <= 256);
    $("#ws-prompt").value = told.prompt;
    $(".seed-value").value = told.seed;
    $(".map-card").hidden = !told.poses;
    $(".begin").hidden = !told.pictures;
    $(".film").hidden = true;
    $(".save").href = `${root}/worldsim/${told.key}/run.wsrun`;
    pads(told);
  },
  waiting(told) {
    state.opened = true;
    show("waiting", `${told.capacity === 1 ? "The only place is" : `All ${told.capacity} places are`} taken. You are number ${told.place} in the queue; this page starts by itself.`);
  },
  receipt() {},
  notice(told) { notice(told.text); },
  path(told) { state.run = told.run; state.path = told.points; plot(); },
  recorded() {
    const link = $(".film");
    link.href = `${root}/worldsim/${state.hello.key}/film.mp4?${Date.now()}`;
    link.hidden = false;
  },
  state(told) {
    state.paused = told.paused;
    state.run = told.run;
    state.recording = told.recording;
    $(".play").textContent = told.paused ? "Play" : "Pause";
    $(".record").textContent = told.recording ? "Stop recording" : "Record";
    $(".record").classList.toggle("on", told.recording);
    $(".dot").hidden = !told.recording;
    if (document.activeElement !== $("#ws-prompt")) $("#ws-prompt").value = told.prompt;
    if (document.activeElement !== $(".seed-value")) $(".seed-value").value = told.seed;
    timeline(told.block, told.oldest);
    branches(told.branches);
    state.replaying = told.replaying;
    if (told.behind) show("going back", "Going back…");
    else if (state.painted.length) show(status());
  },
  hud(told) { figures(told); timeline(told.block, told.oldest); },
};

function hear(told) {
  const act = heard[told.type];
  if (act) act(told);
}

// --- pictures -----------------------------------------------------------------------------------
const lags = []; // received - sent of the newest pictures: how the two clocks stand, and the way
const screen = { at: 0, lasts: 1e3 / 60 }; // its newest frame, and how long one lasts

async function picture(data, received) {
  const head = new DataView(data, 0, HEADER);
  const told = {
    kind: head.getUint8(1), first: (head.getUint16(2, true) & FIRST) > 0, run: head.getUint32(4, true),
    number: head.getUint32(8, true), block: head.getUint32(12, true), event: head.getUint32(16, true),
    pose: [head.getFloat32(20, true), head.getFloat32(24, true), head.getFloat32(28, true)], received,
  };
  lags.push(received - head.getFloat64(40, true));
  if (lags.length > 64) lags.shift();
  told.due = head.getFloat64(32, true) + Math.min(...lags);
  if (told.run < state.run) return;
  told.bitmap = await createImageBitmap(new Blob([new Uint8Array(data, HEADER)], { type: KINDS[told.kind] }));
  state.queue.push(told);
  state.queue.sort((a, b) => a.run - b.run || a.number - b.number); // a decoder may be overtaken
  if (!state.drawing) { state.drawing = true; requestAnimationFrame(draw); }
}

// What is to be painted in the screen's frame that begins now, or null. Pictures of an older run (a
// rewind makes the same numbers again), and those that a newer one overtakes, never are.
function nearest(now) {
  let found = null;
  while (state.queue.length) {
    const told = state.queue[0], newest = state.queue.at(-1).run;
    const old = told.run < Math.max(state.run, newest) || (told.run === state.run && told.number <= state.number);
    if (!old && told.due > now + screen.lasts / 2) break;
    state.queue.shift();
    if (old) { told.bitmap.close(); continue; }
    if (found) { state.dropped += 1; found.bitmap.close(); }
    found = told;
  }
  return found;
}

const after = new MessageChannel(); // its message comes once the browser has painted what was drawn
const drawn = [];
after.port1.onmessage = () => {
  const now = performance.now();
  for (const told of drawn.splice(0)) {
    send("ack", { number: told.number, received: told.received, due: told.due, painted: now });
    if (state.log) state.log.push({ number: told.number, run: told.run, block: told.block, event: told.event, received: told.received, due: told.due, painted: now, pixels: told.pixels });
    setTimeout(painted, 0, told, now); // what may wait
  }
};

function draw(now) {
  const lasted = now - screen.at;
  if (lasted > 2 && lasted < 50) screen.lasts += 0.1 * (lasted - screen.lasts);
  screen.at = now;
  const told = nearest(now);
  state.drawing = state.queue.length > 0;
  if (state.drawing) requestAnimationFrame(draw);
  if (!told) return;
  paper.drawImage(told.bitmap, 0, 0, canvas.width, canvas.height);
  told.bitmap.close();
  if (state.log) told.pixels = hash(paper.getImageData(0, 0, canvas.width, canvas.height).data);
  drawn.push(told);
  after.port2.postMessage(0);
  state.number = told.number;
  state.run = told.run;
  state.applied = told.event;
}

function painted(told, now) {
  state.painted.push(now);
  while (state.painted[0] < now - 2000) state.painted.shift();
  if (told.first) {
    state.block = told.block;
    if (!Number.isNaN(told.pose[0])) { state.path.push([told.block, ...told.pose]); state.path.splice(0, state.path.length - 4096); plot(); }
    timeline(told.block + 1, state.oldest);
  }
  if (open() && $(".badge").dataset.state !== status()) show(status()); // not over what says that it is lost
}

function hash(bytes) { // FNV-1a
  let h = 0x811c9dc5;
  for (let i = 0; i < bytes.length; i++) if ((i & 3) !== 3) h = Math.imul(h ^ bytes[i], 0x01000193);
  return h >>> 0;
}

// --- keys ---------------------------------------------------------------------------------------
function code(event) {
  if (!state.hello) return null;
  const name = state.hello.aliases[event.code] || event.code;
  return state.hello.keys.some((key) => key.code === name) ? name : null;
}
const typing = (target) => target && target.closest && target.closest("input:not([type=range]), textarea, select, [contenteditable=true]");

function press(name, down, time) {
  if (down === state.held.has(name)) return; // repeated by the keyboard
  if (down) state.held.add(name); else state.held.delete(name);
  for (const key of ws.querySelectorAll(".key")) key.classList.toggle("held", state.held.has(key.dataset.code));
  state.event += 1;
  send("control", { id: state.event, t: time, buttons: [...state.held] });
  if (state.keys) state.keys.push({ event: state.event, name, down, t: time });
}
function release() { for (const name of [...state.held]) press(name, false, performance.now()); }

const on = (target, kind, act, more) => target.addEventListener(kind, act, more);
on(window, "keydown", (event) => {
  const name = code(event);
  if (!name || event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
  event.preventDefault();
  if (!event.repeat) press(name, true, event.timeStamp);
});
on(window, "keyup", (event) => { const name = code(event); if (name) press(name, false, event.timeStamp); });
on(window, "blur", release);
on(document, "visibilitychange", () => { if (document.hidden) release(); });
on(window, "pagehide", () => state.socket && state.socket.close());

// Mouse and wheel, where the world heeds them: summed up, and told at most so often.
const SUMMED = 8; // ms
const moved = { look: [0, 0], scroll: 0, time: 0 };
const takes = (name) => state.hello && state.hello.analog.includes(name);
function flow(time) {
  if (!moved.time) setTimeout(() => {
    state.event += 1;
    send("control", { id: state.event, t: moved.time, buttons: [...state.held], ...(takes("look") && { look: moved.look }), ...(takes("scroll") && { scroll: moved.scroll }) });
    Object.assign(moved, { look: [0, 0], scroll: 0, time: 0 });
  }, SUMMED);
  moved.time = time;
}
canvas.onclick = () => { canvas.focus({ preventScroll: true }); if (takes("look") && !document.pointerLockElement) canvas.requestPointerLock(); };
on(document, "mousemove", (event) => {
  if (document.pointerLockElement !== canvas || !takes("look")) return;
  moved.look[0] += event.movementX;
  moved.look[1] += event.movementY;
  flow(event.timeStamp);
});
on(canvas, "wheel", (event) => {
  if (!takes("scroll")) return;
  event.preventDefault();
  moved.scroll += event.deltaY;
  flow(event.timeStamp);
}, { passive: false });

// The keys as they lie on a keyboard, in one cluster for each hand.
const ROWS = ["Digit1 Digit2 Digit3 Digit4 Digit5 Digit6 Digit7 Digit8 Digit9 Digit0", "KeyQ KeyW KeyE KeyR KeyT KeyY KeyU KeyI KeyO KeyP", "KeyA KeyS KeyD KeyF KeyG KeyH KeyJ KeyK KeyL", "KeyZ KeyX KeyC KeyV KeyB KeyN KeyM"].map((row) => row.split(" "));
const ARROWS = { ArrowUp: [1, 21], ArrowLeft: [2, 20], ArrowDown: [2, 21], ArrowRight: [2, 22], ShiftLeft: [4, 0], ControlLeft: [4, 1], Space: [4, 2] };
function place(name, index) {
  if (ARROWS[name]) return ARROWS[name];
  const row = ROWS.findIndex((names) => names.includes(name));
  return row < 0 ? [5, index] : [row, ROWS[row].indexOf(name)];
}
function pads(told) {
  const box = $(".pads");
  box.replaceChildren();
  const keys = told.keys.map((key, index) => ({ ...key, at: place(key.code, index) }));
  const columns = [...new Set(keys.map((key) => key.at[1]))].sort((a, b) => a - b);
  const groups = [];
  columns.forEach((column, i) => { if (!i || column - columns[i - 1] > 2) groups.push([]); groups.at(-1).push(column); });
  for (const group of groups) {
    const inside = keys.filter((key) => group.includes(key.at[1]));
    const rows = [...new Set(inside.map((key) => key.at[0]))].sort((a, b) => a - b);
    const pad = document.createElement("div");
    pad.className = "pad";
    for (const key of inside) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "key";
      button.dataset.code = key.code;
      button.setAttribute("aria-label", key.label || key.code);
      const letter = document.createElement("b"), label = document.createElement("span");
      letter.textContent = key.letter.replace(/^(Key|Digit|Arrow)/, "");
      label.textContent = key.label;
      button.append(letter, label);
      button.style.gridArea = `${rows.indexOf(key.at[0]) + 1} / ${group.indexOf(key.at[1]) + 1}`;
      button.onpointerdown = (event) => { event.preventDefault(); button.setPointerCapture(event.pointerId); press(key.code, true, event.timeStamp); };
      button.onpointerup = button.onpointercancel = button.onlostpointercapture = (event) => press(key.code, false, event.timeStamp);
      button.oncontextmenu = (event) => event.preventDefault();
      pad.append(button);
    }
    box.append(pad);
  }
}

// --- what is around the picture -----------------------------------------------------------------
function show(name, veil, again) {
  const badge = $(".badge");
  badge.dataset.state = name;
  badge.textContent = name;
  $(".veil").classList.toggle("off", !veil);
  if (veil) $(".veil-text").textContent = veil;
  $(".again").hidden = !again;
}
const status = () => (state.paused ? "paused" : state.replaying ? "replay" : "live");
let noticed = 0;
function notice(words) {
  $(".notice").textContent = words;
  $(".notice").hidden = false;
  clearTimeout(noticed);
  noticed = setTimeout(() => { $(".notice").hidden = true; }, 6000);
}
const seconds = (block) => state.hello ? block * state.hello.block_seconds : 0;
const clock = (time) => `${Math.floor(time / 60)}:${String(Math.floor(time % 60)).padStart(2, "0")}`;
function timeline(block, oldest) {
  state.oldest = oldest;
  if (state.scrubbing) return;
  const bar = $(".timeline");
  bar.min = oldest;
  bar.max = Math.max(oldest, block);
  bar.value = block;
  $(".then").textContent = clock(seconds(oldest));
  $(".now").textContent = clock(seconds(block));
}
function branches(list) {
  const box = $(".branches");
  box.replaceChildren();
  for (const number of Object.keys(state.thumbs)) // a new fork of that number is another moment
    if (!list.some((branch) => branch.number === Number(number))) delete state.thumbs[number];
  for (const branch of list) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "branch";
    button.title = `Go on from ${clock(seconds(branch.block))}: ${branch.prompt}`;
    if (!state.thumbs[branch.number]) state.thumbs[branch.number] = canvas.toDataURL();
    const image = document.createElement("img"), label = document.createElement("span"), drop = document.createElement("i");
    image.src = state.thumbs[branch.number];
    image.alt = "";
    label.textContent = clock(seconds(branch.block));
    drop.textContent = "×";
    drop.title = "Forget it";
    drop.onclick = (event) => { event.stopPropagation(); delete state.thumbs[branch.number]; send("drop", { branch: branch.number }); };
    button.onclick = () => send("switch", { branch: branch.number });
    button.append(image, label, drop);
    box.append(button);
  }
}

function plot() {
  if (!state.hello || !state.hello.poses) return;
  const ratio = window.devicePixelRatio || 1, width = 320, height = 200;
  if (map.width !== width * ratio) { map.width = width * ratio; map.height = height * ratio; }
  const style = getComputedStyle(ws), colour = (name) => style.getPropertyValue(name);
  chart.setTransform(ratio, 0, 0, ratio, 0, 0);
  chart.clearRect(0, 0, width, height);
  const [, x, y, heading] = state.path.at(-1) || [0, 0, 0, 0];
  const far = state.path.slice(-160).reduce((most, p) => Math.max(most, Math.abs(p[1] - x) / width, Math.abs(p[2] - y) / height), 0);
  const scale = Math.max(7, Math.min(26, 0.42 / Math.max(far, 0.016))); // pixels of a cell
  chart.save();
  chart.translate(width / 2, height / 2);
  chart.scale(scale, scale);
  chart.translate(-x, -y);
  chart.lineWidth = 1 / scale;
  chart.strokeStyle = colour("--ws-line");
  chart.beginPath();
  for (let i = Math.floor(x - width / scale); i < x + width / scale; i++) { chart.moveTo(i, y - height / scale); chart.lineTo(i, y + height / scale); }
  for (let i = Math.floor(y - height / scale); i < y + height / scale; i++) { chart.moveTo(x - width / scale, i); chart.lineTo(x + width / scale, i); }
  chart.stroke();
  if (state.hello.view) { // what one sees
    chart.fillStyle = colour("--ws-accent");
    chart.globalAlpha = 0.16;
    chart.beginPath();
    chart.moveTo(x, y);
    chart.arc(x, y, 44 / scale, heading - state.hello.view / 2, heading + state.hello.view / 2);
    chart.fill();
    chart.globalAlpha = 1;
  }
  chart.strokeStyle = colour("--ws-accent");
  chart.lineWidth = 2.2 / scale;
  chart.lineJoin = chart.lineCap = "round";
  chart.beginPath();
  state.path.forEach((p, i) => (i ? chart.lineTo(p[1], p[2]) : chart.moveTo(p[1], p[2])));
  chart.stroke();
  chart.translate(x, y);
  chart.rotate(heading);
  chart.scale(1 / scale, 1 / scale);
  chart.fillStyle = colour("--ws-ink");
  chart.beginPath();
  chart.moveTo(9, 0); chart.lineTo(-6, 6); chart.lineTo(-3, 0); chart.lineTo(-6, -6);
  chart.fill();
  chart.restore();
}

const PARTS = ["wait", "denoise", "decode", "encode", "network", "paint"];
const bytes = (count) => count < 2 ** 20 ? `${(count / 1024).toFixed(0)} KiB` : `${(count / 2 ** 20).toFixed(1)} MiB`;
function entry(name, value, colour) {
  const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
  if (colour) { const dot = document.createElement("i"); dot.style.background = colour; dt.append(dot); }
  dt.append(name);
  dd.textContent = value;
  dd.dataset.name = name;
  box.append(dt, dd);
  return box;
}
function figures(told) {
  const [p50, p95] = told.latency.total, ms = (x) => (x < 10 ? x.toFixed(1) : x.toFixed(0));
  $(".total").textContent = p50 ? `${p50.toFixed(0)} ms` : "press a key";
  $(".p95").textContent = p50 ? `p95 ${p95.toFixed(0)} ms` : "";
  $(".bar").replaceChildren(...PARTS.map((part) => {
    const slice = document.createElement("i");
    slice.style.cssText = `flex: ${told.latency[part][0]} 1 0; background: var(--ws-${part})`;
    return slice;
  }));
  $(".parts").replaceChildren(...PARTS.map((part) => entry(part, `${ms(told.latency[part][0])} / ${ms(told.latency[part][1])} ms`, `var(--ws-${part})`)));
  const recent = state.painted.filter((time) => time > performance.now() - 2000);
  const fps = recent.length > 1 ? 1e3 * (recent.length - 1) / (recent.at(-1) - recent[0]) : 0;
  $(".rest").replaceChildren(
    entry("pictures/s", told.paused ? "paused" : fps.toFixed(1)), entry("late", told.late), entry("dropped", told.dropped + state.dropped),
    entry("ahead", `${told.ahead} block${told.ahead === 1 ? "" : "s"}`), entry("made anew", told.aborted + told.redone), entry("applied", told.applied),
    entry("context", bytes(told.cache_bytes)), entry("share", `${(100 * told.share).toFixed(0)} %`), entry("players", told.players),
  );
}

// --- buttons ------------------------------------------------------------------------------------
$(".play").onclick = () => send(state.paused ? "resume" : "pause");
$(".fork").onclick = () => send("fork");
$(".record").onclick = () => send("record", { on: !state.recording });
$(".reset").onclick = () => send("reset", { seed: Math.max(0, Math.min(Number.MAX_SAFE_INTEGER, Math.floor(Number($(".seed-value").value) || 0))) });
$(".prompt").onsubmit = (event) => {
  event.preventDefault();
  const words = $("#ws-prompt").value.trim();
  if (words) { state.event += 1; send("prompt", { id: state.event, t: event.timeStamp, text: words }); }
  $("#ws-prompt").blur();
  canvas.focus({ preventScroll: true });
};
const bar = $(".timeline");
bar.oninput = () => { state.scrubbing = true; $(".now").textContent = clock(seconds(Number(bar.value))); };
bar.onchange = () => { state.scrubbing = false; send("rewind", { block: Number(bar.value) }); bar.blur(); };
bar.onblur = bar.onpointerup = bar.onpointercancel = () => setTimeout(() => { state.scrubbing = false; }); // let go where it was: no change
for (const [button, input, path] of [[".begin", ".file-picture", "picture"], [".load", ".file-run", "run"]]) {
  $(button).onclick = () => $(input).click();
  $(input).onchange = async (event) => {
    const file = event.target.files[0];
    event.target.value = "";
    if (!file || !state.hello) return;
    try {
      const answer = await fetch(`${root}/worldsim/${state.hello.key}/${path}`, { method: "POST", body: file });
      if (!answer.ok) notice(await answer.text());
    } catch { notice("The file did not arrive: try again."); }
  };
}
$(".again").onclick = () => { state.opened = false; connect(); };
$(".toggle-figures").onclick = (event) => {
  const off = ws.classList.toggle("no-figures");
  event.target.setAttribute("aria-pressed", String(!off));
};
new MutationObserver(plot).observe(document.body, { attributes: true, attributeFilter: ["class"] });
connect();
