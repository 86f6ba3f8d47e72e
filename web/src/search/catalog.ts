// The items of a site: search, browse, and counts of values, with filters.

import type { Encoder } from "../model/encoder";
import type { Rgb } from "../model/images";
import type { Columns, Id, Items, Json, Model, ThumbnailPosition } from "../site/documents";
import type { Progress, SiteFiles } from "../site/files";
import { positionsOf } from "../site/ids";
import { columnReader, elementsOf, parseFilter, type Predicate } from "./filters";
import { meanDirection, mix, type ModalityGap, type Parts, type Weights } from "./mixing";
import type { Reranked, Reranker } from "./reranking";
import { VectorIndex, type Scored } from "./vectors";

export interface Hit {
  id: Id;
  text: string | null;
  columns: Columns;
  thumbnail: ThumbnailPosition;
  score: number;
  gain?: number;
}

export interface Page {
  hits: Hit[];
  more: boolean;
  took_ms: number;
  /** The text is longer than the encoder reads. */
  truncated: boolean;
}

export interface SearchOptions {
  text?: string;
  image?: Rgb;
  /** Texts of ids (`idText`). */
  like?: string[];
  unlike?: string[];
  where?: Json;
  weights?: Weights;
  limit: number;
  offset: number;
  rerank?: boolean;
}

const [ITEMS, VECTORS, SCALES] = ["data/items.json", "data/vectors.bin", "data/scales.bin"] as const;

/** The files that `Catalog.open` loads. */
export const catalogFiles = ({ index }: SiteFiles): string[] => [ITEMS, VECTORS, ...(index.vectors === "int8" ? [SCALES] : [])];

export class Catalog {
  private readonly positionOf: (id: string) => number | undefined;
  private readonly gap: ModalityGap;

  constructor(
    readonly items: Items,
    private readonly index: VectorIndex,
    mixing: Model["mixing"],
    private readonly encoder: Encoder,
    private readonly reranker: () => Promise<Reranker>,
  ) {
    this.positionOf = positionsOf(items.ids);
    this.gap = {
      sample: Array.from({ length: mixing.sample }, (_, row) => index.row(row)),
      captionMean: Float32Array.from(mixing.caption_mean),
      neutralMean: Float32Array.from(mixing.neutral_mean),
    };
  }

  static async open(files: SiteFiles, model: Model, encoder: Encoder, reranker: () => Promise<Reranker>, progress: Progress): Promise<Catalog> {
    const items = await files.json<Items>(ITEMS, progress.of(ITEMS));
    const bytes = await files.bytes(VECTORS, progress.of(VECTORS));
    const { dim, vectors } = files.index;
    const scales = vectors === "int8" ? new Float32Array((await files.bytes(SCALES, progress.of(SCALES))).buffer) : null;
    const matrix = scales ? new Int8Array(bytes.buffer) : new Float32Array(bytes.buffer);
    return new Catalog(items, new VectorIndex(matrix, dim, scales), model.mixing, encoder, reranker);
  }

  async search(options: SearchOptions): Promise<Page> {
    const started = performance.now();
    const matches = this.matcher(options.where);
    const { parts, truncated } = await this.parts(options);
    const query = mix(parts, options.weights ?? {}, this.gap);
    const excluded = new Set([...(options.like ?? []), ...(options.unlike ?? [])].map((id) => this.position(id)));
    const wanted = (index: number) => !excluded.has(index) && matches(index);
    const { limit, offset } = options;
    const found = options.rerank && options.text ? await this.reranked(options.text, query, limit, offset, wanted) : this.index.best(query, limit + 1, offset, wanted);
    return { hits: found.slice(0, limit).map((scored) => this.hit(scored)), more: found.length > limit, took_ms: performance.now() - started, truncated };
  }

  browse(where: Json | undefined, limit: number, offset: number): Page {
    const started = performance.now();
    const matches = this.matcher(where);
    const found: number[] = [];
    for (let index = 0; index < this.items.ids.length && found.length <= offset + limit; index++) if (matches(index)) found.push(index);
    const hits = found.slice(offset, offset + limit).map((index) => this.hit({ index, score: 1 }));
    return { hits, more: found.length > offset + limit, took_ms: performance.now() - started, truncated: false };
  }

  /** The number of items with each value of a column, the most frequent first. */
  facets(column: string, where: Json | undefined, limit: number): { value: string | boolean; count: number }[] {
    const read = columnReader(column);
    const matches = this.matcher(where);
    const counts = new Map<string | boolean, number>();
    this.items.columns.forEach((columns, index) => {
      if (!matches(index)) return;
      for (const each of new Set(elementsOf(read(columns)))) {
        if (typeof each === "string" || typeof each === "boolean") counts.set(each, (counts.get(each) ?? 0) + 1);
      }
    });
    const sorted = [...counts].sort(([a, n], [b, m]) => m - n || (String(a) < String(b) ? -1 : 1));
    return sorted.slice(0, limit).map(([value, count]) => ({ value, count }));
  }

  /** The hit of an item, such as the one nearest to a vector. */
  nearest(vector: Float32Array): Hit {
    return this.hit(this.index.best(vector, 1)[0]!);
  }

  /** The thumbnails of some ids, null for one that no item has. */
  thumbnails(ids: string[]): (ThumbnailPosition | null)[] {
    return ids.map((id) => this.items.thumbnails[this.positionOf(id) ?? -1] ?? null);
  }

  private async parts(options: SearchOptions): Promise<{ parts: Parts; truncated: boolean }> {
    const parts: Parts = {};
    let truncated = false;
    if (options.text) ({ vector: parts.text, truncated } = await this.encoder.encodeText(options.text));
    if (options.image) parts.image = await this.encoder.encodeImage(options.image);
    for (const part of ["like", "unlike"] as const) {
      const ids = options[part] ?? [];
      if (ids.length) parts[part] = meanDirection(ids.map((id) => this.index.row(this.position(id))));
    }
    return { parts, truncated };
  }

  /** Re-ranked candidates first, then the others in the order of the encoder. */
  private async reranked(text: string, query: Float32Array, limit: number, offset: number, wanted: (index: number) => boolean): Promise<Scored[]> {
    const reranker = await this.reranker();
    const { candidates } = reranker.model;
    const best = this.index.best(query, Math.max(candidates, offset + limit + 1), 0, wanted);
    return [...(await reranker.rerank(text, best.slice(0, candidates))), ...best.slice(candidates)].slice(offset, offset + limit + 1);
  }

  private matcher(where: Json | undefined): (index: number) => boolean {
    if (where === undefined || where === null) return () => true;
    const predicate: Predicate = parseFilter(where);
    const { columns, ids, texts } = this.items;
    return (index) => predicate({ ...columns[index]!, id: ids[index]!, ...(texts[index] === null ? {} : { text: texts[index]! }) });
  }

  private position(id: string): number {
    const position = this.positionOf(id);
    if (position === undefined) throw new Error(`this catalog has no item ${id}`);
    return position;
  }

  private hit(scored: Scored | Reranked): Hit {
    const { index, score } = scored;
    const { ids, texts, columns, thumbnails } = this.items;
    return { id: ids[index]!, text: texts[index]!, columns: columns[index]!, thumbnail: thumbnails[index]!, score, ...("gain" in scored ? { gain: scored.gain } : {}) };
  }
}
