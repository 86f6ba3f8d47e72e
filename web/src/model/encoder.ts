// Texts and images to unit vectors of one space (unidiff_sdk/inference/encoder.py).

import type { Model } from "../site/documents";
import { preprocess, type Rgb } from "./images";
import type { Sessions } from "./sessions";
import type { TextTokenizer } from "./tokenizer";

export interface EncodedText {
  vector: Float32Array;
  truncated: boolean;
}

const CACHED_TEXTS = 256;

export class Encoder {
  private readonly cached = new Map<string, EncodedText>();

  constructor(
    private readonly model: Model,
    private readonly sessions: Sessions,
    private readonly tokenizer: TextTokenizer,
  ) {}

  async encodeText(text: string): Promise<EncodedText> {
    const known = this.cached.get(text);
    if (known) return known;
    const { ids, truncated } = this.tokenizer.encode(text);
    const feeds = { input_ids: { type: "int64" as const, data: ids, dims: [1, ids.length] } };
    const { text_embeds } = await this.sessions.run(this.model.search.graph, feeds, ["text_embeds"]);
    const encoded = { vector: unit(text_embeds!), truncated };
    if (this.cached.size >= CACHED_TEXTS) this.cached.delete(this.cached.keys().next().value!);
    this.cached.set(text, encoded);
    return encoded;
  }

  async encodeImage(image: Rgb): Promise<Float32Array> {
    const { size } = this.model.image;
    const pixels = preprocess(image, this.model.image);
    const feeds = { pixel_values: { type: "float32" as const, data: pixels, dims: [1, 3, size, size] } };
    const { image_embeds } = await this.sessions.run("image_encoder", feeds, ["image_embeds"]);
    return unit(image_embeds!);
  }
}

export function unit(vector: Float32Array): Float32Array {
  const norm = Math.hypot(...vector);
  if (!Number.isFinite(norm) || norm === 0) throw new Error("an embedding is zero or not finite; export the bundle again at a higher precision");
  return vector.map((value) => value / norm);
}
