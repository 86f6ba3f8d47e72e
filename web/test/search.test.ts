import { describe, expect, it } from "vitest";
import { mix, standardDeviation, type Parts } from "../src/search/mixing";
import { halfToFloat, standardized } from "../src/search/reranking";
import { VectorIndex } from "../src/search/vectors";
import { cases, difference } from "./cases";

const search = cases<{
  dim: number;
  vectors: number[][];
  codes: number[][];
  scales: number[];
  query: number[];
  order: number[];
  scores: number[];
  mixes: { parts: Record<string, number[]>; text_weight: number; mixed: number[] }[];
  gap: { sample: number[][]; caption_mean: number[]; neutral_mean: number[] };
  rerank: { scores: number[]; gains: number[]; combined: number[] };
  halves: number[];
  floats: number[];
}>("search");
const query = Float32Array.from(search.query);
const float = new VectorIndex(Float32Array.from(search.vectors.flat()), search.dim);

describe("search", () => {
  it("finds the items of a brute-force search, in its order", () => {
    expect(difference(float.scores(query), search.scores)).toBeLessThan(1e-6);
    expect(float.best(query, 40).map(({ index }) => index)).toEqual(search.order);
    expect(float.best(query, 5, 7).map(({ index }) => index)).toEqual(search.order.slice(7, 12));
    const even = search.order.filter((index) => index % 2 === 0);
    expect(float.best(query, 3, 0, (index) => index % 2 === 0).map(({ index }) => index)).toEqual(even.slice(0, 3));
  });

  it("keeps the best items of many, whatever their order", () => {
    const ascending = new VectorIndex(Float32Array.from({ length: 5000 }, (_, i) => i), 1);
    expect(ascending.best(Float32Array.of(1), 3).map(({ index }) => index)).toEqual([4999, 4998, 4997]);
    expect(ascending.best(Float32Array.of(0), 3).map(({ index }) => index)).toEqual([0, 1, 2]); // all are equal
  });

  it("has nearly the same scores with int8 vectors", () => {
    const codes = new VectorIndex(Int8Array.from(search.codes.flat()), search.dim, Float32Array.from(search.scales));
    expect(difference(codes.scores(query), search.scores)).toBeLessThan(0.01);
    expect(difference(codes.row(3), search.vectors[3]!)).toBeLessThan(0.004);
  });

  it("refuses a query of another size", () => {
    expect(() => float.scores(new Float32Array(3))).toThrow("3 dimensions instead of 24");
  });
});

describe("queries of several parts", () => {
  const gap = {
    sample: search.gap.sample.map((row) => Float32Array.from(row)),
    captionMean: Float32Array.from(search.gap.caption_mean),
    neutralMean: Float32Array.from(search.gap.neutral_mean),
  };

  it("are mixed as in Python", () => {
    for (const { parts, text_weight, mixed } of search.mixes) {
      const vectors = Object.fromEntries(Object.entries(parts).map(([part, vector]) => [part, Float32Array.from(vector)])) as Parts;
      expect(difference(mix(vectors, { text: text_weight }, gap), mixed), Object.keys(parts).join()).toBeLessThan(1e-5);
    }
  });
});

describe("re-ranking", () => {
  it("combines scores as in Python", () => {
    const { scores, gains, combined } = search.rerank;
    const [s, g] = [standardized(scores), standardized(gains)];
    expect(difference(s.map((value, k) => value + 1.5 * g[k]!), combined)).toBeLessThan(1e-9);
    expect(standardized([2, 2, 2])).toEqual([0, 0, 0]);
    expect(standardDeviation([])).toBe(0);
  });

  it("reads half precision", () => {
    expect(search.halves.map(halfToFloat)).toEqual(search.floats);
    expect([0x7c00, 0xfc00, 0x0001, 0x8000].map(halfToFloat)).toEqual([Infinity, -Infinity, 2 ** -24, -0]);
    expect(halfToFloat(0x7e00)).toBeNaN();
  });
});
