// How deep a JSON text is nested, told before it is parsed: parsers and those who walk what they made recurse, here and in
// engines, and a body of brackets alone must not be what ends one.

const quote = 0x22;
const backslash = 0x5c;

/** Whether the deepest place of a JSON text lies within more than `most` arrays and objects. */
export function isNestedDeeper(text: Uint8Array, most: number): boolean {
  let depth = 0;
  for (let i = 0; i < text.length; i += 1) {
    const byte = text[i];
    if (byte === quote) {
      i = endOfString(text, i);
      if (i === -1) return false;
    } else if (byte === 0x5b || byte === 0x7b) {
      depth += 1;
      if (depth > most) return true;
    } else if (byte === 0x5d || byte === 0x7d) depth -= 1;
  }
  return false;
}

/** A string that is longer is searched by `indexOf`: a call costs more than a look at so many bytes. */
const shortBytes = 64;

/** Where the string that begins at `start` has its last quote; -1 when it has none. */
function endOfString(text: Uint8Array, start: number): number {
  const near = Math.min(text.length, start + shortBytes);
  for (let i = start + 1; i < near; i += 1) {
    if (text[i] === quote) return i;
    if (text[i] === backslash) break;
  }
  let end = text.indexOf(quote, start + 1);
  while (end !== -1) {
    let first = end;
    while (text[first - 1] === backslash) first -= 1;
    if ((end - first) % 2 === 0) return end;
    end = text.indexOf(quote, end + 1);
  }
  return -1;
}
