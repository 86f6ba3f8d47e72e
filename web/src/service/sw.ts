// The service worker: after the first visit, the site works without a network.
//
// Addresses of data name their content (`site/files.ts`), and so do those of scripts, so a cached one is never out of
// date. The page itself and `site.json` come from the network while there is one.

import type { SiteIndex } from "../site/documents";

interface ExtendableEvent extends Event {
  waitUntil(work: Promise<unknown>): void;
}
interface FetchEvent extends ExtendableEvent {
  request: Request;
  respondWith(response: Promise<Response>): void;
}
interface MessageEvent extends ExtendableEvent {
  data: Message;
  ports: readonly MessagePort[];
}
interface Scope {
  addEventListener(type: "install" | "activate", listener: (event: ExtendableEvent) => void): void;
  addEventListener(type: "fetch", listener: (event: FetchEvent) => void): void;
  addEventListener(type: "message", listener: (event: MessageEvent) => void): void;
  skipWaiting(): Promise<void>;
  clients: { claim(): Promise<void> };
  registration: { scope: string };
}

/** What a page asks: to be controlled, after it was reloaded without the cache; or which addresses are not kept. */
export type Message = { claim: true } | { missing: string[] };

const scope = self as unknown as Scope;
const base = scope.registration.scope;
const INDEX = new URL("site.json", base).href;
const CHECKED: RequestInit = { cache: "no-cache" }; // ask the server whether the browser's own copy is still right
const writing = new Set<Promise<void>>();
const CACHE = `unidiff-site ${base}`; // other sites of this host have their own

scope.addEventListener("install", (event) => event.waitUntil(install()));
scope.addEventListener("activate", (event) => event.waitUntil(scope.clients.claim()));
scope.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || !request.url.startsWith(base)) return;
  event.respondWith(isFixed(request.url) ? cacheFirst(event) : networkFirst(request));
});
scope.addEventListener("message", (event) => event.waitUntil(answer(event)));

async function answer({ data, ports }: MessageEvent): Promise<void> {
  if ("claim" in data) return scope.clients.claim();
  await Promise.all(writing);
  const kept = new Set((await (await caches.open(CACHE)).keys()).map(({ url }) => url));
  ports[0]!.postMessage(data.missing.filter((url) => !kept.has(url)));
}

async function install(): Promise<void> {
  const cache = await caches.open(CACHE);
  const response = await fetch(INDEX, CHECKED);
  const index = (await response.clone().json()) as SiteIndex;
  await cache.put(INDEX, response);
  await cache.addAll(["./", ...index.shell.filter((name) => name !== "sw.js")].map((name) => new Request(new URL(name, base), CHECKED)));
  await scope.skipWaiting();
}

/** Delete what an earlier version of the site left. */
async function prune(cache: Cache, index: SiteIndex): Promise<void> {
  const data = Object.entries(index.files).map(([name, { sha256 }]) => `${name}?${sha256.slice(0, 16)}`);
  const current = new Set([...data, ...index.shell, "", "site.json"].map((name) => new URL(name, base).href));
  for (const { url } of await cache.keys()) if (!current.has(url)) await cache.delete(url);
}

/** Keep an answer. Without room for it, the page works nevertheless, but not offline. */
async function keep(cache: Cache, address: string, response: Response): Promise<void> {
  try {
    await cache.put(address, response);
  } catch (error) {
    console.warn(`${address} is not kept: ${String(error)}`);
  }
}

/** Whether the content at an address never changes. */
function isFixed(url: string): boolean {
  return /^assets\/|\?[0-9a-f]{16}$/u.test(url.slice(base.length)); // the site may be in a folder of that name
}

/** The page reads a new answer while it is written, so that it can show progress. */
async function cacheFirst(event: FetchEvent): Promise<Response> {
  const { request } = event;
  const cache = await caches.open(CACHE);
  const cached = await cache.match(request.url);
  if (cached) return cached;
  const response = await fetch(request);
  if (response.ok) {
    const written = keep(cache, request.url, response.clone()).finally(() => writing.delete(written));
    writing.add(written);
    event.waitUntil(written);
  }
  return response;
}

async function networkFirst(request: Request): Promise<Response> {
  const cache = await caches.open(CACHE);
  const address = request.mode === "navigate" ? base : request.url; // the address of the page holds the search
  let response: Response;
  try {
    response = await fetch(request, CHECKED);
  } catch (error) {
    const cached = await cache.match(address);
    if (cached) return cached;
    throw error;
  }
  if (!response.ok) return response;
  if (address === INDEX) await prune(cache, (await response.clone().json()) as SiteIndex); // first: it makes room
  await keep(cache, address, response.clone());
  return response;
}
