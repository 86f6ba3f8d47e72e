// Re-rank the encoder's best items with the generator: the formula of unidiff_sdk/retrieval/reranking/reranker.py.

import { concatenated, type Generator } from "../model/generator";
import type { RerankModel } from "../site/documents";
import type { SiteFiles } from "../site/files";
import { standardDeviation } from "./mixing";
import type { Scored } from "./vectors";

export interface Reranked extends Scored {
  rerank_score: number;
  gain: number;
}

const SMALLEST_SPREAD = 1e-6;
const SMALLEST_ERROR = 1e-12;

export class Reranker {
  private constructor(
    readonly model: RerankModel,
    private readonly generator: Generator,
    private readonly latents: Uint16Array,
    private readonly unconditional: Float32Array,
    private readonly noise: Float32Array,
  ) {}

  static async open(files: SiteFiles, model: RerankModel, generator: Generator): Promise<Reranker> {
    const [latents, errors, noise] = await Promise.all(["latents", "errors", "noise"].map((name) => files.bytes(`data/${name}.bin`)));
    return new Reranker(model, generator, new Uint16Array(latents!.buffer), new Float32Array(errors!.buffer), new Float32Array(noise!.buffer));
  }

  /** The candidates in their new order. */
  async rerank(text: string, candidates: Scored[]): Promise<Reranked[]> {
    const states = await this.generator.states(text);
    const gains: number[] = [];
    for (const { index } of candidates) gains.push(await this.gain(index, states));
    const [scores, standardizedGains] = [standardized(candidates.map(({ score }) => score)), standardized(gains)];
    return candidates
      .map((candidate, k) => ({ ...candidate, gain: gains[k]!, rerank_score: scores[k]! + this.model.weight * standardizedGains[k]! }))
      .sort((a, b) => b.rerank_score - a.rerank_score || a.index - b.index);
  }

  /** The share by which the text lowers the denoising error of an image. */
  private async gain(index: number, states: Float32Array): Promise<number> {
    const count = this.noise.length / this.model.timesteps.length;
    const clean = Float32Array.from(this.latents.subarray(index * count, (index + 1) * count), halfToFloat);
    const errors: number[] = [];
    for (const [k, timestep] of this.model.timesteps.entries()) {
      const noise = this.noise.subarray(k * count, (k + 1) * count);
      const [signal, noisy] = [Math.fround(this.model.signal[k]!), Math.fround(this.model.noise[k]!)];
      const sample = clean.map((value, i) => signal * value + noisy * noise[i]!);
      const target = this.model.velocity ? clean.map((value, i) => signal * noise[i]! - noisy * value) : noise;
      const output = await this.generator.predict(concatenated([sample]), timestep, states, 1);
      errors.push(output.reduce((sum, value, i) => sum + (value - target[i]!) ** 2, 0) / count);
    }
    const start = index * this.model.timesteps.length;
    const without = mean([...this.unconditional.subarray(start, start + this.model.timesteps.length)]);
    return (without - mean(errors)) / Math.max(without, SMALLEST_ERROR);
  }
}

const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;

export function standardized(values: number[]): number[] {
  const [center, spread] = [mean(values), standardDeviation(values)];
  return values.map((value) => (spread > SMALLEST_SPREAD ? (value - center) / spread : 0));
}

/** A number of half precision, from its bits. */
export function halfToFloat(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
