// An image to search by: chosen, dropped or pasted.

import { overWhite, type Rgb } from "../model/images";
import { byId, element } from "./dom";

const MAX_SIDE = 1024;

/** Call a function with each image that the visitor gives, or with a message if it cannot be read. */
export function listenForImages(onImage: (pixels: Rgb, url: string) => void, onError: (message: string) => void): void {
  const use = async (file: File | undefined) => {
    if (!file) return;
    try {
      onImage(...(await decode(file)));
    } catch {
      onError(`${file.name || "The file"} is not an image that this browser can read.`);
    }
  };
  const input = byId<HTMLInputElement>("file");
  input.addEventListener("change", () => {
    void use(input.files?.[0]);
    input.value = "";
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    void use(event.dataTransfer?.files[0]);
  });
  document.addEventListener("paste", (event) => void use([...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"))));
}

async function decode(file: Blob): Promise<[Rgb, string]> {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale))) as [number, number];
  const canvas = element("canvas", { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true })!;
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return [overWhite(context.getImageData(0, 0, width, height).data, width, height), URL.createObjectURL(file)];
}
