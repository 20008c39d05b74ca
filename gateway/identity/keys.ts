// A bearer key as the text of a Secret's entry or of a file. It is only ever kept as its digest.

import { hash } from 'node:crypto';

/** What is known of one entry of one Secret. */
export type KeyState =
  /** Nothing yet: the Secret could not be read so far. */
  | { kind: 'unread' }
  | { kind: 'no_secret' }
  | { kind: 'no_entry' }
  /** The API server does not let the gateway read the Secret. */
  | { kind: 'forbidden' }
  /** `problem` says what is wrong with the value, and shows nothing of it. */
  | { kind: 'invalid'; problem: string }
  | { kind: 'key'; digest: string };

/** @param value  of the Secret's entry, decoded, or of the file */
export function readKey(value: Buffer | undefined): KeyState {
  if (value === undefined) return { kind: 'no_entry' };
  const key = value.toString('utf8').trim();
  const invalid = (problem: string): KeyState => ({ kind: 'invalid', problem });
  if (key.length < 16) return invalid(`expected at least 16 characters, got ${key.length}`);
  if (key.length > 512) return invalid(`expected at most 512 characters, got ${key.length}`);
  if (/\s/.test(key)) return invalid('expected no white space inside the key');
  // A header could not carry it as it is.
  if (!/^[\x21-\x7e]+$/.test(key)) return invalid('expected printable ASCII characters');
  return { kind: 'key', digest: digestOfKey(key) };
}

/** SHA-256, in hexadecimal. */
export function digestOfKey(key: string): string {
  return hash('sha256', key);
}
