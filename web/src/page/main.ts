// The page: starts the worker and the service worker, and wires the parts together.

import type { Info } from "../engine";
import type { Rgb } from "../model/images";
import { Client } from "../protocol";
import { SiteFiles, type LoadProgress } from "../site/files";
import { byId, megabytes } from "./dom";
import { Filters } from "./filters";
import { Generating } from "./generating";
import { keepOffline, startServiceWorker } from "./offline";
import { listenForImages } from "./query_image";
import { Results } from "./results";
import { dropImage, readAddress, state } from "./state";
import { Thumbnails } from "./thumbnails";


async function main(): Promise<void> {
  const base = new URL("./", location.href).href;
  byId("loading-text").textContent = "Loading…";
  const controlled = await startServiceWorker();
  const worker = new Worker(new URL("../worker.ts", import.meta.url), { type: "module" });
  const client = new Client(worker);
  const asked = new URLSearchParams(location.search).get("engine");
  const info = await client.call("start", [base, asked], { onEvent: showLoading });
  const files = await SiteFiles.open(base);
  const thumbnails = new Thumbnails(files);
  const search = () => void results.refresh();
  const filters = new Filters(client, info, search);
  const results: Results = new Results(client, info, thumbnails, () => void filters.show());
  const useImage = (pixels: Rgb, url: string, text = state.q) => {
    dropImage();
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
  await prepareOffline(files, info, controlled);
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

async function prepareOffline(files: SiteFiles, info: Info, controlled: boolean): Promise<void> {
  const where = byId("offline");
  if (!controlled) {
    where.textContent = window.isSecureContext ? "This browser does not keep the page for offline use." : "Over https or on localhost, it would also work offline.";
    return;
  }
  try {
    const missing = await keepOffline(files, info.offline, ({ received, total }) => {
      where.textContent = `Loading the rest: ${megabytes(received)} of ${megabytes(total)} MB`;
    });
    where.textContent = missing.length
      ? `Does not work offline: the browser had no room for ${missing.length} files. Free some space, and reload the page.`
      : "Works offline from now on.";
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
