// ONNX Runtime in the browser: WebGPU where the model and the browser have it, or WebAssembly with or without threads.

import type { InferenceSession, Tensor } from "onnxruntime-web";
import type { Model } from "../site/documents";
import { SiteError, type OnBytes, type SiteFiles } from "../site/files";

type Runtime = typeof import("onnxruntime-web");

export interface Engine {
  provider: "webgpu" | "wasm";
  threads: number;
}

export type Feeds = Record<string, { type: "float32"; data: Float32Array; dims: number[] } | { type: "int64"; data: BigInt64Array; dims: number[] }>;

const MAX_THREADS = 4; // more do not speed up graphs of this size

/** What describes an engine to a person. */
export function describeEngine({ provider, threads }: Engine): string {
  if (provider === "webgpu") return "WebGPU";
  return threads > 1 ? `WebAssembly, ${threads} threads` : "WebAssembly, 1 thread";
}

/** The fastest engine for a model. Threads need a page that is isolated from other origins by its headers. */
export async function chooseEngine(model: Model, asked: string | null): Promise<Engine> {
  const threads = globalThis.crossOriginIsolated ? Math.min(MAX_THREADS, navigator.hardwareConcurrency || 1) : 1;
  if (asked === "wasm" || !model.gpu) return { provider: "wasm", threads };
  const adapter = await gpuAdapter();
  if (!adapter || (adapter.isSoftware && asked !== "webgpu")) return { provider: "wasm", threads };
  if (model.precision === "fp16" && !adapter.features.has("shader-f16")) return { provider: "wasm", threads };
  return { provider: "webgpu", threads: 1 };
}

interface Adapter {
  features: { has(name: string): boolean };
  isSoftware: boolean;
}

async function gpuAdapter(): Promise<Adapter | null> {
  const gpu = (navigator as { gpu?: { requestAdapter(): Promise<GpuAdapter | null> } }).gpu;
  const adapter = await gpu?.requestAdapter().catch(() => null);
  return adapter ? { features: adapter.features, isSoftware: adapter.info?.isFallbackAdapter ?? adapter.info?.architecture === "swiftshader" } : null;
}

interface GpuAdapter {
  features: { has(name: string): boolean };
  info?: { architecture?: string; isFallbackAdapter?: boolean };
}

function decompressed(content: Uint8Array<ArrayBuffer>): Promise<ArrayBuffer> {
  const stream = new Blob([content]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** The graphs of a model. Each is loaded when it is first used, and stays loaded. */
export class Sessions {
  private readonly loaded = new Map<string, Promise<InferenceSession>>();
  private running: Promise<unknown> = Promise.resolve();

  private constructor(
    private readonly files: SiteFiles,
    private readonly model: Model,
    private readonly runtime: Runtime,
    readonly engine: Engine,
  ) {}

  static async start(files: SiteFiles, model: Model, engine: Engine, onBytes?: OnBytes): Promise<Sessions> {
    const runtime = (engine.provider === "webgpu" ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm")) as Runtime;
    const build = engine.provider === "webgpu" ? "webgpu" : "wasm";
    runtime.env.logLevel = "error";
    runtime.env.wasm.numThreads = engine.threads;
    runtime.env.wasm.wasmPaths = { mjs: files.url(`ort/${build}.mjs`) };
    runtime.env.wasm.wasmBinary = await decompressed(await files.bytes(`ort/${build}.bin`, onBytes));
    return new Sessions(files, model, runtime, engine);
  }

  /** Whether a graph is loaded, or being loaded. */
  has(graph: string): boolean {
    return this.loaded.has(graph);
  }

  load(graph: string, onBytes?: OnBytes): Promise<InferenceSession> {
    let session = this.loaded.get(graph);
    if (!session) {
      session = this.create(graph, onBytes);
      this.loaded.set(graph, session);
      session.catch(() => this.loaded.delete(graph)); // the next call tries again
    }
    return session;
  }

  /** Call a graph; returns its outputs by name. Calls run one after the other. */
  async run(graph: string, feeds: Feeds, outputs: string[]): Promise<Record<string, Float32Array>> {
    const session = await this.load(graph);
    const { Tensor } = this.runtime;
    const inputs = Object.fromEntries(Object.entries(feeds).map(([name, { type, data, dims }]) => [name, new Tensor(type, data as never, dims) as Tensor]));
    const turn = this.running.then(() => session.run(inputs, outputs));
    this.running = turn.catch(() => undefined);
    const results = await turn;
    const values = Object.fromEntries(outputs.map((name) => [name, (results[name]!.data as Float32Array).slice()]));
    for (const tensor of [...Object.values(inputs), ...Object.values(results)]) (tensor as Tensor).dispose();
    return values;
  }

  private async create(graph: string, onBytes?: OnBytes): Promise<InferenceSession> {
    const file = this.model.graphs[graph];
    if (!file) throw new SiteError(`the model ${this.model.name} has no ${graph}`);
    const bytes = await this.files.bytes(`model/${file}`, onBytes);
    return this.runtime.InferenceSession.create(bytes, { executionProviders: [this.engine.provider], logSeverityLevel: 3 });
  }
}
