import { afterEach, describe, expect, it, vi } from "vitest";
import { readAddress, state } from "../src/page/state";
import { columnReader, quoted } from "../src/search/filters";

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

describe("a column", () => {
  it("is found by the name that a filter gives it", () => {
    for (const name of ["price", "width.cm", "sizes[0]", "tags[]", "not", "größe", "a b"]) {
      expect(columnReader(quoted(name))({ [name]: 1 }), name).toEqual([1]);
    }
  });
});
