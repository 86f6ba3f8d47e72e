// The vectors of all items as one matrix, searched by dot product.

export interface Scored {
  index: number;
  score: number;
}

export class VectorIndex {
  /** @param scales - with int8 rows: a vector is its row times its scale */
  constructor(
    private readonly matrix: Float32Array | Int8Array,
    readonly dim: number,
    private readonly scales: Float32Array | null = null,
  ) {}

  get size(): number {
    return this.matrix.length / this.dim;
  }

  row(index: number): Float32Array {
    const scale = this.scales?.[index] ?? 1;
    return Float32Array.from(this.matrix.subarray(index * this.dim, (index + 1) * this.dim), (value) => value * scale);
  }

  /** The dot product of every item with a vector. */
  scores(query: Float32Array): Float32Array {
    const { matrix, dim, scales, size } = this;
    if (query.length !== dim) throw new Error(`the query has ${query.length} dimensions instead of ${dim}`);
    const scores = new Float32Array(size);
    for (let item = 0, start = 0; item < size; item++, start += dim) {
      let sum = 0;
      for (let k = 0; k < dim; k++) sum += matrix[start + k]! * query[k]!;
      scores[item] = scales ? sum * scales[item]! : sum;
    }
    return scores;
  }

  /** The best items in the order of their scores, equal ones in the order of the items. */
  best(query: Float32Array, limit: number, offset = 0, matches: (index: number) => boolean = () => true): Scored[] {
    const scores = this.scores(query);
    const wanted = limit + offset;
    let kept: Scored[] = [];
    let lowest = -Infinity;
    const order = (a: Scored, b: Scored) => b.score - a.score || a.index - b.index;
    for (let index = 0; index < scores.length; index++) {
      const score = scores[index]!;
      if ((kept.length >= wanted && score <= lowest) || !matches(index)) continue;
      kept.push({ index, score });
      if (kept.length >= 2 * wanted + 64) {
        kept = kept.sort(order).slice(0, wanted);
        lowest = kept[wanted - 1]!.score;
      }
    }
    return kept.sort(order).slice(offset, wanted);
  }
}
