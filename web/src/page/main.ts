// The page: starts the worker and the service worker, and wires the parts together.

import type { LoadProgress } from "../engine";
import type { Rgb } from "../model/images";
import { Client } from "../protocol";
import { SiteFiles } from "../site/files";
import type { Items } from "../site/documents";
import { byId } from "./dom";
import { Filters } from "./filters";
import { Generating } from "./generating";
import { listenForImages } from "./query_image";
import { Results } from "./results";
import { readAddress, state } from "./state";
import { Thumbnails } from "./thumbnails";

const SERVICE_WORKER_WAIT = 10_000; // ms

const megabytes = (bytes: number) => (bytes / 1e6).toFixed(1);

async function main(): Promise<void> {
  const base = new URL("./", location.href).href;
  byId("loading-text").textContent = "Loading…";
  const offline = await startServiceWorker();
  const worker = new Worker(new URL("../worker.ts", import.meta.url), { type: "module" });
  const client = new Client(worker);
  const asked = new URLSearchParams(location.search).get("engine");
  const info = await client.call("start", [base, asked], { onEvent: showLoading });
  const files = await SiteFiles.open(base);
  const items = await files.json<Items>("data/items.json");
  const positions = new Map(items.ids.map((id, index) => [String(id), index]));
  const thumbnails = new Thumbnails(files, items.thumbnails);
  const search = () => void results.refresh();
  const filters = new Filters(client, info, search);
  const results: Results = new Results(client, info, thumbnails, (id) => positions.get(id), () => void filters.show());
  const useImage = (pixels: Rgb, url: string, text = state.q) => {
    if (state.image) URL.revokeObjectURL(state.image.url);
    Object.assign(state, { image: { pixels, url }, q: text });
    search();
  };
  wireSearch(search);
  listenForImages(useImage, (message) => (byId("status").textContent = message));
  window.addEventListener("popstate", () => {
    readAddress();
    void results.refresh({ address: false });
  });
  byId("engine").textContent = `Searches and generates in this browser: ${info.engine}. Model: ${info.model}${info.synthetic ? ", trained on rendered images" : ""}.`;
  readAddress();
  await results.refresh({ address: false });
  byId("loading").hidden = true;
  if (info.generator) new Generating(client, info.generator, (pixels, url) => useImage(pixels, url, ""));
  await prepare(client, offline);
}

function wireSearch(search: () => void): void {
  const text = byId<HTMLInputElement>("text");
  text.disabled = false;
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    state.q = text.value.trim();
    search();
  });
  byId("weight").addEventListener("change", (event) => {
    state.weight = Number((event.target as HTMLInputElement).value);
    search();
  });
  byId("rerank").addEventListener("change", (event) => {
    state.rerank = (event.target as HTMLInputElement).checked;
    search();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || /INPUT|TEXTAREA|SELECT/u.test(document.activeElement?.tagName ?? "")) return;
    event.preventDefault();
    text.focus();
  });
  const open = byId("open-filters");
  open.addEventListener("click", () => open.setAttribute("aria-expanded", String(byId("filters").classList.toggle("open"))));
}

/** Whether a service worker keeps the files of this page from now on. */
async function startServiceWorker(): Promise<boolean> {
  if (!("serviceWorker" in navigator)) return false; // the page was loaded over http from another machine
  const controlled = new Promise<boolean>((resolve) => {
    if (navigator.serviceWorker.controller) resolve(true);
    navigator.serviceWorker.addEventListener("controllerchange", () => resolve(true), { once: true });
    setTimeout(() => resolve(false), SERVICE_WORKER_WAIT);
  });
  try {
    await navigator.serviceWorker.register("./sw.js");
  } catch {
    return Boolean(navigator.serviceWorker.controller); // no network, or the browser refuses it: then without
  }
  return controlled;
}

async function prepare(client: Client, offline: boolean): Promise<void> {
  const where = byId("offline");
  try {
    await client.call("prepare", [], {
      onEvent: ({ received, total }) => (where.textContent = `Loading the rest: ${megabytes(received)} of ${megabytes(total)} MB`),
    });
    where.textContent = offline ? "Works offline from now on." : "Over https or on localhost, it would also work offline.";
  } catch (error) {
    where.textContent = error instanceof Error ? error.message : String(error);
  }
}

function showLoading({ received, total }: LoadProgress): void {
  byId<HTMLProgressElement>("loading-progress").value = received / total;
  byId("loading-text").textContent = `Loading: ${megabytes(received)} of ${megabytes(total)} MB`;
}

main().catch((error: unknown) => {
  byId("loading-progress").hidden = true;
  byId("loading-text").textContent = `The page could not be started. ${error instanceof Error ? error.message : String(error)}`;
});
