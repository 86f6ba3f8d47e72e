// The worker: one engine, called by the page.

import { Engine } from "./engine";
import type { Answer, Methods, Request } from "./protocol";

const post = (answer: Answer) => self.postMessage(answer);
const running = new Map<number, { aborted: boolean }>();
let engine: Engine | undefined;

function started(): Engine {
  if (!engine) throw new Error("the page is still loading");
  return engine;
}

type Handlers = { [M in keyof Methods]: (id: number, signal: { aborted: boolean }, ...args: Methods[M]["args"]) => Methods[M]["result"] | Promise<Methods[M]["result"]> };

const handlers: Handlers = {
  async start(id, _signal, base, asked) {
    engine = await Engine.start(base, asked, (event) => post({ id, event }));
    return engine.info;
  },
  thumbnails: (_id, _signal, ids) => started().thumbnails(ids),
  search: (_id, _signal, options) => started().search(options),
  browse: (_id, _signal, where, limit, offset) => started().browse(where, limit, offset),
  embedText: (_id, _signal, text) => started().embedText(text),
  embedImage: (_id, _signal, image) => started().embedImage(image),
  facets: (_id, _signal, column, where, limit) => started().facets(column, where, limit),
  generate: (id, signal, request) => started().generate(request, (event) => post({ id, event }), signal),
};

self.addEventListener("message", ({ data }: MessageEvent<Request>) => {
  if ("abort" in data) {
    const signal = running.get(data.id);
    if (signal) signal.aborted = true;
    return;
  }
  void answer(data.id, data.method, data.args);
});

async function answer(id: number, method: keyof Methods, args: unknown[]): Promise<void> {
  const signal = { aborted: false };
  running.set(id, signal);
  try {
    const handler = handlers[method] as (id: number, signal: { aborted: boolean }, ...args: unknown[]) => unknown;
    post({ id, result: await handler(id, signal, ...args) });
  } catch (error) {
    const { name, message } = error instanceof Error ? error : new Error(String(error));
    post({ id, error: { name, message } });
  } finally {
    running.delete(id);
  }
}
