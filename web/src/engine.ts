// Everything that computes: the catalog, the encoders and the generator. It runs in a worker, so that the page stays
// responsive; `protocol.ts` is how the page calls it.

import { Encoder } from "./model/encoder";
import { Generator, type GenerationOptions, type OnStep } from "./model/generator";
import type { Rgb } from "./model/images";
import { chooseEngine, describeEngine, Sessions } from "./model/sessions";
import { TextTokenizer } from "./model/tokenizer";
import { Catalog, catalogFiles, type Hit, type Page, type SearchOptions } from "./search/catalog";
import { dot } from "./search/mixing";
import { Reranker } from "./search/reranking";
import type { Json, Model } from "./site/documents";
import { Progress, SiteError, SiteFiles, type LoadProgress } from "./site/files";

export interface Info {
  name: string;
  items: number;
  kinds: Record<string, string>;
  engine: string;
  /** What works without a network, once these files were loaded. */
  offline: string[];
  model: string;
  synthetic: boolean;
  reranks: boolean;
  generator: { side: number; steps: number; sampler: string; guidance_scale: number; samplers: Record<string, number[]> } | null;
}

export interface GenerateRequest extends Omit<GenerationOptions, "seed"> {
  n: number;
  seed: number;
  /** Standard normal noise to start from instead of that of the seed, for one image: float32[channels, height, width]. */
  latents?: Float32Array;
}

export interface GeneratedImage {
  image: Rgb;
  seed: number;
  score: number;
  nearest: Hit;
}

export interface StepProgress {
  done: number;
  total: number;
  preview: Rgb | null;
}

const MAX_IMAGES = 8;
const PREVIEW_EVERY = 3; // steps
const GENERATION_GRAPHS = ["unet", "vae_decoder", "image_encoder"];

export class Engine {
  private constructor(
    readonly info: Info,
    readonly catalog: Catalog,
    readonly encoder: Encoder,
    readonly generator: Generator | null,
    private readonly sessions: Sessions,
    private readonly files: SiteFiles,
    private readonly model: Model,
  ) {}

  /** Load what a search by text needs. */
  static async start(base: string, asked: string | null, onProgress: (progress: LoadProgress) => void): Promise<Engine> {
    const files = await SiteFiles.open(base);
    const model = await files.json<Model>("data/model.json");
    const engine = await chooseEngine(model, asked);
    const runtime = `ort/${engine.provider}.bin`;
    const graph = `model/${model.graphs[model.search.graph]}`;
    const progress = new Progress(files, [runtime, graph, ...catalogFiles(files)], onProgress);
    const sessions = await Sessions.start(files, model, engine, progress.of(runtime));
    const tokenizer = await loadTokenizer(files, model.search.tokenizer, model.search.max_tokens);
    const encoder = new Encoder(model, sessions, tokenizer);
    await sessions.load(model.search.graph, progress.of(graph));
    const { generator: described } = model;
    const generator = described ? new Generator(described, sessions, await loadTokenizer(files, described.tokenizer, described.max_tokens)) : null;
    let reranker: Promise<Reranker> | undefined;
    const open = () => {
      if (!model.rerank || !generator) throw new SiteError("this site was written without --rerank");
      return (reranker ??= Reranker.open(files, model.rerank, generator));
    };
    const catalog = await Catalog.open(files, model, encoder, open, progress);
    const info: Info = {
      name: files.index.name,
      items: catalog.items.ids.length,
      kinds: catalog.items.kinds,
      engine: describeEngine(engine),
      offline: Object.keys(files.index.files).filter((name) => !name.startsWith("ort/") || name.startsWith(`ort/${engine.provider}.`)),
      model: `${model.name}, ${model.precision}`,
      synthetic: model.synthetic,
      reranks: model.rerank !== null,
      generator: described && {
        side: described.latent.size * described.latent.scale_factor,
        steps: described.steps,
        sampler: described.sampler,
        guidance_scale: described.guidance_scale,
        samplers: Object.fromEntries(Object.entries(described.samplers).map(([name, tables]) => [name, Object.keys(tables).map(Number)])),
      },
    };
    return new Engine(info, catalog, encoder, generator, sessions, files, model);
  }

  search(options: SearchOptions): Promise<Page> {
    return this.catalog.search(options);
  }

  async embedText(text: string): Promise<Float32Array> {
    return (await this.encoder.encodeText(text)).vector;
  }

  embedImage(image: Rgb): Promise<Float32Array> {
    return this.encoder.encodeImage(image);
  }

  browse(where: Json | undefined, limit: number, offset: number): Page {
    return this.catalog.browse(where, limit, offset);
  }

  facets(column: string, where: Json | undefined, limit: number) {
    return this.catalog.facets(column, where, limit);
  }

  thumbnails(ids: string[]) {
    return this.catalog.thumbnails(ids);
  }

  /** Images of a prompt, those that the encoder finds closest to it first. */
  async generate(request: GenerateRequest, emit: (progress: StepProgress | LoadProgress) => void, signal: { aborted: boolean }): Promise<GeneratedImage[]> {
    const { generator } = this;
    if (!generator) throw new SiteError("the model of this site does not generate images");
    const n = Math.min(MAX_IMAGES, Math.max(1, request.n));
    await this.load(GENERATION_GRAPHS, emit);
    const { vector } = await this.encoder.encodeText(request.prompt);
    const images: GeneratedImage[] = [];
    for (let k = 0; k < n; k++) {
      const seed = request.seed + k;
      const onStep: OnStep = async (done, total, preview) => {
        if (signal.aborted) throw new DOMException("Stopped.", "AbortError");
        const shown = done % PREVIEW_EVERY === 0 && done < total ? await preview() : null;
        emit({ done: k * total + done, total: n * total, preview: shown });
      };
      const image = await generator.generate({ ...request, seed }, onStep, request.latents);
      const embedding = await this.encoder.encodeImage(image);
      images.push({ image, seed, score: dot(embedding, vector), nearest: this.catalog.nearest(embedding) });
    }
    return images.sort((a, b) => b.score - a.score);
  }

  private async load(graphs: string[], emit: (progress: LoadProgress) => void): Promise<void> {
    const missing = graphs.filter((graph) => !this.sessions.has(graph)).map((graph) => ({ graph, file: `model/${this.model.graphs[graph]}` }));
    const progress = new Progress(this.files, missing.map(({ file }) => file), emit);
    for (const { graph, file } of missing) {
      await this.sessions.load(graph, progress.of(file));
      progress.done(file);
    }
  }
}

async function loadTokenizer(files: SiteFiles, folder: string, maxTokens: number): Promise<TextTokenizer> {
  const [json, config] = await Promise.all(["tokenizer", "tokenizer_config"].map((name) => files.json<object>(`model/${folder}/${name}.json`)));
  return new TextTokenizer(json!, config!, maxTokens);
}
