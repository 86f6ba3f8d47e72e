import { afterEach, describe, expect, it, vi } from "vitest";
import { readAddress, state } from "../src/page/state";
import { columnReader, quoted } from "../src/search/filters";
import type { Id } from "../src/site/documents";
import { idText, positionsOf } from "../src/site/ids";

afterEach(() => vi.unstubAllGlobals());

describe("the address", () => {
  it("holds the filter, and is read although someone edited it", () => {
    for (const [where, read] of [
      ['{"price":{"lt":8}}', { price: { lt: 8 } }],
      ["null", {}],
      ["[1]", {}],
      ["7", {}],
      ["{", {}],
    ] as const) {
      vi.stubGlobal("location", { search: `?where=${encodeURIComponent(where)}` });
      readAddress();
      expect(state.where, where).toEqual(read);
    }
  });
});

describe("ids", () => {
  const ids: Id[] = [7, "7", -7, "-7", 9007199254740993n, "9007199254740993", "D-17", '"7"', '"', "007", "42"];

  it("differ in the address if they differ", () => {
    expect(new Set(ids.map(idText)).size).toBe(ids.length);
    const position = positionsOf(ids);
    ids.forEach((id, k) => expect(position(idText(id)), String(id)).toBe(k));
  });

  it("need no quotes where they are unique", () => {
    const position = positionsOf(ids);
    expect(position("42")).toBe(ids.indexOf("42"));
    expect(position("D-17")).toBe(ids.indexOf("D-17"));
    expect(position("43")).toBeUndefined();
  });
});

describe("a column", () => {
  it("is found by the name that a filter gives it", () => {
    for (const name of ["price", "width.cm", "sizes[0]", "tags[]", "not", "größe", "a b"]) {
      expect(columnReader(quoted(name))({ [name]: 1 }), name).toEqual([1]);
    }
  });
});
