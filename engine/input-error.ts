/**
 * Files that come from outside (models, tokenizers, adapters) are refused with this: a code, and a message that says
 * what was looked at, what was expected there and what was found.
 */
export type InputErrorCode = 'model_invalid' | 'tokenizer_invalid' | 'safetensors_invalid' | 'io_failed';

export class InputError extends Error {
  readonly code: InputErrorCode;

  constructor(code: InputErrorCode, message: string, options: { cause?: unknown } = {}) {
    super(message, options);
    this.name = 'InputError';
    this.code = code;
  }
}

/** A value of a file as part of a message: on one line, short, and with no control characters. */
export function shown(value: unknown): string {
  const text = value === undefined ? 'nothing' : (JSON.stringify(value) ?? String(value));
  return text.length > 120 ? `${text.slice(0, 117)}...` : text;
}

/** What a failed file operation says to the user; the cause keeps the rest. */
export function ioError(what: string, cause: unknown): InputError {
  const { code, message } = cause as NodeJS.ErrnoException;
  return new InputError('io_failed', `${what}: expected it to work, got ${code ?? message}`, { cause });
}
