// Ids as the address of the page holds them.

import type { Id } from "./documents";

/** 7 and "7" are different ids, so a string that looks like an integer is quoted. */
export const idText = (id: Id): string => (typeof id === "string" && /^(?:"|-?\d+$)/u.test(id) ? JSON.stringify(id) : String(id));

/** A function that finds the position of an item by the text of its id. Links by hand need no quotes. */
export function positionsOf(ids: Id[]): (text: string) => number | undefined {
  const positions = new Map(ids.map((id, position) => [idText(id), position]));
  return (text) => positions.get(text) ?? positions.get(JSON.stringify(text));
}
