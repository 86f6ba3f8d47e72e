// Small helpers for elements. Text from the catalog is only ever set as text, never as markup.

import type { Rgb } from "../model/images";

export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no element #${id}`);
  return found as T;
}

export const megabytes = (bytes: number) => (bytes / 1e6).toFixed(1);

type Attributes = Record<string, string | number | boolean | ((event: Event) => void)>;

/** An element with properties (or attributes), listeners ("onclick") and children. */
export function element<K extends keyof HTMLElementTagNameMap>(tag: K, attributes: Attributes = {}, ...children: (Node | string | null)[]): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (name in made) Object.assign(made, { [name]: value });
    else made.setAttribute(name, String(value));
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function canvasOf(image: Rgb): HTMLCanvasElement {
  const canvas = element("canvas", { width: image.width, height: image.height });
  const pixels = new ImageData(image.width, image.height);
  for (let i = 0; i < image.width * image.height; i++) {
    for (let channel = 0; channel < 3; channel++) pixels.data[4 * i + channel] = image.data[3 * i + channel]!;
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d")!.putImageData(pixels, 0, 0);
  return canvas;
}

/** An image as a PNG file. Its address is to be revoked when the image is no longer shown. */
export async function pngOf(image: Rgb): Promise<string> {
  const canvas = canvasOf(image);
  const blob = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) throw new Error("the browser cannot encode the image");
  return URL.createObjectURL(blob);
}
