// What the page needs without a network: a service worker, and all files in its cache.

import type { Message } from "../service/sw";
import { Progress, type LoadProgress, type SiteFiles } from "../site/files";

const CONTROL_WAIT = 10_000; // ms

/** Whether a service worker keeps the files of this page from now on. */
export async function startServiceWorker(): Promise<boolean> {
  if (!("serviceWorker" in navigator)) return false; // the page was loaded over http from another machine
  const workers = navigator.serviceWorker;
  const controlled = new Promise<boolean>((resolve) => {
    if (workers.controller) resolve(true);
    workers.addEventListener("controllerchange", () => resolve(true), { once: true });
    setTimeout(() => resolve(false), CONTROL_WAIT);
  });
  try {
    const { active } = await workers.register("./sw.js");
    active?.postMessage({ claim: true } satisfies Message); // it does not control a page that was reloaded without the cache
  } catch {
    return Boolean(workers.controller); // no network, or the browser refuses it: then without
  }
  return controlled;
}

/** Load the files that the service worker does not keep yet. Returns those that it could not keep. */
export async function keepOffline(files: SiteFiles, names: string[], onProgress: (progress: LoadProgress) => void): Promise<string[]> {
  const missing = await notKept(files, names);
  const progress = new Progress(files, missing, onProgress);
  for (const name of missing) await files.bytes(name, progress.of(name)); // into the cache; not kept in memory
  return notKept(files, missing);
}

async function notKept(files: SiteFiles, names: string[]): Promise<string[]> {
  const { controller } = navigator.serviceWorker;
  if (!controller || !names.length) return names;
  const { port1, port2 } = new MessageChannel();
  const answered = new Promise<string[]>((resolve) => (port1.onmessage = ({ data }: MessageEvent<string[]>) => resolve(data)));
  controller.postMessage({ missing: names.map((name) => files.url(name)) } satisfies Message, [port2]);
  const missing = new Set(await answered);
  return names.filter((name) => missing.has(files.url(name)));
}
