// A denoising step, by a row of a sampler's table (unidiff_sdk/generation/samplers.py).

import type { SamplerTable } from "../site/documents";

export const COLUMNS = [
  "timestep",
  "input_scale",
  "x0_from_x",
  "x0_from_output",
  "next_from_x",
  "next_from_x0",
  "next_from_previous_x0",
  "next_from_noise",
] as const;

export type Coefficients = Record<(typeof COLUMNS)[number], number>;

export const rowsOf = (table: SamplerTable): Coefficients[] =>
  table.rows.map((row) => Object.fromEntries(COLUMNS.map((name, k) => [name, Math.fround(row[k]!)])) as Coefficients);

/** The next latents and the estimate of the clean ones. All arrays have the same length. */
export function advance(
  row: Coefficients,
  x: Float32Array,
  output: Float32Array,
  previousX0: Float32Array,
  noise: Float32Array | null,
): { x: Float32Array; x0: Float32Array } {
  const x0 = x.map((value, i) => row.x0_from_x * value + row.x0_from_output * output[i]!);
  const next = x.map(
    (value, i) =>
      row.next_from_x * value +
      row.next_from_x0 * x0[i]! +
      row.next_from_previous_x0 * previousX0[i]! +
      (noise ? row.next_from_noise * noise[i]! : 0),
  );
  return { x: next, x0 };
}
