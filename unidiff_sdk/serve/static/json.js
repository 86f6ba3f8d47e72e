// JSON whose integers beyond 2^53, such as ids, stay exact: they are BigInts. `JSON.parse` alone would round them.

const LARGE = /(?:^|[:,[\s])-?\d{16,}(?=[\s\]},]|$)/;
const STRING_OR_NUMBER = /"[^"\\]*(?:\\.[^"\\]*)*"|-?\d[\d.eE+-]*/g;

/** Marks strings that stand for integers. It is random, so that no other string has it. */
const newMark = () => `${Math.random().toString(36).slice(2)}:`;

const isRounded = (/** @type {string} */ token) => /^-?[1-9]\d*$/.test(token) && !Number.isSafeInteger(Number(token));

/**
 * @param {string} text
 * @returns {any}
 */
export function parseJson(text) {
  if (!LARGE.test(text)) return JSON.parse(text);
  const mark = newMark();
  const marked = text.replace(STRING_OR_NUMBER, (token) => (isRounded(token) ? `"${mark}${token}"` : token));
  return JSON.parse(marked, (_key, value) => (typeof value === "string" && value.startsWith(mark) ? BigInt(value.slice(mark.length)) : value));
}

/**
 * @param {unknown} value
 * @returns {string}
 */
export function stringifyJson(value) {
  const mark = newMark();
  const text = JSON.stringify(value, (_key, each) => (typeof each === "bigint" ? `${mark}${each}` : each));
  return text.replace(new RegExp(`"${mark}(-?\\d+)"`, "g"), "$1");
}
