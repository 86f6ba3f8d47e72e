import { describe, expect, it } from "vitest";
import { Thumbnails } from "../src/page/thumbnails";
import type { SiteFiles } from "../src/site/files";

/** Thumbnails of shards whose bytes are their number, and the shards that were loaded. */
function thumbnails(): { shown: Thumbnails; loaded: string[] } {
  const loaded: string[] = [];
  const bytes = (name: string) => {
    loaded.push(name);
    return name.includes("099") ? Promise.reject(new Error("gone")) : Promise.resolve(new Uint8Array(16).fill(Number(/\d+/u.exec(name)![0])));
  };
  return { shown: new Thumbnails({ bytes } as unknown as SiteFiles), loaded };
}

describe("thumbnails", () => {
  it("are parts of their shard", async () => {
    const { shown, loaded } = thumbnails();
    expect(await shown.content([12, 3, 5])).toEqual(new Uint8Array(5).fill(12));
    await shown.content([12, 8, 2]);
    expect(loaded).toEqual(["data/thumbnails/012.bin"]);
  });

  it("of at most eight shards are in memory, those used last", async () => {
    const { shown, loaded } = thumbnails();
    for (const shard of [0, 1, 2, 3, 4, 5, 6, 7, 0, 8]) await shown.content([shard, 0, 1]);
    expect(loaded.length).toBe(9);
    for (const shard of [0, 2, 3, 4, 5, 6, 7, 8]) await shown.content([shard, 0, 1]);
    expect(loaded.length).toBe(9);
    await shown.content([1, 0, 1]);
    expect(loaded.length).toBe(10);
  });

  it("are loaded again after a failure", async () => {
    const { shown, loaded } = thumbnails();
    for (let k = 0; k < 2; k++) await expect(shown.content([99, 0, 1])).rejects.toThrow("gone");
    expect(loaded.length).toBe(2);
  });
});
