// The storefront: the state of a search lives in the address, so that links and the back button work.

import { parseJson, stringifyJson } from "./json.js";

const $ = (id) => document.getElementById(id);
const PAGE = 24, MAX_VALUES = 30, SUGGESTIONS = 6, MAX_SIDE = 1024;
const state = { q: "", like: [], unlike: [], where: {}, weight: 0.5 };
let image = null;      // data URL of the image to search by; too large for the address
let info = null, cursor = null, loading = null, generation = null;
let source = null;     // what a generation starts from: {id} or {image}
let key = sessionStorage.getItem("key") || "";

// --- the API

async function call(path, options = {}) {
  const headers = { ...(options.json ? { "Content-Type": "application/json" } : {}), ...(options.headers || {}) };
  if (key) headers.Authorization = `Bearer ${key}`;
  const body = options.json ? stringifyJson(options.json) : undefined;
  const response = await fetch(path, { method: options.method || (body ? "POST" : "GET"), headers, body, signal: options.signal });
  if (response.status === 401) {
    await login();
    return call(path, options);
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw new Error(problem.detail || problem.title || `The server answered ${response.status}.`);
  }
  return response;
}

const json = async (path, options) => parseJson(await (await call(path, options)).text());

let asking = null;
function login() {
  asking ||= new Promise((resolve) => {
    const dialog = $("login");
    dialog.addEventListener("close", () => {
      key = $("key").value.trim();
      sessionStorage.setItem("key", key);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

// --- small helpers

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Elements cannot send a key, so images are fetched when there is one.
function imageOf(path, alt) {
  const made = element("img", { alt, loading: "lazy", decoding: "async" });
  if (!key) made.src = path;
  else call(path).then((response) => response.blob()).then((blob) => { made.src = URL.createObjectURL(blob); }).catch(() => {});
  return made;
}

const caption = (hit) => hit.text || String(hit.id);
const dataUrl = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

function failed(error, where = "status") {
  if (error.name !== "AbortError") $(where).textContent = error.message;
}

// --- the address

function readAddress() {
  const parameters = new URLSearchParams(location.search);
  state.q = parameters.get("q") || "";
  state.like = parameters.getAll("like");
  state.unlike = parameters.getAll("unlike");
  state.weight = Number(parameters.get("weight")) || 0.5;
  try {
    state.where = { ...parseJson(parameters.get("where") || "{}") };  // also of null
  } catch {
    state.where = {};
  }
}

function writeAddress() {
  const parameters = new URLSearchParams();
  if (state.q) parameters.set("q", state.q);
  for (const id of state.like) parameters.append("like", id);
  for (const id of state.unlike) parameters.append("unlike", id);
  if (Object.keys(state.where).length) parameters.set("where", stringifyJson(state.where));
  if (state.weight !== 0.5) parameters.set("weight", state.weight);
  const address = parameters.size ? `?${parameters}` : location.pathname;
  if (address !== location.search) history.pushState(null, "", address);
}

// --- searching

const hasWhere = () => Object.keys(state.where).length > 0;
const isQuery = () => Boolean(state.q || image || state.like.length || state.unlike.length);

function query() {
  const asked = { limit: PAGE };
  if (state.q) asked.text = state.q;
  if (image) asked.image = image;
  if (state.like.length) asked.like = state.like;
  if (state.unlike.length) asked.unlike = state.unlike;
  if (hasWhere()) asked.where = state.where;
  if (state.q && image) asked.weights = { text: state.weight, image: 1 - state.weight };
  return asked;
}

async function loadPage(first) {
  loading?.abort();
  const mine = (loading = new AbortController());
  try {
    let page;
    if (isQuery()) {
      page = await json("/v1/search", { json: first ? query() : { ...query(), cursor }, signal: mine.signal });
      cursor = page.cursor;
    } else {
      const offset = first ? 0 : $("results").children.length;
      const parameters = new URLSearchParams({ limit: PAGE, offset });
      if (hasWhere()) parameters.set("where", stringifyJson(state.where));
      page = await json(`/v1/browse?${parameters}`, { signal: mine.signal });
      cursor = page.hits.length === PAGE ? "next" : null;
    }
    if (first) $("results").replaceChildren();
    $("results").append(...page.hits.map((hit) => card(hit)));
    const count = $("results").children.length;
    if (!count) $("status").textContent = hasWhere() ? "Nothing matches these filters." : "Nothing found.";
    else if (isQuery()) $("status").textContent = `${count}${cursor ? "+" : ""} results${first ? ` in ${page.took_ms.toFixed(0)} ms` : ""}`;
    else $("status").textContent = `${info.items.toLocaleString()} items`;
  } catch (error) {
    failed(error);
  } finally {
    if (loading === mine) loading = null;
  }
}

function refresh({ address = true } = {}) {
  if (address) writeAddress();
  cursor = null;
  $("text").value = state.q;
  $("mix").hidden = !(state.q && image);
  $("weight").value = state.weight;
  document.title = state.q ? `${state.q} – Catalog` : "Catalog";
  showQuery();
  showFilters();
  window.scrollTo(0, 0);
  return loadPage(true);
}

function card(hit) {
  const price = info.columns.price === "number" && typeof hit.columns.price === "number" ? hit.columns.price.toFixed(2) : null;
  const facts = [hit.columns.brand, price].filter(Boolean).join(" · ");
  const act = (label, title, action) => element("button", { type: "button", title, onclick: action }, label);
  return element("li", { className: "card" },
    element("button", { type: "button", className: "frame", "aria-label": `Show ${caption(hit)}`, onclick: () => showItem(hit) },
      imageOf(`${hit.image}?size=128`, "")),
    element("p", {}, caption(hit)),
    facts ? element("span", { className: "facts" }, facts) : null,
    element("div", { className: "tools" },
      act("More like this", "Search for similar items", () => approach("like", hit)),
      act("Not this", "Avoid items like this", () => approach("unlike", hit))));
}

function approach(how, hit) {
  const id = String(hit.id), other = how === "like" ? "unlike" : "like";
  state[other] = state[other].filter((each) => each !== id);
  if (!state[how].includes(id)) state[how].push(id);
  $("item").close();
  refresh();
}

function showQuery() {
  const chip = (label, remove, ...content) => element("button", { type: "button", "aria-label": `Remove ${label}`, onclick: () => { remove(); refresh(); } }, ...content, element("span", { "aria-hidden": "true" }, "✕"));
  const thumbnail = (id) => imageOf(`/v1/items/${encodeURIComponent(id)}/image?size=128`, "");
  const without = (list, id) => list.filter((each) => each !== id);
  $("query").replaceChildren(
    ...(image ? [chip("image", () => { image = null; }, element("img", { src: image, alt: "" }), "image")] : []),
    ...state.like.map((id) => chip(`like ${id}`, () => { state.like = without(state.like, id); }, thumbnail(id), "like")),
    ...state.unlike.map((id) => chip(`not like ${id}`, () => { state.unlike = without(state.unlike, id); }, thumbnail(id), "not like")));
}

async function showItem(hit) {
  const dialog = $("item");
  const rows = Object.entries(hit.columns).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, typeof value === "object" ? stringifyJson(value) : String(value))]);
  dialog.replaceChildren(
    element("div", { className: "title" },
      element("h2", { id: "item-title" }, caption(hit)),
      element("button", { type: "button", className: "button icon", "aria-label": "Close", onclick: () => dialog.close() }, "✕")),
    element("div", { className: "detail" },
      imageOf(`${hit.image}?size=512`, caption(hit)),
      element("div", {},
        element("dl", {}, element("dt", {}, "id"), element("dd", {}, String(hit.id)), ...rows),
        element("div", { className: "actions" },
          element("button", { type: "button", className: "primary", onclick: () => approach("like", hit) }, "More like this"),
          info.generates ? element("button", { type: "button", onclick: () => { dialog.close(); openGenerate({ id: hit.id, path: hit.image, text: caption(hit) }); } }, "Vary it") : null))));
  dialog.showModal();
}

// --- filters

// A column as a filter names it: a name with a dot or a bracket, or of a connective, is quoted.
const quoted = (name) => (/[.[\]]/.test(name) || ["and", "or", "not"].includes(name) ? `"${name}"` : name);

let shown = 0;
async function showFilters() {
  const turn = ++shown, parts = [];
  const names = Object.entries(info.columns).filter(([name]) => !["id", "text"].includes(name));
  for (const [name, kind] of names) {
    if (kind === "number") parts.push(range(name));
    else if (kind === "string" || kind === "boolean") parts.push(values(name));
  }
  const made = (await Promise.all(parts)).filter(Boolean);
  if (turn === shown) {
    const focused = document.activeElement?.dataset?.filter;
    $("filters").replaceChildren(...made);
    if (focused) $("filters").querySelector(`[data-filter="${CSS.escape(focused)}"]`)?.focus();
  }
}

async function values(name) {
  const key = quoted(name), { [key]: own, ...others } = state.where;
  const parameters = new URLSearchParams({ column: key, limit: MAX_VALUES + 1 });
  if (Object.keys(others).length) parameters.set("where", stringifyJson(others));
  const found = (await json(`/v1/facets?${parameters}`).catch(() => ({ values: [] }))).values;
  const chosen = Array.isArray(own) ? own : [];
  if (found.length > MAX_VALUES || (found.length < 2 && !chosen.length)) return null;  // a column of names, or without a choice
  const choose = (value, on) => {
    const now = on ? [...chosen, value] : chosen.filter((each) => each !== value);
    if (now.length) state.where[key] = now; else delete state.where[key];
    refresh();
  };
  return element("fieldset", {}, element("legend", {}, name.replaceAll("_", " ")),
    element("div", { className: "values" }, ...found.map(({ value, count }) => element("label", {},
      element("input", { type: "checkbox", checked: chosen.includes(value), "data-filter": `${name}=${value}`, onchange: (event) => choose(value, event.target.checked) }),
      String(value), element("span", { className: "count" }, String(count))))));
}

function range(name) {
  const key = quoted(name), own = state.where[key] || {};
  const change = (bound) => (event) => {
    const next = { ...own };
    if (event.target.value === "") delete next[bound]; else next[bound] = Number(event.target.value);
    if (Object.keys(next).length) state.where[key] = next; else delete state.where[key];
    refresh();
  };
  const input = (bound, label) => element("input", { type: "number", step: "any", value: own[bound] ?? "", placeholder: label, "aria-label": `${name}, ${label}`, "data-filter": `${name}.${bound}`, onchange: change(bound) });
  return element("fieldset", {}, element("legend", {}, name.replaceAll("_", " ")), element("div", { className: "range" }, input("gte", "from"), input("lte", "to")));
}

// --- captions while typing

let typed = 0, marked = -1;
function suggest() {
  const text = $("text").value.trim(), turn = ++typed;
  setTimeout(async () => {
    if (turn !== typed) return;
    if (text.length < 3) return closeSuggestions();
    const page = await json("/v1/search", { json: { text, limit: SUGGESTIONS } }).catch(() => null);
    if (!page || turn !== typed || document.activeElement !== $("text")) return;
    const captions = [...new Set(page.hits.map((hit) => hit.text).filter(Boolean))];
    $("suggestions").replaceChildren(...captions.map((each, n) => element("li", { id: `suggestion-${n}`, role: "option", "aria-selected": "false", onmousedown: () => take(each) }, each)));
    marked = -1;
    $("suggestions").hidden = !captions.length;
    $("text").setAttribute("aria-expanded", String(captions.length > 0));
  }, 200);
}

function closeSuggestions() {
  typed++;
  $("suggestions").hidden = true;
  $("text").setAttribute("aria-expanded", "false");
  $("text").removeAttribute("aria-activedescendant");
}

function take(text) {
  state.q = text;
  closeSuggestions();
  refresh();
}

function mark(step) {
  const options = [...$("suggestions").children];
  if ($("suggestions").hidden || !options.length) return;
  marked = (marked + step + options.length) % options.length;
  options.forEach((option, n) => option.setAttribute("aria-selected", String(n === marked)));
  $("text").setAttribute("aria-activedescendant", `suggestion-${marked}`);
}

// --- searching by image

async function useImage(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = element("canvas", { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) });
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    image = canvas.toDataURL("image/png");
    await refresh();
  } catch {
    $("status").textContent = `${file.name || "The file"} is not an image that this browser can read.`;
  }
}

// --- generating

async function openGenerate(from = null) {
  source = from;
  $("source").hidden = !from;
  if (from) {
    const blob = await (await call(`${from.path}?size=512`)).blob();
    $("source-image").src = URL.createObjectURL(blob);
    $("source-text").textContent = from.text;
    $("prompt").value = from.text;
  } else if (state.q) $("prompt").value = state.q;
  clearMask();
  $("generate").showModal();
}

function clearMask() {
  const canvas = $("mask");
  canvas.width = canvas.height = 256;
  canvas.dataset.painted = "";
}

function draw(event) {
  const canvas = $("mask");
  if (!event.buttons) return;
  const box = canvas.getBoundingClientRect(), context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.beginPath();
  context.arc((event.clientX - box.left) / box.width * 256, (event.clientY - box.top) / box.height * 256, 14, 0, 7);
  context.fill();
  canvas.dataset.painted = "yes";
}

function maskUrl() {
  const canvas = element("canvas", { width: 256, height: 256 }), context = canvas.getContext("2d");
  context.fillRect(0, 0, 256, 256);
  context.drawImage($("mask"), 0, 0);
  return canvas.toDataURL("image/png");
}

async function generate(event) {
  event.preventDefault();
  generation?.abort();
  generation = new AbortController();
  const asked = { prompt: $("prompt").value, n: Number($("n").value) || 1 };
  if ($("steps").value) asked.steps = Number($("steps").value);
  const seed = $("seed").value;
  if (seed) asked.seed = /^[1-9]\d*$/.test(seed) ? parseJson(seed) : Number(seed);  // exact also beyond 2^53
  if (source) {
    asked.like = source.id;
    if ($("mask").dataset.painted) asked.mask = maskUrl(); else asked.strength = Number($("strength").value);
  }
  $("stop").hidden = $("progress").hidden = false;
  $("progress").value = 0;
  $("generate-status").textContent = "Generating…";
  $("generated").replaceChildren();
  try {
    const response = await call("/v1/generate", { json: asked, headers: { Accept: "text/event-stream" }, signal: generation.signal });
    for await (const [name, content] of events(response)) {
      if (name === "progress") $("progress").value = content.done / content.total;
      if (name === "preview") showPreviews(content.images);
      if (name === "error") throw new Error(content.detail);
      if (name === "result") showGenerated(content);
    }
  } catch (error) {
    if (error.name === "AbortError") $("generate-status").textContent = "Stopped.";
    else failed(error, "generate-status");
  } finally {
    $("stop").hidden = $("progress").hidden = true;
  }
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const [name, data] = block.split("\n");
      yield [name.replace("event: ", ""), parseJson(data.replace("data: ", ""))];
    }
  }
}

function showPreviews(images) {
  $("generated").replaceChildren(...images.map((data) => element("li", { className: "card" },
    element("span", { className: "frame" }, element("img", { src: `data:image/webp;base64,${data}`, alt: "Preview" })))));
}

function showGenerated(result) {
  const rejected = Object.values(result.rejected).reduce((sum, n) => sum + n, 0);
  $("generate-status").textContent = `${result.images.length} images in ${(result.took_ms / 1000).toFixed(1)} s${rejected ? `, ${rejected} rejected` : ""}`;
  $("generated").replaceChildren(...result.images.map((each) => {
    const url = `data:image/png;base64,${each.image}`;
    const add = element("button", { type: "button", onclick: () => addToCatalog(each, add) }, "Add to catalog");
    return element("li", { className: "card" },
      element("a", { className: "frame", href: url, download: `${each.recipe.prompt.slice(0, 40)} ${each.seed}.png` }, element("img", { src: url, alt: each.recipe.prompt })),
      element("p", {}, `Score ${each.score.toFixed(3)}, seed ${each.seed}`),
      each.nearest ? element("span", { className: "facts" }, `Nearest: ${caption(each.nearest)} (${each.nearest.score.toFixed(3)})`) : null,
      element("div", { className: "tools" },
        element("button", { type: "button", onclick: () => { image = url; state.q = ""; $("generate").close(); refresh(); } }, "Find similar"),
        info.writes ? add : null));
  }));
  $("generated").lastElementChild?.scrollIntoView({ block: "nearest" });
}

async function addToCatalog(generated, button) {
  button.disabled = true;
  try {
    const columns = { generated: true, ...generated.recipe };
    await json("/v1/items", { json: { items: [{ image: generated.image, text: generated.recipe.prompt, columns }] } });
    button.textContent = "Added";
    info = await json("/v1/info");
  } catch (error) {
    button.disabled = false;
    failed(error, "generate-status");
  }
}

// --- wiring

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const chosen = marked >= 0 && !$("suggestions").hidden ? $("suggestions").children[marked] : null;
  take(chosen ? chosen.textContent : $("text").value.trim());
});
$("text").addEventListener("input", suggest);
$("text").addEventListener("blur", closeSuggestions);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    mark(event.key === "ArrowDown" ? 1 : -1);
  } else if (event.key === "Escape") closeSuggestions();
});
$("weight").addEventListener("change", (event) => { state.weight = Number(event.target.value); refresh(); });
$("file").addEventListener("change", (event) => { if (event.target.files[0]) useImage(event.target.files[0]); event.target.value = ""; });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  const file = event.dataTransfer.files[0];
  if (file) useImage(file);
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (file) useImage(file);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) {
    event.preventDefault();
    $("text").focus();
  }
});
$("open-filters").addEventListener("click", () => {
  const open = $("filters").classList.toggle("open");
  $("open-filters").setAttribute("aria-expanded", String(open));
});
$("open-generate").addEventListener("click", () => openGenerate());
$("prompt-form").addEventListener("submit", generate);
$("stop").addEventListener("click", () => generation?.abort());
$("generate").addEventListener("close", () => generation?.abort());
$("generate").querySelector("[data-close]").addEventListener("click", () => $("generate").close());
$("clear-mask").addEventListener("click", clearMask);
$("clear-source").addEventListener("click", () => { source = null; $("source").hidden = true; });
$("mask").addEventListener("pointerdown", draw);
$("mask").addEventListener("pointermove", draw);
window.addEventListener("popstate", () => { readAddress(); refresh({ address: false }); });
new IntersectionObserver((entries) => {
  if (entries[0].isIntersecting && cursor && !loading) loadPage(false);
}, { rootMargin: "600px" }).observe($("more"));

async function start() {
  try {
    info = await json("/v1/info");
    $("open-generate").hidden = !info.generates;
    readAddress();
    await refresh({ address: false });
  } catch (error) {
    failed(error);
  }
}
start();
