import { describe, expect, it } from "vitest";
import { preprocess } from "../src/model/images";
import { Noise } from "../src/model/noise";
import { advance, rowsOf } from "../src/model/sampling";
import { TextTokenizer } from "../src/model/tokenizer";
import type { ImageInput, SamplerTable } from "../src/site/documents";
import { cases, difference } from "./cases";

describe("the tokenizer", () => {
  const { tokenizer, config, max_tokens, texts, ids, too_long } = cases<{
    tokenizer: object;
    config: object;
    max_tokens: number;
    texts: string[];
    ids: number[][];
    too_long: boolean[];
  }>("tokens");
  const ours = new TextTokenizer(tokenizer, config, max_tokens);

  it("returns the ids of Python's tokenizers", () => {
    texts.forEach((text, i) => {
      const { ids: found, truncated } = ours.encode(text);
      expect(Array.from(found, Number), JSON.stringify(text)).toEqual(ids[i]);
      expect(truncated, JSON.stringify(text)).toBe(too_long[i]);
    });
  });

  it("needs a pad token", () => {
    expect(() => new TextTokenizer(tokenizer, { pad_token: "[PAD]" }, max_tokens)).toThrow("no pad token");
  });
});

describe("images", () => {
  it("become the pixels that Pillow makes of them", () => {
    for (const { width, height, pixels, input, expected } of cases<{ width: number; height: number; pixels: number[]; input: ImageInput; expected: number[] }[]>("images")) {
      const found = preprocess({ width, height, data: Uint8Array.from(pixels) }, input);
      expect(difference(found, expected), `${width} x ${height}, ${JSON.stringify(input)}`).toBeLessThan(1e-6);
    }
  });
});

describe("noise", () => {
  it("is that of NumPy", () => {
    for (const { seed, count, head, every_97 } of cases<{ seed: number; count: number; head: number[]; every_97: number[] }[]>("noise")) {
      const values = new Noise(seed).standardNormal(count);
      expect(difference(values.subarray(0, head.length), head)).toBe(0);
      expect(difference(values.filter((_, i) => i % 97 === 0), every_97)).toBeLessThan(1e-6); // log1p and exp differ in the last digit
    }
  });
});

describe("samplers", () => {
  type Trajectory = { start: number[]; outputs: number[][]; noises: number[][]; end: number[]; x0: number[] };
  const { tables, exact, trajectories } = cases<{
    tables: Record<string, Record<string, SamplerTable>>;
    exact: Record<string, Record<string, number[][]>>;
    trajectories: Record<string, Trajectory>;
  }>("samplers");

  it("have the float32 coefficients of Python", () => {
    for (const [name, bySteps] of Object.entries(exact)) {
      for (const [steps, rows] of Object.entries(bySteps)) {
        const found = tables[name]![steps]!.rows.map((row) => [...new Uint32Array(Float32Array.from(row).buffer)]);
        expect(found, `${name}, ${steps} steps`).toEqual(rows);
      }
    }
  });

  it("take the steps of Python", () => {
    for (const [name, { start, outputs, noises, end, x0: expected }] of Object.entries(trajectories)) {
      let x = Float32Array.from(start);
      let x0 = new Float32Array(start.length);
      rowsOf(tables[name]!["8"]!).forEach((row, step) => {
        ({ x, x0 } = advance(row, x, Float32Array.from(outputs[step]!), x0, Float32Array.from(noises[step]!)) as { x: typeof x; x0: typeof x0 });
      });
      expect(difference(x, end), name).toBeLessThan(1e-4);
      expect(difference(x0, expected), name).toBeLessThan(1e-4);
    }
  });
});
