// NumPy's standard normal noise of a seed: Philox 4x64-10 (Salmon et al. 2011) and the ziggurat method (Marsaglia and
// Tsang 2000) with 256 layers in float32. So a seed gives the same image in the browser as in Python.

const MASK = (1n << 64n) - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n] as const;
const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn] as const;
const ROUNDS = 10;

const LAYERS = 256;
const TAIL = 3.6541528853610087963519472518; // where the tail of the distribution starts
const AREA = 0.0049286732339746519; // of each layer
const SCALE = 2 ** 23;

export class Noise {
  private readonly key: readonly [bigint, bigint];
  private counter = 0n;
  private words: number[] = []; // 32 bits each, the next one last

  /** The generator of `np.random.Philox(key=[seed, stream])`. */
  constructor(seed: number | bigint, stream: number | bigint = 0) {
    this.key = [BigInt(seed) & MASK, BigInt(stream) & MASK];
  }

  /** float32[count], standard normal. */
  standardNormal(count: number): Float32Array {
    return Float32Array.from({ length: count }, () => this.next());
  }

  private next(): number {
    for (;;) {
      const bits = this.word();
      const layer = bits & 0xff;
      const magnitude = (bits >>> 9) & 0x7fffff;
      const x = Math.fround(magnitude * WIDTHS[layer]!) * ((bits >>> 8) & 1 ? -1 : 1);
      if (magnitude < INSIDE[layer]!) return x;
      if (layer === 0) return this.tail(((magnitude >>> 8) & 1) === 1);
      const height = Math.fround(Math.fround(Math.fround(HEIGHTS[layer - 1]! - HEIGHTS[layer]!) * this.uniform()) + HEIGHTS[layer]!);
      if (height < Math.exp(-0.5 * x * x)) return x;
    }
  }

  private tail(negative: boolean): number {
    const start = Math.fround(TAIL);
    const inverse = Math.fround(1 / TAIL);
    for (;;) {
      const beyond = Math.fround(-inverse * Math.fround(Math.log1p(-this.uniform())));
      const height = Math.fround(-Math.log1p(-this.uniform()));
      if (height + height > beyond * beyond) return Math.fround(negative ? -(start + beyond) : start + beyond);
    }
  }

  private uniform(): number {
    return (this.word() >>> 8) / 2 ** 24;
  }

  private word(): number {
    if (!this.words.length) this.refill();
    return this.words.pop()!;
  }

  private refill(): void {
    this.counter = (this.counter + 1n) & ((1n << 256n) - 1n);
    let block = [0n, 64n, 128n, 192n].map((shift) => (this.counter >> shift) & MASK);
    let [k0, k1] = this.key;
    for (let round = 0; round < ROUNDS; round++) {
      const a = MULTIPLIERS[0] * block[0]!;
      const b = MULTIPLIERS[1] * block[2]!;
      block = [(b >> 64n) ^ block[1]! ^ k0, b & MASK, (a >> 64n) ^ block[3]! ^ k1, a & MASK];
      k0 = (k0 + WEYL[0]) & MASK;
      k1 = (k1 + WEYL[1]) & MASK;
    }
    // The low half of each number comes first.
    this.words = block.flatMap((number) => [Number(number & 0xffffffffn), Number(number >> 32n)]).reverse();
  }
}

const [INSIDE, WIDTHS, HEIGHTS] = ziggurat();

/** For each layer: the share of its width inside the curve, in units of 2⁻²³; its width over 2²³; its height. */
function ziggurat(): [Uint32Array, Float32Array, Float32Array] {
  const density = (x: number) => Math.exp(-0.5 * x * x);
  const [inside, widths, heights] = [new Uint32Array(LAYERS), new Float32Array(LAYERS), new Float32Array(LAYERS)];
  const base = AREA / density(TAIL);
  inside[0] = Math.trunc((TAIL / base) * SCALE);
  widths[0] = base / SCALE;
  widths[LAYERS - 1] = TAIL / SCALE;
  heights[0] = 1;
  heights[LAYERS - 1] = density(TAIL);
  let outer = TAIL;
  for (let layer = LAYERS - 2; layer >= 1; layer--) {
    const inner = Math.sqrt(-2 * Math.log(AREA / outer + density(outer)));
    inside[layer + 1] = Math.trunc((inner / outer) * SCALE);
    widths[layer] = inner / SCALE;
    heights[layer] = density(inner);
    outer = inner;
  }
  return [inside, widths, heights];
}
