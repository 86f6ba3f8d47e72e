// RGB images to the pixel values of the image encoder, with Pillow's resampling: 8-bit, weights in fixed point.

import type { ImageInput } from "../site/documents";

export interface Rgb {
  width: number;
  height: number;
  data: Uint8Array | Uint8ClampedArray; // [height, width, 3]
}

const PRECISION = 22; // bits after the point, as in Pillow for 8-bit images
const FILTERS: Record<string, { support: number; weight: (x: number) => number }> = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: bicubic },
  lanczos: { support: 3, weight: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

function bicubic(x: number): number {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

const sinc = (x: number) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

/** float32[3, size, size], normalized. */
export function preprocess(image: Rgb, input: ImageInput): Float32Array {
  const square = input.fit === "crop" ? cropped(image, input) : padded(image, input.size);
  const { size } = input;
  const pixels = new Float32Array(3 * size * size);
  for (let channel = 0; channel < 3; channel++) {
    const mean = Math.fround(input.mean[channel]!);
    const std = Math.fround(input.std[channel]!);
    for (let i = 0; i < size * size; i++) {
      const value = Math.fround(square.data[3 * i + channel]! / 255);
      pixels[channel * size * size + i] = Math.fround(value - mean) / std;
    }
  }
  return pixels;
}

function cropped(image: Rgb, input: ImageInput): Rgb {
  const { side, squash, interpolation } = input.resize ?? { side: input.size, squash: false, interpolation: "bicubic" };
  const shorter = Math.min(image.width, image.height);
  const scaled = (edge: number) => (squash ? side : Math.trunc((side * edge) / shorter));
  const small = resize(image, scaled(image.width), scaled(image.height), interpolation);
  const left = Math.floor((small.width - input.size) / 2);
  const top = Math.floor((small.height - input.size) / 2);
  return paste(small, input.size, -left, -top, 0);
}

function padded(image: Rgb, size: number): Rgb {
  const longer = Math.max(image.width, image.height);
  const scaled = (edge: number) => Math.max(1, roundHalfEven((size * edge) / longer));
  const small = resize(image, scaled(image.width), scaled(image.height), "bicubic");
  return paste(small, size, Math.floor((size - small.width) / 2), Math.floor((size - small.height) / 2), 255);
}

function roundHalfEven(x: number): number {
  const floor = Math.floor(x);
  return x - floor === 0.5 ? floor + (floor % 2) : Math.round(x);
}

/** The image at (left, top) of a square of one gray value. */
function paste(image: Rgb, size: number, left: number, top: number, gray: number): Rgb {
  const data = new Uint8Array(3 * size * size).fill(gray);
  for (let y = Math.max(0, top); y < Math.min(size, top + image.height); y++) {
    const start = Math.max(0, left);
    const end = Math.min(size, left + image.width);
    const source = 3 * ((y - top) * image.width + start - left);
    data.set(image.data.subarray(source, source + 3 * (end - start)), 3 * (y * size + start));
  }
  return { width: size, height: size, data };
}

/** Pillow's `Image.resize` of an RGB image. (Pillow 13 resizes the height of tall images first, with other roundings.) */
export function resize(image: Rgb, width: number, height: number, interpolation: string): Rgb {
  const wide = width === image.width ? image : resample(image, width, interpolation);
  return height === wide.height ? wide : transposed(resample(transposed(wide), height, interpolation));
}

function resample(image: Rgb, width: number, interpolation: string): Rgb {
  const data = new Uint8Array(3 * width * image.height);
  weightsFor(image.width, width, interpolation).forEach(({ first, weights }, x) => {
    for (let y = 0; y < image.height; y++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 2 ** (PRECISION - 1);
        for (let k = 0; k < weights.length; k++) sum += image.data[3 * (y * image.width + first + k) + channel]! * weights[k]!;
        data[3 * (y * width + x) + channel] = Math.min(255, Math.max(0, Math.floor(sum / 2 ** PRECISION)));
      }
    }
  });
  return { width, height: image.height, data };
}

function weightsFor(from: number, to: number, interpolation: string): { first: number; weights: number[] }[] {
  const filter = FILTERS[interpolation];
  if (!filter) throw new Error(`the interpolation ${interpolation} is not supported in the browser`);
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: to }, (_, x) => {
    const center = (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - filter.support * stretch + 0.5));
    const end = Math.min(from, Math.trunc(center + filter.support * stretch + 0.5));
    const plain = Array.from({ length: end - first }, (_, k) => filter.weight((k + first - center + 0.5) * (1 / stretch)));
    const total = plain.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: plain.map((weight) => roundAway((weight / total) * 2 ** PRECISION)) };
  });
}

const roundAway = (x: number) => Math.trunc(x < 0 ? x - 0.5 : x + 0.5);

function transposed(image: Rgb): Rgb {
  const { width, height } = image;
  const data = new Uint8Array(image.data.length);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      for (let channel = 0; channel < 3; channel++) data[3 * (x * height + y) + channel] = image.data[3 * (y * width + x) + channel]!;
    }
  }
  return { width: height, height: width, data };
}

/** RGBA over white, as Python composites transparent images. */
export function overWhite(rgba: Uint8ClampedArray, width: number, height: number): Rgb {
  const data = new Uint8Array(3 * width * height);
  for (let i = 0; i < width * height; i++) {
    const alpha = rgba[4 * i + 3]!;
    for (let channel = 0; channel < 3; channel++) {
      data[3 * i + channel] = Math.round((rgba[4 * i + channel]! * alpha + 255 * (255 - alpha)) / 255);
    }
  }
  return { width, height, data };
}
