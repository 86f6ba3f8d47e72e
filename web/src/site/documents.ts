// The JSON documents of a site, as `unidiff web` writes them (unidiff_sdk/cli/servers/site).

export interface FileEntry {
  bytes: number;
  sha256: string;
}

/** `site.json`. */
export interface SiteIndex {
  format: "unidiff-site";
  version: number;
  name: string;
  items: number;
  dim: number;
  vectors: "float32" | "int8";
  shell: string[];
  files: Record<string, FileEntry>;
}

/** A sampler: one row of coefficients for each step (unidiff_sdk/generation/samplers.py). */
export interface SamplerTable {
  rows: number[][];
  init_noise_sigma: number;
}

export interface ImageInput {
  size: number;
  mean: number[];
  std: number[];
  fit: "crop" | "pad";
  resize: { side: number; squash: boolean; interpolation: string } | null;
}

export interface GeneratorModel {
  tokenizer: string;
  max_tokens: number;
  latent: { channels: number; size: number; scale_factor: number; scaling_factor: number; shift_factor: number };
  sampler: string;
  steps: number;
  guidance_scale: number;
  samplers: Record<string, Record<string, SamplerTable>>;
}

export interface RerankModel {
  timesteps: number[];
  candidates: number;
  weight: number;
  velocity: boolean;
  signal: number[];
  noise: number[];
}

/** `data/model.json`. */
export interface Model {
  name: string;
  precision: "fp32" | "fp16" | "int8";
  synthetic: boolean;
  gpu: boolean;
  graphs: Record<string, string>;
  search: { graph: string; tokenizer: string; max_tokens: number; dim: number };
  image: ImageInput;
  generator: GeneratorModel | null;
  mixing: { caption_mean: number[]; neutral_mean: number[]; sample: number };
  rerank: RerankModel | null;
}

/** A large integer is a bigint (`parseJson`). */
export type Json = null | boolean | number | bigint | string | Json[] | { [name: string]: Json };
export type Columns = { [name: string]: Json };
export type Id = string | number | bigint;

/** Where a thumbnail is. */
export type ThumbnailPosition = [shard: number, start: number, bytes: number];

/** `data/items.json`. */
export interface Items {
  ids: Id[];
  texts: (string | null)[];
  columns: Columns[];
  kinds: Record<string, string>;
  thumbnails: ThumbnailPosition[];
}
