/** GGUF's key-value metadata, read by type: what a key of the wrong type holds is refused by the key's name. */
import type { GgufValue } from '../../native/index.ts';
import { InputError, shown } from '../input-error.ts';

/** Values of `tokenizer.ggml.token_type`. */
export const tokenTypes = { unknown: 2, control: 3, userDefined: 4 };

/**
 * Readers that return a key's value, or the fallback where the file lacks the key.
 * @throws InputError model_invalid when the type is another, or the key is absent and has no fallback
 */
export function metadataReader(metadata: Record<string, GgufValue>) {
  const read = <T>(key: string, expected: string, is: (value: GgufValue) => boolean, fallback?: T): T => {
    const value = Object.hasOwn(metadata, key) ? metadata[key]! : undefined;
    if (value === undefined && fallback !== undefined) return fallback;
    if (value === undefined || !is(value)) {
      throw new InputError('model_invalid', `${key}: expected ${expected}, got ${shown(value)}`);
    }
    return value as T;
  };
  const isNumber = (value: GgufValue) => typeof value === 'number' && Number.isFinite(value);
  return {
    count: (key: string, fallback?: number) =>
      read<number>(
        key,
        'a non-negative integer',
        (v) => Number.isSafeInteger(v) && (v as number) >= 0,
        fallback,
      ),
    number: (key: string, fallback?: number) => read<number>(key, 'a number', isNumber, fallback),
    text: <F extends string | null>(key: string, fallback?: F) =>
      read<string | F>(key, 'a string', (v) => typeof v === 'string', fallback),
    flag: (key: string, fallback?: boolean) =>
      read<boolean>(key, 'a bool', (v) => typeof v === 'boolean', fallback),
    strings: (key: string, fallback?: string[]) =>
      read<string[]>(
        key,
        'an array of strings',
        (v) => Array.isArray(v) && typeof (v[0] ?? '') === 'string',
        fallback,
      ),
    numbers: (key: string, fallback?: Float64Array | null) =>
      read<Float64Array>(
        key,
        'an array of numbers',
        (v) => v instanceof Float64Array,
        fallback as Float64Array,
      ),
  };
}
