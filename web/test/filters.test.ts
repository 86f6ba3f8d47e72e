import { describe, expect, it } from "vitest";
import { FilterError, parseDate, parseFilter } from "../src/search/filters";
import type { Columns, Json } from "../src/site/documents";
import { cases } from "./cases";

describe("filters", () => {
  it("select the same items as Python's evaluation", () => {
    const all = cases<{ items: Columns[]; where: Json; matching: number[] }[]>("filters");
    expect(all.length).toBeGreaterThan(1000);
    for (const { items, where, matching } of all) {
      const predicate = parseFilter(where);
      const found = items.flatMap((columns, i) => (predicate(columns) ? [i] : []));
      expect(found, JSON.stringify({ where, items })).toEqual(matching);
    }
  });

  it("are valid where they are in Python", () => {
    const all = cases<{ where: Json; valid: boolean }[]>("parsing").filter(({ where }) => where !== null);
    expect(all.some(({ valid }) => valid)).toBe(true);
    for (const { where, valid } of all) {
      const parse = () => parseFilter(where);
      if (valid) expect(parse, JSON.stringify(where)).not.toThrow();
      else expect(parse, JSON.stringify(where)).toThrow(FilterError);
    }
  });

  it("refuse what would be slow or has no meaning here, with a reason", () => {
    let deep: Json = { price: 1 };
    for (let level = 0; level < 40; level++) deep = { not: deep };
    expect(() => parseFilter(deep)).toThrow("nested more than 32 deep");
    expect(() => parseFilter({ or: Array.from({ length: 1025 }, () => ({ price: 1 })) })).toThrow("at most 1024");
    expect(() => parseFilter({ "tags[1234567890]": "red" })).toThrow("at most 9 digits");
    expect(() => parseFilter({ price: { like: 1 } })).toThrow('Unknown operator "like" on "price"');
  });

  it("do not read the prototype of an object", () => {
    expect(parseFilter({ constructor: { exists: true } })({ price: 1 })).toBe(false);
    expect(parseFilter({ "price.toString": { exists: true } })({ price: {} })).toBe(false);
  });
});

describe("dates", () => {
  it("are points in time in UTC", () => {
    expect(parseDate("2024-05-01T12:30:00+02:00")).toBe(parseDate("2024-05-01T10:30:00Z"));
    expect(parseDate("2023-12-31 23:59:59.5")! + 500_000n).toBe(parseDate("2024-01-01"));
    expect(parseDate("2024-02-30")).toBeNull();
    expect(parseDate("9999-12-31T23:59:59.999999")! % 1_000_000n).toBe(999_999n);
  });
});
