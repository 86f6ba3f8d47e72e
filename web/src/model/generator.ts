// Prompts to images (unidiff_sdk/generation/generator.py): noise, denoising steps with guidance, decoding.

import type { GeneratorModel } from "../site/documents";
import type { Rgb } from "./images";
import { Noise } from "./noise";
import { advance, rowsOf } from "./sampling";
import type { Feeds, Sessions } from "./sessions";
import type { TextTokenizer } from "./tokenizer";

export interface GenerationOptions {
  prompt: string;
  negative_prompt: string;
  seed: number;
  steps: number;
  sampler: string;
  guidance_scale: number;
}

/** Called after each step; `preview` decodes the current estimate. */
export type OnStep = (done: number, total: number, preview: () => Promise<Rgb>) => Promise<void> | void;

const CACHED_PROMPTS = 64;

export class Generator {
  private readonly cached = new Map<string, Float32Array>();

  constructor(
    readonly model: GeneratorModel,
    private readonly sessions: Sessions,
    private readonly tokenizer: TextTokenizer,
  ) {}

  /** One image. `latents` replace the noise of the seed. */
  async generate(options: GenerationOptions, onStep?: OnStep, latents?: Float32Array): Promise<Rgb> {
    const table = this.model.samplers[options.sampler]?.[options.steps];
    if (!table) throw new Error(`${options.sampler} with ${options.steps} steps is not a sampler of this site`);
    const rows = rowsOf(table);
    const noise = new Noise(options.seed);
    const { channels, size } = this.model.latent;
    const count = channels * size * size;
    const guided = options.guidance_scale > 1;
    const prompts = guided ? [options.prompt, options.negative_prompt] : [options.prompt];
    const states = concatenated(await Promise.all(prompts.map((prompt) => this.states(prompt))));
    const sigma = Math.fround(table.init_noise_sigma);
    let x = (latents ?? noise.standardNormal(count)).map((value) => value * sigma);
    let x0 = new Float32Array(count);
    for (const [step, row] of rows.entries()) {
      const scaled = x.map((value) => value * row.input_scale);
      const sample = concatenated(prompts.map(() => scaled));
      const output = await this.predict(sample, row.timestep, states, prompts.length);
      const guidedOutput = guided ? mixGuidance(output, count, options.guidance_scale) : output;
      ({ x, x0 } = advance(row, x, guidedOutput, x0, row.next_from_noise ? noise.standardNormal(count) : null) as { x: Float32Array<ArrayBuffer>; x0: Float32Array<ArrayBuffer> });
      await onStep?.(step + 1, rows.length, () => this.decode(x0));
    }
    return this.decode(x);
  }

  /** The UNet's output for a batch at one timestep. */
  async predict(sample: Float32Array, timestep: number, states: Float32Array, batch: number): Promise<Float32Array> {
    const { channels, size } = this.model.latent;
    const tokens = this.model.max_tokens;
    const feeds: Feeds = {
      sample: { type: "float32", data: sample, dims: [batch, channels, size, size] },
      timestep: { type: "float32", data: new Float32Array(batch).fill(timestep), dims: [batch] },
      encoder_hidden_states: { type: "float32", data: states, dims: [batch, tokens, states.length / batch / tokens] },
    };
    return (await this.sessions.run("unet", feeds, ["out_sample"])).out_sample!;
  }

  /** Token states of a prompt: float32[tokens, width]. */
  async states(prompt: string): Promise<Float32Array> {
    const known = this.cached.get(prompt);
    if (known) return known;
    const { ids } = this.tokenizer.encode(prompt);
    const feeds: Feeds = { input_ids: { type: "int64", data: ids, dims: [1, ids.length] } };
    const states = (await this.sessions.run("text_encoder", feeds, ["last_hidden_state"])).last_hidden_state!;
    if (this.cached.size >= CACHED_PROMPTS) this.cached.delete(this.cached.keys().next().value!);
    this.cached.set(prompt, states);
    return states;
  }

  async decode(latents: Float32Array): Promise<Rgb> {
    const { channels, size, scale_factor, scaling_factor, shift_factor } = this.model.latent;
    const scaled = latents.map((value) => value / scaling_factor + shift_factor);
    const feeds: Feeds = { latent_sample: { type: "float32", data: scaled, dims: [1, channels, size, size] } };
    const { sample } = await this.sessions.run("vae_decoder", feeds, ["sample"]);
    return toRgb(sample!, size * scale_factor);
  }
}

/** Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): the prompt's prediction, then the negative one's. */
function mixGuidance(output: Float32Array, count: number, scale: number): Float32Array {
  return Float32Array.from({ length: count }, (_, i) => output[count + i]! + scale * (output[i]! - output[count + i]!));
}

function toRgb(sample: Float32Array, side: number): Rgb {
  const data = new Uint8Array(3 * side * side);
  for (let i = 0; i < side * side; i++) {
    for (let channel = 0; channel < 3; channel++) {
      const value = sample[channel * side * side + i]! * 0.5 + 0.5;
      if (!Number.isFinite(value)) throw new Error("the generated values are not finite; lower the guidance, or export the bundle at a higher precision");
      data[3 * i + channel] = Math.round(Math.min(1, Math.max(0, value)) * 255);
    }
  }
  return { width: side, height: side, data };
}

export function concatenated(parts: Float32Array[]): Float32Array<ArrayBuffer> {
  const joined = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let start = 0;
  for (const part of parts) {
    joined.set(part, start);
    start += part.length;
  }
  return joined;
}
