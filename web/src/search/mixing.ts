// The query vector of several parts: the formula of unidiff_sdk/retrieval/mixing.py.

export type Part = "text" | "image" | "like" | "unlike";
export type Parts = Partial<Record<Part, Float32Array>>;
export type Weights = Partial<Record<Part, number>>;

const DEFAULT_WEIGHTS: Record<Part, number> = { text: 1, image: 1, like: 1, unlike: 0.5 };
const SMALLEST_SPREAD = 1e-6;
const SMALLEST_NORM = 1e-12;

export interface ModalityGap {
  sample: Float32Array[];
  captionMean: Float32Array;
  neutralMean: Float32Array;
}

export const dot = (a: Float32Array, b: Float32Array) => a.reduce((sum, value, i) => sum + value * b[i]!, 0);

/** The mean of some vectors as a unit vector. */
export function meanDirection(vectors: Float32Array[]): Float32Array {
  const sum = vectors.reduce((total, vector) => total.map((value, i) => value + vector[i]!), new Float32Array(vectors[0]!.length));
  const norm = Math.max(Math.hypot(...sum), SMALLEST_NORM);
  return sum.map((value) => value / norm);
}

/** The vector to search with. A query of one part is not mixed. */
export function mix(parts: Parts, weights: Weights, gap: ModalityGap): Float32Array {
  const given = Object.entries(parts) as [Part, Float32Array][];
  if (given.length === 1) {
    const [part, vector] = given[0]!;
    return part === "unlike" ? vector.map((value) => -value) : vector;
  }
  const vectors = given.map(([part, vector]) => (part === "text" ? projectOut(vector, gap) : vector));
  let spreads = vectors.map((vector) => spreadOf(vector, gap.sample));
  if (!spreads.every(Boolean)) spreads = spreads.map(() => 1); // the sample holds fewer than two different items
  const coefficients = given.map(([part], k) => ((part === "unlike" ? -1 : 1) * (weights[part] ?? DEFAULT_WEIGHTS[part])) / spreads[k]!);
  const positive = coefficients.filter((c) => c > 0).reduce((sum, c) => sum + c, 0);
  const scale = positive || coefficients.reduce((sum, c) => sum + Math.abs(c), 0);
  return vectors[0]!.map((_, i) => vectors.reduce((sum, vector, k) => sum + (coefficients[k]! / scale) * vector[i]!, 0));
}

/** Remove from a text embedding what all captions share and what neutral texts express. */
function projectOut(text: Float32Array, gap: ModalityGap): Float32Array {
  const neutral = gap.neutralMean.map((value, i) => value - gap.captionMean[i]!);
  const centered = text.map((value, i) => value - gap.captionMean[i]!);
  const along = dot(centered, neutral) / Math.max(dot(neutral, neutral), SMALLEST_NORM);
  return centered.map((value, i) => value - along * neutral[i]!);
}

function spreadOf(vector: Float32Array, sample: Float32Array[]): number {
  const scores = sample.map((row) => dot(row, vector));
  const spread = standardDeviation(scores);
  return spread > SMALLEST_SPREAD ? spread : 0;
}

export function standardDeviation(values: number[]): number {
  const mean = values.reduce((sum, value) => sum + value, 0) / Math.max(values.length, 1);
  return Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / Math.max(values.length, 1));
}
