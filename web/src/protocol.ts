// Calls from the page to the worker: a request has a number, and its answers carry the same one.

import type { Engine, GeneratedImage, GenerateRequest, Info, StepProgress } from "./engine";
import type { Rgb } from "./model/images";
import type { Page, SearchOptions } from "./search/catalog";
import type { Json, ThumbnailPosition } from "./site/documents";
import type { LoadProgress } from "./site/files";

/** The methods of the worker: arguments, events, result. */
export interface Methods {
  start: { args: [base: string, engine: string | null]; event: LoadProgress; result: Info };
  thumbnails: { args: [ids: string[]]; event: never; result: (ThumbnailPosition | null)[] };
  search: { args: [options: SearchOptions]; event: never; result: Page };
  browse: { args: [where: Json | undefined, limit: number, offset: number]; event: never; result: Page };
  embedText: { args: [text: string]; event: never; result: Float32Array };
  embedImage: { args: [image: Rgb]; event: never; result: Float32Array };
  facets: { args: [column: string, where: Json | undefined, limit: number]; event: never; result: ReturnType<Engine["facets"]> };
  generate: { args: [request: GenerateRequest]; event: StepProgress | LoadProgress; result: GeneratedImage[] };
}

export type Method = keyof Methods;

export type Request = { id: number; method: Method; args: unknown[] } | { id: number; abort: true };
export type Answer = { id: number; event: unknown } | { id: number; result: unknown } | { id: number; error: { name: string; message: string } };

/** The page's side. */
export class Client {
  private readonly waiting = new Map<number, { resolve: (value: unknown) => void; reject: (error: Error) => void; onEvent: (event: unknown) => void }>();
  private next = 0;

  constructor(private readonly worker: Worker) {
    worker.addEventListener("message", ({ data }: MessageEvent<Answer>) => this.receive(data));
    worker.addEventListener("error", (event) => {
      const error = new Error(event.message || "The worker of this page could not be started.");
      for (const { reject } of this.waiting.values()) reject(error);
      this.waiting.clear();
    });
  }

  call<M extends Method>(
    method: M,
    args: Methods[M]["args"],
    { onEvent, signal }: { onEvent?: (event: Methods[M]["event"]) => void; signal?: AbortSignal } = {},
  ): Promise<Methods[M]["result"]> {
    const id = this.next++;
    signal?.addEventListener("abort", () => this.post({ id, abort: true }), { once: true });
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve: resolve as (value: unknown) => void, reject, onEvent: (onEvent ?? (() => undefined)) as (event: unknown) => void });
      this.post({ id, method, args });
    });
  }

  private post(request: Request): void {
    this.worker.postMessage(request);
  }

  private receive(answer: Answer): void {
    const call = this.waiting.get(answer.id);
    if (!call) return;
    if ("event" in answer) return call.onEvent(answer.event);
    this.waiting.delete(answer.id);
    if ("result" in answer) return call.resolve(answer.result);
    const error = new Error(answer.error.message);
    error.name = answer.error.name;
    call.reject(error);
  }
}
