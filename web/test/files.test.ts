import { afterEach, describe, expect, it, vi } from "vitest";
import type { SiteIndex } from "../src/site/documents";
import { hexHash, Progress, SiteFiles, type LoadProgress } from "../src/site/files";

const content = new TextEncoder().encode("graph");
const other = new TextEncoder().encode("other");

async function site(served: Record<string, Uint8Array<ArrayBuffer>>): Promise<SiteFiles> {
  vi.stubGlobal("fetch", (url: string) => {
    const body = served[new URL(url).pathname.slice(1)];
    return Promise.resolve(body ? new Response(body) : new Response(null, { status: 404 }));
  });
  const files = {
    "model.onnx": { bytes: content.length, sha256: await hexHash(content) },
    "other.bin": { bytes: other.length, sha256: await hexHash(other) },
  };
  const index: SiteIndex = { format: "unidiff-site", version: 1, name: "shop", items: 1, dim: 1, vectors: "float32", shell: [], files };
  return new SiteFiles("http://localhost/", index);
}

afterEach(() => vi.unstubAllGlobals());

describe("files", () => {
  it("are returned if their hash is right, with progress", async () => {
    const files = await site({ "model.onnx": content });
    const progress: number[] = [];
    expect(await files.bytes("model.onnx", (received) => progress.push(received))).toEqual(content);
    expect(progress.at(-1)).toBe(content.length);
    expect(files.url("model.onnx")).toMatch(/^http:\/\/localhost\/model\.onnx\?[0-9a-f]{16}$/u);
  });

  it("are refused if their content is another, is missing, or is not listed", async () => {
    const files = await site({ "other.bin": content });
    await expect(files.bytes("other.bin")).rejects.toThrow("other.bin is damaged: its SHA-256 is not the one in site.json");
    await expect(files.bytes("model.onnx")).rejects.toThrow("the server answered 404");
    await expect(files.bytes("missing.bin")).rejects.toThrow("missing.bin is missing from site.json");
  });

  it("are not read further than their size", async () => {
    const files = await site({});
    let sent = 0;
    const endless = new ReadableStream<Uint8Array>({ pull: (controller) => (sent++, controller.enqueue(new Uint8Array(4))) });
    vi.stubGlobal("fetch", () => Promise.resolve(new Response(endless)));
    await expect(files.bytes("model.onnx")).rejects.toThrow("model.onnx is damaged");
    expect(sent).toBeLessThan(8);
  });

  it("report their bytes together, also those that were loaded before", async () => {
    const files = await site({ "model.onnx": content });
    const reported: LoadProgress[] = [];
    const progress = new Progress(files, ["model.onnx", "other.bin"], (each) => reported.push(each));
    await files.bytes("model.onnx", progress.of("model.onnx"));
    progress.done("other.bin");
    const total = content.length + other.length;
    expect(reported).toEqual([{ received: content.length, total }, { received: total, total }]);
  });

  it("have the same hash without the browser's own function", async () => {
    const native = await hexHash(content);
    vi.stubGlobal("crypto", {});
    expect(await hexHash(content)).toBe(native);
  });

  it("of another version are refused", async () => {
    await site({ "site.json": new TextEncoder().encode('{"format": "unidiff-site", "version": 2}') });
    await expect(SiteFiles.open("http://localhost/")).rejects.toThrow("not the index of a site of version 1");
  });
});
