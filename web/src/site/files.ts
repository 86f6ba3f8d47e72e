// The files of a site. Each is used only if it has the SHA-256 that `site.json` states.

import { sha256 } from "@noble/hashes/sha2";
import { parseJson } from "../../../unidiff_sdk/serve/static/json.js";
import type { SiteIndex } from "./documents";

export class SiteError extends Error {
  override name = "SiteError";
}

export type OnBytes = (received: number) => void;

export interface LoadProgress {
  received: number;
  total: number;
}

const INDEX = "site.json";
const VERSION = 1;

export class SiteFiles {
  constructor(
    readonly base: string,
    readonly index: SiteIndex,
  ) {}

  static async open(base: string): Promise<SiteFiles> {
    const index = JSON.parse(new TextDecoder().decode(await download(new URL(INDEX, base).href, INDEX, Infinity))) as SiteIndex;
    if (index.format !== "unidiff-site" || index.version !== VERSION) {
      throw new SiteError(`${INDEX} is not the index of a site of version ${VERSION}. Write the site again: unidiff web`);
    }
    return new SiteFiles(base, index);
  }

  size(name: string): number {
    return this.entry(name).bytes;
  }

  /** The address of a file. It names the content, so that caches never return an older one. */
  url(name: string): string {
    return new URL(`${name}?${this.entry(name).sha256.slice(0, 16)}`, this.base).href;
  }

  async bytes(name: string, onBytes?: OnBytes): Promise<Uint8Array<ArrayBuffer>> {
    const entry = this.entry(name);
    const content = await download(this.url(name), name, entry.bytes, onBytes);
    if (content.length !== entry.bytes || (await hexHash(content)) !== entry.sha256) {
      await forget(this.url(name));
      throw new SiteError(`${name} is damaged: its SHA-256 is not the one in ${INDEX}. Copy the whole site again.`);
    }
    return content;
  }

  async json<T>(name: string, onBytes?: OnBytes): Promise<T> {
    return parseJson(new TextDecoder().decode(await this.bytes(name, onBytes))) as T;
  }

  private entry(name: string) {
    const entry = this.index.files[name];
    if (!entry) throw new SiteError(`${name} is missing from ${INDEX}. Write the site again: unidiff web`);
    return entry;
  }
}

/** Adds up the bytes of several files. */
export class Progress {
  private readonly received = new Map<string, number>();
  private readonly total: number;

  constructor(
    private readonly files: SiteFiles,
    names: string[],
    private readonly emit: (progress: LoadProgress) => void,
  ) {
    this.total = names.reduce((sum, name) => sum + files.size(name), 0);
  }

  of(name: string): OnBytes {
    return (bytes) => {
      this.received.set(name, bytes);
      this.emit({ received: [...this.received.values()].reduce((sum, each) => sum + each, 0), total: this.total });
    };
  }

  /** A file is there, also if it was loaded before and so reported nothing. */
  done(name: string): void {
    this.of(name)(this.files.size(name));
  }
}

/** The content of a file. Of one that is longer than it should be, at most one chunk more than `bytes` is read. */
async function download(url: string, name: string, bytes: number, onBytes?: (received: number) => void): Promise<Uint8Array<ArrayBuffer>> {
  let response: Response;
  try {
    response = await fetch(url, name === INDEX ? { cache: "no-cache" } : {});
  } catch (error) {
    throw new SiteError(`${name} cannot be loaded (${String(error)}). Check the connection, and reload the page.`);
  }
  if (!response.ok || !response.body) throw new SiteError(`${name} cannot be loaded: the server answered ${response.status}.`);
  const parts: Uint8Array[] = [];
  let received = 0;
  const reader = response.body.getReader();
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    parts.push(read.value);
    received += read.value.length;
    if (received > bytes) {
      await reader.cancel();
      break;
    }
    onBytes?.(received);
  }
  return joined(parts, received);
}

function joined(parts: Uint8Array[], length: number): Uint8Array<ArrayBuffer> {
  const content = new Uint8Array(length);
  let start = 0;
  for (const part of parts) {
    content.set(part, start);
    start += part.length;
  }
  return content;
}

/** SHA-256 in hexadecimal. Browsers have it only in secure contexts: https, or localhost. */
export async function hexHash(content: Uint8Array<ArrayBuffer>): Promise<string> {
  const native = globalThis.crypto?.subtle as SubtleCrypto | undefined;
  const digest = native ? new Uint8Array(await native.digest("SHA-256", content)) : sha256(content);
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function forget(url: string): Promise<void> {
  if (!("caches" in globalThis)) return;
  for (const name of await caches.keys()) await (await caches.open(name)).delete(url);
}
