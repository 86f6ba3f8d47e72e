import { beforeEach, describe, expect, it, vi } from "vitest";
import type { Message } from "../src/service/sw";

const BASE = "http://localhost/assets/shop/";
const HASH = "0123456789abcdef";
const index = {
  shell: ["index.html"],
  files: { "data/items.json": { bytes: 1, sha256: `${HASH}00` }, "ort/wasm.mjs": { bytes: 1, sha256: `${HASH}00` } },
};

/** A cache as a browser has it, which holds at most some answers. */
class Cache {
  readonly kept = new Map<string, Response>();

  constructor(private readonly room = Infinity) {}

  match = (address: string) => Promise.resolve(this.kept.get(address)?.clone());
  keys = () => Promise.resolve([...this.kept.keys()].map((url) => new Request(url)));
  delete = (address: string) => Promise.resolve(this.kept.delete(address));

  async put(address: string, response: Response): Promise<void> {
    if (this.kept.size >= this.room) throw new DOMException("full", "QuotaExceededError");
    this.kept.set(address, new Response(await response.arrayBuffer()));
  }
}

/** Start the service worker, and return functions that fetch through it and send it messages. */
async function started(cache: Cache, server: (url: string) => Response | undefined) {
  const listeners: Record<string, (event: unknown) => void> = {};
  const claims: true[] = [];
  vi.stubGlobal("self", {
    registration: { scope: BASE },
    clients: { claim: () => Promise.resolve(claims.push(true)) },
    addEventListener: (type: string, listener: (event: unknown) => void) => (listeners[type] = listener),
  });
  vi.stubGlobal("caches", { open: () => Promise.resolve(cache) });
  vi.stubGlobal("fetch", (request: Request | string) => {
    const response = server(typeof request === "string" ? request : request.url);
    return response ? Promise.resolve(response) : Promise.reject(new TypeError("no network"));
  });
  vi.stubGlobal("console", { ...console, warn: () => undefined });
  vi.resetModules();
  await import("../src/service/sw");
  const ask = (name: string) =>
    new Promise<Response>((resolve, reject) => {
      const respondWith = (response: Promise<Response>) => void response.then(resolve, reject);
      listeners.fetch!({ request: new Request(new URL(name, BASE)), respondWith, waitUntil: () => undefined });
    });
  const tell = (data: Message) =>
    new Promise<string[]>((resolve) => listeners.message!({ data, ports: [{ postMessage: resolve }], waitUntil: () => undefined }));
  return { ask, tell, claims };
}

const site = (url: string) => new Response(url.endsWith("site.json") ? JSON.stringify(index) : `content of ${url}`);

describe("the service worker", () => {
  beforeEach(() => vi.unstubAllGlobals());

  it("answers from the cache where an address names its content", async () => {
    const cache = new Cache();
    let requests = 0;
    const { ask } = await started(cache, (url) => (requests++, site(url)));
    for (let k = 0; k < 2; k++) expect(await (await ask(`data/items.json?${HASH}`)).text()).toContain("items.json");
    expect(requests).toBe(1);
  });

  it("passes on what it receives while it writes, and then says what it keeps", async () => {
    const name = `data/items.json?${HASH}`;
    let end = () => undefined as void;
    const body = new ReadableStream<Uint8Array>({
      start(controller) {
        controller.enqueue(new TextEncoder().encode("first"));
        end = () => controller.close();
      },
    });
    const { ask, tell } = await started(new Cache(), () => new Response(body));
    const reader = (await ask(name)).body!.getReader();
    expect(new TextDecoder().decode((await reader.read()).value)).toBe("first"); // the rest is not there yet
    const missing = tell({ missing: [`${BASE}${name}`, `${BASE}other?${HASH}`] });
    end();
    expect(await missing).toEqual([`${BASE}other?${HASH}`]);
  });

  it("says what it has no room for", async () => {
    const { ask, tell } = await started(new Cache(0), site);
    await ask(`data/items.json?${HASH}`);
    expect(await tell({ missing: [`${BASE}data/items.json?${HASH}`] })).toEqual([`${BASE}data/items.json?${HASH}`]);
  });

  it("takes control of a page that was reloaded without the cache", async () => {
    const { tell, claims } = await started(new Cache(), site);
    void tell({ claim: true });
    expect(claims).toEqual([true]);
  });

  it("never answers from the cache where it does not", async () => {
    const cache = new Cache();
    let version = 1;
    const { ask } = await started(cache, () => new Response(String(version)));
    for (const name of ["ort/wasm.mjs", "index.html"]) {
      version = 1;
      expect(await (await ask(name)).text()).toBe("1");
      version = 2;
      expect(await (await ask(name)).text()).toBe("2");
    }
  });

  it("answers although there is no room to keep the answer", async () => {
    const { ask } = await started(new Cache(0), site);
    expect(await (await ask(`data/items.json?${HASH}`)).text()).toContain("items.json");
    expect(((await (await ask("site.json")).json()) as typeof index).shell).toEqual(["index.html"]);
  });

  it("forgets what an earlier version of the site left, and answers without a network", async () => {
    const cache = new Cache();
    cache.kept.set(`${BASE}ort/wasm.mjs?fedcba9876543210`, new Response("old"));
    cache.kept.set(`${BASE}ort/wasm.mjs?${HASH}`, new Response("new"));
    let online = true;
    const { ask } = await started(cache, (url) => (online ? site(url) : undefined));
    await ask("site.json");
    expect([...cache.kept.keys()].sort()).toEqual([`${BASE}ort/wasm.mjs?${HASH}`, `${BASE}site.json`]);
    online = false;
    expect(((await (await ask("site.json")).json()) as typeof index).shell).toEqual(["index.html"]);
    await expect(ask("other.json")).rejects.toThrow("no network");
  });
});
